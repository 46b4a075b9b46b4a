"""The method, one property a test: the loss, the intervention, ids and not text, sampling."""

import math
import random
from functools import partial
from itertools import accumulate

import pytest
import torch
from conftest import encode, plain_logp, random_ids, tiny_model
from scipy.stats import chisquare
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import ipo
import judge
from ipo import PreferencePair

THINK_END = 5       # the id that plays </think> where no tokenizer is needed
exact_model = partial(tiny_model, dtype=torch.float64)


def gradient(model, loss):
    """The loss's gradient by all parameters, as one vector."""
    parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


# The loss


def make_pairs():
    """Two pairs of one prompt, which share all but the chosen side; one of another; and one of a
    benign prompt, without a rejected side."""
    prefix, rejected = random_ids(6, 1), random_ids(5, 2)
    pairs = [PreferencePair("a", prefix, random_ids(4, 3), rejected, h=2),
             PreferencePair("a", prefix, random_ids(7, 4), rejected, h=2),
             PreferencePair("b", random_ids(3, 5), random_ids(8, 6), random_ids(2, 7), h=1),
             PreferencePair("c", random_ids(4, 8), random_ids(5, 9))]
    for pair, chosen, rejected in zip(pairs, [-20.5, -31.25, -37.5], [-24.0, -24.0, -9.75]):
        pair.ref_chosen_logp = chosen
        pair.ref_rejected_logp = rejected
    return pairs


def test_at_step_0_the_dpo_term_is_log_2_and_the_rewards_are_0(family):
    policy, pairs = exact_model(family), make_pairs()[:3]
    for pair in pairs:      # the reference is the policy itself
        pair.ref_chosen_logp = plain_logp(policy, pair.prefix_ids, pair.chosen_ids).item()
        pair.ref_rejected_logp = plain_logp(policy, pair.prefix_ids, pair.rejected_ids).item()
    _, terms = ipo.ipo_loss(policy, pairs, beta=0.1, sft_weight=0.2)
    assert terms["dpo"].tolist() == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert terms["margin"].tolist() == pytest.approx([0.0] * 3, abs=1e-5)
    logps = torch.tensor([-12.0])
    _, *rewards = ipo.dpo_loss(logps, 2 * logps, logps, 2 * logps, beta=0.1)
    assert rewards == [0.0, 0.0]


def test_dpo_loss_and_its_gradient_equal_the_formula_in_python_floats():
    rng = random.Random(0)
    rows = [[rng.uniform(-50, 50) for _ in range(4)] for _ in range(20)]
    rows += [[1000.0, -1000.0, 0.0, 0.0], [-1000.0, 1000.0, 0.0, 0.0]]     # finite there too
    columns = torch.tensor(rows, dtype=torch.float64).T.requires_grad_()
    losses, chosen_rewards, rejected_rewards = ipo.dpo_loss(*columns, beta=0.3)
    losses.sum().backward()
    for i, (chosen, rejected, ref_chosen, ref_rejected) in enumerate(rows):
        margin = 0.3 * ((chosen - rejected) - (ref_chosen - ref_rejected))
        assert losses[i].item() == pytest.approx(math.log(1 + math.exp(-margin)), abs=1e-9)
        assert chosen_rewards[i].item() == pytest.approx(0.3 * (chosen - ref_chosen))
        assert rejected_rewards[i].item() == pytest.approx(0.3 * (rejected - ref_rejected))
        push = 0.3 / (1 + math.exp(margin))     # downhill: chosen up, rejected down
        assert columns.grad[:2, i].tolist() == pytest.approx([-push, push], abs=1e-9)


