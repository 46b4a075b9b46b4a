"""Models: a prompt is rendered so that the model thinks, and a model works or is refused in one
line, here and on a server."""

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as T
from conftest import tiny_model
from stand_ins import OPENINGS, PARTS_TEMPLATES, byte_tokenizer, qwen, r1, refused, serve
from tokenizers import normalizers

import data
import ipo
import judge

# Rendering: the prompt ends with the think opening, once, and holds one BOS where there is one

QWEN_SHAPE = "<|im_start|>user\nPROMPT<|im_end|>\n<|im_start|>assistant\n<think>"
R1_SHAPE = "<｜begin▁of▁sentence｜><｜User｜>PROMPT<｜Assistant｜><think>"
# "think" and "n" also stand in what the templates put behind the prompt
PROMPTS = ["How do I bake a pie?", "think", "n", " two lines,\nand spaces ", "{{ 7 * 7 }} é 日本"]


@pytest.mark.parametrize("opening", [name for name in OPENINGS if name != "closed"])
@pytest.mark.parametrize("family, shape", [(qwen, QWEN_SHAPE), (r1, R1_SHAPE)])
def test_a_rendered_prompt_ends_with_one_think_opening(family, shape, opening):
    tokenizer = family(opening)
    for prompt in PROMPTS:
        ids = data.render(tokenizer, prompt)
        assert tokenizer.decode(ids).rstrip("\n") == shape.replace("PROMPT", prompt)
        assert [ids.count(token) for token in data.think_ids(tokenizer)] == [1, 0]


def test_a_template_that_closes_the_think_is_refused_whatever_the_prompt():
    for prompt in PROMPTS:
        refused(lambda: data.render(qwen("closed"), prompt), "enable_thinking")


def test_a_template_that_tells_of_think_tags_before_the_prompt_is_opened_all_the_same():
    tokenizer = qwen()
    tokenizer.chat_template = "Think in <think> and </think>.\n" + tokenizer.chat_template
    assert tokenizer.decode(data.render(tokenizer, "Hm?")).endswith("assistant\n<think>\n")


@pytest.mark.parametrize("template", PARTS_TEMPLATES.values(), ids=PARTS_TEMPLATES)
def test_a_template_that_reads_a_turn_in_parts_is_shown_the_text(template):
    tokenizer = byte_tokenizer(template)
    assert "How do I bake?" in tokenizer.decode(data.render(tokenizer, "How do I bake?"))


@pytest.mark.parametrize("template", [
    None, "", "No text at all", "{% for m in messages %}{{ m['role'] }}{% endfor %}", "{% if",
    "{{ messages[0]['content'][:3] + '' }}", "{{ raise_exception('no') }}",
    "{{ messages[7]['content'] }}", {"a": "{{ messages }}", "b": "{{ messages }}"}])
def test_a_template_that_does_not_show_the_prompt_is_refused(template):
    tokenizer = byte_tokenizer("")
    tokenizer.chat_template = template
    refused(lambda: data.render(tokenizer, "How do I bake?"), "template")


@pytest.mark.parametrize("tokenizer, control", [
    (qwen(), "<|im_end|>"), (qwen(), "<|im_start|>"), (qwen(), "</think>"), (r1("open"), "<think>"),
    (r1("open"), "<｜end▁of▁sentence｜>"), (r1("open"), "<｜User｜>")])
def test_a_users_text_never_becomes_a_control_token(tokenizer, control):
    refused(lambda: data.render(tokenizer, f"Bake {control} a pie"), control)


def test_think_tokens_that_are_special_work_too():
    tokenizer = qwen("open", think_is_special=True)
    assert data.render(tokenizer, "How?")[-2] == data.think_ids(tokenizer)[0]


def test_a_tokenizer_without_single_think_tokens_is_refused():
    for think in ((), ("<think>",), ("[THINK]", "[/THINK]")):
        refused(lambda: data.think_ids(qwen(think=think)), "<think>", "reasoning model")


@pytest.mark.parametrize("of_config, all_of_them", [
    (None, [256]), (256, [256]), (257, [256, 257]), ([257, 9], [9, 256, 257]),
    ([256, 257], [256, 257])])
def test_the_eos_ids_are_those_of_the_generation_config_and_the_tokenizer(of_config, all_of_them):
    tokenizer = qwen()      # its own is 256
    assert data.eos_ids(T.GenerationConfig(eos_token_id=of_config), tokenizer) == all_of_them


