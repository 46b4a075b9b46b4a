"""python train.py whole, on small models of three families that were taught a few traces."""

import errno
import json
import math
import random
import shutil
from contextlib import contextmanager
from functools import partial

import pytest
import safetensors.torch
import torch
from conftest import (
    ADAPTERS, BENIGN, HARMFUL, encode, flags, plain_logp, random_ids, tiny_model)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import data
import eval as evaluation
import ipo
import train
from ipo import PreferencePair, ReasoningModel

@pytest.fixture(params=[[], ADAPTERS], ids=["all weights", "adapters"])
def run(request, family, finished):
    return finished(family, *request.param)


def error_of(argv, capsys):
    """The one line that a command ends with, at status 2."""
    with pytest.raises(SystemExit) as ended:
        train.main(argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2 and len(lines) == 1
    return lines[0]


# The whole path


def test_every_pair_is_its_traces_ids_cut_at_the_cue_with_a_trigger_in_its_place(run):
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    traces = {trace["key"]: trace for trace in data.read_jsonl(run / "traces.jsonl")}
    pairs = data.read_jsonl(run / "pairs.jsonl")
    assert pairs
    for pair in pairs:
        trace = traces[pair["key"]]
        assert pair["prefix_ids"] == trace["prompt_ids"] + trace["output_ids"][:pair["h"]]
        assert pair["rejected_ids"] == trace["output_ids"][pair["h"]:]
        assert pair["rejected"].startswith(" Let me lay out a plan.")
        assert pair["chosen"].startswith(" " + pair["trigger"])
        assert tokenizer.decode(pair["chosen_ids"]) == pair["chosen"]
        if pair["exact_text"]:
            again = encode(tokenizer, pair["prompt"] + pair["chosen"])
            assert again == pair["prefix_ids"] + pair["chosen_ids"]


def test_the_log_starts_at_log_2_and_its_loss_is_the_sum_of_its_parts(run):
    rows = data.read_jsonl(run / "log.jsonl")
    stage_1 = [row for row in rows if row["stage"] == 1]
    assert stage_1[0]["dpo"] == pytest.approx(math.log(2), abs=1e-5)
    for row in stage_1:
        assert row["loss"] == pytest.approx(row["dpo"] + 0.2 * row["sft"], abs=1e-5)
    assert stage_1[-1]["dpo"] < stage_1[0]["dpo"] and stage_1[-1]["margin"] > 0
    assert {row["stage"] for row in rows} == {1, 2}


def test_what_was_saved_is_what_was_evaluated(run, taught, family):
    """The folder loads in transformers as it is; it samples the traces that the run judged."""
    model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    settings = json.loads((run / "config.json").read_text())["settings"]
    rows = [row for row in data.read_jsonl(run / "eval_traces.jsonl") if row["side"] == "after"]
    again = ipo.sample(
        model, [row["prompt_ids"] for row in rows], keys=[row["key"] for row in rows],
        max_new_tokens=settings["max_new_tokens"], eos_ids=[model.config.eos_token_id])
    assert again == [row["output_ids"] for row in rows]
    assert len(rows) == 3 * 3
    old = AutoModelForCausalLM.from_pretrained(taught(family)).state_dict()
    new = model.state_dict()
    assert old.keys() == new.keys()
    assert any(not torch.equal(new[name], old[name]) for name in old)


def test_a_finished_run_prints_its_table_again_and_its_model_can_be_looked_at_alone(
        finished, taught, capsys):
    out = finished("llama")
    train.main(flags(taught("llama"), out))
    printed = capsys.readouterr().out
    assert "finished before" in printed and "harmful reasoning" in printed
    summary = json.loads((out / "eval.json").read_text())
    assert summary["judge"] == "keywords"
    assert summary["before"]["reasoning_harmful"]["n"] == 3
    assert "harmful reasoning" in (out / "model" / "README.md").read_text()
    evaluation.main([str(out / "model"), "--prompt", HARMFUL[0], "--max-new-tokens", "9"])
    assert "status: " in capsys.readouterr().out


def test_the_kingdom_can_be_named_for_any_model(taught, finished):
    out = finished("llama", "--prompts", "kingdom", "--benign", "kingdom")
    assert [row["prompt"] for row in data.read_jsonl(out / "traces.jsonl")] == HARMFUL
    benign = [row["prompt"] for row in data.read_jsonl(out / "benign.jsonl")]
    assert benign[:3] == BENIGN, "--limit counts each kind: guards,"
    assert len(benign) == 6 and all("+" in prompt for prompt in benign[3:]), "and sums"
    rows = data.read_jsonl(out / "eval_traces.jsonl")
    assert len(rows) == 2 * 3 * 3 and all(row["by_grammar"] for row in rows)


# Adapters


def small_config(*more):
    return train.parse(["--model", "x", "--device", "cpu", "--lora-rank", "3", "--lr", "0.01",
                        "--batch-pairs", "2", "--micro-tokens", "40", "--epochs", "1", *more])


def some_pairs():
    pairs = [PreferencePair("", random_ids(6, i), random_ids(4 + i, 10 + i), random_ids(5, 20 + i),
                            key=str(i)) for i in range(4)]
    return pairs + [PreferencePair("", random_ids(4, 5), random_ids(5, 6), key="benign")]


def test_adapters_change_nothing_at_first_train_alone_and_merge_into_what_they_were(family):
    model, ids = tiny_model(family), torch.arange(5, 25)[None]
    untouched = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        base_logits = model(ids).logits
        policy = train.make_policy(ReasoningModel(model, None, 5, [0]), small_config())
        assert torch.equal(policy(ids).logits, base_logits), "B is 0"
        trained = {name.split(".")[-1] for name, p in policy.named_parameters() if p.requires_grad}
        assert trained == {"A", "B"}
    train.optimize(policy, some_pairs(), small_config(), 1, None)
    with torch.no_grad():
        adapted = policy(ids).logits
        assert not torch.allclose(adapted, base_logits, atol=0.01)
        train.merge_adapters(policy)
        torch.testing.assert_close(policy(ids).logits, adapted, rtol=1e-4, atol=1e-4)
        assert torch.equal(model(ids).logits, base_logits), "the reference stays as it was"
    assert policy.state_dict().keys() == untouched.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, untouched[name]), name