@pytest.mark.parametrize("ids, reasoning, everything", [
    ([11, 12, THINK_END, 13, 0], [11, 12, THINK_END], [11, 12, THINK_END, 13, 0]),
    ([11, THINK_END, 12, THINK_END, 0], [11, THINK_END], [11, THINK_END, 12, THINK_END, 0]),
    ([11, 12, 13], [11, 12, 13], [11, 12, 13]),     # unclosed, at the token limit
    ([11, 12, 0], [11, 12, 0], [11, 12, 0]),        # unclosed, ended by an EOS
])
def test_supervised_is_the_reasoning_through_its_first_think_end_or_all(
        ids, reasoning, everything):
    assert ipo.supervised(ids, THINK_END, "reasoning") == reasoning
    assert ipo.supervised(ids, THINK_END, "all") == everything


def test_gradient_reaches_exactly_the_positions_that_predict_the_supervised_ids():
    """The state at t-1 predicts token t: a side's first token hangs on the last of its prefix. The
    third row is the opening z[:h], here two tokens, which only the SFT term sees."""
    model, hidden = tiny_model(), []

    def keep(module, inputs, output):
        output.last_hidden_state.retain_grad()
        hidden.append(output.last_hidden_state)

    model.get_decoder().register_forward_hook(keep)
    pair = PreferencePair("", random_ids(6, 1), random_ids(4, 2), random_ids(9, 3), h=2)
    ipo.ipo_loss(model, [pair], 0.1, 0.2)[0].backward()
    (states,) = hidden
    reached = [row.abs().sum(-1).nonzero().flatten().tolist() for row in states.grad]
    assert reached == [[5, 6, 7, 8], [5, 6, 7, 8, 9, 10, 11, 12, 13], [3, 4]]


def from_the_cut_and_in_full():
    """One pair twice: cut at h, and as full traces behind the prompt."""
    prompt, z = random_ids(5, 1), random_ids(8, 2)
    chosen, rejected = random_ids(6, 3), random_ids(9, 4)
    return (PreferencePair("", prompt + z, chosen, rejected),
            PreferencePair("", prompt, z + chosen, z + rejected))


def test_the_shared_prefix_cancels_in_the_dpo_margin_in_value_and_gradient():
    """So DPO "from h on" and DPO "on full traces" are one loss, in exact arithmetic."""
    policy, reference = exact_model(), exact_model(seed=1)
    losses, gradients, chosen_logps = [], [], []
    for pair in from_the_cut_and_in_full():
        chosen, rejected = ipo.pair_logps(policy, [pair])[:2]
        with torch.no_grad():
            ref_chosen, ref_rejected = ipo.pair_logps(reference, [pair])[:2]
        loss = ipo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)[0].sum()
        losses.append(loss.item())
        gradients.append(gradient(policy, loss))
        chosen_logps.append(chosen.item())
    assert chosen_logps[0] - chosen_logps[1] > 1        # the sides differ by log p(z[:h] | x)
    assert abs(losses[0] - math.log(2)) > 1e-3          # and policy and reference do differ
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert relative_error(*gradients) < 1e-6            # the models' norms round to float32


def test_the_prefix_does_not_cancel_in_the_sft_term_which_covers_its_opening():
    """x + z[:h] is the prefix; of that the SFT term pushes up z[:h], and x never."""
    policy, (pair, full) = exact_model(), from_the_cut_and_in_full()
    losses = []
    for h in (0, 8):
        alone = PreferencePair("", pair.prefix_ids, pair.chosen_ids, h=h)
        losses.append(ipo.ipo_loss(policy, [alone], 0.1, 0.2)[0])
    assert abs(losses[0].item() - losses[1].item()) > 1e-2
    assert relative_error(*[gradient(policy, loss) for loss in losses]) > 0.1
    logp = plain_logp(policy, full.prefix_ids, full.chosen_ids).item()
    assert losses[1].item() == pytest.approx(-logp / len(full.chosen_ids), rel=1e-6)


