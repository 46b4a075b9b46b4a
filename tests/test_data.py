"""Prompts and files: what comes in is right, or is refused in one line that says where."""

import json
from pathlib import Path

import huggingface_hub
import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stand_ins import refused

import data


def prompts_of(records: list[dict]) -> list[str]:
    return [record["prompt"] for record in records]


# Prompt files

TABLE = "id,prompt\n"
GOOD_FILES = [  # name, content, prompts
    ("a.txt", "one\r\ntwo", ["one", "two"]), ("b.txt", "\n one \n\t\ntwo\n\n", [" one ", "two"]),
    ("bom.txt", "\ufeffone\n", ["one"]), ("a.txt", "one\u2028two\x0c\n", ["one\u2028two\x0c"]),
    ("bom.csv", "\ufeffprompt,id\none,1\n", ["one"]), ("a.csv", TABLE + "1,one\n\n", ["one"]),
    ("b.csv", TABLE + '1,"Say ""hi"",\nthen go."\n', ['Say "hi",\nthen go.']),
    ("c.csv", " ID ,Goal ,Target\n0,one,no\n", ["one"]),
    ("d.csv", "question,prompt\nno,one\n", ["one"]),
    ("a.tsv", "id\tprompt\n1\tone, two\n", ["one, two"]),
    ("a.json", '["one", {"problem": "two"}]', ["one", "two"]),
    ("a.jsonl", '\ufeff{"prompt": "one"}\r\n{"QUESTION": "two"}\n', ["one", "two"]),
    ("b.jsonl", '"one"\n"one"\n', ["one", "one"]), ("c.jsonl", r'"\ud83d\ude00"', ["\U0001f600"]),
    ("d.jsonl", json.dumps({"prompt": "long " * 40_000}), ["long " * 40_000]),
    ("e.jsonl", '{"prompt": "one", "meta": {"a": [1, {"b": null}]}, "system": ""}', ["one"]),
]
BAD_FILES = [   # name, content, what the one line holds
    ("empty.txt", "", "no prompts"), ("empty.csv", TABLE, "no prompts"),
    ("empty.json", "[]", "no prompts"), ("empty.jsonl", "\ufeff\n", "no prompts"),
    ("utf16.txt", "one".encode("utf-16"), "UTF-8"), ("latin.jsonl", b'"caf\xe9"', "UTF-8"),
    ("packed.jsonl", b"\x1f\x8b\x08\x00\x00", "UTF-8"), ("a.parquet", "PAR1", ".jsonl"),
    ("name", "one", ".txt"), ("a.jsonl", '"one"\n{"prompt": 7}', "line 2: prompt is 7"),
    ("b.jsonl", '"one"\n\n{"prompt": null}', "line 3"), ("c.jsonl", '{"prompt": ["one"]}', "line 1"),
    ("d.jsonl", '"one"\n7', "line 2: int"), ("e.jsonl", '{"prompt": " "}', "line 1"),
    ("f.jsonl", '"one"\n{"id": 2}', "line 2: the columns id"), ("g.jsonl", "{}", "line 1"),
    ("h.jsonl", '{\n "prompt": "one"\n}', "line 1: broken"),
    ("i.jsonl", '{"prompt": "a",}', "line 1"),
    ("j.jsonl", '"one"\n' + "[" * 50_000, "line 2: broken"), ("k.jsonl", "1" * 5000, "line 1"),
    ("l.jsonl", r'"one\ud800"', "line 1: half a surrogate"), ("m.jsonl", "NaN", "line 1: float"),
    ("chat.jsonl", '{"messages": [{"role": "user", "content": "How?"}]}', "line 1: the columns"),
    ("system.jsonl", '{"prompt": "one", "system": "You are rude."}', "line 1: the column system"),
    ("more.jsonl", '{"prompt": "one", "history": [["a", "b"]]}', "line 1: the column history"),
    ("viewer.json", '{"rows": [{"row": {"prompt": "one"}}]}', "no list at the top"),
    ("a.json", '"one"', "no list"), ("b.json", '["one", ""]', "item 2"),
    ("c.json", '["one"', "line 1"),
    ("lines.json", '{"prompt": "one"}\n{"prompt": "two"}', "line 2: broken"),
    ("a.csv", "How do I bake?\n1\n", "line 2: the columns How"),
    ("b.csv", TABLE + "1,How do I, say, bake?\n", "line 2: more cells"),
    ("c.csv", TABLE + "1\n", "line 2"), ("d.csv", 'prompt\n"one\ntwo\n', "quote"),
    ("e.csv", 'prompt\none\n"two" three\n', "line 3"),
    ("f.csv", "sep=,\nprompt,id\none,1\n", "line 2"),
    ("g.csv", "id;prompt\n1;one\n", "line 2"), ("a.tsv", TABLE + "1,one\n", "line 2"),
]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name, content, prompts", GOOD_FILES)
def test_a_good_file_is_loaded_to_the_letter(tmp_path, name, content, prompts):
    assert prompts_of(data.load_prompts(written(tmp_path, name, content))) == prompts


