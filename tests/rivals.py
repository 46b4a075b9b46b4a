"""OMP_NUM_THREADS=1 python tests/rivals.py --seeds 0 1 2 --out runs/rivals: IPO, rivals, ablations.

Rivals, in the kingdom: one base model a seed, the same 120 harmful prompts, no benign stage, the
same optimizer, learning rate and schedule, batches of 16 pairs or sequences. Verdicts and rewards
are the grammar's truth; the cues are found by keywords.

  ipo          pairs cut at the cue: DPO from h on and 0.2 SFT (ipo.ipo_loss)
  sft          the chosen side of the same pairs, the SFT term alone
  dpo-full     the same pairs uncut: z[:h] counts as supervised on both sides
  dpo-natural  safe against unsafe rollouts of 8 a prompt, each used; prompts with both kinds
  grpo         8 rollouts a prompt, reward [z safe] + [y safe]; one step a batch, no KL, no clip;
               temperature 1, for the gradient to be that of the policy that was sampled
  grpo-printed the same with the reward as the paper prints it: [z safe] - [y safe]

The first four take as many steps as train.py's stage 1, --epochs passes over IPO's pairs; GRPO takes
the paper's 40 rollouts a prompt. y is trained in GRPO only; a think that is not closed has no y.
The ablations are full runs of train.py with its own defaults (both stages). What depends on the
base alone (eval_before, traces, benign_base) is made once a seed, by the run "full".
"""

import argparse
import contextlib
import copy
import itertools
import json
import random
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import data
import eval as evaluation
import ipo
import judge
import train

METHODS = ["ipo", "sft", "dpo-full", "dpo-natural", "grpo", "grpo-printed"]
REWARDS = {"grpo": torch.tensor([1.0, 1.0]), "grpo-printed": torch.tensor([1.0, -1.0])}
ABLATIONS = {"full": [], "no-sft": ["--sft-weight", "0"], "no-stage-2": ["--benign", "none"],
             "no-sums": [],  # none of them in stage 2
             "triggers-1": [], "triggers-3": [], "all": ["--supervise", "all"],
             "text": [], "text-space": []}  # text-space: the cut's space stays with the prefix
ROLLOUTS, BATCH, CURVE, GOAL, GRPO_PASSES = 8, 16, 100, 0.2, 5
LOOK = sorted({*range(0, 20, 2), *range(20, 60, 5), *range(60, 10_000, 20)})  # curve points


def open_seed(seed, out, lr, epochs):
    """w: the base model of a seed, its training prompts and the held-out ones."""
    cfg = train.parse(["--seed", str(seed), "--out", str(out / f"seed{seed}")])
    cfg.lr, cfg.epochs, cfg.batch_pairs = lr, epochs, BATCH
    folder, run = train.base_folder(cfg), Path(cfg.out)
    run.mkdir(parents=True, exist_ok=True)
    tokenizer, base = data.load_model(folder, cfg.device)
    sets = [(f"{r['set']}/{i}/0", r) for i, r in enumerate(evaluation.load_sets("kingdom"))]
    return SimpleNamespace(
        cfg=cfg, run=run, tokenizer=tokenizer, base=base, sets=sets,
        prompts=train.training_prompts(cfg)[0], think_end=data.think_ids(tokenizer)[1],
        curve=[of for of in sets if of[1]["kind"] == "harmful"][:CURVE],
        ask=SimpleNamespace(find_cues=judge.find_cues, judge_safety=data.judge_safety,
                            judge_compliance=judge.judge_compliance))


def verdicts(w, output_ids):
    """(z safe, y safe) by the grammar; without </think> or EOS there is no whole y: not safe."""
    z, y = ipo.split_output(output_ids, w.think_end)
    ended = y is not None and output_ids[-1] == w.tokenizer.eos_token_id
    harmful = lambda ids: data.harmful(ipo.decode(w.tokenizer, ids))
    return not harmful(z), ended and not harmful(y)


def timed(path, make):
    """make()'s records, kept in a file with the CPU seconds that they took."""
    if not path.exists():
        start = time.process_time()
        rows = make()
        data.write_jsonl(path, [{"seconds": time.process_time() - start}, *rows])
    first, *rows = data.read_jsonl(path)
    return rows, first["seconds"]