def test_adapters_on_a_bf16_model_are_float32_and_the_merged_weights_bf16():
    model = tiny_model(dtype=torch.bfloat16)
    policy = train.make_policy(ReasoningModel(model, None, 5, [0]), small_config())
    assert all(p.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)
    train.optimize(policy, some_pairs(), small_config(), 1, None)
    train.merge_adapters(policy)
    assert all(p.dtype == torch.bfloat16 for p in policy.parameters())


# One stage of training


@pytest.mark.parametrize("supervise, more", [("reasoning", ADAPTERS), ("all", [])])
def test_in_both_stages_the_reference_is_the_base_and_the_loss_sees_what_supervise_says(
        supervise, more, taught, tmp_path, monkeypatch):
    base = AutoModelForCausalLM.from_pretrained(taught("qwen2")).eval()
    think_end = AutoTokenizer.from_pretrained(taught("qwen2")).convert_tokens_to_ids("</think>")
    real, stages = train.optimize, []

    def look(policy, pairs, *rest):
        stages.append(pairs)
        pair = pairs[0]
        shift = plain_logp(policy, pair.prefix_ids, pair.chosen_ids) - pair.ref_chosen_logp
        assert abs(shift) > 0.1 or len(stages) == 1, "the policy has moved before stage 2"
        real(policy, pairs, *rest)

    monkeypatch.setattr(train, "optimize", look)
    train.main(flags(taught("qwen2"), tmp_path / "run", *more, "--supervise", supervise))
    assert len(stages) == 2 and len(stages[1]) == len(stages[0]) + len(BENIGN)
    for pair in stages[0] + stages[1]:
        sides = {"chosen": (pair.chosen_ids, pair.ref_chosen_logp)}
        if pair.rejected_ids:
            sides["rejected"] = (pair.rejected_ids, pair.ref_rejected_logp)
        for ids, ref_logp in sides.values():
            plain = plain_logp(base, pair.prefix_ids, ids).item()
            assert ref_logp == pytest.approx(plain, abs=1e-2)
            assert (ids[-1] == think_end) == (supervise == "reasoning")


