"""python tests/experiments/rivals.py --seeds 0 1 2: IPO, its rivals and ablations, in the kingdom.

A seed's runs share one base model, its traces, candidates and answers before training, which the
run of stage 1 alone makes. RUNS lists what is done with them: full runs of train.py with other
settings, and rivals in place of stage 1, without a stage 2. All are measured on the same held-out
prompts, by the grammar; the rivals that need verdicts while training get the grammar's, too, where
IPO has only the keywords'. Settings that are not named are train.py's own for the kingdom, the
learning rate included. What is finished is not made again.
"""

import argparse
import contextlib
import json
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import PreTrainedModel, get_constant_schedule_with_warmup

import data
import eval as evaluation
import ipo
import judge
import plots
import train
from ipo import PreferencePair, ReasoningModel

FIRST = "stage-1"       # the run that makes what the others share
ROLLOUTS = 8            # a prompt, of GRPO and of natural pairs
GRPO_PASSES = 5         # over the prompts: the paper's 40 rollouts a prompt
GRPO_PROMPTS = 2        # of an optimizer step


@dataclass
class Start:
    """What all runs of a seed begin with."""
    folder: Path                    # OUT/seedN
    config: train.Config            # of a plain run
    harmful: list[dict]             # training prompts
    held_out: list[dict]
    base: ReasoningModel
    the_judge: judge.Judge
    candidates: list[PreferencePair]

    @property
    def kept(self) -> list[PreferencePair]:
        return [pair for pair in self.candidates if pair.status == "kept"]


# Changes of the candidates, for ablations


def with_triggers(n: int, pairs: list[PreferencePair], start: Start) -> list[PreferencePair]:
    """Only the first n triggers' candidates, as if the pool had no others."""
    pool = ["", *ipo.TRIGGERS[:n]]      # "" where a rollout has no cue
    return [pair for pair in pairs if pair.trigger in pool]


def through_text(
    space_stays: bool, pairs: list[PreferencePair], start: Start
) -> list[PreferencePair]:
    """Every part decoded and encoded again, as a pipeline of texts would. space_stays: where both
    sides begin with a space it is left to the prefix, as many such pipelines do."""
    tokenizer = start.base.tokenizer
    changed = Counter()
    again = []
    for pair in pairs:
        prefix = ipo.decode(tokenizer, pair.prefix_ids)
        chosen = ipo.decode(tokenizer, pair.chosen_ids)
        rejected = ipo.decode(tokenizer, pair.rejected_ids)
        if space_stays and chosen.startswith(" ") and rejected.startswith(" "):
            prefix += " "
            chosen = chosen[1:]
            rejected = rejected[1:]
        other = replace(
            pair, prefix_ids=tokenizer.encode(prefix, add_special_tokens=False),
            chosen_ids=tokenizer.encode(chosen, add_special_tokens=False),
            rejected_ids=tokenizer.encode(rejected, add_special_tokens=False))
        if pair.status == "kept":
            changed["pairs"] += 1
            changed["other prefix"] += other.prefix_ids != pair.prefix_ids
            changed["other chosen"] += other.chosen_ids != pair.chosen_ids
            changed["other rejected"] += other.rejected_ids != pair.rejected_ids
        again.append(other)
    note = f"space_stays={space_stays}, other ids than before: {dict(changed)}"
    data.write_text(start.folder / f"text{'-space' if space_stays else ''}.txt", note)
    return again


def as_they_are(pairs: list[PreferencePair], start: Start) -> list[PreferencePair]:
    return pairs


# Rivals: each trains the policy and returns how many generations it took


def ipo_as_it_is(policy: PreTrainedModel, start: Start, run: Path) -> int:
    """Stage 1 of train.py, to see what it costs; the model is that of the run of stage 1 alone."""
    train.train_stage(1, policy, start.kept, start.base, start.config, run)
    return generations(start.candidates)


def sft_on_chosen(policy: PreTrainedModel, start: Start, run: Path) -> int:
    """SFT on the chosen sides of IPO's pairs."""
    pairs = [replace(pair, rejected_ids=[]) for pair in start.kept]
    train.train_stage(1, policy, pairs, start.base, start.config, run)
    return generations(start.candidates)


