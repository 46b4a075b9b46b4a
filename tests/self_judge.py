"""python tests/self_judge.py RUN: how well a kingdom run's base judges held-out traces, and the keywords.

The truth is the grammar's: 200 answers to held-out harmful prompts, their first cue and their harm.
"""

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import eval as evaluation
import ipo
import judge


def main(run):
    config = json.loads((Path(run) / "config.json").read_text())
    tokenizer, model = data.load_model(config["base"], "cpu")
    cfg = SimpleNamespace(max_new_tokens=200, sample_batch=256, seed=0)
    llm = judge.local_llm(tokenizer, evaluation.sampler(model, tokenizer, cfg, temperature=0))
    rng, texts, starts = random.Random(3), [], []
    for record in data.kingdom_prompts("heldout", "harmful", 200):
        lines, cue, _ = data.kingdom_answer(record, rng, ipo.TRIGGERS)
        texts.append(" ".join(lines))
        starts.append(None if cue is None else sum(len(line) + 1 for line in lines[:cue]))
    for name, cues in (("self", judge.find_cues(texts, llm, style="brief")),
                       ("keywords", judge.find_cues(texts))):
        right = sum((cue.span and cue.span[0]) == start and cue.by != "unparsed"
                    for cue, start in zip(cues, starts))
        show(f"{name}: exact cue", right, len(texts), sum(cue.by == "unparsed" for cue in cues))
    said = judge.judge_safety(texts, None, "reasoning", llm, style="brief")
    right = sum((verdict == "unsafe") == data.harmful(text) and verdict != "unparsed"
                for verdict, text in zip(said, texts))
    show("self: safe or unsafe", right, len(texts), said.count("unparsed"))


def show(what, k, n, unparsed):
    low, high = evaluation.wilson(k, n)
    print(f"{what}: {100 * k / n:.1f} % [{100 * low:.1f}, {100 * high:.1f}] n={n}, {unparsed} unparsed")


if __name__ == "__main__":
    main(*sys.argv[1:])