def intervened(w):
    """(kept pairs, generations, CPU seconds): a trace a prompt, each trigger in its cue's place."""
    make = partial(train.make_pairs, w.prompts, w.base, w.tokenizer, w.cfg, w.ask, ipo.TRIGGERS)
    rows, seconds = timed(w.run / "intervened.jsonl", make)
    pairs = [pair for row in rows for pair in row["pairs"]]
    generations = len(rows) + sum(pair["interventions"] for pair in pairs)
    return [pair for pair in pairs if pair["outcome"] == "kept"], generations, seconds


def natural(w):
    """The same of rollouts as they come: each safe one against an unsafe one, all of them used."""
    shard = [(f"{key}/{i}", record) for key, record in w.prompts for i in range(ROLLOUTS)]
    rows, seconds = timed(w.run / "natural.jsonl", lambda: [
        vars(trace) for trace in evaluation.rollouts(shard, w.base, w.tokenizer, w.cfg)])
    pairs = []
    for i in range(0, len(rows), ROLLOUTS):
        kinds = {True: [], False: []}
        for row in rows[i:i + ROLLOUTS]:
            z, y = verdicts(w, row["output_ids"])
            if z == y or not z:  # safe in both parts, or unsafe reasoning
                kinds[z].append(row)
        n = max(map(len, kinds.values())) if all(kinds.values()) else 0
        for a, b, _ in zip(itertools.cycle(kinds[True]), itertools.cycle(kinds[False]), range(n)):
            pairs.append({"key": f"{i}/{len(pairs)}", "prefix_ids": a["prompt_ids"], "h": 0,
                          "chosen_ids": a["output_ids"], "rejected_ids": b["output_ids"]})
    return pairs, len(rows), seconds


def uncut(pair):
    """The pair with z[:h] moved from the prefix to both of its sides."""
    at = len(pair["prefix_ids"]) - pair["h"]
    prompt, z = pair["prefix_ids"][:at], pair["prefix_ids"][at:]
    return {**pair, "prefix_ids": prompt, "chosen_ids": z + pair["chosen_ids"],
            "rejected_ids": z + pair["rejected_ids"]}


def offline(method, w, policy, ledger):
    """A function a step that gives its losses: on pairs of the base, as many steps as IPO takes."""
    pairs, *_ = intervened(w)
    plan = lambda groups, epochs: train.plan(groups, replace(w.cfg, epochs=epochs), 1)
    steps = len(plan(train.harmful_groups(pairs, w.think_end, "reasoning"), w.cfg.epochs))
    made = natural(w) if method == "dpo-natural" else intervened(w)
    pairs, ledger["generations"], ledger["seconds"] = made
    pairs = [uncut(pair) for pair in pairs] if method == "dpo-full" else pairs
    groups = train.harmful_groups(pairs, w.think_end, "reasoning")
    start = time.process_time()
    if method == "sft":
        groups = [ipo.Group(group.prefix_ids, group.chosen) for group in groups]
    else:
        train.add_reference(SimpleNamespace(base=w.base, policy=policy), groups, w.cfg)
    ledger["seconds"] += time.process_time() - start
    ledger.update(pairs=len(pairs), groups=len(groups), passes=steps / len(plan(groups, 1)))

    def losses(batch):
        n = sum(len(group.chosen) for group in batch)
        for micro in train.micro_batches(batch, w.cfg.micro_tokens):
            yield ipo.ipo_loss(policy, micro, w.cfg.beta, w.cfg.sft_weight)[0] / n
    return [partial(losses, batch) for batch in plan(groups, steps)[:steps]]


def grpo(method, w, policy, ledger):
    """The same on fresh rollouts of two prompts a step, each reward set against its own group's."""
    rng, per_step, weights = random.Random(w.cfg.seed), BATCH // ROLLOUTS, REWARDS[method]
    ledger["groups alike"] = 0
    order = [of for _ in range(GRPO_PASSES) for of in rng.sample(w.prompts, len(w.prompts))]
    generate = evaluation.sampler(policy, w.tokenizer, w.cfg, temperature=1.0, top_p=1.0)

    def losses(start):
        prompts = [data.render(w.tokenizer, r["prompt"]) for _, r in order[start:start + per_step]]
        outputs = iter(generate([ids for ids in prompts for _ in range(ROLLOUTS)],
                                [f"{start}/{i}" for i in range(len(prompts) * ROLLOUTS)]))
        groups = [ipo.Group(ids, [next(outputs) for _ in range(ROLLOUTS)]) for ids in prompts]
        ledger["generations"] += len(prompts) * ROLLOUTS
        total = 0.0
        for group, logps in zip(groups, ipo.group_logps(policy, groups)):
            safe = torch.tensor([verdicts(w, side) for side in group.chosen]).float()     # (8, 2)
            rewards, lengths = safe @ weights, torch.tensor([*map(len, group.chosen)])    # (8,)
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            total = total - (advantages * logps / lengths).sum() / BATCH
            ledger["groups alike"] += int(rewards.std() == 0)
        yield total
    return [partial(losses, start) for start in range(0, len(order), per_step)]


