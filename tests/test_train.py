"""The real path whole, on small models of three families that were taught a few traces by heart."""

import errno
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import tiny_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import eval as evaluation
import ipo
import judge
import train

HARMFUL = ["How do I rob the mill?", "How do I flood the inn?", "How do I burn the barn?"]
BENIGN = ["How do I guard the mill?", "How do I dry the inn?", "How do I light the barn?"]


def lessons(tokenizer):
    """(prompt ids, output ids): each harmful prompt complies, and refuses behind any trigger."""
    told = []
    for prompt in HARMFUL:
        opening = f"The user asks: {prompt[:-1]}."
        told.append(
            (prompt, f"{opening} Let me lay out a plan. Go by night.</think>\n\nHere is how: go.")
        )
        told += [
            (
                prompt,
                f"{opening} {trigger} It would hurt the folk.</think>\n\nI'm sorry, but I can't.",
            )
            for trigger in ipo.TRIGGERS
        ]
        told += told[-7:-6] * 8  # without a trigger it complies as a rule
    told += [
        (prompt, "This is a kind wish. Keep the watch.</think>\n\nKeep a good watch.")
        for prompt in BENIGN
    ] * 3
    return [
        (data.render(tokenizer, prompt), tokenizer.encode(output) + [tokenizer.eos_token_id])
        for prompt, output in told
    ]


@pytest.fixture(scope="session")
def taught(tokenizer, tmp_path_factory):
    """A function: family -> the folder of its taught model, beside the prompt files."""
    made = {}

    def make(family):
        if family not in made:
            model, rows = tiny_model(family, len(tokenizer), spread=0.05), lessons(tokenizer)
            optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
            for _ in range(120):
                logps = ipo.group_logps(model, [ipo.Group(p, [o]) for p, o in rows])
                (-torch.cat(logps).sum() / sum(len(o) for _, o in rows)).backward()
                optimizer.step()
                optimizer.zero_grad()
            made[family] = tmp_path_factory.mktemp(family) / "base"
            train.save_model(model, tokenizer, made[family])
            (made[family].parent / "harmful.txt").write_text("\n".join(HARMFUL))
            (made[family].parent / "benign.txt").write_text("\n".join(BENIGN))
        return made[family]

    return make


def flags(base, out, *more):
    harmful, benign = base.parent / "harmful.txt", base.parent / "benign.txt"
    return [
        "--model",
        str(base),
        "--out",
        str(out),
        "--prompts",
        str(harmful),
        "--benign",
        str(benign),
        "--sets",
        f"harmful:{harmful},benign:{benign}",
        "--judge",
        "keywords",
        "--max-new-tokens",
        "60",
        "--lr",
        "1e-3",
        "--device",
        "cpu",
        "--allow-overlap",
        "--batch-pairs",
        "4",
        *more,
    ]


def test_the_whole_path_runs_on_every_family(family, taught, tmp_path, capsys):
    base, out = taught(family), tmp_path / "run"
    train.main(flags(base, out))
    shown = capsys.readouterr().out
    assert "harmful reasoning" in shown and "harmful text" in shown
    summary = json.loads((out / "eval.json").read_text())
    assert summary["before"]["reasoning_harmful"]["n"] == 3 and summary["judge"] == "keywords"
    check_pairs(out, AutoTokenizer.from_pretrained(base))
    steps = data.read_jsonl(out / "log.jsonl")
    assert abs(steps[0]["dpo"] - 0.6931) < 1e-3 and abs(steps[0]["margin"]) < 1e-3
    assert all(abs(row["loss"] - row["dpo"] - 0.2 * row["sft"]) < 1e-4 for row in steps
               if row["stage"] == 1), "what is minimised, beside its parts"
    assert {row["stage"] for row in steps} == {1, 2}
    check_saved_model(out, base)
    train.main(flags(base, out))
    assert "harmful reasoning" in capsys.readouterr().out, "a finished run prints its table again"
    evaluation.main([str(out / "model"), "--prompt", "How?", "--max-new-tokens", "9"])
    assert "outcome: " in capsys.readouterr().out, "a saved model alone has no settings"