# Models: they work, or are refused in one line

TINY = dict(
    vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=256,
    pad_token_id=256, max_position_embeddings=2048)
LINEAR = dict(
    head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
    linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"])
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
              image_size=28, patch_size=14)


def gemma3() -> T.PreTrainedModel:
    text = T.Gemma3TextConfig(head_dim=8, query_pre_attn_scalar=8, **TINY)
    return T.Gemma3ForConditionalGeneration(T.Gemma3Config(text_config=text, vision_config=VISION))


GOOD_FAMILIES = {
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**TINY)),
    "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**TINY)),
    "qwen2, windows": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(
        use_sliding_window=True, sliding_window=8, max_window_layers=1, **TINY)),
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(head_dim=8, **TINY)),
    "mistral, windows": lambda: T.MistralForCausalLM(T.MistralConfig(sliding_window=8, **TINY)),
}
BAD_FAMILIES = {    # scaled logits, nested configs, other caches, ropes that see the whole batch
    "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(head_dim=8, **TINY)),
    "gemma3": gemma3,
    "granite": lambda: T.GraniteForCausalLM(T.GraniteConfig(logits_scaling=8.0, **TINY)),
    "cohere": lambda: T.CohereForCausalLM(T.CohereConfig(**TINY)),
    "qwen3.5": lambda: T.Qwen3_5ForCausalLM(T.Qwen3_5TextConfig(**TINY, **LINEAR)),
    "mamba": lambda: T.MambaForCausalLM(T.MambaConfig(
        vocab_size=261, hidden_size=32, num_hidden_layers=2, eos_token_id=256, pad_token_id=256)),
    "phi3, longrope": lambda: T.Phi3ForCausalLM(T.Phi3Config(
        original_max_position_embeddings=32, rope_parameters=LONGROPE, **TINY)),
    "llama, dynamic": lambda: T.LlamaForCausalLM(T.LlamaConfig(rope_parameters=DYNAMIC, **TINY)),
}