def dpo_on_full_traces(policy: PreTrainedModel, start: Start, run: Path) -> int:
    """IPO's pairs uncut: z[:h] counts as supervised, on both sides."""
    pairs = []
    for pair in start.kept:
        at = len(pair.prefix_ids) - pair.h
        z = pair.prefix_ids[at:]
        pairs.append(replace(
            pair, prefix_ids=pair.prefix_ids[:at], h=0, chosen_ids=z + pair.chosen_ids,
            rejected_ids=z + pair.rejected_ids))
    train.train_stage(1, policy, pairs, start.base, start.config, run)
    return generations(start.candidates)


def dpo_on_natural_pairs(policy: PreTrainedModel, start: Start, run: Path) -> int:
    """A rollout that is safe in both parts over one with unsafe reasoning, of ROLLOUTS a prompt.
    As many pairs as IPO has; prompts whose rollouts are all of one kind give none."""
    records = []
    keys = []
    for i, record in enumerate(start.harmful):
        for k in range(ROLLOUTS):
            records.append(record)
            keys.append(f"natural/{i}/{k}")
    sampler = data.make_sampler(start.base, start.config)
    rollouts = data.roll_out(records, keys, start.base, sampler)
    pairs = []
    for i in range(0, len(rollouts), ROLLOUTS):
        safe = []
        unsafe = []
        for rollout in rollouts[i:i + ROLLOUTS]:
            reasoning_safe, response_safe = truth(rollout.output_ids, start.base)
            if not reasoning_safe:
                unsafe.append(rollout)
            elif response_safe:
                safe.append(rollout)
        for chosen in safe:
            for rejected in unsafe:
                pairs.append(PreferencePair(
                    chosen.prompt, chosen.prompt_ids, chosen.output_ids, rejected.output_ids,
                    key=str(i)))
    if not pairs:
        raise data.UserError("no prompt has both kinds of rollouts; use more prompts")
    pairs = random.Random(start.config.seed).choices(pairs, k=len(start.kept))
    train.train_stage(1, policy, pairs, start.base, start.config, run)
    return len(rollouts)


def grpo(
    reasoning_weight: float, response_weight: float, passes: int, policy: PreTrainedModel,
    start: Start, run: Path,
) -> int:
    """GRPO on fresh rollouts; the reward is a weighted sum of [z is safe] and [y is safe].

    One step a batch, no KL term, no clipping; the rate stays at its peak. Temperature 1 and no
    nucleus, so that the gradient is that of the policy that was sampled.
    """
    config = start.config
    rng = random.Random(config.seed)
    order = []
    for _ in range(passes):
        order += rng.sample(start.harmful, len(start.harmful))
    steps = range(0, len(order), GRPO_PROMPTS)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0)
    schedule = get_constant_schedule_with_warmup(optimizer, round(train.WARMUP * len(steps)))
    made = 0
    log = []
    for step in steps:
        prompts = []
        for record in order[step:step + GRPO_PROMPTS]:
            prompts += [data.render(start.base.tokenizer, record["prompt"])] * ROLLOUTS
        outputs = ipo.sample(
            policy, prompts, max_new_tokens=config.max_new_tokens, eos_ids=start.base.eos_ids,
            temperature=1.0, top_p=1.0, seed=config.seed, batch_size=config.sample_batch,
            keys=[f"grpo/{step}/{i}" for i in range(len(prompts))])
        made += len(outputs)
        rewards = []
        for output_ids in outputs:
            reasoning_safe, response_safe = truth(output_ids, start.base)
            rewards.append(reasoning_weight * reasoning_safe + response_weight * response_safe)
        rewards = torch.tensor(rewards).view(-1, ROLLOUTS)                    # (prompts, rollouts)
        spread = rewards.std(-1, keepdim=True) + 1e-4
        advantages = (rewards - rewards.mean(-1, keepdim=True)) / spread
        lengths = torch.tensor([float(len(output_ids)) for output_ids in outputs])
        logps = ipo.completion_logps(policy, list(zip(prompts, outputs)))     # (B,)
        loss = -(advantages.view(-1) * logps / lengths).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), train.MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        log.append({"step": step // GRPO_PROMPTS, "reward": rewards.mean().item(),
                    "groups alike": int((rewards.std(-1) == 0).sum())})    # they teach nothing
    data.write_jsonl(run / "log.jsonl", log)
    return made


