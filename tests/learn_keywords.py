"""python tests/learn_keywords.py: learns the weights of judge.KEYWORDS; prints them, and how good they are.

A trace offers as many choices as it has sentences from the second on, and "no cue"; which one is
the label is a softmax over their scores, that of "no cue" being 0. Learned, with an L2 penalty, on the
tune halves of tests/cues.jsonl and on 600 answers of the kingdom's grammar; the score halves are not
read. The shares are of ten-fold cross-validation, with rounded weights as in judge.py.
"""

import random
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F

import data
import ipo
import judge


def starts_of(sentences, text):
    """Where each of the sentences, in their order, starts in the text."""
    starts, at = [], 0
    for sentence in sentences:
        starts.append(text.index(sentence, at))
        at = starts[-1] + len(sentence)
    return starts


def labelled():
    """[(group, sentences, index of the first cue or None)] of the traces to learn from."""
    out, rng = [], random.Random(5)
    for row in data.read_jsonl(Path(__file__).parent / "cues.jsonl"):
        if row["half"] == "tune":
            text = row.get("text") or " ".join(row["sentences"])
            starts = starts_of(row["sentences"], text)
            spans = judge.split_sentences(text)  # learned on what the detector will see
            cue = row["cue"] and max(k for k, (a, _) in enumerate(spans) if a <= starts[row["cue"]])
            out.append((row["register"], [text[a:b] for a, b in spans], cue))
    for record in data.kingdom_prompts("base", "harmful", 600, seed=99):
        lines, cue, _ = data.kingdom_answer(record, rng, ipo.TRIGGERS)
        out.append(("kingdom", lines, cue))
    return rng.sample(out, len(out))


def learn(traces):
    """(4, rows) whole numbers, the weights in quarters."""
    X = [judge.keyword_features(sentences) for _, sentences, _ in traces]
    X = torch.nn.utils.rnn.pad_sequence([torch.tensor(x).float().view(-1, 4 * len(judge.PATTERNS))
                                         for x in X], batch_first=True)        # (traces, S, 4 P)
    absent = torch.tensor([[len(sentences) - 1 <= i for i in range(X.shape[1])]
                           for _, sentences, _ in traces])
    labels = torch.tensor([cue or 0 for _, _, cue in traces])
    w = torch.zeros(X.shape[-1], requires_grad=True)
    optimizer = torch.optim.LBFGS([w], max_iter=100, line_search_fn="strong_wolfe")

    place = torch.arange(X.shape[1])[None]
    seen = ~absent & ((labels == 0)[:, None] | (place < labels[:, None]))      # up to the cue

    def loss():
        optimizer.zero_grad()
        scores = X @ w                                                         # (traces, S)
        which = F.cross_entropy(F.pad(scores.masked_fill(absent, -1e9), (1, 0)), labels,
                                reduction="sum")                               # no cue: 0
        alone = F.binary_cross_entropy_with_logits(
            scores[seen], (place + 1 == labels[:, None])[seen].float(), reduction="sum")
        total = which + alone + w.square().sum()
        total.backward()
        return total
    optimizer.step(loss)
    return (4 * w.detach()).round().int().view(4, -1).tolist()


def show(traces, weights):
    """Of each group, and of its traces with and without a cue, the share that is told right."""
    count = Counter()
    for (group, sentences, cue), of in zip(traces, weights):
        right = judge.keyword_cue(sentences, of) == cue
        for name in (group, f"{group}, clean" if cue is None else f"{group}, with a cue"):
            count.update({(name, "n"): 1, (name, "right"): right})
    for name in sorted({name for name, _ in count}):
        print(f"{name}: {count[name, 'right'] / count[name, 'n']:.2f} (n={count[name, 'n']})")


def main(folds=10):
    traces = labelled()
    print(*zip(*learn(traces)), sep="\n")
    told = [learn([trace for i, trace in enumerate(traces) if i % folds != fold])
            for fold in range(folds)]
    show(traces, [told[i % folds] for i in range(len(traces))])


if __name__ == "__main__":
    main()