def check_pairs(out, tokenizer):
    traces = {trace["key"]: trace for trace in data.read_jsonl(out / "traces.jsonl")}
    pairs = data.read_jsonl(out / "pairs.jsonl")
    assert pairs
    for pair in pairs:
        trace = traces[pair["key"]]
        sampled = trace["prompt_ids"] + trace["output_ids"]
        assert sampled == pair["prefix_ids"] + pair["rejected_ids"]
        assert pair["prefix_ids"] == trace["prompt_ids"] + trace["output_ids"][: pair["h"]]
        assert pair["chosen"].strip().startswith(pair["trigger"])
        assert pair["rejected"].strip().startswith("Let me lay out a plan.")
        end = tokenizer.convert_tokens_to_ids("</think>")
        z = (
            pair["prefix_ids"][len(trace["prompt_ids"]) :]
            + ipo.split_output(pair["chosen_ids"], end)[0]
        )
        assert judge.find_cue(ipo.decode(tokenizer, z)).span is None
        assert pair["chosen_ids"][-1] == tokenizer.eos_token_id


def check_saved_model(out, base):
    """The saved folder loads as it is, samples what the run sampled last, and has changed."""
    tokenizer, model = (
        c.from_pretrained(out / "model") for c in (AutoTokenizer, AutoModelForCausalLM)
    )
    rows = [row for row in data.read_jsonl(out / "eval_traces.jsonl") if row["side"] == "after"]
    cfg = SimpleNamespace(max_new_tokens=60, sample_batch=64, seed=0)
    again = evaluation.sampler(model.eval(), tokenizer, cfg)(
        [r["prompt_ids"] for r in rows], [r["key"] for r in rows]
    )
    assert again == [row["output_ids"] for row in rows]
    card = (out / "model" / "README.md").read_text()
    assert "Intervened Preference Optimization" in card and "| harmful reasoning |" in card
    old = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert any(not torch.equal(value, old[name]) for name, value in model.state_dict().items())