def truth(output_ids: list[int], model: ReasoningModel) -> tuple[bool, bool]:
    """(reasoning is safe, response is safe) by the grammar; a response that is not there or did not
    end is not safe."""
    z, y = ipo.split_output(output_ids, model.think_end)
    reasoning_safe = not data.harmful(ipo.decode(model.tokenizer, z))
    if y is None or output_ids[-1] not in model.eos_ids:
        return reasoning_safe, False
    return reasoning_safe, not data.harmful(ipo.decode(model.tokenizer, y))


def generations(candidates: list[PreferencePair]) -> int:
    """How often the base was sampled for IPO's candidates: rollouts and continuations."""
    rollouts = {pair.key for pair in candidates}
    return len(rollouts) + sum(pair.interventions for pair in candidates)


# The runs


@dataclass
class Run:
    """A row of the table: a run of train.py with these flags and changed candidates, or a rival."""
    name: str
    title: str
    flags: list[str] = field(default_factory=list)
    change: Callable = as_they_are
    rival: Callable | None = None


COST_OF_IPO = "IPO, stage 1 alone, its cost"
RUNS = [
    Run(FIRST, "IPO, stage 1 alone", ["--benign", "none"]),
    Run("ipo", COST_OF_IPO, rival=ipo_as_it_is),
    Run("sft", "SFT on the chosen side", rival=sft_on_chosen),
    Run("dpo-full", "DPO on full traces", rival=dpo_on_full_traces),
    Run("dpo-natural", "DPO on natural pairs", rival=dpo_on_natural_pairs),
    Run("grpo", "GRPO, reward [z safe] + [y safe]", rival=partial(grpo, 1.0, 1.0, GRPO_PASSES)),
    # About as many generations as IPO takes:
    Run("grpo-1", "GRPO, [z safe] + [y safe], one pass", rival=partial(grpo, 1.0, 1.0, 1)),
    Run("grpo-response", "GRPO, [y safe]", rival=partial(grpo, 0.0, 1.0, GRPO_PASSES)),
    Run("grpo-printed", "GRPO, [z safe] - [y safe], as printed",
        rival=partial(grpo, 1.0, -1.0, GRPO_PASSES)),
    Run("full", "IPO, both stages"),
    Run("sft-0", "no SFT term", ["--sft-weight", "0"]),
    Run("sft-0.2", "SFT weight 0.2", ["--sft-weight", "0.2"]),
    Run("sft-0.5", "SFT weight 0.5", ["--sft-weight", "0.5"]),
    Run("sft-1", "SFT weight 1", ["--sft-weight", "1"]),
    Run("beta-0.1", "beta 0.1", ["--beta", "0.1"]),
    Run("beta-0.5", "beta 0.5", ["--beta", "0.5"]),
    Run("beta-1", "beta 1", ["--beta", "1"]),
    Run("no-sums", "no sums in stage 2", ["--benign", "{benign_without_sums}"]),
    Run("triggers-1", "1 trigger", ["--triggers", "{triggers_1}"], partial(with_triggers, 1)),
    Run("triggers-3", "3 triggers", ["--triggers", "{triggers_3}"], partial(with_triggers, 3)),
    Run("reasoning", "the response not supervised", ["--supervise", "reasoning"]),
    Run("text", "text at the cut", change=partial(through_text, False)),
    Run("text-space", "text at the cut, its space left to the prefix",
        change=partial(through_text, True)),
]


def flags_of(run: Run, start: Start) -> list[str]:
    """The run's flags, the files that they name written."""
    files = {}
    for n in (1, 3):
        files[f"triggers_{n}"] = start.folder / f"triggers_{n}.txt"
        data.write_text(files[f"triggers_{n}"], "\n".join(ipo.TRIGGERS[:n]) + "\n")
    files["benign_without_sums"] = start.folder / "benign_without_sums.jsonl"
    guards = data.kingdom_prompts(
        "train", "benign", train.KINGDOM_PROMPTS["benign"], start.config.seed)
    data.write_jsonl(files["benign_without_sums"], guards)
    return [text.format(**files) for text in run.flags]