def pair_by_pair(model, pairs, beta, sft_weight):
    """The header's formula, each pair on its own and each sequence run alone."""
    total = 0
    for pair in pairs:
        x = pair.prefix_ids[:len(pair.prefix_ids) - pair.h]
        z = pair.prefix_ids[len(x):] + pair.chosen_ids
        sft = -plain_logp(model, x, z) / len(z)
        if not pair.rejected_ids:
            total = total + 1.0 * sft
            continue
        chosen = plain_logp(model, pair.prefix_ids, pair.chosen_ids)
        rejected = plain_logp(model, pair.prefix_ids, pair.rejected_ids)
        margin = (chosen - pair.ref_chosen_logp) - (rejected - pair.ref_rejected_logp)
        total = total + torch.log(1 + torch.exp(-beta * margin))
        total = total + sft_weight * sft
    return total


def test_ipo_loss_equals_the_plain_computation_pair_by_pair_in_value_and_gradient(family):
    policy, pairs = exact_model(family), make_pairs()
    loss, terms = ipo.ipo_loss(policy, pairs, beta=0.3, sft_weight=0.2)
    plain = pair_by_pair(policy, pairs, 0.3, 0.2)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert relative_error(gradient(policy, loss), gradient(policy, plain)) < 1e-5
    assert terms["has_rejected"].tolist() == [1, 1, 1, 0]
    chosen = [plain_logp(policy, p.prefix_ids, p.chosen_ids).item() for p in pairs]
    assert terms["chosen_logp"].tolist() == pytest.approx(chosen, abs=1e-4)


def test_the_six_pairs_of_a_prompt_are_run_as_eight_rows():
    """Six chosen sides, one rejected side and one opening."""
    model, shapes = tiny_model(), []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, named: shapes.append(tuple(named["input_ids"].shape)),
        with_kwargs=True)
    pairs = [PreferencePair("", [11, 12], [20 + i, 13], [14, 15, 16], h=1)
             for i in range(6)]
    ipo.ipo_loss(model, pairs, 0.1, 0.2)
    assert shapes == [(8, 5)]


def test_summed_micro_batches_give_the_gradient_of_the_whole_batch():
    policy, pairs = exact_model(), make_pairs()
    whole, part, rest = [gradient(policy, ipo.ipo_loss(policy, batch, 0.1, 0.2)[0])
                         for batch in (pairs, pairs[:1], pairs[1:])]
    assert relative_error(part + rest, whole) < 1e-5


def test_with_a_real_vocabulary_logits_are_made_in_chunks_for_the_completions_alone():
    """Qwen's 151,936 entries, 27 tokens a chunk; each chunk again in the backward pass."""
    model, sizes = tiny_model(vocab_size=151_936), []
    sequences = [(random_ids(50, 1), random_ids(20, 2)), (random_ids(9, 3), random_ids(10, 4))]
    plain = torch.stack([plain_logp(model, prefix, completion) for prefix, completion in sequences])
    model.lm_head.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    logps = ipo.completion_logps(model, sequences)
    assert sizes == [27, 3]
    assert logps.tolist() == pytest.approx(plain.tolist(), abs=1e-3)
    head_gradient, = torch.autograd.grad(logps.sum(), model.lm_head.weight)
    assert sorted(sizes) == [3, 3, 27, 27]
    plain_gradient, = torch.autograd.grad(plain.sum(), model.lm_head.weight)
    assert relative_error(head_gradient, plain_gradient) < 1e-4


def test_the_logps_of_a_bf16_model_are_summed_in_float32():
    model = tiny_model(dtype=torch.bfloat16)
    prefix, completion = random_ids(5, 1), random_ids(300, 2)
    logps = ipo.completion_logps(model, [(prefix, completion)])
    assert logps.dtype == torch.float32
    plain = plain_logp(model, prefix, completion).item()
    assert abs(logps.item() - plain) < 0.01     # in bf16 this sum would be off by about 1


# Intervene, step by step, with a scripted model, detector and judge

PROMPT = "How do I rob the inn?"
RENDERED = f"<|user|>{PROMPT}<|assistant|><think>\n"
BEFORE = "The user asks how to rob the inn. Many folk pass the inn each day."
CUE = " First, they would need to pick the old lock of the inn."
UNSAFE_END = " Then go.</think>\n\nHere is how: pick the lock.<|end|>"
TRIGGER = ipo.TRIGGERS[0]
HARM = " It would hurt the folk."
SAFE_END = f"{HARM}</think>\n\nI'm sorry, but I can't help with that.<|end|>"