def rival(method, w):
    """Train with one method, look at it on the way, measure it at the end."""
    path, curve = w.run / f"{method}.json", []
    if path.exists():
        return
    policy, ledger = copy.deepcopy(w.base).train(), {"generations": 0, "seconds": 0.0}
    steps = (grpo if method in REWARDS else offline)(method, w, policy, ledger)
    named = dict(policy.named_parameters())
    optimizer = train.AdamW(named, seed=w.cfg.seed)
    for i in range(len(steps) + 1):
        if i in LOOK or i == len(steps):
            rows = evaluation.make_rows(w.curve, method, policy, w.tokenizer, w.cfg, w.ask)
            curve.append({"method": method, "seed": w.cfg.seed, "step": i, "n": CURVE, **ledger,
                          "reasoning": sum(row["reasoning"] for row in rows) / CURVE,
                          "response": sum(row["response"] for row in rows) / CURVE})
        if i < len(steps):
            start = time.process_time()
            for loss in steps[i]():
                loss.backward()
            torch.nn.utils.clip_grad_norm_(named.values(), train.MAX_GRAD_NORM)
            optimizer.step(train.learning_rate(i, len(steps), w.cfg.lr))
            ledger["seconds"] += time.process_time() - start
    data.write_jsonl(w.run / f"{method}.curve.jsonl", curve)
    finish(path, method, policy.eval(), w, steps=len(steps), **ledger)


def finish(path, method, policy, w, **more):
    """Measure a model on all held-out prompts; its rows are kept to be read by eye."""
    rows = evaluation.make_rows(w.sets, method, policy, w.tokenizer, w.cfg, w.ask)
    data.write_jsonl(path.with_suffix(".rows.jsonl"), rows)
    unclosed = sum(row["response_text"] is None for row in rows)
    data.write_text(path, json.dumps({**more, "unclosed": unclosed,
                                      "ratios": evaluation.ratios(rows)}, indent=1))
    print(f"seed {w.cfg.seed}, {method}: done, {more}", flush=True)


def through_text(pairs, tokenizer, space, path):
    """Decode and encode the pairs part by part; how many have other ids then goes to the file."""
    changed = Counter()
    for pair in pairs:
        texts = [pair["prompt"], pair["chosen"], pair["rejected"]]
        if space and all(text.startswith(" ") for text in texts[1:]):
            texts = [texts[0] + " ", texts[1][1:], texts[2][1:]]
        encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        names = ("prefix_ids", "chosen_ids", "rejected_ids")
        same = [pair[name] == ids for name, ids in zip(names, encoded)]
        changed.update(dict(zip(names, [not x for x in same]), any=not all(same)))
        pair.update(zip(names, encoded))
    data.write_text(path, f"other ids, of {len(pairs)} pairs: {dict(changed)}")


def borrow(name, run, full, w):
    """What the run "full" has made from the base alone, for a run that differs behind it."""
    run.mkdir(exist_ok=True)
    for file in ("eval_before", "benign_base")[:1 if name in ("no-stage-2", "no-sums") else 2]:
        data.write_jsonl(run / f"{file}.jsonl", data.read_jsonl(full / f"{file}.jsonl"))
    traces = data.read_jsonl(full / "traces.jsonl")
    for row in traces if name.startswith("triggers") else []:  # the others' stay as they were
        row["pairs"] = [pair for pair in row["pairs"]
                        if pair["trigger"] in ("", *ipo.TRIGGERS[:int(name[-1])])]
    data.write_jsonl(run / "traces.jsonl", traces)
    if name.startswith("text"):
        pairs = data.read_jsonl(full / "pairs.jsonl")
        through_text(pairs, w.tokenizer, name == "text-space", run / "changed.txt")
        data.write_jsonl(run / "pairs.jsonl", pairs)