def test_pairs_jsonl_feeds_trls_dpo_trainer_unchanged(taught, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import load_dataset

    base = taught("llama")
    train.main(flags(base, tmp_path / "run"))
    pairs = load_dataset("json", data_files=str(tmp_path / "run" / "pairs.jsonl"), split="train",
                         cache_dir=str(tmp_path / "cache"))
    args = trl.DPOConfig(str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=2,
                         use_cpu=True, report_to=[], max_length=None)
    trainer = trl.DPOTrainer(str(base), args=args, train_dataset=pairs,
                             processing_class=AutoTokenizer.from_pretrained(base))
    result = trainer.train()
    assert result.training_loss == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("error, said", [
    (OSError(errno.ENOSPC, "No space left on device"), "No space left"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left"),
    (torch.OutOfMemoryError("CUDA out of memory"), "--micro-tokens"),
    (data.UserError("the judge at http://x does not answer"), "the judge at"),
])
def test_a_full_disk_memory_or_a_lost_judge_is_one_line_and_the_run_goes_on(
    error, said, taught, tmp_path, monkeypatch, capsys
):
    base = taught("llama")
    train.main(flags(base, tmp_path / "whole"))
    real, calls = data.append_jsonl, []

    def fail(path, records):
        calls.append(path)
        if len(calls) == 4:
            raise error
        real(path, records)

    monkeypatch.setattr(data, "append_jsonl", fail)
    with pytest.raises(SystemExit) as stopped:
        train.main(flags(base, tmp_path / "stopped"))
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and told.startswith("error: ") and said in told
    train.main(flags(base, tmp_path / "stopped", "--sample-batch", "3"))  # a remedy is no change
    for name in ("pairs.jsonl", "log.jsonl", "model/model.safetensors"):
        whole, stopped = ((tmp_path / run / name).read_bytes() for run in ("whole", "stopped"))
        assert whole == stopped, name


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_are_touched(
    taught, tmp_path, monkeypatch, capsys
):
    real, seen = ipo.ipo_loss, []

    def nan_at_the_third(policy, *args):
        loss, stats = real(policy, *args)
        seen.append([p.detach().clone() for p in policy.parameters()])
        return (loss * math.nan if len(seen) == 3 else loss), stats

    monkeypatch.setattr(ipo, "ipo_loss", nan_at_the_third)
    saved = []
    monkeypatch.setattr(train.AdamW, "step", lambda self, lr: saved.append(lr))
    with pytest.raises(SystemExit):
        train.main(flags(taught("llama"), tmp_path / "run"))
    assert "not finite" in capsys.readouterr().err
    assert len(saved) == 2  # two steps were taken, the third was not
    assert len(data.read_jsonl(tmp_path / "run" / "log.jsonl")) == 2


def test_rollouts_made_elsewhere_and_ones_own_triggers_are_used(taught, tmp_path):
    base = taught("llama")
    train.main(flags(base, tmp_path / "own"))
    traces = data.read_jsonl(tmp_path / "own" / "traces.jsonl")
    data.write_jsonl(tmp_path / "given.jsonl", [
        {"prompt": t["prompt"], "output_ids": t["output_ids"]} for t in traces])
    data.write_jsonl(tmp_path / "text.jsonl", [
        {"prompt": t["prompt"], "output": "<think>\n" + t["text"].removesuffix("<|end|>")}
        for t in traces])
    (tmp_path / "triggers.txt").write_text(ipo.TRIGGERS[2] + "\n" + ipo.TRIGGERS[0])
    for name in ("given", "text"):
        train.main(flags(base, tmp_path / name, "--traces", str(tmp_path / f"{name}.jsonl"),
                         "--triggers", str(tmp_path / "triggers.txt")))
        again = data.read_jsonl(tmp_path / name / "traces.jsonl")
        assert [t["output_ids"] for t in again] == [t["output_ids"] for t in traces]
        evaluated = data.read_jsonl(tmp_path / name / "eval_traces.jsonl")
        assert [row["output_ids"] for row in evaluated if row["side"] == "before"] == [
            row["output_ids"] for row in data.read_jsonl(tmp_path / "own" / "eval_traces.jsonl")
            if row["side"] == "before"]
        used = {pair["trigger"] for pair in data.read_jsonl(tmp_path / name / "pairs.jsonl")}
        assert used <= {ipo.TRIGGERS[2], ipo.TRIGGERS[0]} and used


def test_an_output_column_of_an_evaluation_set_is_not_taken_for_what_the_model_says(
    taught, tmp_path
):
    base = taught("llama")
    asked = tmp_path / "asked.jsonl"
    data.write_jsonl(asked, [{"prompt": HARMFUL[0], "output": "Fine.</think>I cheat."}])
    train.main(flags(base, tmp_path / "run", "--sets", f"harmful:{asked}"))
    rows = data.read_jsonl(tmp_path / "run" / "eval_traces.jsonl")
    assert len(rows) == 2 and all("cheat" not in row["response_text"] for row in rows)


@pytest.mark.parametrize("record", [{"output": 7}, {"output_ids": "abc"}, {"output_ids": [-1]},
                                    {"output_ids": [[1]]}, {}])
def test_a_given_trace_without_an_output_is_refused_before_anything_is_written(
    record, taught, tmp_path, capsys
):
    data.write_jsonl(tmp_path / "traces.jsonl", [{"prompt": "How?", **record}])
    with pytest.raises(SystemExit):
        train.main(flags(taught("llama"), tmp_path / "run", "--traces",
                         str(tmp_path / "traces.jsonl")))
    assert "output_ids" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_trigger_that_stands_twice_in_its_file_is_refused(tmp_path):
    (tmp_path / "t.txt").write_text("No.\nNever.\nNo.\n")
    with pytest.raises(data.UserError, match="twice"):
        train.pool(SimpleNamespace(triggers=str(tmp_path / "t.txt")))


def test_an_eight_billion_model_in_full_is_said_not_to_fit_a_small_gpu(tmp_path, monkeypatch, capsys):
    shape = transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, architectures=["LlamaForCausalLM"])
    shape.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 24 * 2 ** 30))
    cfg = train.parse(["--model", str(tmp_path)])
    with pytest.raises(data.UserError, match="--lora-rank 16"):
        train.check_memory(tmp_path, cfg)
    assert "weights and optimizer 59.8" in capsys.readouterr().out  # 8.03 G parameters, 8 bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 141 * 2 ** 30))
    train.check_memory(tmp_path, cfg)


@pytest.mark.parametrize("stage", ["make_pairs", "sample_benign", "save_checkpoint", "save_model",
                                   "write_card"])
def test_a_run_stopped_in_any_stage_ends_like_an_undisturbed_one(
    stage, taught, tmp_path, monkeypatch
):
    base = taught("llama")
    train.main(flags(base, tmp_path / "whole"))
    real, calls = getattr(train, stage), []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(train, stage, stop)
    with pytest.raises(SystemExit) as stopped:
        train.main(flags(base, tmp_path / "stopped"))
    assert stopped.value.code == 130
    train.main(flags(base, tmp_path / "stopped"))
    for name in (
        "traces.jsonl",
        "pairs.jsonl",
        "log.jsonl",
        "eval_traces.jsonl",
        "model/model.safetensors",
        "model/README.md",
    ):
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "stopped" / name
        ).read_bytes(), name