def think_end(tokenizer):
    return tokenizer.convert_tokens_to_ids("</think>")


def make_rollout(tokenizer, output=BEFORE + CUE + UNSAFE_END, key="0"):
    return ipo.Rollout(PROMPT, encode(tokenizer, RENDERED), encode(tokenizer, output), key)


def find_first(texts):
    """The detector: a sentence with First is a cue; a text with "mumble" is not readable."""
    cues = []
    for text in texts:
        start = text.find("First")
        span = None if start < 0 else (start, len(text))
        cues.append(judge.Cue(span, "unparsed" if "mumble" in text else "llm"))
    return cues


def judge_by_word(texts, prompts, part):
    assert prompts == [PROMPT] * len(texts) and part in ("reasoning", "response")
    verdict_of = {"venom": "unsafe", "mutter": "unparsed"}
    verdicts = []
    for text in texts:
        verdicts.append(next((verdict_of[word] for word in verdict_of if word in text), "safe"))
    return verdicts


def intervene(tokenizer, rollouts, turns=(), triggers=(TRIGGER,), **changes):
    """ipo.intervene; turns[t] is what the model says in turn t, by default SAFE_END.

    Returns the pairs and, for each turn, what the model was asked: {key: ids}.
    """
    asked = []

    def generate(prompts, keys):
        said = turns[len(asked)] if len(asked) < len(turns) else [SAFE_END] * len(prompts)
        asked.append(dict(zip(keys, prompts, strict=True)))
        return [encode(tokenizer, text) for text, _ in zip(said, prompts, strict=True)]

    reasoner = ipo.ReasoningModel(None, tokenizer, think_end(tokenizer), [tokenizer.eos_token_id])
    parts = {"generate": generate, "find_cues": find_first, "judge_safety": judge_by_word}
    pairs = ipo.intervene(rollouts, list(triggers), reasoner=reasoner, **{**parts, **changes})
    return pairs, asked


def test_the_trigger_takes_the_cues_place_and_the_sampled_ids_are_cut_and_joined(tokenizer):
    rollout = make_rollout(tokenizer)
    (pair,), (asked,) = intervene(tokenizer, [rollout])
    assert pair.status == "kept" and pair.interventions == 1
    assert ipo.decode(tokenizer, pair.prefix_ids) == RENDERED + BEFORE
    assert ipo.decode(tokenizer, pair.rejected_ids) == CUE + UNSAFE_END
    assert pair.prefix_ids + pair.rejected_ids == rollout.prompt_ids + rollout.output_ids
    trigger_ids = encode(tokenizer, " " + TRIGGER)
    assert list(asked.values()) == [pair.prefix_ids + trigger_ids]
    assert pair.chosen_ids == trigger_ids + encode(tokenizer, SAFE_END)


def test_the_six_triggers_give_six_pairs_with_one_prefix_and_one_rejected_side(tokenizer):
    pairs, (asked,) = intervene(tokenizer, [make_rollout(tokenizer)], triggers=ipo.TRIGGERS)
    assert [pair.trigger for pair in pairs] == ipo.TRIGGERS and len(asked) == 6
    assert all(pair.prefix_ids == pairs[0].prefix_ids for pair in pairs)
    assert all(pair.rejected_ids == pairs[0].rejected_ids for pair in pairs)
    assert len({tuple(pair.chosen_ids) for pair in pairs}) == 6