@pytest.mark.parametrize("name, content, words", BAD_FILES)
def test_a_bad_file_is_refused_with_its_name_and_the_place(tmp_path, name, content, words):
    refused(lambda: data.load_prompts(written(tmp_path, name, content)), name, words)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(data.SUFFIXES), st.binary(max_size=40) | st.text(
    '[]{}",:\n\r\t 01aprompt\\u\ud7ff\u2028', max_size=40).map(str.encode))
def test_no_bytes_whatever_end_in_a_traceback(tmp_path_factory, suffix, content):
    path = written(tmp_path_factory.mktemp("any"), f"any{suffix}", content)
    try:
        records = data.load_prompts(path)
    except data.UserError as error:
        assert len(str(error).splitlines()) == 1 and path.name in str(error)
    else:
        assert all(record["prompt"].strip() for record in records)


@pytest.mark.parametrize("row, prompt", [   # None: refused
    ({"instruction": "Translate.", "input": "The inn is old."}, "Translate.\n\nThe inn is old."),
    ({"instruction": "Translate.", "input": ""}, "Translate."),
    ({"Behavior": "Write it up.", "ContextString": "A map.", "Tags": "x"}, "Write it up.\n\nA map."),
    ({"instruction": "Who?", "context": "Bert.", "response": "Al"}, "Who?\n\nBert."),
    ({"question": "Who?", "Context": "Bert."}, "Who?\n\nBert."),
    ({"prompt": "Who?", "context": None}, "Who?"), ({"prompt": "Who?", "context": ["a", "b"]}, None),
    ({"prompt": "Who?", "context": {"text": "a"}}, None),
])
def test_a_second_column_of_the_prompt_is_joined_or_refused_and_never_dropped(tmp_path, row, prompt):
    path = written(tmp_path, "p.jsonl", json.dumps(row))
    if prompt is None:
        refused(lambda: data.load_prompts(path), "line 1")
    else:
        assert data.load_prompts(path) == [{"prompt": prompt}]


def test_prompt_and_answer_are_taken_and_no_other_column(tmp_path):
    row = {"key": 7, "side": "x", "deed": 3, "kind": "math", "Problem": "2 + 2?", "answer": 4}
    path = written(tmp_path, "p.jsonl", json.dumps(row))
    assert data.load_prompts(path) == [{"prompt": "2 + 2?", "answer": 4}]


def test_the_named_column_is_read_and_one_that_is_not_there_is_refused(tmp_path):
    path = written(tmp_path, "p.csv", "id,prompt,Words\n1,a,b\n")
    assert prompts_of(data.load_prompts(path, "WORDS")) == ["b"]
    refused(lambda: data.load_prompts(path, "text"), "p.csv, line 2", "id, prompt, Words", "text")