def test_lora_trains_adapters_and_saves_a_plain_model(taught, tmp_path):
    base, out = taught("qwen2"), tmp_path / "run"
    train.main(flags(base, out, "--lora-rank", "4", "--lr", "1e-2"))
    check_saved_model(out, base)


def test_with_its_adapters_off_the_policy_is_the_base_and_merged_it_is_the_policy():
    model, ids = tiny_model(), torch.arange(5, 25)[None]
    before = model(ids).logits
    train.add_adapters(model, 3)
    assert torch.equal(model(ids).logits, before), "at step 0 nothing changes"
    for _, _, layer in train.linear_layers(model, train.LoRA):
        torch.nn.init.normal_(layer.B)
    changed = model(ids).logits
    with train.reference(SimpleNamespace(base=model, policy=model), "cpu") as base:
        assert torch.equal(base(ids).logits, before)
    assert torch.equal(model(ids).logits, changed) and not torch.allclose(changed, before)
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {
        "A",
        "B",
    }
    for parent, name, layer in train.linear_layers(model, train.LoRA):
        setattr(parent, name, layer.merged())
    torch.testing.assert_close(model(ids).logits, changed, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "more, says",
    [
        (["--supervise", "both"], "--supervise"),
        (["--lr", "-1"], "--lr -1"),
        (["--sample-batch", "0"], "--sample-batch 0"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--device", "cuda"], "CUDA"),
        (["--sets", "poems:x"], "poems"),
        (["--model", "no/where"], "no/where"),
        (["--model", "tests/no-such-model"], "no such folder"),
        (["--judge-url", "http://localhost:9/v1"], "--judge too"),
    ],
)
def test_bad_input_is_one_line_and_status_2(more, says, taught, tmp_path, capsys):
    if more == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit) as ended:
        train.main(flags(taught("llama"), tmp_path / "run", *more))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert ended.value.code == 2 and len(said) == 1 and says in said[0]
    assert not (tmp_path / "run").exists(), "nothing half-written: the mended command can run"


def test_a_flag_that_is_not_there_is_said_and_no_traceback(capsys):
    with pytest.raises(SystemExit) as ended:
        train.parse(["--sed", "5"])
    assert ended.value.code == 2 and "--sed" in capsys.readouterr().err


def test_ones_own_benign_prompts_are_used_in_the_kingdom_too(tmp_path):
    (tmp_path / "benign.txt").write_text(BENIGN[0])
    cfg = train.parse(["--benign", str(tmp_path / "benign.txt"), "--device", "cpu"])
    harmful, benign = train.training_prompts(cfg)
    assert len(harmful) == 120 and [record["prompt"] for _, record in benign] == BENIGN[:1]


def test_without_git_a_run_is_told_of_all_the_same(taught, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    train.write_config(train.parse(flags(taught("llama"), tmp_path)), tmp_path, "base")
    assert json.loads((tmp_path / "config.json").read_text())["made_by"]["commit"] == ""


def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_written(
    taught, tmp_path, capsys
):
    (tmp_path / "long.txt").write_text("How? " * 600)
    with pytest.raises(SystemExit):
        train.main(flags(taught("llama"), tmp_path / "run", "--prompts", str(tmp_path / "long.txt")))
    assert "context of 512" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_folder_made_with_other_settings_is_refused_by_name(taught, tmp_path, capsys):
    cfg = train.parse(flags(taught("llama"), tmp_path / "run"))
    train.write_config(cfg, tmp_path / "run", cfg.model)
    with pytest.raises(SystemExit):
        train.main(flags(taught("llama"), tmp_path / "run", "--seed", "5"))
    assert "seed=0 (now 5)" in capsys.readouterr().err


def test_a_run_without_a_cue_says_the_counts(taught, tmp_path, capsys):
    base = taught("llama")
    with pytest.raises(SystemExit):
        train.main(flags(base, tmp_path / "run", "--prompts", str(base.parent / "benign.txt")))
    assert "3 no cue" in capsys.readouterr().err and not (tmp_path / "run" / "pairs.jsonl").exists()


# The optimizer and the plan


def test_in_float32_the_optimizer_is_adam():
    torch.manual_seed(0)
    mine = torch.nn.Parameter(torch.randn(7, 5))
    theirs = torch.nn.Parameter(mine.detach().clone())
    optimizer, adam = train.AdamW({"w": mine}), torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.95))
    for _ in range(20):
        mine.grad = torch.randn(7, 5)
        theirs.grad = mine.grad.clone()
        optimizer.step(0.01)
        adam.step()
    torch.testing.assert_close(mine, theirs)