def start_seed(seed: int, out: Path, options: list[str]) -> Start:
    """The run of stage 1 alone, and what the others take over from it."""
    folder = out / f"seed{seed}" / FIRST
    flags = ["--seed", str(seed), "--out", str(folder), *options]
    run_train([*flags, "--benign", "none"], folder)
    config = train.parse(flags)
    harmful, _ = train.training_prompts(config)
    base = data.load_model(folder / "base", config.device)
    candidates = []
    for trace in data.read_jsonl(folder / "traces.jsonl"):
        candidates += [PreferencePair(**candidate) for candidate in trace["candidates"]]
    return Start(
        folder=folder.parent, config=config, harmful=harmful,
        held_out=evaluation.load_sets(config.sets, config.limit), base=base,
        the_judge=judge.load_judge(config, base), candidates=candidates)


def run_train(flags: list[str], folder: Path) -> None:
    """train.py with its output in the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "terminal.txt", "a") as log, contextlib.redirect_stdout(log):
        train.main(flags)


def same_as_full(run: Run, start: Start, options: list[str]) -> bool:
    """Whether the run's flags are what train.py does anyway."""
    if run.name == "full" or run.rival or run.change is not as_they_are:
        return False
    config = train.parse(
        ["--seed", str(start.config.seed), "--out", start.config.out, *options, *run.flags])
    return config == start.config


def run_ablation(run: Run, start: Start, options: list[str]) -> None:
    """A full run of train.py that begins with the seed's base, traces and answers before."""
    folder = start.folder / run.name
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        shutil.copytree(start.folder / FIRST / "base", folder / "base")
        data.write_jsonl(folder / "eval_before.jsonl", rows_before(start.folder))
        changed = run.change(start.candidates, start)
        traces = data.read_jsonl(start.folder / FIRST / "traces.jsonl")
        for trace in traces:
            trace["candidates"] = [vars(pair) for pair in changed if pair.key == trace["key"]]
        data.write_jsonl(folder / "traces.jsonl", traces)
    flags = ["--seed", str(start.config.seed), "--out", str(folder), *options]
    run_train(flags + flags_of(run, start), folder)


def rows_before(folder: Path) -> list[dict]:
    """The base's answers to the held-out prompts."""
    rows = data.read_jsonl(folder / FIRST / "eval_traces.jsonl")
    return [row for row in rows if row["side"] == "before"]


def run_rival(run: Run, start: Start) -> None:
    """Train with the rival, measure the model, and leave both in result.json."""
    folder = start.folder / run.name
    folder.mkdir(exist_ok=True)
    policy = train.make_policy(start.base, start.config)
    begun = time.process_time()
    made = run.rival(policy, start, folder)
    seconds = time.process_time() - begun
    model = replace(start.base, model=policy.eval())
    rows = evaluation.evaluate(
        folder / "eval_after.jsonl", "after", start.held_out, model,
        data.make_sampler(model, start.config), start.the_judge)
    data.write_text(folder / "result.json", json.dumps(
        {"after": evaluation.ratios(rows), "generations": made, "cpu_seconds": seconds,
         "steps": len(data.read_jsonl(folder / "log.jsonl"))}, indent=1))
    (folder / "stage1.safetensors").unlink(missing_ok=True)


# The tables


Ratios = dict[str, dict]    # eval.py's, by name


def results(out: Path, seed: int) -> dict[str, Ratios]:
    """{row's title: ratios} of what a seed has; the base first."""
    folder = out / f"seed{seed}"
    found = {}
    if (folder / FIRST / "eval.json").exists():
        found["the base"] = evaluation.ratios(rows_before(folder))
    for run in RUNS:
        for file in ("eval.json", "result.json"):
            if (folder / run.name / file).exists():
                found[run.title] = json.loads((folder / run.name / file).read_text())["after"]
    return found


def pool(by_seed: list[dict[str, Ratios]]) -> dict[str, Ratios]:
    """Counts of all seeds together, for the rows that every seed has."""
    pooled = {}
    for title in by_seed[0]:
        if not all(title in found for found in by_seed):
            continue
        pooled[title] = {}
        for name in by_seed[0][title]:
            of_seeds = [found[title][name] for found in by_seed]
            n = sum(ratio["n"] for ratio in of_seeds)
            k = sum(round((ratio["rate"] or 0) * ratio["n"]) for ratio in of_seeds)
            pooled[title][name] = evaluation.share(k, n)
    return pooled