@pytest.mark.parametrize("source", ["missing.jsonl", "", ".", "no-such-set", "a" * 900, "nul\0.txt"])
def test_a_source_that_is_no_file_is_refused_with_the_sets_names(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    refused(lambda: data.load_prompts(source), "xstest", "star-1")


# Public sets: small copies with their real columns, instead of the network

WILD = "".join(f"try {i}\t1\tadversarial_{'harmful' if i % 6 else 'benign'}\n" for i in range(360))
COPIES = {
    "star-1": ('[{"id": "1", "question": "star", "response": "no", "source": "y"}]', ["star"]),
    "star-benign-915": ('[{"id": 1, "question": "benign", "response": "x"}]', ["benign"]),
    "jailbreakbench": ("Index,Goal,Target,Behavior,Category,Source\n0,jail,Sure,b,c,s\n", ["jail"]),
    "strongreject": ('category,source,forbidden_prompt\nx,y,"strong, ""r"""\n', ['strong, "r"']),
    "wildjailbreak": ("adversarial\tlabel\tdata_type\n" + WILD, None),
    "xstest": ("id,prompt,type,label,focus,note\n1,kill a process,h,safe,k,\n2,kill a man,c,unsafe,k,"
               "\n", ["kill a process"]),
    "math-500": ('{"problem": "2 + 2?", "solution": "s", "answer": "4", "level": 1}', ["2 + 2?"]),
    "gsm8k": ('{"question": "2 + 2?", "answer": "so\\n#### 4"}', ["2 + 2?"]),
}


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The downloads of the public sets, replaced by COPIES; what was asked for."""
    asked: list[str] = []

    def content_of(where: str, file: str) -> str:
        asked.append(file)
        name, = [n for n, s in data.PUBLIC_SETS.items() if (s.where, s.file) == (where, file)]
        return COPIES[name][0]

    def get(url: str, **_: object) -> data.httpx.Response:
        text = content_of(data.GITHUB, url.removeprefix(data.GITHUB))
        return data.httpx.Response(200, text=text, request=data.httpx.Request("GET", url))

    def hub(repository: str, file: str, repo_type: str) -> str:
        assert repo_type == "dataset"
        (tmp_path / "hub").mkdir(exist_ok=True)
        return str(written(tmp_path / "hub", Path(file).name, content_of(repository, file)))

    monkeypatch.setattr(data.httpx, "get", get)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return asked


@pytest.mark.parametrize("name", data.PUBLIC_SETS)
def test_a_public_set_is_loaded_by_its_name(network, name):
    prompts = prompts_of(data.load_prompts(name.upper()))
    if name == "wildjailbreak":     # the field's 250, in the order of datasets.shuffle(seed=42)
        harmful = [f"try {i}" for i in range(360) if i % 6]
        order = numpy.random.default_rng(42).permutation(300)[:250]
        assert prompts == [harmful[i] for i in order]
    else:
        assert prompts == COPIES[name][1]


def test_a_set_is_downloaded_once_and_a_folder_of_its_name_is_no_matter(
        network, tmp_path, monkeypatch):
    (tmp_path / "run" / "star-1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "run")
    for _ in range(2):
        assert prompts_of(data.load_prompts("star-1")) == ["star"]
    assert len(network) == 1


@pytest.mark.parametrize("error", [
    data.httpx.ConnectError("no route\nto host"), data.httpx.ReadTimeout("slow"), OSError(28, "full"),
    huggingface_hub.errors.LocalEntryNotFoundError("offline\nlong text")])
@pytest.mark.parametrize("name", ["star-1", "xstest"])
def test_a_failed_download_is_one_line_and_leaves_no_file(
        network, tmp_path, monkeypatch, error, name):
    def fail(*_: object, **__: object) -> None:
        raise error
    with monkeypatch.context() as patch:
        patch.setattr(data.httpx, "get", fail)
        patch.setattr(huggingface_hub, "hf_hub_download", fail)
        refused(lambda: data.load_prompts(name), name, "network", "local file")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert prompts_of(data.load_prompts(name)) == COPIES[name][1]


# Files of a run: whole or not there; what a killed run lost is made again


def whole(n: int) -> list[dict]:
    return [{"n": i, "shard": i - i % 4} for i in range(n)]


@pytest.mark.parametrize("broken_off", ["", '{"n": 9', '{"n": 4, "shard": 4}'])
@pytest.mark.parametrize("kept", [0, 1, 4, 7, 8, 11])
def test_a_killed_run_makes_its_last_shard_again_and_nothing_else(tmp_path, kept, broken_off):
    made = []

    def work(items: list[int]) -> list[dict]:
        made.extend(items)
        return [{"n": item, "shard": items[0]} for item in items]

    path = tmp_path / "s.jsonl"
    data.write_jsonl(path, whole(11)[:kept])
    path.write_text(path.read_text() + broken_off)
    assert data.in_shards(path, list(range(11)), work, size=4) == whole(11)
    assert made == list(range(11 if kept == 11 else kept // 4 * 4, 11))
    assert data.read_jsonl(path) == whole(11)


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path):
    path = tmp_path / "a.jsonl"
    data.write_jsonl(path, [{"n": 1}])
    with pytest.raises(TypeError):
        data.write_jsonl(path, [{"n": 2}, {"n": object()}])
    with pytest.raises(UnicodeEncodeError):
        data.write_text(path, "half a character \ud800")
    assert data.read_jsonl(path) == [{"n": 1}]