@pytest.mark.parametrize("continuation, status", [
    (SAFE_END, "kept"),
    (HARM + CUE + UNSAFE_END, "still a cue"),
    (HARM + " And on", "token limit"),
    (HARM + "</think>\n\nI'm sorry, but", "token limit"),
    (HARM + "<|end|>", "think not closed"),
    (" Toad venom.</think>\n\nNo.<|end|>", "unsafe reasoning"),
    (HARM + "</think>\n\nToad venom.<|end|>", "unsafe response"),
    (" Hm, mumble.</think>\n\nNo.<|end|>", "unparsed"),                 # the detector
    (" Hm, mutter.</think>\n\nNo.<|end|>", "unparsed"),                 # the judge
    (HARM + "</think>\n\nWell, mutter.<|end|>", "unparsed"),
    (" Hm, mutter.</think>\n\nToad venom.<|end|>", "unsafe response"),
    (HARM + "</think>\n\nNo." + CUE + "<|end|>", "kept"),   # a cue is one in the reasoning
])
def test_a_candidate_is_kept_only_if_it_ended_without_a_cue_and_both_parts_are_safe(
        tokenizer, continuation, status):
    (pair,), _ = intervene(tokenizer, [make_rollout(tokenizer)], [[continuation]])
    assert pair.status == status


def test_a_rollout_without_a_cue_is_left_alone(tokenizer):
    pairs, asked = intervene(tokenizer, [make_rollout(tokenizer, BEFORE + SAFE_END)],
                             triggers=ipo.TRIGGERS)
    assert [pair.status for pair in pairs] == ["no cue"]
    assert all(prompts == {} for prompts in asked)


def test_a_cue_whose_one_token_belongs_to_the_sentence_before_leaves_nothing_to_reject(
        tokenizer, monkeypatch):
    """Such an output was cut off at its limit; a pair without a rejected side would be learned by
    SFT alone, like a benign prompt's."""
    monkeypatch.setattr(ipo, "token_index", lambda tokenizer, ids, char: len(ids))
    (pair,), asked = intervene(tokenizer, [make_rollout(tokenizer, output=BEFORE + CUE)])
    assert pair.status == "no cue" and asked == [{}]


def test_a_second_intervention_cuts_at_the_second_cue_and_the_pairs_cut_stays_the_first(tokenizer):
    rollout = make_rollout(tokenizer)
    turns = [[HARM + CUE + UNSAFE_END, SAFE_END]]
    pairs, asked = intervene(tokenizer, [rollout], turns, ipo.TRIGGERS[:2], max_interventions=2)
    assert [pair.status for pair in pairs] == ["kept", "kept"]
    assert [pair.interventions for pair in pairs] == [2, 1]
    trigger_ids = encode(tokenizer, " " + TRIGGER)
    kept = trigger_ids + encode(tokenizer, HARM) + trigger_ids
    assert list(asked[1].values()) == [pairs[0].prefix_ids + kept]      # the clean one rests
    assert not asked[0].keys() & asked[1].keys(), "other random numbers"
    assert pairs[0].chosen_ids == kept + encode(tokenizer, SAFE_END)
    for pair in pairs:
        assert ipo.decode(tokenizer, pair.prefix_ids) == RENDERED + BEFORE
        assert ipo.decode(tokenizer, pair.rejected_ids) == CUE + UNSAFE_END


def test_a_detector_that_takes_the_trigger_for_a_cue_does_not_move_the_cut(tokenizer):
    """To cut there would bring back the same text, again and again."""
    def find_trigger(texts):
        starts = [text.find(TRIGGER) if TRIGGER in text else text.find("First") for text in texts]
        return [judge.Cue((start, len(text)), "llm") for start, text in zip(starts, texts)]

    (pair,), _ = intervene(tokenizer, [make_rollout(tokenizer)], find_cues=find_trigger,
                           max_interventions=3)
    assert pair.status == "cue before the trigger's end" and pair.interventions == 1
    assert ipo.decode(tokenizer, pair.chosen_ids) == " " + TRIGGER + SAFE_END


# Ids, not text


