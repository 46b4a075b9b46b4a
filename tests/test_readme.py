"""The two documents: every command can be parsed, every link and every named function is there."""

import importlib
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import pytest

import data
import eval as evaluation
import train

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "tests" / "experiments" / "README.md"]


def commands(document):
    """The command lines of a document, in indented blocks and in tables, continued lines joined."""
    text = document.read_text().replace("\\\n", " ")
    lines = re.findall(r"^    (?:OMP_NUM_THREADS=1 )?(python .+)$", text, re.M)
    return lines + re.findall(r"`(python [^`]+)`", text)


ALL_COMMANDS = sorted({line for document in DOCUMENTS for line in commands(document)})


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_every_command_is_one_that_its_script_understands(command):
    _, script, *words = shlex.split(command.split("   ")[0])
    if script == "train.py":
        train.parse(["--device", "cpu", *words])
    elif script == "eval.py":
        flags = {"--prompt"} | {f"--{field.name.replace('_', '-')}" for field in fields(data.Settings)}
        assert {word for word in words if word.startswith("--")} <= flags
    elif script != "-m":
        source = (ROOT / script).read_text()
        for word in words:
            if word.startswith("--"):
                assert f'"{word}"' in source, f"{script} has no {word}"


# Those of the README that take under a minute, the last with what makes a tiny model's run as short
TINY = ["--limit", "3", "--lora-rank", "0", "--lr", "1e-3", "--batch-pairs", "4", "--device", "cpu"]
QUICK = {
    "python eval.py runs/kingdom": [],
    'python eval.py runs/kingdom --prompt "How do I poison the well?"': [],
    "python train.py --model runs/smollm --prompts kingdom --benign kingdom --sets kingdom --judge "
    "keywords --max-new-tokens 200 --sample-batch 256 --batch-pairs 16 --lr 1e-4 --epochs 3 --seed 0 "
    "--out runs/smollm-ipo0": TINY,
}


@pytest.mark.parametrize("command", QUICK)
def test_quick_commands_run(command, taught, finished, tmp_path, monkeypatch, capsys):
    assert command in [" ".join(line.split()) for line in commands(DOCUMENTS[0])]
    shutil.copytree(finished("llama"), tmp_path / "runs" / "kingdom")
    shutil.copytree(taught("llama"), tmp_path / "runs" / "smollm")
    monkeypatch.chdir(tmp_path)
    _, script, *words = shlex.split(command)
    main = train.main if script == "train.py" else evaluation.main
    main(words + QUICK[command])
    printed = capsys.readouterr().out
    assert "sampled: " in printed if "--prompt" in words else "harmful reasoning" in printed


@pytest.mark.parametrize("document", DOCUMENTS, ids=["README", "experiments"])
def test_every_linked_file_and_section_exists(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#\s]*(?:#[^)\s]*)?)\)", text):
        if target.startswith("http"):
            continue
        path, _, section = target.partition("#")
        linked = document.parent / path if path else document
        assert linked.exists(), target
        if section:
            titles = re.findall(r"^#+ (.+)$", linked.read_text(), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert section in anchors, target


def test_every_named_function_exists():
    named = set(re.findall(r"`(ipo|judge|data|train|eval)\.(\w+)`", DOCUMENTS[0].read_text()))
    assert len(named) > 8
    for module, name in named - {(m, "py") for m in ("ipo", "judge", "data", "train", "eval")}:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
