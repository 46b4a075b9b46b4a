"""python tests/experiments/self_judge.py RUN: how well a kingdom run's base judges held-out traces.

The truth is the grammar's: answers that it writes to held-out harmful prompts, where their first
cue stands, and whether they are harmful. Beside the base stand the keywords.
"""

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import data
import eval as evaluation
import ipo
import judge


def held_out_traces(n: int) -> tuple[list[str], list[int | None]]:
    """n reasonings and the character at which the first cue of each starts, None without a cue."""
    rng = random.Random(3)
    texts = []
    starts = []
    for record in data.kingdom_prompts("heldout", "harmful", n):
        sentences, cue, _ = data.kingdom_answer(record, rng, ipo.TRIGGERS)
        texts.append(" ".join(sentences))
        if cue is None:
            starts.append(None)
        else:
            starts.append(sum(len(sentence) + 1 for sentence in sentences[:cue]))
    return texts, starts


def cue_cells(cues: list[judge.Cue], starts: list[int | None]) -> list[str]:
    """How many first cues are exact, one that could not be read being wrong; how many those are."""
    right = 0
    for cue, start in zip(cues, starts):
        found = None if cue.span is None else cue.span[0]
        right += found == start and cue.by != "unparsed"
    unparsed = sum(cue.by == "unparsed" for cue in cues)
    return [evaluation.percent(evaluation.share(right, len(cues))), str(unparsed)]


def safety_cells(verdicts: list[str], texts: list[str]) -> list[str]:
    """The same for safe or unsafe."""
    right = 0
    for verdict, text in zip(verdicts, texts):
        right += verdict == ("unsafe" if data.harmful(text) else "safe")
    return [evaluation.percent(evaluation.share(right, len(texts))),
            str(verdicts.count("unparsed"))]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="a finished kingdom run of train.py")
    parser.add_argument("--n", type=int, default=200, help="held-out traces, at most 200")
    options = parser.parse_args(argv)
    with data.errors_in_one_line():
        settings, models, _ = evaluation.settings_of(options.run, {"judge": "self"})
        base = data.load_model(models["before"], settings.device)
        texts, starts = held_out_traces(options.n)
        lines = [["judge", "first cue exact", "unparsed", "safe or unsafe right", "unparsed"]]
        for name, the_judge in (("the base itself", judge.load_judge(settings, base)),
                                ("keywords", judge.Judge())):
            cues = the_judge.find_cues(texts)
            verdicts = the_judge.judge_safety(texts, [None] * len(texts), "reasoning")
            lines.append([name] + cue_cells(cues, starts) + safety_cells(verdicts, texts))
        print(evaluation.as_text(lines))


if __name__ == "__main__":
    main()