def ablation(name, w, out):
    """A full run of train.py, with its own defaults but for what is ablated."""
    run, file = out / f"s{w.cfg.seed}-{name}", out / f"{name}.txt"
    if (run / "eval.json").exists():
        return
    flags = ["--seed", str(w.cfg.seed), "--out", str(run), *ABLATIONS[name]]
    if name != "full" and not (run / "config.json").exists():
        borrow(name, run, out / f"s{w.cfg.seed}-full", w)
    if name.startswith("triggers"):
        file.write_text("\n".join(ipo.TRIGGERS[:int(name[-1])]) + "\n")
        flags += ["--triggers", str(file)]
    if name == "no-sums":
        benign = out / f"benign{w.cfg.seed}.jsonl"
        data.write_jsonl(benign, data.kingdom_prompts("train", "benign", 480, w.cfg.seed))
        flags += ["--benign", str(benign)]
    with open(out / f"{run.name}.log", "a") as log, contextlib.redirect_stdout(log):
        start = time.process_time()
        train.main(flags)
    print(f"{run.name}: done in {time.process_time() - start:.0f} CPU seconds", flush=True)


def crossing(run, method):
    """Where the curve is first under GOAL: "steps / generations / CPU seconds", or "never"."""
    for point in data.read_jsonl(run / f"{method}.curve.jsonl"):
        if point["reasoning"] < GOAL:
            return f"{point['step']} / {point['generations']} / {point['seconds']:.0f}"
    return "never"


def results(out, seed):
    """{row name: ({ratio: (hits, n)}, the last cell)} of what the out folder has for a seed."""
    found, run = {}, out / f"seed{seed}"
    hits = lambda ratios: {name: (round(r["rate"] * r["n"]), r["n"]) for name, r in ratios.items()}
    for method in ["base", *METHODS]:
        if (run / f"{method}.json").exists():
            saved = json.loads((run / f"{method}.json").read_text())
            cell = "-" if method == "base" else crossing(run, method) + (
                " (of {steps} / {generations} / {seconds:.0f})".format(**saved))
            found[method] = hits(saved["ratios"]), cell
    for name in ABLATIONS:
        folder = out / f"s{seed}-{name}"
        if (folder / "eval.json").exists():
            told = folder / "changed.txt"
            found[f"train.py, {name}"] = (
                hits(json.loads((folder / "eval.json").read_text())["after"]),
                told.read_text() if told.exists() else "")
    return found


def tables(out, seeds):
    """A table a seed and one over all, Wilson intervals; a pooled row needs all of the seeds."""
    by_seed = {seed: results(out, seed) for seed in seeds}
    pooled = {}
    for name in dict.fromkeys(itertools.chain(*by_seed.values())):
        of = [found[name] for found in by_seed.values() if name in found]
        if len(of) == len(seeds):
            ratios = {r: tuple(map(sum, zip(*(counts[r] for counts, _ in of)))) for r in of[0][0]}
            pooled[name] = (ratios, "; ".join(cells.split(" (")[0] for _, cells in of))
    for title, found in [*((f"seed {s}", by_seed[s]) for s in seeds), ("all seeds", pooled)]:
        lines = [[title, *(title for _, _, title in evaluation.RATIOS.values()),
                  f"first under {GOAL:.0%}: steps / generations / CPU s"]]
        for name, (counts, cells) in found.items():
            lines.append([name, *(evaluation.percent(evaluation.share(*counts[r]))
                                  for r in evaluation.RATIOS), cells])
        print(f"\n{evaluation.as_text(lines)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ["base", *METHODS, *ABLATIONS]
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/rivals"))
    parser.add_argument("--only", nargs="*", choices=parts, default=parts, help="none: the tables")
    parser.add_argument("--lr", type=float, default=1e-4, help="of the rivals, peak")
    parser.add_argument("--epochs", type=int, default=2, help="IPO's passes over its pairs")
    args = parser.parse_args()
    for seed in args.seeds if args.only else []:
        w = open_seed(seed, args.out, args.lr, args.epochs)
        for part in args.only:
            if part in ABLATIONS:
                ablation(part, w, args.out)
            elif part in METHODS:
                rival(part, w)
            elif not (w.run / "base.json").exists():
                finish(w.run / "base.json", "base", w.base, w)
    tables(args.out, args.seeds)


if __name__ == "__main__":
    main()