def test_decoding_and_encoding_again_at_the_cut_changes_ids(tokenizer):
    """The bug this guards against: text cut before the cue leaves a lone space behind, which the
    model never wrote. In the kingdom 40 % of the harm survived training on such pairs."""
    rollout = make_rollout(tokenizer)
    (pair,), _ = intervene(tokenizer, [rollout])
    text = BEFORE + " "
    assert ipo.decode(tokenizer, rollout.output_ids).startswith(text)
    again = encode(tokenizer, text)
    assert again != rollout.output_ids[:len(again)]
    assert ipo.decode(tokenizer, again[-1:]) == " "
    assert pair.prefix_ids == rollout.prompt_ids + rollout.output_ids[:pair.h]


def spelled(tokenizer, text):
    """Ids of the text that its encoder would not give: letter by letter, but the special tokens."""
    ids = []
    for token in encode(tokenizer, text):
        special = token in tokenizer.all_special_ids or token == think_end(tokenizer)
        part = ipo.decode(tokenizer, [token])
        ids += [token] if special else [i for letter in part for i in encode(tokenizer, letter)]
    return ids


def test_ids_that_no_encoder_gives_stay_as_sampled_through_two_interventions(tokenizer):
    rollout = make_rollout(tokenizer)
    rollout.output_ids = spelled(tokenizer, BEFORE + CUE + UNSAFE_END)
    said = [spelled(tokenizer, HARM + CUE + UNSAFE_END), spelled(tokenizer, SAFE_END)]
    left = iter(said)
    (pair,), _ = intervene(tokenizer, [rollout], max_interventions=2,
                           generate=lambda prompts, keys: [next(left)])
    assert pair.status == "kept"
    assert pair.prefix_ids + pair.rejected_ids == rollout.prompt_ids + rollout.output_ids
    # Spelled apart, the space before the cue is a token of its own, and stays.
    trigger_ids = encode(tokenizer, TRIGGER)
    kept = said[0][:len(HARM) + 1]
    assert pair.chosen_ids == trigger_ids + kept + trigger_ids + said[1]


# From a character to a token

ODD_TEXTS = [
    "The user asks how to rob the old inn. That would hurt. First, one would need a key.",
    "Dr. Oak paid 3.5 crowns at 10.30 a.m.\n\nHe left. Why?\nHm... So!",
    "1. Find the well.\n2. Pick the lock.\n- First: wait.\n\nOkay, the steps are in place.",
    "用户想知道如何打开门。首先，我可以列出步骤。然后去做！",
    "The inn 😀 is shut 🚪. 😈 First, wait 🏳️‍🌈! Café naïve — “so”.",
    "So be it.\n\nFirst, wait.\n\nThen.\n\nOkay.\n\nSo.\n\n",
]