def show(title: str, found: dict[str, Ratios]) -> None:
    lines = [[title] + [words for _, _, words in evaluation.RATIOS.values()]]
    for row, ratios in found.items():
        cells = [evaluation.percent(ratios.get(name)) for name in evaluation.RATIOS]
        lines.append([row] + cells)
    print(f"\n{evaluation.as_text(lines)}")


def show_each(by_seed: list[dict[str, Ratios]], titles: list[str]) -> None:
    """The rates of each seed, in per cent."""
    lines = [["a seed"] + [words for _, _, words in evaluation.RATIOS.values()]]
    for title in titles:
        cells = []
        for name in evaluation.RATIOS:
            rates = [100 * found[title][name]["rate"] for found in by_seed]
            cells.append(" / ".join(f"{rate:.1f}" for rate in rates))
        lines.append([title] + cells)
    print(f"\n{evaluation.as_text(lines)}")


def show_costs(out: Path, seeds: list[int]) -> None:
    """What the rivals cost, a cell a seed. The seconds hold the sampling that is done for the rival
    alone: GRPO's, and that of natural pairs."""
    lines = [["steps / generations / CPU seconds"] + [f"seed {seed}" for seed in seeds]]
    for run in RUNS:
        cells = []
        for seed in seeds:
            path = out / f"seed{seed}" / run.name / "result.json"
            if path.exists():
                result = json.loads(path.read_text())
                cells.append(f"{result['steps']} / {result['generations']} / "
                             f"{result['cpu_seconds']:.0f}")
        if cells:
            lines.append([run.title] + cells)
    print(f"\n{evaluation.as_text(lines)}")


def error_bar(ratio: dict) -> list[list[float]]:
    """How far the interval reaches down and up; an end that rounding puts inside counts as 0."""
    down = max(0.0, ratio["rate"] - ratio["low"])
    up = max(0.0, ratio["high"] - ratio["rate"])
    return [[down], [up]]


def draw(found: dict[str, Ratios]) -> None:
    """Harmful reasoning and harmful responses against benign compliance, a point a row."""
    found = {title: ratios for title, ratios in found.items() if title != COST_OF_IPO}
    figure, axes = plots.panels(2, width=11, height=5)
    markers = "osD^v<>P"
    for panel, name in zip(axes, ("reasoning_harmful", "response_harmful")):
        for i, (title, ratios) in enumerate(found.items()):
            x = ratios["benign_complied"]
            y = ratios[name]
            panel.errorbar(
                x["rate"], y["rate"], xerr=error_bar(x), yerr=error_bar(y),
                label=title if name == "reasoning_harmful" else None, linewidth=0.8,
                marker=markers[i // len(plots.COLOURS) % len(markers)],
                color=plots.COLOURS[i % len(plots.COLOURS)], linestyle="none")
        panel.set(xlabel="benign prompts complied with", ylabel=evaluation.RATIOS[name][2],
                  xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    figure.legend(loc="outside right upper", fontsize=9)
    plots.save(figure, "rivals")


def main(argv: list[str] | None = None) -> None:
    names = [run.name for run in RUNS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/rivals"))
    parser.add_argument("--only", nargs="*", choices=names, default=names, metavar="NAME",
                        help=f"of {', '.join(names)}; none: only the tables and the figure")
    parser.add_argument("--limit", help="use at most this many prompts of each set, to try it out")
    options = parser.parse_args(argv)
    given = ["--limit", options.limit] if options.limit else []
    with data.errors_in_one_line():
        for seed in options.seeds if options.only else []:
            start = start_seed(seed, options.out, given)
            for run in RUNS:
                finished = [start.folder / run.name / file for file in ("eval.json", "result.json")]
                if run.name not in options.only or any(path.exists() for path in finished):
                    continue
                if same_as_full(run, start, given):
                    continue
                begun = time.time()
                if run.rival:
                    run_rival(run, start)
                else:
                    run_ablation(run, start, given)
                print(f"seed {seed}, {run.title}: {time.time() - begun:.0f} s", file=sys.stderr)
        by_seed = [results(options.out, seed) for seed in options.seeds]
        pooled = pool(by_seed)
        show(f"seeds {' '.join(map(str, options.seeds))}", pooled)
        if len(by_seed) > 1:
            show_each(by_seed, list(pooled))
        show_costs(options.out, options.seeds)
        draw(pooled)


if __name__ == "__main__":
    main()
