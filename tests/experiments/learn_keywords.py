"""Learns the weights of judge.KEYWORDS from labelled reasonings, and measures them.

    python tests/experiments/learn_keywords.py           # prints the weights to write into judge.py
    python tests/experiments/learn_keywords.py --score   # measures judge.py on the score halves

Learned on the tune halves of cues.jsonl and on 600 answers of the kingdom's grammar. The examples
of a logistic regression are the sentences of a reasoning from the second up to its first cue; those
after it are left out, because there the search is over. The words are chosen by hand, with a look
at the tune halves alone; the score halves only measure:

    register             exact        cue seen   none invented
    free          0.73 (n=150)     0.72 (n=92)     0.83 (n=58)
    kingdom      1.00 (n=1000)    1.00 (n=785)    1.00 (n=215)
    long           0.75 (n=24)     0.94 (n=16)      0.75 (n=8)
    model         0.74 (n=480)    0.75 (n=277)    0.89 (n=203)

The words are English: of the 28 traces of "model" in other languages 8 are exact, of the 452 in
English 349 (0.77). Cross-validation on the tune halves says 0.80, as the words were chosen there.

cues.jsonl: "sentences", "cue" (an index or null), "half" (tune or score) and "register":
"model" is short reasoning as models think, "free" any prose, "long" eight sentences or so in the
manner of DeepSeek-R1.
"""

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import ipo
import judge

FOLDS = 10
PER_LOGIT = 2       # weights are whole numbers of halves of a logit


@dataclass
class Trace:
    """A labelled reasoning; cue is the index of its first compliance cue, or None."""
    register: str
    sentences: list[str]
    cue: int | None


def starts_of(sentences: list[str], text: str) -> list[int]:
    """Where each of the sentences, in their order, starts in the text."""
    starts = []
    position = 0
    for sentence in sentences:
        start = text.index(sentence, position)
        starts.append(start)
        position = start + len(sentence)
    return starts


def split_again(row: dict) -> Trace:
    """A row of cues.jsonl in the sentences that judge.split_sentences makes of its text."""
    text = row.get("text") or " ".join(row["sentences"])
    spans = judge.split_sentences(text)
    cue = None
    if row["cue"] is not None:
        labelled_start = starts_of(row["sentences"], text)[row["cue"]]
        cue = max(i for i, (start, _) in enumerate(spans) if start <= labelled_start)
    return Trace(row["register"], [text[start:end] for start, end in spans], cue)


def labelled_traces(half: str) -> list[Trace]:
    rows = data.read_jsonl(HERE / "cues.jsonl")
    return [split_again(row) for row in rows if row["half"] == half]


def kingdom_traces(split: str, n: int, seed: int) -> list[Trace]:
    rng = random.Random(seed)
    traces = []
    for record in data.kingdom_prompts(split, "harmful", n, seed):
        sentences, cue, _ = data.kingdom_answer(record, rng, ipo.TRIGGERS)
        traces.append(Trace("kingdom", sentences, cue))
    return traces


def features(trace: Trace) -> Tensor:
    """(S - 1, 3 * rows) of 0 and 1: the rows found in each place, from the second sentence on."""
    examples = []
    for places in judge.keyword_features(trace.sentences):
        example = []
        for row in judge.KEYWORDS:
            example += [float(row.name in names) for names in places]
        examples.append(example)
    return torch.tensor(examples).reshape(-1, 3 * len(judge.KEYWORDS))


def learn(traces: list[Trace]) -> Tensor:
    """(3 * rows,) whole numbers: the weights."""
    inputs = []
    labels = []
    for trace in traces:
        last = len(trace.sentences) - 1 if trace.cue is None else trace.cue
        inputs.append(features(trace)[:last])
        labels += [float(i == trace.cue) for i in range(1, last + 1)]
    x = torch.cat(inputs)                                              # (examples, 3 * rows)
    y = torch.tensor(labels)                                           # (examples,)
    weights = torch.zeros(x.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = F.binary_cross_entropy_with_logits(x @ weights, y, reduction="sum")
        total = total + weights.square().sum()                         # keeps the weights small
        total.backward()
        return total

    optimizer.step(loss)
    return (PER_LOGIT * weights.detach()).round()


def first_cue(trace: Trace, weights: Tensor) -> int | None:
    """What judge.keyword_cue would say with these weights."""
    scores = features(trace) @ weights
    found = (scores > 0).nonzero().flatten().tolist()
    return found[0] + 1 if found else None


def cross_validate(traces: list[Trace]) -> list[int | None]:
    """For each trace the cue that is found with the weights learned from the other folds."""
    answers: list[int | None] = [None] * len(traces)
    for fold in range(FOLDS):
        weights = learn([trace for i, trace in enumerate(traces) if i % FOLDS != fold])
        for i in range(fold, len(traces), FOLDS):
            answers[i] = first_cue(traces[i], weights)
    return answers


def share(values: list[bool]) -> str:
    return f"{sum(values) / len(values):.2f} (n={len(values)})"


def print_table(traces: list[Trace], answers: list[int | None]) -> None:
    """For each register the share with the right answer; of the traces with a cue, the share in
    which one is seen; of those without, the share in which none is seen."""
    print(f"{'register':10}{'exact':>16}{'cue seen':>16}{'none invented':>16}")
    for register in sorted({trace.register for trace in traces}):
        exact = []
        seen = []
        none_invented = []
        for trace, answer in zip(traces, answers):
            if trace.register != register:
                continue
            exact.append(answer == trace.cue)
            if trace.cue is None:
                none_invented.append(answer is None)
            else:
                seen.append(answer is not None)
        print(f"{register:10}{share(exact):>16}{share(seen):>16}{share(none_invented):>16}")


def print_weights(weights: Tensor) -> None:
    for row, values in zip(judge.KEYWORDS, weights.reshape(-1, 3).int().tolist()):
        before, itself, after = values
        print(f'KeywordRow("{row.name}", ({before}, {itself}, {after}),')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--score", action="store_true", help="measure judge.py on the score halves")
    if parser.parse_args().score:
        traces = labelled_traces("score")
        for seed in range(5):
            traces += kingdom_traces("heldout", 200, seed)
        print_table(traces, [judge.keyword_cue(trace.sentences) for trace in traces])
        return
    traces = labelled_traces("tune") + kingdom_traces("base", 600, seed=99)
    random.Random(5).shuffle(traces)
    print_weights(learn(traces))
    print(f"\n{FOLDS}-fold cross-validation:")
    print_table(traces, cross_validate(traces))


if __name__ == "__main__":
    main()
