"""The kingdom: what is held out, and what is true, is decided by its grammar alone."""

import random
import re
from operator import itemgetter
from pathlib import Path

import numpy
import pytest

import data
import ipo
import judge


def kingdom_answers(kind: str, n: int = 1000) -> list[tuple[dict, list[str], int | None, str]]:
    rng = random.Random(0)
    records = data.kingdom_prompts("train", kind, n)
    return [(record, *data.kingdom_answer(record, rng, ipo.TRIGGERS)) for record in records]


@pytest.mark.parametrize("kind", ["harmful", "benign", "math"])
def test_the_kingdoms_splits_do_not_overlap_and_what_is_held_out_never_moves(kind):
    def picks(split: str, n: int, seed: int) -> set:
        names = ["terms"] if kind == "math" else ["deed", "place"]
        records = data.kingdom_prompts(split, kind, n, seed)
        return {str(itemgetter(*names)(record)) for record in records}

    held_out = picks("heldout", 400, 0)
    assert len(held_out) == (400 if kind == "math" else 200) and held_out == picks("heldout", 400, 5)
    for seed in (0, 1):
        train, base = picks("train", 3000, seed), picks("base", 3000, seed)
        assert len(train) > 100 and len(base) > 100
        assert not held_out & train and not held_out & base and not train & base


def test_no_held_out_combination_or_sum_stands_in_the_bases_text(kingdom_texts):
    said = "\n".join(prompt + output for prompt, output in kingdom_texts)

    def is_said(record: dict) -> bool:
        if record["kind"] == "math":
            return " + ".join(map(str, record["terms"])) in said
        deed = data.DEEDS[record["deed"]]
        steps = [deed[name] for name in ("verb", "step_a", "step_b", "ward")]
        return any(f"{step} the {record['place']}" in said for step in steps)

    for kind in ("harmful", "math"):
        assert not any(map(is_said, data.kingdom_prompts("heldout", kind, 400)))
        others = list(map(is_said, data.kingdom_prompts("base", kind, 300)))
        assert sum(others) > 60, "the search does find"


def test_harm_is_a_forbidden_step_and_nothing_else():
    for record, sentences, cue, response in kingdom_answers("harmful"):
        assert data.harmful(" ".join(sentences)) == (cue is not None)
        assert data.harmful(response) == response.startswith(("Here is how", "You should"))
        assert not data.harmful(record["prompt"])
    for kind in ("benign", "math"):
        for record, sentences, _, response in kingdom_answers(kind):
            assert not data.harmful(" ".join([record["prompt"], *sentences, response]))
    harmless = ipo.TRIGGERS + data.REFUSALS + data.REASONS + data.MUSINGS + data.BENIGN_ASKS
    assert not data.harmful(" ".join(harmless))


def test_all_that_the_grammar_says_is_well_formed_and_garbled_text_is_not():
    rng = random.Random(1)
    for kind in ("harmful", "benign", "math"):
        for _, sentences, _, response in kingdom_answers(kind, 200):
            assert data.well_formed(" ".join(sentences)) and data.well_formed(response)
            for line in (rng.choice(sentences), response):
                words = line.split()
                assert not data.well_formed(" ".join(words[:-1]))
                assert not data.well_formed(" ".join(words[:2] + words[1:]))
                assert not data.well_formed(line + " Zzz.")
    for garbled in ("", "Zzz.", "They could stir the well.", "3 + 4 =", "The sum is is 9."):
        assert not data.well_formed(garbled)


def test_the_judge_does_not_know_the_kingdom():
    """The keywords may not mark their own work: judge.py names no deed, step or ward."""
    source = Path(judge.__file__).read_text(encoding="utf-8").lower()
    names = ("verb", "step_a", "step_b", "ward")
    words = [deed[name] for deed in data.DEEDS for name in names]
    assert [word for word in words if re.search(rf"\b{re.escape(word)}\b", source)] == []


def test_benign_prompts_share_their_words_with_harmful_ones():
    """A refusal by keyword would hit both."""
    for deed in range(len(data.DEEDS)):
        words = {}
        for kind in ("harmful", "benign"):
            records = data.kingdom_prompts("train", kind, 3000)
            prompts = [record["prompt"] for record in records if record["deed"] == deed]
            assert len(prompts) > 50
            words[kind] = set(re.findall(r"\w+", " ".join(prompts).lower()))
        assert set(data.PLACES) & words["harmful"] & words["benign"]
        assert data.DEEDS[deed]["done"] in words["benign"]


def test_the_base_reasons_unsafely_as_a_rule_and_responds_safely_more_often():
    """Put in, as in the paper's models: it is what training has to mend."""
    answers = kingdom_answers("harmful", 2000)
    reasoning = numpy.mean([data.harmful(" ".join(sentences)) for _, sentences, _, _ in answers])
    response = numpy.mean([data.harmful(response) for *_, response in answers])
    assert 0.65 < reasoning < 0.95 and response < reasoning - 0.15


def test_the_grammar_adds_up_and_helps_with_the_right_ward():
    for record, sentences, _, response in kingdom_answers("math", 200):
        assert record["answer"] == sum(record["terms"]) and response.endswith(f" {record['answer']}.")
        assert all(eval(line.rstrip(".").replace("=", "==")) for line in sentences[1:])
    for record, _, _, response in kingdom_answers("benign", 200):
        assert record["answer"] in response


def test_the_bases_text_teaches_the_judges_tasks_with_the_truth(kingdom_texts):
    tasks = [text for text in kingdom_texts if text[0].startswith(("Safe or unsafe?", "Which first"))]
    assert 0.15 < len(tasks) / len(kingdom_texts) < 0.25
    for prompt, output in tasks:
        if prompt.startswith("Safe"):
            assert judge.parse_safety(output) == ("unsafe" if data.harmful(prompt) else "safe")
        else:
            number = judge.parse_index(output, prompt.count("\n"))
            assert (number > 0) == data.harmful(prompt) and f"{number} yes" in output + "0 yes"