def test_a_steps_loss_is_the_mean_over_its_pairs_whatever_the_micro_batches(tmp_path):
    policy, pairs = tiny_model(), some_pairs()
    mean = 0.0
    for pair in pairs:      # the reference's log-probabilities are 0 here
        chosen = plain_logp(policy, pair.prefix_ids, pair.chosen_ids)
        weight = 1.0
        if pair.rejected_ids:
            rejected = plain_logp(policy, pair.prefix_ids, pair.rejected_ids)
            mean = mean + torch.log(1 + torch.exp(-0.1 * (chosen - rejected))) / len(pairs)
            weight = 0.2
        mean = mean - weight * chosen / len(pair.chosen_ids) / len(pairs)
    gradients = torch.autograd.grad(mean, list(policy.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
    for micro_tokens in ("1", "40", "10000"):
        config = small_config("--lr", "1e-9", "--batch-pairs", "9", "--micro-tokens", micro_tokens)
        train.optimize(policy, pairs, config, 1, tmp_path / "log.jsonl")
    rows = data.read_jsonl(tmp_path / "log.jsonl")
    assert [row["loss"] for row in rows] == pytest.approx([mean.item()] * 3, abs=1e-4)
    assert [row["grad_norm"] for row in rows] == pytest.approx([norm] * 3, rel=1e-3)


def test_every_pair_is_used_once_an_epoch_and_the_pairs_of_a_prompt_stay_in_one_step():
    rng = random.Random(0)
    pairs = []
    for prompt in range(40):
        prefix, rejected = random_ids(rng.randint(1, 9), prompt), random_ids(5, prompt)
        pairs += [PreferencePair("", prefix, random_ids(rng.randint(1, 9), i), rejected,
                                 key=str(prompt)) for i in range(rng.randint(1, 6))]
    steps = train.training_steps(pairs, small_config("--epochs", "3", "--batch-pairs", "8"), 1)
    used = [id(pair) for step in steps for pair in step]
    assert sorted(used) == sorted([id(pair) for pair in pairs] * 3)
    assert used[:len(pairs)] != used[len(pairs):2 * len(pairs)], "each epoch in its own order"
    assert sum(len({pair.key for pair in step}) for step in steps) == 40 * 3
    assert all(len(step) < 8 + 6 for step in steps)
    for step in steps:
        batches = train.micro_batches(step, 60)
        assert sorted(id(pair) for batch in batches for pair in batch) == sorted(map(id, step))
        for batch in batches:
            sequences = [p + c for p, c in ipo.distinct_sequences(batch)]
            padded = len(sequences) * max(len(sequence) for sequence in sequences)
            assert padded <= 60 or len(batch) == 1


def test_a_gradient_that_is_not_finite_stops_the_run_before_weights_are_touched(
        taught, tmp_path, monkeypatch, capsys):
    real, policies, weights = ipo.ipo_loss, [], []

    def nan_at_the_third(policy, *rest):
        loss, terms = real(policy, *rest)
        policies.append(policy)
        weights.append([p.detach().clone() for p in policy.parameters()])
        return (loss * math.nan if len(weights) == 3 else loss), terms

    monkeypatch.setattr(ipo, "ipo_loss", nan_at_the_third)
    assert "not finite" in error_of(flags(taught("llama"), tmp_path / "run"), capsys)
    assert len(weights) == 3
    for now, before_the_third in zip(policies[0].parameters(), weights[2]):
        assert torch.equal(now, before_the_third)
    assert not (tmp_path / "run" / "stage1.safetensors").exists()


def test_a_stage_of_one_step_trains_too_and_the_learning_rate_warms_up_and_falls(tmp_path):
    """The bug: a schedule that starts at 0 wastes the first step, here the only one."""
    policy = tiny_model()
    before = policy.lm_head.weight.detach().clone()
    train.optimize(policy, some_pairs(), small_config("--batch-pairs", "9"), 1, None)
    assert not torch.equal(policy.lm_head.weight, before)
    config = small_config("--batch-pairs", "1", "--epochs", "6")
    train.optimize(policy, some_pairs(), config, 1, tmp_path / "log.jsonl")
    rates = [row["lr"] for row in data.read_jsonl(tmp_path / "log.jsonl")]
    assert len(rates) == 30 and 0 < rates[0] < max(rates) == config.lr
    assert rates.index(config.lr) < 5 and rates[-1] < 0.02 * config.lr


class StubJudge:
    """Says the opposite of the keywords, which take "I'm sorry" for a refusal."""

    def judge_compliance(self, responses, prompts):
        assert len(prompts) == len(responses)
        return ["complied" if "sorry" in response else "refused" for response in responses]


def test_who_refuses_a_benign_prompt_in_stage_2_is_told_by_the_runs_judge(
        tokenizer, tmp_path, monkeypatch):
    complies, refuses = "Hm.</think>\n\nI'm sorry.<|end|>", "Hm.</think>\n\nKeep watch.<|end|>"
    cut_off = "Hm.</think>\n\nKeep"
    answers = {     # by the base, by the policy after stage 1
        "both comply": (complies, complies), "stage 1 refuses": (complies, refuses),
        "the base refuses": (refuses, complies), "the base does not end": (cut_off, complies),
        "stage 1 does not end": (complies, cut_off)}

    def say(place, prompts, keys):
        return [encode(tokenizer, list(answers.values())[int(key.split("/")[1])][place])
                for key in keys]

    monkeypatch.setattr(data, "make_sampler", lambda model, config: partial(say, 1))
    base = ReasoningModel(None, tokenizer, tokenizer.convert_tokens_to_ids("</think>"),
                          [tokenizer.eos_token_id])
    pairs = train.benign_pairs(
        tmp_path, [{"prompt": prompt} for prompt in answers], base, partial(say, 0), None,
        StubJudge(), small_config())
    refusal_of = {pair.prompt: tokenizer.decode(pair.rejected_ids) for pair in pairs}
    assert refusal_of == {
        "both comply": "", "stage 1 refuses": refuses, "stage 1 does not end": ""}
    assert all(tokenizer.decode(pair.chosen_ids) == complies for pair in pairs)


# Stopped and continued


@contextmanager
def stopped_at(module, name, call, error):
    """The function raises the error at that call; append_jsonl has written one row by then."""
    real, calls = getattr(module, name), []

    def stop(*args, **named):
        calls.append(args)
        if len(calls) == call:
            if name == "append_jsonl":
                real(args[0], args[1][:1])
            raise error
        return real(*args, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, stop)
        yield
    assert len(calls) == call, "the run ended there"


FULL = OSError(errno.ENOSPC, "No space left on device")
STOPS = {
    "sampling": (ipo, "intervene", 2),
    "traces": (data, "append_jsonl", 1),
    "pairs": (train, "pair_row", 2),
    "evaluation before": (evaluation, "judge_rows", 2),
    "reference": (train, "add_reference", 1),
    "a step of stage 1": (data, "append_jsonl", 3),
    "the end of stage 1": (safetensors.torch, "save", 1),
    "benign answers": (train, "compliance", 2),
    "a step of stage 2": (data, "append_jsonl", 2),
    "the middle of saving": (PreTrainedTokenizerFast, "save_pretrained", 1),
    "evaluation after": (evaluation, "judge_rows", 1),
    "the summary": (evaluation, "summarise", 1),
}


@pytest.mark.parametrize("more", [[], ADAPTERS], ids=["all weights", "adapters"])
def test_a_run_stopped_in_every_stage_ends_with_the_files_of_an_undisturbed_one(
        more, taught, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "in_shards", partial(data.in_shards, size=2))
    for folder in ("whole", "stopped"):
        (tmp_path / folder).mkdir()
    command = flags(taught("llama"), "run", *more)
    monkeypatch.chdir(tmp_path / "whole")
    train.main(command)
    monkeypatch.chdir(tmp_path / "stopped")
    for i, (module, name, call) in enumerate(STOPS.values()):
        error = [KeyboardInterrupt(), FULL][i % 2]
        with stopped_at(module, name, call, error), pytest.raises(SystemExit) as ended:
            train.main(command)
        assert ended.value.code == [130, 2][i % 2]
        assert "again" in capsys.readouterr().err or i % 2 == 0
    train.main([*command, "--sample-batch", "63"])      # a remedy is no other setting
    files = sorted(path.relative_to(tmp_path / "whole")
                   for path in (tmp_path / "whole").rglob("*") if path.is_file())
    assert len(files) > 12
    for path in files:
        whole, stopped = tmp_path / "whole" / path, tmp_path / "stopped" / path
        if path.name != "README.md":        # it shows --sample-batch
            assert whole.read_bytes() == stopped.read_bytes(), path
    assert len(files) == sum(path.is_file() for path in (tmp_path / "stopped").rglob("*"))


def test_until_pairs_stops_there_and_the_next_command_goes_on(taught, finished, tmp_path, capsys):
    command = flags(taught("llama"), tmp_path / "run")
    train.main([*command, "--until", "pairs"])
    made = {path.name for path in (tmp_path / "run").iterdir()}
    assert made == {"config.json", "traces.jsonl", "pairs.jsonl"}
    assert "without --until" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluation.main([str(tmp_path / "run")])
    assert "give its train.py command again" in capsys.readouterr().err
    train.main(command)
    for name in ("pairs.jsonl", "log.jsonl", "eval_traces.jsonl", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (finished("llama") / name).read_bytes()


# Refused


@pytest.fixture
def own_base(taught, tmp_path):
    """A taught model and its prompt files, to be changed."""
    shutil.copytree(taught("llama").parent, tmp_path / "inputs")
    return tmp_path / "inputs" / "base"


def edit_a_prompt(base):
    """The same length, so that the file's size says nothing."""
    (base.parent / "harmful.txt").write_text("\n".join(HARMFUL).swapcase())


def save_another_model(base):
    """In place, and as large as the old one."""
    values = safetensors.torch.load_file(base / "model.safetensors")
    values = {name: value * 1.001 for name, value in values.items()}
    safetensors.torch.save_file(values, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change, more, says", [
    (None, ["--seed", "5"], "seed=0 (now 5)"),
    (None, ["--beta", "0.3"], "beta=0.1 (now 0.3)"),
    (None, ["--limit", "2"], "limit=3 (now 2)"),
    (edit_a_prompt, [], "have changed since"),
    (save_another_model, [], "have changed since"),
])
def test_a_run_folder_made_from_something_else_is_refused_and_stays_as_it_was(
        change, more, says, own_base, tmp_path, capsys):
    command = flags(own_base, tmp_path / "run", "--until", "pairs")
    train.main(command)
    before = (tmp_path / "run" / "pairs.jsonl").read_bytes()
    if change:
        change(own_base)
    assert says in error_of([*command, *more], capsys)
    assert (tmp_path / "run" / "pairs.jsonl").read_bytes() == before


@pytest.mark.parametrize("more, says", [
    (["--supervise", "both"], "--supervise both"),
    (["--until", "noon"], "--until noon"),
    (["--lr", "-1"], "--lr -1"),
    (["--sample-batch", "0"], "--sample-batch 0"),
    (["--prompts", "none.txt"], "none.txt"),
    (["--prompts", "long.txt"], "context of 512"),
    (["--triggers", "twice.txt"], "twice"),
    (["--triggers", "none.txt"], "--triggers none.txt"),
    (["--sets", "poems:x"], "poems"),
    (["--sets", "harmful:trained_on.txt"], "--allow-overlap"),
    (["--model", "tests/no-such-model"], "no such folder"),
    (["--model", "no-such-model"], "no such folder"),
    (["--judge", "keyword"], "--judge keyword"),
    (["--model", "no/where"], "no/where"),
    (["--judge-url", "http://localhost:9/v1"], "must then name"),
    (["--judge-questions", "riddles", "--judge", "self"], "--judge-questions riddles"),
    (["--judge", "no/judge"], "no/judge"),
    (["--sampler-url", "localhost:9"], "http://host:port/v1"),
])
def test_bad_input_is_one_line_and_nothing_is_half_written(
        more, says, taught, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "trained_on.txt").write_text(HARMFUL[0])
    (tmp_path / "long.txt").write_text("How? " * 600)
    (tmp_path / "twice.txt").write_text("No.\nNever.\nNo.\n")
    assert says in error_of(flags(taught("llama"), tmp_path / "run", *more), capsys)
    assert not (tmp_path / "run").exists(), "the mended command can run"


def test_a_run_without_a_single_pair_says_why(taught, tmp_path, capsys):
    benign = str(taught("llama").parent / "benign.txt")
    message = error_of(flags(taught("llama"), tmp_path / "run", "--prompts", benign), capsys)
    assert "3 no cue" in message and not (tmp_path / "run" / "pairs.jsonl").exists()