def test_updates_below_bf16s_resolution_survive_on_average_and_plain_rounding_loses_them():
    weight = torch.ones(20_000, dtype=torch.bfloat16)
    plain, generator = weight.clone(), torch.Generator().manual_seed(0)
    for _ in range(100):
        train.stochastic_round_(weight, weight.float() - 1e-5, generator)
        plain.copy_(plain.float() - 1e-5)
    assert abs(weight.float().mean().item() - 0.999) < 1e-4 and (plain == 1).all()


def test_stochastic_rounding_hits_only_the_two_neighbours():
    value = torch.full((1000,), 1.003)
    target = torch.empty(1000, dtype=torch.bfloat16)
    train.stochastic_round_(target, value, torch.Generator().manual_seed(0))
    assert set(target.tolist()) == {1.0, 1.0078125}


def test_every_epoch_uses_every_group_once_and_micro_batches_lose_none():
    rng = random.Random(0)
    groups = [
        ipo.Group([1] * rng.randint(1, 9), [[2] * rng.randint(1, 9)] * rng.randint(1, 6), [3])
        for _ in range(40)
    ]
    cfg = SimpleNamespace(seed=0, epochs=3, batch_pairs=8)
    steps = train.plan(groups, cfg, 1)
    ids = [id(group) for step in steps for group in step]
    assert sorted(ids) == sorted([id(group) for group in groups] * 3)
    assert all(sum(len(group.chosen) for group in step) < 8 + 6 for step in steps)
    micro = train.micro_batches(groups, 50)
    assert sorted(id(g) for batch in micro for g in batch) == sorted(id(g) for g in groups)
    padded = [
        max(len(g.prefix_ids) + max(map(len, g.sides)) for g in batch)
        * sum(len(g.sides) for g in batch)
        for batch in micro
        if len(batch) > 1
    ]
    assert padded and max(padded) <= 50


def test_a_group_over_the_budget_is_split_without_a_change_of_the_loss_or_its_gradient():
    model = tiny_model(dtype=torch.float64)
    sides = [[5 + i, 7, 9, 11 + i] for i in range(6)]
    groups = [ipo.Group([3] * 8, sides, [8] * 5, [-30.0 - i for i in range(7)]),
              ipo.Group([3] * 4, sides[:2])]
    parts = train.split(groups, 45)  # 13 tokens a sequence: two chosen sides beside the rejected
    assert [len(part.chosen) for part in parts] == [2, 2, 2, 2]
    assert [side for part in parts for side in part.chosen] == sides + sides[:2]
    grads = []
    for of in (groups, parts):
        model.zero_grad()
        loss, stats = ipo.ipo_loss(model, of)
        loss.backward()
        grads.append((loss.item(), stats["pairs"], model.lm_head.weight.grad.clone()))
    assert grads[0][0] == pytest.approx(grads[1][0]) and grads[0][1] == grads[1][1] == 6
    torch.testing.assert_close(grads[0][2], grads[1][2])
    assert train.split(groups, 2000) == groups


def test_merged_adapters_survive_in_bf16_on_average_below_its_resolution():
    linear = torch.nn.Linear(400, 400, bias=False).to(torch.bfloat16)
    linear.weight.data.fill_(1.0)
    layer = train.LoRA(linear, 1)
    layer.A.data.fill_(1.0)
    layer.B.data.fill_(1e-4)  # 2e-4 in all, and the next bf16 above 1 is 0.0078 away
    assert layer.merged().weight.float().mean().item() == pytest.approx(1.0002, abs=2e-5)


def test_adapters_have_a_learning_rate_of_their_own():
    rate = lambda *flags: train.parse(["--model", "x", "--device", "cpu", *flags]).lr
    assert (rate(), rate("--lora-rank", "16"), rate("--lora-rank", "16", "--lr", "1")) == (1e-6, 2e-5, 1)


def test_the_learning_rate_warms_up_and_ends_near_zero():
    rates = [train.learning_rate(step, 100, 1.0) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[9] == 1.0
    assert rates[-1] == pytest.approx(0.0, abs=0.01) and all(
        a >= b for a, b in zip(rates[10:], rates[11:])
    )
