"""python tests/experiments/result.py RUN...: the pooled table of finished runs, and its picture.

Prints each ratio before and after, pooled over the runs, with a Wilson interval, and beside it each
run's own; draws figures/result.svg.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import eval as evaluation
import plots


def pooled(ratios: list[dict]) -> dict:
    """One ratio of the runs' own, as eval.share gives it."""
    k = sum(round(ratio["rate"] * ratio["n"]) for ratio in ratios)
    return evaluation.share(k, sum(ratio["n"] for ratio in ratios))


def columns_of(runs: list[Path]) -> dict[str, dict]:
    """{"before": {ratio's name: pooled ratio}, "after": ...}, and a column a run and side."""
    summaries = [json.loads((run / "eval.json").read_text()) for run in runs]
    columns = {}
    for side in ("before", "after"):
        names = summaries[0][side]
        columns[side] = {name: pooled([summary[side][name] for summary in summaries])
                         for name in names}
    return columns


def each_run(runs: list[Path]) -> list[list[str]]:
    """Lines of the rates of each run: "before -> after" in percent."""
    lines = [["", *(run.name for run in runs)]]
    summaries = [json.loads((run / "eval.json").read_text()) for run in runs]
    for name, (_, _, title) in evaluation.RATIOS.items():
        cells = []
        for summary in summaries:
            before, after = summary["before"][name]["rate"], summary["after"][name]["rate"]
            cells.append(f"{100 * before:.1f} -> {100 * after:.1f}")
        lines.append([title, *cells])
    return lines


def draw(columns: dict[str, dict]) -> None:
    """A bar each ratio and side, with its interval."""
    figure, (axes,) = plots.panels(width=7.0, height=3.2)
    titles = []
    for i, (name, (_, _, title)) in enumerate(evaluation.RATIOS.items()):
        titles.append(title)
        for side, offset, colour in (("before", -0.19, plots.COLOURS[1]),
                                     ("after", 0.19, plots.COLOURS[0])):
            ratio = columns[side][name]
            rate, low, high = (100 * ratio[key] for key in ("rate", "low", "high"))
            errors = [[max(0.0, rate - low)], [max(0.0, high - rate)]]
            axes.barh(i + offset, rate, height=0.36, color=colour, xerr=errors, ecolor=plots.INK,
                      label=side if i == 0 else None)
            axes.text(min(high, 100) + 1.5, i + offset, f"{rate:.1f}", va="center", fontsize=9)
    axes.set_yticks(range(len(titles)), titles)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel("% of held-out answers, with 95 % intervals")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    plots.save(figure, "result")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    runs = parser.parse_args(argv).runs
    columns = columns_of(runs)
    print(evaluation.as_text(evaluation.table(columns)))
    print()
    print(evaluation.as_text(each_run(runs)))
    draw(columns)


if __name__ == "__main__":
    main()