def saved(folder: Path, make_model: Callable, tokenizer: object = None) -> Path:
    """A model with weights far from zero, so that mistakes show, saved with its tokenizer."""
    torch.manual_seed(0)
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    (tokenizer or qwen()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", GOOD_FAMILIES)
def test_a_known_family_is_loaded_and_samples_the_same_alone_and_in_a_batch(tmp_path, family):
    loaded = data.load_model(saved(tmp_path / "m", GOOD_FAMILIES[family]), "cpu")
    assert loaded.think_end == loaded.tokenizer.convert_tokens_to_ids("</think>")
    prompts = [loaded.tokenizer.encode(text) for text in ("Why", "How do I bake a pie?", "Then?")]
    options = dict(max_new_tokens=12, eos_ids=list(range(0, 250, 9)), temperature=0)
    together = ipo.sample(loaded.model, prompts, **options)
    alone = [ipo.sample(loaded.model, [prompt], **options)[0] for prompt in prompts]
    assert together == alone


@pytest.mark.parametrize("family", BAD_FAMILIES)
def test_a_family_that_cannot_work_is_refused_in_one_line(tmp_path, family):
    folder = saved(tmp_path / "m", BAD_FAMILIES[family])
    refused(lambda: data.load_model(folder, "cpu"), str(folder), "Llama, Qwen or Mistral")


def test_a_judge_that_cannot_be_sampled_here_is_refused_in_one_line_too(tmp_path):
    folder = saved(tmp_path / "m", BAD_FAMILIES["qwen3.5"])
    refused(lambda: data.load_model(folder, "cpu", must_think=False), str(folder))


def cut(name: str, size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def configured(**values: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))
    return change


BROKEN = {
    "no folder": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tok*")],
    "half the config": cut("config.json", 100),
    "half the weights": cut("model.safetensors", 4000),
    "no bytes of weights": cut("model.safetensors", 0),
    "half the tokenizer": cut("tokenizer.json", 4000),
    "weights that lack a layer": configured(num_hidden_layers=3),
    "weights of another shape": configured(intermediate_size=64),
    "an unknown family": configured(model_type="no-such-family"),
}


@pytest.mark.parametrize("harm", BROKEN.values(), ids=BROKEN)
def test_a_folder_that_is_no_whole_model_is_refused_in_one_line(tmp_path, harm):
    folder = saved(tmp_path / "m", GOOD_FAMILIES["llama"])
    harm(folder)
    refused(lambda: data.load_model(folder, "cpu"), str(folder))


def test_a_tokenizer_whose_cuts_cannot_be_worked_out_is_refused(tmp_path):
    lower = qwen()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    folder = saved(tmp_path / "m", GOOD_FAMILIES["llama"], lower)
    refused(lambda: data.load_model(folder, "cpu"), str(folder), "tokenizer")


def test_a_tokenizer_without_an_eos_is_refused(tmp_path):
    endless = qwen()
    endless.eos_token = None
    folder = saved(tmp_path / "m", GOOD_FAMILIES["llama"], endless)
    refused(lambda: data.load_model(folder, "cpu"), str(folder), "eos_token")


def test_a_prompt_that_fills_the_models_context_is_refused():
    model = ipo.ReasoningModel(tiny_model(), qwen(), 260, [256])
    refused(lambda: data.render_all([{"prompt": "so " * 200}], model), "context", "512")


def test_a_device_that_is_not_there_and_a_number_below_one_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(lambda: data.check_settings(data.Settings(device="cuda")), "--device", "cpu")
    refused(lambda: data.check_settings(data.Settings(limit=0)), "--limit 0")
    refused(lambda: data.check_settings(data.Settings(max_new_tokens=-1)), "--max-new-tokens")


def test_a_model_saved_again_is_another_and_an_evaluation_beside_it_is_not(tmp_path):
    folder = saved(tmp_path / "m", GOOD_FAMILIES["llama"])
    before = data.model_state(folder)
    (folder / "eval_model_1234.jsonl").write_text("")
    assert data.model_state(folder) == before
    shutil.copyfile(folder / "model.safetensors", tmp_path / "copy")
    shutil.copyfile(tmp_path / "copy", folder / "model.safetensors")
    assert data.model_state(folder) != before


# A served model: exact ids in and out, and it is the same model


def completions(model: ipo.ReasoningModel, change: Callable = dict) -> Callable:
    """What vLLM answers: the model's own continuation, with the ids of prompt and answer."""
    def answer(body: dict, number: int) -> tuple[int, object]:
        output_ids, = ipo.sample(
            model.model, [body["prompt"]], max_new_tokens=body["max_tokens"],
            eos_ids=body["stop_token_ids"], temperature=body["temperature"])
        choice = {"text": model.tokenizer.decode(output_ids, skip_special_tokens=True),
                  "token_ids": output_ids, "prompt_token_ids": body["prompt"]}
        if body.get("logprobs") is not None:
            with torch.no_grad():
                ids = torch.tensor([body["prompt"] + output_ids])
                logps = model.model(ids).logits[0, len(body["prompt"]) - 1:-1].log_softmax(-1)
            picked = logps.gather(-1, torch.tensor(output_ids)[:, None])[:, 0]
            choice["logprobs"] = {"token_logprobs": picked.tolist()}
        return 200, {"choices": [change(choice)]}
    return answer


@pytest.fixture(scope="module")
def local() -> ipo.ReasoningModel:
    return ipo.ReasoningModel(tiny_model(vocab_size=261), qwen(), 260, [256])


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were slept, without sleeping them."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


def test_a_served_model_gives_the_ids_of_the_model_itself(local):
    prompts = [local.tokenizer.encode(text) for text in ("How?", "Why not?", "And then?")]
    with serve(completions(local)) as server:
        data.check_served(server.url, local, "How?")
        sampler = data.served_sampler(server.url, local, max_new_tokens=9, temperature=0)
        outputs = sampler(prompts, ["a", "b", "c"])
    assert outputs == ipo.sample(
        local.model, prompts, max_new_tokens=9, eos_ids=[256], temperature=0)
    assert server.bodies()[0]["model"] == "m" and "seed" not in server.bodies()[0]


def test_another_model_behind_the_address_is_refused(local):
    other = ipo.ReasoningModel(tiny_model(vocab_size=261, seed=1), local.tokenizer, 260, [256])
    with serve(completions(other), "other") as server:
        refused(lambda: data.check_served(server.url, local, "How?"), server.url, "other")
    no_weights = ipo.ReasoningModel(None, local.tokenizer, 260, [256])
    with serve(completions(local, lambda choice: {**choice, "text": "Ahoy"})) as server:
        refused(lambda: data.check_served(server.url, no_weights, "How?"), server.url)


WRONG_CHOICES = {
    "no ids": lambda choice: {"text": choice["text"]},
    "ids are null": lambda choice: {**choice, "token_ids": None},
    "no answer": lambda choice: {**choice, "token_ids": []},
    "another prompt": lambda choice: {**choice, "prompt_token_ids": [1, *choice["prompt_token_ids"]]},
    "too many ids": lambda choice: {**choice, "token_ids": [5] * 10},
}


@pytest.mark.parametrize("change", WRONG_CHOICES.values(), ids=WRONG_CHOICES)
def test_a_server_that_does_not_give_exact_ids_back_is_refused(local, change):
    with serve(completions(local, change)) as server:
        sampler = data.served_sampler(server.url, local, max_new_tokens=9, temperature=0)
        refused(lambda: sampler([[5, 6]], ["a"]), server.url, "vLLM")


def test_a_server_that_turns_a_prompt_down_ends_the_run_with_its_words(local):
    with serve(lambda body, number: (400, "too long by 7 tokens")) as server:
        sampler = data.served_sampler(server.url, local, max_new_tokens=9, temperature=0)
        refused(lambda: sampler([[5, 6]], ["a"]), "too long by 7 tokens")


def test_a_server_without_models_or_none_at_all_is_refused(local, no_waiting):
    with serve(completions(local), None) as server:
        refused(lambda: data.check_served(server.url, local, "How?"), server.url, "models")
    refused(lambda: data.check_served(server.url, local, "How?"), server.url)    # it is gone now
    for url in ("", "my-server", "localhost:1/v1", "http://", "http://127.0.0.1:port/v1"):
        refused(lambda: data.check_served(url, local, "How?"), "http://host:port/v1")


# Real tokenizers: IPO_TOKENIZERS names a folder with one in each of its sub-folders

REAL = sorted(Path(os.environ["IPO_TOKENIZERS"]).iterdir()) if "IPO_TOKENIZERS" in os.environ else []


@pytest.mark.skipif(not REAL, reason="IPO_TOKENIZERS names no folder with tokenizers")
@pytest.mark.parametrize("folder", REAL, ids=[folder.name for folder in REAL])
def test_a_real_tokenizer_renders_cuts_and_takes_triggers_as_the_stand_ins_do(folder):
    tokenizer = data.load_tokenizer(folder)
    data.check_tokenizer(folder, tokenizer)
    think, think_end = data.think_ids(tokenizer)
    for prompt in PROMPTS:
        ids = data.render(tokenizer, prompt)
        assert ids.count(think) == 1 and think_end not in ids and think in ids[-2:]
        assert ids[:2] != [tokenizer.bos_token_id] * 2      # SmolLM2's begins each turn
    for reasoning in real_reasonings():
        ids = tokenizer.encode(reasoning, add_special_tokens=False)
        assert ipo.decode(tokenizer, ids) == reasoning
        for start, _ in judge.split_sentences(reasoning)[1:6]:
            h = ipo.token_index(tokenizer, ids, start)
            prefix = ipo.decode(tokenizer, ids[:h])
            # The whole sentence goes, but for a token that it shares with the one before.
            assert len(prefix.rstrip("\ufffd")) >= start - 1
            assert reasoning[start:].lstrip().startswith(ipo.decode(tokenizer, ids[h:]).lstrip()[:9])
            trigger_ids = ipo.encode_trigger(tokenizer, ipo.TRIGGERS[0], ids[h:])
            joined = ipo.decode(tokenizer, ids[:h] + trigger_ids)
            assert re.search(r"\s" + re.escape(ipo.TRIGGERS[0]) + "$", joined), joined[-90:]


def real_reasonings() -> list[str]:
    """Reasonings of a real model where IPO_SETS names a folder with them, else a few lines."""
    path = Path(os.environ.get("IPO_SETS", ".")) / "star1_reasoning.jsonl"
    if not path.exists():
        return ["They ask about the inn.\n\nFirst, look at the lock. Then (maybe) \"go\".\n1. Wait."]
    return [row["reasoning"] for row in data.read_jsonl(path)]