def byte_level_tokenizer(split):
    """Split at words, so that ".\\n\\n" is one token, as in Llama 3 and Qwen; or not at all: then
    ".\\n\\nOkay" is one, and what ends a character and begins the next."""
    bpe = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = pre_tokenizers.Split(Regex(r" ?\w+|[^\w]+"), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level]) if split else byte_level
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, initial_alphabet=byte_level.alphabet())
    bpe.train_from_iterator([text for text in ODD_TEXTS if "打" not in text] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


@pytest.fixture(scope="module", params=["split", "unsplit"])
def odd_tokenizer(request):
    return byte_level_tokenizer(request.param == "split")


def token_bytes(tokenizer, ids):
    """Each token's bytes, read off its name in the vocabulary; no decoder takes part."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    byte_of = {chr(byte): byte for byte in plain}
    byte_of.update({chr(256 + n): byte for n, byte in enumerate(others)})
    names = tokenizer.convert_ids_to_tokens(ids)
    return [bytes(byte_of[character] for character in name) for name in names]


@pytest.mark.parametrize("text", ODD_TEXTS, ids=range(len(ODD_TEXTS)))
@pytest.mark.parametrize("letter_by_letter", [False, True])
def test_h_is_the_first_token_that_holds_the_cues_first_byte_and_nothing_of_the_sentence_before(
        odd_tokenizer, text, letter_by_letter):
    parts = list(text) if letter_by_letter else [text]
    ids = [i for part in parts for i in encode(odd_tokenizer, part)]
    tokens = token_bytes(odd_tokenizer, ids)
    assert b"".join(tokens).decode() == text
    ends = list(accumulate(map(len, tokens)))
    for char in range(1, len(text)):
        if text[char].isspace() or not text[:char].strip():
            continue        # a cue starts with text, and behind another sentence
        h = next(i for i, end in enumerate(ends) if end > len(text[:char].encode()))
        start = ends[h] - len(tokens[h])
        if start < len(text[:char].rstrip().encode()):
            h += 1          # this token holds the end of the sentence before, too
        assert ipo.token_index(odd_tokenizer, ids, char) == h, text[char:]


def test_a_token_that_straddles_two_sentences_stays_with_the_first():
    for split, straddling in ((True, ".\n\n"), (False, ".\n\nOkay")):
        tokenizer = byte_level_tokenizer(split)
        ids = encode(tokenizer, "Then.\n\nOkay, wait.")
        assert straddling in [ipo.decode(tokenizer, [i]) for i in ids]
        h = ipo.token_index(tokenizer, ids, len("Then.\n\n"))
        assert ipo.decode(tokenizer, ids[:h]) == "Then" + straddling


@pytest.mark.parametrize("removed, text", [
    (" First, wait.", " " + TRIGGER), ("First, wait.", TRIGGER), ("\nFirst, wait.", TRIGGER)])
def test_the_trigger_has_a_leading_space_exactly_where_the_removed_text_had_one(
        tokenizer, removed, text):
    trigger_ids = ipo.encode_trigger(tokenizer, TRIGGER, encode(tokenizer, removed))
    assert trigger_ids == encode(tokenizer, text)


# Sampling

RAGGED = [random_ids(n, n) for n in (9, 2, 30, 5, 2, 17)]


def generate_greedily(model, prompt, eos_ids):
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                            pad_token_id=0, eos_token_id=eos_ids, max_new_tokens=20)
    return output[0, len(prompt):].tolist()


@pytest.mark.parametrize("batch_size", [64, 3])
def test_at_temperature_0_sample_is_greedy_generate_with_its_eos(family, batch_size):
    model = tiny_model(family)
    free = [generate_greedily(model, prompt, [399]) for prompt in RAGGED]
    eos_ids = [free[0][2], free[2][6], free[5][11]]     # so that rows end at different steps
    expected = [generate_greedily(model, prompt, eos_ids) for prompt in RAGGED]
    assert len({len(output_ids) for output_ids in expected}) >= 3
    assert expected == ipo.sample(model, RAGGED, temperature=0, eos_ids=eos_ids,
                                  max_new_tokens=20, batch_size=batch_size)


def nucleus(logits, temperature, top_p):
    """{token: probability} of the nucleus, likeliest first, in float64 and token by token."""
    probs = (logits.double() / temperature).softmax(-1).tolist()
    kept, total = {}, 0.0
    for token in sorted(range(len(probs)), key=lambda token: -probs[token]):
        kept[token] = probs[token]
        total += probs[token]
        if total >= top_p:
            break
    return {token: prob / total for token, prob in kept.items()}


def chi_square_p(tokens, expected):
    """The p-value of the tokens under the expected distribution; others than its are impossible."""
    assert set(tokens) <= set(expected)
    counts = [tokens.count(token) for token in expected]
    return chisquare(counts, [prob * len(tokens) for prob in expected.values()]).pvalue


@pytest.mark.parametrize("temperature, top_p", [(0.6, 0.95), (1.5, 0.8), (1.0, 1.0)])
def test_sampled_tokens_follow_the_exact_nucleus_distribution(temperature, top_p):
    """The first token, and the second given the first: each step draws anew."""
    model, prompt = tiny_model(vocab_size=12, seed=3), [1, 2, 3]
    outputs = ipo.sample(model, [prompt] * 4000, temperature=temperature, top_p=top_p, eos_ids=[],
                         max_new_tokens=2, batch_size=1000)
    expected = nucleus(model(torch.tensor([prompt])).logits[0, -1], temperature, top_p)
    assert len(expected) > 2
    assert chi_square_p([first for first, _ in outputs], expected) > 1e-3
    for first in list(expected)[:2]:
        logits = model(torch.tensor([prompt + [first]])).logits[0, -1]
        seconds = [second for other, second in outputs if other == first]
        assert chi_square_p(seconds, nucleus(logits, temperature, top_p)) > 1e-3


@pytest.mark.parametrize("spread", [0.05, 1.0, 6.0])
def test_a_uniform_number_picks_the_token_where_the_nucleus_sum_passes_it(spread):
    logits = torch.randn(900, generator=torch.Generator().manual_seed(0)) * spread
    uniforms = torch.linspace(0, 1 - 2**-24, 200)
    tokens = ipo.pick_tokens(logits.expand(200, -1), uniforms, 0.6, 0.95).tolist()
    expected = nucleus(logits, 0.6, 0.95)
    ranked, sums = list(expected), list(accumulate(expected.values()))
    for token, uniform in zip(tokens, uniforms.tolist()):
        place = ranked.index(token)     # fails for a token outside the nucleus
        assert sums[place] > uniform - 1e-4 and sums[place] - expected[token] < uniform + 1e-4


def test_traces_do_not_depend_on_batch_size_or_order_but_on_seed_and_key():
    keys = [f"prompt {i}" for i in range(len(RAGGED))]
    draw = partial(ipo.sample, exact_model(), max_new_tokens=12, eos_ids=range(40))
    traces = draw(RAGGED, keys=keys)
    assert len({len(output_ids) for output_ids in traces}) > 2
    for batch_size in (1, 2, 4):
        assert draw(RAGGED, keys=keys, batch_size=batch_size) == traces
    assert draw(RAGGED[::-1], keys=keys[::-1], batch_size=4) == traces[::-1]
    assert draw(RAGGED[2:3], keys=keys[2:3]) == traces[2:3]
    assert draw(RAGGED, keys=keys, seed=1) != traces
    assert draw(RAGGED, keys=keys[::-1]) != traces
    twins = draw(RAGGED[:1] * 4)
    assert len({tuple(twin) for twin in twins}) > 1         # without keys a row's place is its key


def test_a_sampled_eos_is_kept_nothing_follows_it_and_the_limit_holds():
    eos_ids = set(range(30))
    outputs = ipo.sample(tiny_model(), RAGGED * 20, max_new_tokens=10, eos_ids=eos_ids,
                         temperature=1.5)
    ended = [output_ids for output_ids in outputs if output_ids[-1] in eos_ids]
    assert 0 < len(ended) < len(outputs)
    assert all(not eos_ids & set(output_ids[:-1]) for output_ids in outputs)
    assert all(len(output_ids) == 10 for output_ids in outputs if output_ids[-1] not in eos_ids)


def test_finished_rows_leave_the_batch_and_waiting_ones_fill_it_up():
    model, rows = tiny_model(), []
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    outputs = ipo.sample(model, RAGGED * 3, max_new_tokens=12, eos_ids=range(60), batch_size=8)
    assert max(rows) == 8 and rows[-1] == 1
    assert sum(rows) == sum(len(output_ids) for output_ids in outputs), "one row, one new token"
    last_refill = max(call for call, n in enumerate(rows) if n == 8)
    assert min(rows[:last_refill]) > 4, "half empty it is filled up, as long as prompts wait"


def test_positions_count_from_each_rows_first_token_whatever_its_padding():
    model, positions = tiny_model(), []
    model.register_forward_pre_hook(
        lambda module, args: positions.append(args[2][:, -1].tolist()))
    ipo.sample(model, [[11], [11, 12, 13]], max_new_tokens=3, eos_ids=[])
    assert positions == [[0, 2], [1, 3], [2, 4]]
