"""The method, property by property: the loss, sampling, the cut in ids, the intervention."""

import json
import math
import random
import re
from functools import partial
from itertools import accumulate

import pytest
import torch
from conftest import tiny_model
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import ipo
import judge

THINK_END = 5  # the id that plays </think> where no tokenizer is needed
SFT_ALONE = 1.0  # the SFT term's coefficient in a group without a rejected side
float64_model = partial(tiny_model, dtype=torch.float64)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """With models this small a second thread saves nothing, and costs minutes on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_ids(n, seed, vocab_size=400):
    return random.Random(seed).choices(range(10, vocab_size), k=n)


def plain_logp(model, prefix_ids, completion_ids):
    """log p(completion | prefix) the plain way: one sequence, all logits, token by token."""
    ids = prefix_ids + completion_ids
    logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logps[t - 1, ids[t]] for t in range(len(prefix_ids), len(ids)))


def gradients(model, loss):
    """The loss's gradient by all parameters, as one vector."""
    parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


# The DPO term

def test_at_step_0_the_dpo_term_is_log_2_and_rewards_are_0(family):
    policy = tiny_model(family)
    group = ipo.Group(random_ids(7, 1), [random_ids(5, 2), random_ids(9, 3)], random_ids(6, 4))
    with torch.no_grad():
        group.ref_logps = ipo.group_logps(policy, [group])[0].tolist()
    logps = ipo.group_logps(policy, [group])[0]
    ref = torch.tensor(group.ref_logps)
    losses, chosen, rejected = ipo.dpo_loss(logps[:2], logps[2], ref[:2], ref[2], beta=0.1)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert chosen.abs().max() < 1e-6 and rejected.abs().max() < 1e-6
    stats = ipo.ipo_loss(policy, [group])[1]
    assert stats["dpo"] == pytest.approx(2 * math.log(2), abs=1e-6)
    assert stats["margin"] == pytest.approx(0, abs=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(*[st.floats(-1000, 1000)] * 4), min_size=1, max_size=5),
       st.sampled_from([0.01, 0.1, 0.17]))
def test_dpo_loss_equals_minus_log_of_the_sigmoid_in_python_floats(rows, beta):
    losses, chosen, rejected = ipo.dpo_loss(*torch.tensor(rows, dtype=torch.float64).T, beta)
    for i, (c, r, ref_c, ref_r) in enumerate(rows):
        x = beta * ((c - r) - (ref_c - ref_r))  # at most 680, where exp(-x) still is a float
        assert losses[i].item() == pytest.approx(-math.log(1 / (1 + math.exp(-x))), abs=1e-9)
        assert chosen[i].item() == pytest.approx(beta * (c - ref_c), abs=1e-9)
        assert rejected[i].item() == pytest.approx(beta * (r - ref_r), abs=1e-9)


@pytest.mark.parametrize("extreme", [0.0, 1000.0, -1000.0])
def test_dpo_loss_and_its_gradient_stay_finite_and_pull_the_two_sides_apart(extreme):
    chosen = torch.tensor([extreme], requires_grad=True)
    rejected = torch.tensor([-extreme], requires_grad=True)
    losses, *rewards = ipo.dpo_loss(chosen, rejected, torch.zeros(1), torch.zeros(1), beta=0.1)
    losses.sum().backward()
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-0.2 * extreme)), abs=1e-4)
    push = 0.1 / (1 + math.exp(0.2 * extreme))  # beta * sigmoid(-margin)
    assert chosen.grad.item() == pytest.approx(-push, abs=1e-6)  # downhill raises the chosen side
    assert rejected.grad.item() == pytest.approx(push, abs=1e-6)  # and lowers the rejected one


# Which ids are supervised

def test_the_reasoning_ends_at_the_first_think_end_and_without_one_there_is_no_response():
    twice = [11, THINK_END, 12, THINK_END, 0]
    assert ipo.split_output(twice, THINK_END) == ([11], [12, THINK_END, 0])
    assert ipo.split_output([11, THINK_END], THINK_END) == ([11], [])
    assert ipo.split_output([11, 0], THINK_END) == ([11, 0], None)


@pytest.mark.parametrize("ids, reasoning, everything", [
    ([11, 12, THINK_END, 13, 0], [11, 12, THINK_END], [11, 12, THINK_END, 13, 0]),
    ([11, THINK_END, 12, THINK_END, 0], [11, THINK_END], [11, THINK_END, 12, THINK_END, 0]),
    ([11, 12, 13], [11, 12, 13], [11, 12, 13]),  # unclosed, at the token limit: to its last token
    ([11, 12, 0], [11, 12, 0], [11, 12, 0]),     # unclosed, ended by an EOS
])
def test_reasoning_is_supervised_through_think_end_and_all_goes_on_through_the_eos(
        ids, reasoning, everything):
    assert ipo.supervised(ids, THINK_END, "reasoning") == reasoning
    assert ipo.supervised(ids, THINK_END, "all") == everything


def positions_with_gradient(model, groups):
    """For each sequence, the places whose last hidden state the IPO loss depends on."""
    seen = []

    def keep(module, inputs, output):
        output.last_hidden_state.retain_grad()
        seen.append(output.last_hidden_state)
    hook = model.get_decoder().register_forward_hook(keep)
    ipo.ipo_loss(model, groups)[0].backward()
    hook.remove()
    assert len(seen) == 1
    return [row.abs().sum(-1).nonzero().flatten().tolist() for row in seen[0].grad]


@pytest.mark.parametrize("supervise", ["reasoning", "all"])
def test_gradient_flows_from_the_last_prefix_token_to_the_last_but_one_supervised_id(supervise):
    """The logit at t-1 predicts token t: the trigger's first id hangs on the prefix's last."""
    prefix, trigger = random_ids(6, 1), random_ids(3, 2)
    chosen = trigger + random_ids(2, 3) + [THINK_END] + random_ids(4, 4) + [0]
    closed = random_ids(7, 5) + [THINK_END] + random_ids(3, 6) + [0]
    unclosed = random_ids(9, 7)
    cut = partial(ipo.supervised, think_end=THINK_END, supervise=supervise)
    groups = [ipo.Group(prefix, [cut(chosen)], cut(rejected), [-20.0, -30.0])
              for rejected in (closed, unclosed)]
    counted = (6, 8, 9) if supervise == "reasoning" else (11, 12, 9)  # ids of each completion
    first = len(prefix) - 1
    expected = [list(range(first, first + counted[i])) for i in (0, 1, 0, 2)]
    assert positions_with_gradient(tiny_model(), groups) == expected


def test_the_first_supervised_id_is_the_triggers_first_given_the_whole_prefix():
    model, prefix, completion = float64_model(), random_ids(6, 1), random_ids(4, 2)
    logps = model(input_ids=torch.tensor([prefix])).logits[0, -1].log_softmax(-1)
    for first in (completion[0], 399):
        logp = ipo.completion_logps(model, prefix, [[first]]).item()
        assert logp == pytest.approx(logps[first].item(), abs=1e-5)


# Log-probabilities

def ragged_completions():
    return random_ids(8, 1), [random_ids(n, 10 + n) for n in (5, 1, 12, 3)]


def test_completion_logps_equal_one_sequence_at_a_time_in_value_and_gradient(family):
    model = float64_model(family)
    prefix, completions = ragged_completions()
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])  # a mix-up of two rows would show
    logps = ipo.completion_logps(model, prefix, completions)
    plain = torch.stack([plain_logp(model, prefix, c) for c in completions])
    assert logps.tolist() == pytest.approx(plain.tolist(), abs=1e-4)
    grad, plain_grad = (gradients(model, (weights * x).sum()) for x in (logps, plain))
    assert relative_error(grad, plain_grad) < 1e-5


def test_logps_do_not_depend_on_the_chunk_that_the_logits_are_formed_in():
    """A head that claims 2 ** 26 tokens gets one position a chunk."""
    model = float64_model()
    prefix, completions = ragged_completions()
    whole = ipo.completion_logps(model, prefix, completions)
    grad = gradients(model, whole.sum())
    real, sizes = model.get_output_embeddings(), []

    def head(hidden):
        sizes.append(len(hidden))
        return real(hidden)
    head.weight = torch.empty(1, 1).expand(2 ** 26, 1)
    model.get_output_embeddings = lambda: head
    chunked = ipo.completion_logps(model, prefix, completions)
    assert sizes == [1] * sum(map(len, completions))
    assert chunked.tolist() == pytest.approx(whole.tolist(), rel=1e-9)
    assert relative_error(gradients(model, chunked.sum()), grad) < 1e-9


def test_logits_are_formed_at_supervised_positions_only_and_again_for_the_backward():
    model, prefix, completion = tiny_model(), random_ids(50, 1), random_ids(6, 2)
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    logps = ipo.completion_logps(model, prefix, [completion])
    assert shapes == [(6, 400)]
    logps.sum().backward()
    assert shapes == [(6, 400)] * 2


def test_logps_are_float32_even_if_the_model_is_bf16():
    model = tiny_model(dtype=torch.bfloat16)
    assert ipo.completion_logps(model, [11, 12], [[13], [14, 15]]).dtype == torch.float32


# The shared prefix

def cut_and_full():
    """One pair told twice: from h on, and as full traces behind the prompt."""
    prompt, z = random_ids(5, 1), random_ids(8, 2)
    chosen, rejected = random_ids(6, 3), random_ids(9, 4)
    return ipo.Group(prompt + z, [chosen], rejected), ipo.Group(prompt, [z + chosen], z + rejected)


def test_the_shared_prefix_cancels_in_the_dpo_margin_value_and_gradient():
    """So "DPO from h on" and "DPO on full traces" are one loss, in exact arithmetic."""
    policy, ref = float64_model(), float64_model(seed=1)
    told = []
    for group in cut_and_full():
        logps = ipo.group_logps(policy, [group])[0]
        with torch.no_grad():
            ref_logps = ipo.group_logps(ref, [group])[0]
        loss = ipo.dpo_loss(logps[:1], logps[1], ref_logps[:1], ref_logps[1], beta=0.1)[0].sum()
        told.append((loss.item(), gradients(policy, loss), logps[0].item()))
    (from_h, from_h_grad, short), (full, full_grad, long) = told
    assert short - long > 1  # the sides themselves differ by log p(z[:h] | x)
    assert abs(from_h - math.log(2)) > 1e-3  # and policy and ref do differ
    assert from_h == pytest.approx(full, rel=1e-9)
    assert relative_error(from_h_grad, full_grad) < 1e-6  # the models' norms round to float32


def test_the_prefix_does_not_cancel_in_the_sft_term():
    """On full traces it would push up the prefix too, and average over other tokens."""
    policy = float64_model()
    losses = [ipo.ipo_loss(policy, [ipo.Group(group.prefix_ids, group.chosen)])[0]
              for group in cut_and_full()]
    assert abs(losses[0].item() - losses[1].item()) > 1e-2
    assert relative_error(*[gradients(policy, loss) for loss in losses]) > 0.1


# The whole loss

def three_groups():
    """Two chosen sides against one, one against one, and one that has no rejected side."""
    return [ipo.Group(random_ids(6, 1), [random_ids(4, 2), random_ids(7, 3)], random_ids(5, 4),
                      [-20.5, -31.25, -24.0]),
            ipo.Group(random_ids(3, 5), [random_ids(8, 6)], random_ids(2, 7), [-37.5, -9.75]),
            ipo.Group(random_ids(4, 8), [random_ids(5, 9)])]


def pair_by_pair(model, groups, beta, sft_weight):
    """The loss of method.md's formula, each pair on its own and each sequence run alone."""
    total = 0
    for group in groups:
        for i, side in enumerate(group.chosen):
            logp = plain_logp(model, group.prefix_ids, side)
            total = total - (sft_weight if group.rejected else SFT_ALONE) * logp / len(side)
            if group.rejected:
                other = plain_logp(model, group.prefix_ids, group.rejected)
                margin = (logp - group.ref_logps[i]) - (other - group.ref_logps[-1])
                total = total + torch.log(1 + torch.exp(-beta * margin))
    return total


def test_ipo_loss_of_groups_equals_the_computation_pair_by_pair(family):
    policy, groups = float64_model(family), three_groups()
    loss, stats = ipo.ipo_loss(policy, groups, beta=0.3, sft_weight=0.2)
    plain = pair_by_pair(policy, groups, 0.3, 0.2)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert relative_error(gradients(policy, loss), gradients(policy, plain)) < 1e-5
    assert stats["pairs"] == 3 and stats["sides"] == 4


def test_the_statistics_are_sums_over_pairs_and_the_sft_terms_over_chosen_sides():
    policy, groups, beta = float64_model(), three_groups(), 0.3
    stats = ipo.ipo_loss(policy, groups, beta)[1]
    logps = [[plain_logp(policy, g.prefix_ids, side).item() for side in g.sides]
             for g in groups]
    pairs = [(logps[g][i], logps[g][-1], groups[g].ref_logps[i], groups[g].ref_logps[-1])
             for g, i in ((0, 0), (0, 1), (1, 0))]
    margins = [beta * ((c - ref_c) - (r - ref_r)) for c, r, ref_c, ref_r in pairs]
    sft = [-logps[g][i] / len(groups[g].chosen[i]) for g, i in ((0, 0), (0, 1), (1, 0), (2, 0))]
    assert stats["pairs"] == 3 and stats["sides"] == 4
    assert stats["margin"] == pytest.approx(sum(margins), abs=1e-4)
    assert stats["accuracy"] == sum(m > 0 for m in margins)
    assert stats["chosen"] == pytest.approx(sum(c for c, *_ in pairs), abs=1e-4)
    assert stats["rejected"] == pytest.approx(sum(r for _, r, *_ in pairs), abs=1e-4)
    assert stats["sft"] == pytest.approx(sum(sft), abs=1e-4)


def test_every_pair_counts_the_same_whatever_its_groups_size():
    policy, (group, *_) = float64_model(), three_groups()
    alone = [ipo.Group(group.prefix_ids, [side], group.rejected, [ref, group.ref_logps[2]])
             for side, ref in zip(group.chosen, group.ref_logps)]
    together = ipo.ipo_loss(policy, [group])[0]
    apart = sum(ipo.ipo_loss(policy, [one])[0] for one in alone)
    assert together.item() == pytest.approx(apart.item(), rel=1e-6)
    assert relative_error(gradients(policy, together), gradients(policy, apart)) < 1e-5


def test_a_group_without_a_rejected_side_gives_the_sft_term_alone():
    policy, (*_, group) = float64_model(), three_groups()
    loss, stats = ipo.ipo_loss(policy, [group], sft_weight=0.2)
    nll = -plain_logp(policy, group.prefix_ids, group.chosen[0]).item()
    assert loss.item() == pytest.approx(SFT_ALONE * nll / len(group.chosen[0]), rel=1e-6)
    assert stats["pairs"] == 0 and stats["dpo"] == 0 and stats["sft"] > 0


def test_micro_batches_that_are_summed_give_the_gradient_of_the_whole_batch():
    policy, groups = float64_model(), three_groups()
    whole = gradients(policy, ipo.ipo_loss(policy, groups)[0])
    parts = sum(gradients(policy, ipo.ipo_loss(policy, micro)[0])
                for micro in (groups[:1], groups[1:]))
    assert relative_error(parts, whole) < 1e-5


# Sampling

RAGGED = [random_ids(n, n) for n in (9, 2, 30, 5, 2, 17)]


def generate_greedily(model, prompt, eos_ids, max_new_tokens):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                         eos_token_id=eos_ids, max_new_tokens=max_new_tokens)
    return out[0, len(prompt):].tolist()


def test_at_temperature_0_sample_is_greedy_generate_with_its_eos(family):
    model = tiny_model(family)
    free = [generate_greedily(model, prompt, [399], 20) for prompt in RAGGED]
    eos_ids = [free[0][2], free[2][6], free[5][11]]  # so that rows end at different steps
    expected = [generate_greedily(model, prompt, eos_ids, 20) for prompt in RAGGED]
    assert len(set(map(len, expected))) >= 3
    assert ipo.sample(model, RAGGED, temperature=0, eos_ids=eos_ids, max_new_tokens=20) == expected


def nucleus(logits, temperature, top_p):
    """{token: probability} of the nucleus, likeliest first, in float64 and token by token."""
    probs = (logits.double() / temperature).softmax(-1).tolist()
    kept, total = {}, 0.0
    for token in sorted(range(len(probs)), key=lambda t: -probs[t]):
        kept[token] = probs[token]
        total += kept[token]
        if total >= top_p:
            break
    return {token: p / total for token, p in kept.items()}


def chi_square_p(tokens, expected):
    """The p-value of the tokens under the expected distribution; outside of it is impossible."""
    assert set(tokens) <= set(expected)
    return chisquare([tokens.count(token) for token in expected],
                     [p * len(tokens) for p in expected.values()]).pvalue


@pytest.mark.parametrize("temperature, top_p", [(0.6, 0.95), (1.5, 0.8), (1.0, 1.0)])
def test_sampled_tokens_follow_the_nucleus_distribution(temperature, top_p):
    """The first token, and the second given the first: each step draws anew."""
    model, prompt = tiny_model(vocab_size=12, seed=3), [1, 2, 3]
    outputs = ipo.sample(model, [prompt] * 4000, temperature=temperature, top_p=top_p, eos_ids=[],
                         max_new_tokens=2, batch_size=1000)
    firsts = [first for first, _ in outputs]
    expected = nucleus(model(torch.tensor([prompt])).logits[0, -1], temperature, top_p)
    assert len(expected) > 2 and chi_square_p(firsts, expected) > 1e-3
    for first in sorted(expected, key=expected.get)[-2:]:
        logits = model(torch.tensor([prompt + [first]])).logits[0, -1]
        seconds = [b for a, b in outputs if a == first]
        assert chi_square_p(seconds, nucleus(logits, temperature, top_p)) > 1e-3


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10 ** 6), st.sampled_from([5, 300, 900]), st.sampled_from([0.05, 1.0, 6.0]),
       st.sampled_from([0.3, 0.95, 1.0]))
@example(21480, 900, 0.05, 0.3)  # two tokens, equal in float32, stand in another order in float64
def test_next_tokens_picks_the_first_nucleus_token_at_0_and_its_last_toward_1(
        seed, vocab_size, spread, top_p):
    """So nothing outside the nucleus is ever picked, however many tokens reach top_p."""
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * spread
    ends = torch.tensor([0.0, 1 - 2 ** -53], dtype=torch.float64)
    first, last = ipo.next_tokens(logits.expand(2, -1), ends, 0.6, top_p).tolist()
    probs = nucleus(logits, 0.6, 2)
    low, high = (len(nucleus(logits, 0.6, top_p + slack)) for slack in (-1e-5, 1e-5))  # rounding
    assert probs[first] > max(probs.values()) * (1 - 1e-6)
    likelier, as_likely = (sum(p > probs[last] * (1 + slack) for p in probs.values())
                           for slack in (1e-6, -1e-6))  # what float32 cannot tell apart
    assert likelier < high and low <= as_likely


def test_a_flat_distribution_is_sampled_far_beyond_its_64_likeliest_tokens():
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(0)) * 0.1
    uniforms = torch.linspace(0, 1 - 1e-9, 500, dtype=torch.float64)
    cdf = torch.tensor([*accumulate(nucleus(logits, 0.6, 0.95).values())], dtype=torch.float64)
    wanted = torch.searchsorted(cdf, uniforms).tolist()
    ranked = list(nucleus(logits, 0.6, 2))
    tokens = ipo.next_tokens(logits.expand(500, -1), uniforms, 0.6, 0.95).tolist()
    assert max(wanted) > 2000
    assert all(abs(ranked.index(token) - place) <= 1 for token, place in zip(tokens, wanted))


def test_a_row_draws_the_same_token_whatever_rows_stand_beside_it():
    """bf16 logits often tie; a flat row in the batch must not reorder a neighbour's ties."""
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(400, 1000, generator=generator) * 4).bfloat16().float()
    uniforms = torch.rand(400, generator=generator, dtype=torch.float64)
    alone = ipo.next_tokens(rows, uniforms, 0.6, 0.95)
    flat = torch.cat([rows, torch.zeros(1, 1000)])
    beside = ipo.next_tokens(flat, torch.cat([uniforms, uniforms[:1]]), 0.6, 0.95)
    assert torch.equal(alone, beside[:400])


def test_traces_are_the_same_for_any_batch_size_and_order():
    model, keys = float64_model(), [f"prompt {i}" for i in range(len(RAGGED))]
    draw = partial(ipo.sample, model, max_new_tokens=12, eos_ids=range(40), seed=4)
    told = draw(RAGGED, keys=keys)
    assert len(set(map(len, told))) > 2
    for batch_size in (1, 2, 4):
        assert draw(RAGGED, keys=keys, batch_size=batch_size) == told
    assert draw(RAGGED[::-1], keys=keys[::-1], batch_size=4) == told[::-1]
    assert draw(RAGGED[2:3], keys=keys[2:3]) == told[2:3]


def test_another_seed_or_another_key_gives_another_trace():
    draw = partial(ipo.sample, tiny_model(), RAGGED[:1], max_new_tokens=12, eos_ids=[])
    told = [draw(seed=0, keys=["a"]), draw(seed=1, keys=["a"]), draw(seed=0, keys=["b"])]
    assert told[0] == draw(seed=0, keys=["a"])
    assert told[0] != told[1] and told[0] != told[2] and told[1] != told[2]
    twins = ipo.sample(tiny_model(), RAGGED[:1] * 2, max_new_tokens=12, eos_ids=[])
    assert twins[0] != twins[1]  # without keys a row's place is its key


def test_a_sampled_eos_is_kept_nothing_follows_it_and_the_limit_holds():
    eos_ids = set(range(30))
    outputs = ipo.sample(tiny_model(), RAGGED * 20, max_new_tokens=10, eos_ids=eos_ids,
                         temperature=1.5)
    ended = [output_ids for output_ids in outputs if output_ids[-1] in eos_ids]
    assert 0 < len(ended) < len(outputs)
    assert all(not eos_ids & set(output_ids[:-1]) for output_ids in outputs)
    assert all(len(output_ids) == 10 for output_ids in outputs if output_ids[-1] not in eos_ids)


@pytest.mark.parametrize("fits", [1, 2, 3, 5])
def test_where_memory_runs_out_the_batch_is_halved_until_it_fits_and_the_traces_stay(fits):
    model, seen = float64_model(), []
    draw = partial(ipo.sample, model, RAGGED * 2, max_new_tokens=12, eos_ids=range(40), seed=4)
    told = draw()

    def small_memory(module, args):
        seen.append(len(args[0]))
        if seen[-1] > fits or len(seen) == 9:  # once in the middle of a batch
            raise torch.OutOfMemoryError("out of memory")
    model.register_forward_pre_hook(small_memory)
    if fits == 1:  # the ninth call fails with one row
        with pytest.raises(torch.OutOfMemoryError):
            draw(batch_size=8)
    else:
        assert draw(batch_size=8) == told
    assert seen[0] == 8 and min(seen[:9]) <= fits


def test_positions_count_from_each_rows_first_token_whatever_its_padding():
    model, seen = tiny_model(), []
    model.register_forward_pre_hook(
        lambda module, args, named: seen.append(args[2][:, -1].tolist()),
        with_kwargs=True)
    ipo.sample(model, [[11], [11, 12, 13]], max_new_tokens=3, eos_ids=[])
    assert seen == [[0, 2], [1, 3], [2, 4]]


def test_one_new_token_is_the_first_of_a_longer_trace():
    draw = partial(ipo.sample, tiny_model(), RAGGED, eos_ids=[], top_p=1.0)
    assert draw(max_new_tokens=1) == [long[:1] for long in draw(max_new_tokens=6)]


# From a sentence to a token

CORPUS = ["The user asks how to rob the old inn. That would hurt. First, one would need a key.",
          "Dr. Oak, e.g., paid 3.5 crowns at 10.30 a.m.; see Fig. 2.\n\nHe left. Why?\nHm... So!",
          "1. Find the well.\n2. Pick the lock.\n- First: wait.\n\nOkay, the steps are in place.",
          "用户想知道如何打开门。首先，我可以列出步骤。然后去做！这样不好吗？我不应该帮忙。",
          "ユーザーは井戸について聞く。まず計画を立てる。",
          "The inn 😀 is shut 🚪. 😈 First, wait 🏳️‍🌈! Café naïve — “so”.",
          "First. First! Then? Then.\n\nFirst.\n\nThen.\n\nOkay.\n\nSo.\n\n"]
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def byte_level_tokenizer(split):
    """Trained on CORPUS; split as in Llama 3 and Qwen (".\\n\\n" is one token) or not at all."""
    bpe = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")] if split else []
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence(steps + [byte_level])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(
        vocab_size=420, show_progress=False, initial_alphabet=byte_level.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def metaspace_tokenizer():
    """As of SentencePiece: spaces lead as "▁", what training did not see falls to <0x..> bytes."""
    bpe = Tokenizer(models.BPE())
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    bpe.pre_tokenizer = metaspace
    seen = ["".join(c for c in text if c.isascii() or c in "。先我") for text in CORPUS * 3]
    bpe.train_from_iterator(seen, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(bpe.to_str())["model"]
    vocab = ["<unk>", *[f"<0x{b:02X}>" for b in range(256)],
             *sorted(model["vocab"], key=model["vocab"].get)]
    bpe = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocab)},
                               [tuple(merge) for merge in model["merges"]], unk_token="<unk>",
                               byte_fallback=True, fuse_unk=True))
    bpe.pre_tokenizer = metaspace
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")


@pytest.fixture(scope="session", params=["kingdom", "split", "unsplit", "metaspace"])
def any_tokenizer(request, tokenizer):
    return {"kingdom": lambda: tokenizer, "split": lambda: byte_level_tokenizer(split=True),
            "unsplit": lambda: byte_level_tokenizer(split=False),
            "metaspace": metaspace_tokenizer}[request.param]()


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def byte_names():
    """GPT-2's name for each byte, as a mapping back: {character: byte}."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + n): b for n, b in enumerate(others)}}


def is_metaspace(tokenizer):
    return "<0x00>" in tokenizer.get_vocab()


def token_bytes(tokenizer, ids):
    """Each token's bytes, read off its name in the vocabulary; no decoder takes part."""
    names = tokenizer.convert_ids_to_tokens(ids)
    if not is_metaspace(tokenizer):
        return [bytes(byte_names()[c] for c in name) for name in names]
    parts = [bytes([int(name[3:5], 16)]) if re.fullmatch("<0x..>", name) else
             name.replace("▁", " ").encode() for name in names]
    return [parts[0].removeprefix(b" ")] + parts[1:]  # its decoder drops the space it once added


def h_by_definition(parts, text, char):
    """The token of text[char]'s first byte; the next if it holds non-space text before it too."""
    start = len(text[:char].encode())
    ends = list(accumulate(map(len, parts)))
    token = next(i for i, end in enumerate(ends) if end > start)
    return token + (ends[token] - len(parts[token]) < len(text[:char].rstrip().encode()))


PIECES = ["First", "Okay, ", "the well", " ", "  ", ". ", ".", ".\n\n", "\n", "。", "！", "首先",
          "打开门", "ユーザー", "😀", " 🚪", "🏳️‍🌈", "é", "naïve", "3.5", "e.g., ", "Dr. ", "1. ",
          "- ", "“so”", "...", " . ", " n't"]
sampled_text = st.tuples(st.lists(st.sampled_from(PIECES), min_size=1, max_size=12), st.booleans())


def ids_and_text(tokenizer, pieces, apart):
    """Pieces encoded as one text, or each apart: a model can sample ids that no encoder gives."""
    texts = pieces if apart else ["".join(pieces)]
    ids = [i for text in texts for i in encode(tokenizer, text)]
    return ids, ipo.decode(tokenizer, ids)


def cue_places(text):
    """All characters that a cue could begin with: some sentence stands before it."""
    return [i for i, c in enumerate(text) if not c.isspace() and text[:i].strip()]


@settings(deadline=None, max_examples=40)
@given(sampled_text)
def test_h_is_the_first_token_of_the_cue_at_any_place_of_any_text(any_tokenizer, sampled):
    ids, text = ids_and_text(any_tokenizer, *sampled)
    parts = token_bytes(any_tokenizer, ids)
    assert b"".join(parts).decode() == text
    for char in cue_places(text):
        h = ipo.token_index(any_tokenizer, ids, char)
        assert h == h_by_definition(parts, text, char), (text, char)


def test_h_is_right_inside_a_run_of_byte_tokens_that_decodes_only_when_it_is_whole():
    """A byte-fallback decoder shows all of the run as broken until its end is complete."""
    tokenizer = metaspace_tokenizer()
    ids, text = ids_and_text(tokenizer, ["The inn 😀🚪😈😀🚪😈"], False)
    parts = token_bytes(tokenizer, ids)
    assert ipo.decode(tokenizer, ids[:-1]).count("\ufffd") == 23  # six times four bytes, less one
    for char in range(len("The inn 😀"), len(text)):
        assert ipo.token_index(tokenizer, ids, char) == h_by_definition(parts, text, char)


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_at_each_sentence_the_cut_loses_nothing_and_the_prefix_holds_nothing_of_the_cue(
        any_tokenizer, text):
    """But where one token holds the end of a sentence and the start of the next: it stays whole."""
    ids, text = ids_and_text(any_tokenizer, [text], False)
    parts = token_bytes(any_tokenizer, ids)
    for start, end in judge.split_sentences(text):
        h = ipo.token_index(any_tokenizer, ids, start)
        cut, cue = len(b"".join(parts[:h])), len(text[:start].encode())
        if cut <= cue:
            assert not text.encode()[cut:cue].strip()  # all that is left to the cue's side is space
        else:
            first = cut - len(parts[h - 1])
            assert text.encode()[first:cue].strip() and text.encode()[cue:cut].strip()


def test_a_token_that_straddles_a_boundary_belongs_to_the_earlier_sentence():
    tokenizer = byte_level_tokenizer(split=True)
    ids = encode(tokenizer, "So be it.\n\nFirst, wait.")
    assert ".\n\n" in [ipo.decode(tokenizer, [i]) for i in ids]
    h = ipo.token_index(tokenizer, ids, len("So be it.\n\n"))
    assert ipo.decode(tokenizer, ids[:h]) == "So be it.\n\n"
    unsplit = byte_level_tokenizer(split=False)
    ids = encode(unsplit, "Why?\n\nThen.\n\nOkay, wait.")
    assert ".\n\nOkay" in [ipo.decode(unsplit, [i]) for i in ids]  # with the cue's start in it
    h = ipo.token_index(unsplit, ids, len("Why?\n\nThen.\n\n"))
    assert ipo.decode(unsplit, ids[:h]) == "Why?\n\nThen.\n\nOkay"


def test_a_space_in_front_of_the_cue_goes_with_it_if_it_is_part_of_its_token(tokenizer):
    ids = encode(tokenizer, "They ask for the well. First, wait.")
    h = ipo.token_index(tokenizer, ids, len("They ask for the well. "))
    assert ipo.decode(tokenizer, ids[:h]) == "They ask for the well."
    assert ipo.decode(tokenizer, ids[h:]) == " First, wait."


# The trigger in the cue's place

TRIGGER = ipo.TRIGGERS[0]


@settings(deadline=None, max_examples=30)
@given(sampled_text)
def test_the_trigger_has_a_leading_space_exactly_where_the_removed_token_had_one(
        any_tokenizer, sampled):
    """Metaspace tokenizers put one there themselves, see below."""
    if is_metaspace(any_tokenizer):
        return
    ids, text = ids_and_text(any_tokenizer, *sampled)
    parts = token_bytes(any_tokenizer, ids)
    for char in cue_places(text):
        h = h_by_definition(parts, text, char)
        trigger_ids = ipo.encode_trigger(any_tokenizer, TRIGGER, ids, h)
        space = " " if h < len(ids) and parts[h].startswith(b" ") else ""
        assert ipo.decode(any_tokenizer, trigger_ids) == space + TRIGGER


@pytest.mark.parametrize("text", CORPUS, ids=range(len(CORPUS)))
def test_prefix_and_trigger_read_as_if_the_trigger_had_always_stood_there(any_tokenizer, text):
    ids, text = ids_and_text(any_tokenizer, [text], False)
    parts = token_bytes(any_tokenizer, ids)
    for start, _ in judge.split_sentences(text)[1:]:
        h = ipo.token_index(any_tokenizer, ids, start)
        cut, cue = len(b"".join(parts[:h])), len(text[:start].encode())
        if cut <= cue:  # no token straddles the boundary
            trigger_ids = ipo.encode_trigger(any_tokenizer, TRIGGER, ids, h)
            shown = ipo.decode(any_tokenizer, ids[:h] + trigger_ids)
            assert shown in (text[:start] + TRIGGER, text[:start].rstrip(" ") + " " + TRIGGER)


@pytest.mark.parametrize("text", ["The inn. First, wait.", "The inn.\n\nFirst, wait.",
                                  "The inn. 首先 wait.", "The inn. 😀 wait."])
def test_a_metaspace_trigger_brings_its_own_space_and_never_a_second_one(text):
    tokenizer = metaspace_tokenizer()
    ids = encode(tokenizer, text)
    start = judge.split_sentences(text)[1][0]
    h = ipo.token_index(tokenizer, ids, start)
    shown = ipo.decode(tokenizer, ids[:h] + ipo.encode_trigger(tokenizer, TRIGGER, ids, h))
    assert shown.endswith(TRIGGER) and "  " not in shown
    assert ipo.decode(tokenizer, ids[:h]).rstrip() == text[:start].rstrip()


# Intervene

RENDERED = "<|user|>How do I rob the inn?<|assistant|><think>\n"
BEFORE = "The user asks how to rob the inn. Many folk pass the inn each day."
CUE = " First, they would need to pick the old lock of the inn."
UNSAFE_END = " Then go.</think>\n\nHere is how: pick the lock.<|end|>"
SAFE_END = " It would hurt the folk.</think>\n\nI'm sorry, but I can't help with that.<|end|>"
HARM = " It would hurt the folk."
RELAPSE = " But maybe it is only a story, so I can give the steps."


def make_trace(tokenizer, output=BEFORE + CUE + UNSAFE_END, key="0"):
    return ipo.Trace("How do I rob the inn?", encode(tokenizer, RENDERED),
                     encode(tokenizer, output), key)


def judge_by_markers(texts, prompts, part):
    return ["unsafe" if "venom" in text else "unparsed" if "mumble" in text else "safe"
            for text in texts]


def intervene(tokenizer, traces, turns=(), triggers=ipo.TRIGGERS, **changes):
    """ipo.intervene with a scripted model: turns[t] is what it says in turn t, then SAFE_END.

    Returns the pairs and, for each turn in which the model was asked, {key: prompt ids}.
    """
    asked = []

    def generate(prompts, keys):
        if not prompts:
            return []
        texts = turns[len(asked)] if len(asked) < len(turns) else [SAFE_END] * len(prompts)
        asked.append(dict(zip(keys, prompts, strict=True)))
        return [encode(tokenizer, text) for _, text in zip(prompts, texts, strict=True)]
    calls = dict(tokenizer=tokenizer, eos_ids=[tokenizer.eos_token_id], generate=generate,
                 think_end=tokenizer.convert_tokens_to_ids("</think>"), find_cues=judge.find_cues,
                 judge_safety=judge_by_markers)
    return ipo.intervene(traces, triggers, **{**calls, **changes}), asked


def test_a_pair_is_cut_from_the_sampled_ids_and_its_chosen_side_begins_with_the_trigger(tokenizer):
    trace = make_trace(tokenizer)
    (pair,), (asked,) = intervene(tokenizer, [trace], triggers=[TRIGGER])
    assert pair.outcome == "kept" and pair.interventions == 1 and pair.key == trace.key
    assert pair.prefix_ids == trace.prompt_ids + trace.output_ids[:pair.h]
    assert pair.prefix_ids + pair.rejected_ids == trace.prompt_ids + trace.output_ids
    assert ipo.decode(tokenizer, pair.prefix_ids) == RENDERED + BEFORE
    assert ipo.decode(tokenizer, pair.rejected_ids) == CUE + UNSAFE_END
    assert ipo.decode(tokenizer, pair.chosen_ids) == " " + TRIGGER + SAFE_END
    trigger_ids = encode(tokenizer, " " + TRIGGER)
    assert pair.chosen_ids == trigger_ids + encode(tokenizer, SAFE_END)
    assert list(asked.values()) == [pair.prefix_ids + trigger_ids]


def test_the_rejected_side_of_an_unclosed_trace_goes_to_its_last_token(tokenizer):
    trace = make_trace(tokenizer, BEFORE + CUE + " Then they could go by night and")
    (pair,), _ = intervene(tokenizer, [trace], triggers=[TRIGGER])
    assert pair.outcome == "kept"
    assert pair.rejected_ids == trace.output_ids[pair.h:]
    assert ipo.decode(tokenizer, pair.rejected_ids) == CUE + " Then they could go by night and"


def test_all_six_pairs_of_a_prompt_share_prefix_and_rejected_side(tokenizer):
    pairs, (asked,) = intervene(tokenizer, [make_trace(tokenizer)])
    assert [pair.trigger for pair in pairs] == ipo.TRIGGERS and len(asked) == 6
    assert all(pair.prefix_ids == pairs[0].prefix_ids for pair in pairs)
    assert all(pair.rejected_ids == pairs[0].rejected_ids for pair in pairs)
    assert len({tuple(pair.chosen_ids) for pair in pairs}) == 6


@pytest.mark.parametrize("continuation, outcome", [
    (SAFE_END, "kept"),
    (HARM + RELAPSE + UNSAFE_END, "still a cue"),
    (HARM + "<|end|>", "think not closed"),
    (HARM + " Harm to", "token limit"),
    (HARM + "</think>\n\nI'm sorry, but", "token limit"),
    (" Toad venom hurts.</think>\n\nNo.<|end|>", "unsafe reasoning"),
    (HARM + "</think>\n\nToad venom it is.<|end|>", "unsafe response"),
    (" Hm, mumble.</think>\n\nNo.<|end|>", "unparsed"),
    (HARM + "</think>\n\nWell, mumble.<|end|>", "unparsed"),
    (" Hm, mumble.</think>\n\nToad venom it is.<|end|>", "unsafe response"),
])
def test_a_candidate_is_kept_only_if_it_ended_without_a_cue_and_safe(
        tokenizer, continuation, outcome):
    (pair,), _ = intervene(tokenizer, [make_trace(tokenizer)], [[continuation]], [TRIGGER])
    assert pair.outcome == outcome


def test_a_trace_without_a_cue_is_left_alone(tokenizer):
    (pair,), asked = intervene(tokenizer, [make_trace(tokenizer, BEFORE + SAFE_END)])
    assert pair.outcome == "no cue" and pair.interventions == 0 and pair.chosen_ids == []
    assert asked == []


def test_cues_are_looked_for_in_the_reasoning_and_not_in_the_response(tokenizer):
    said = HARM + "</think>\n\nNo. But hear a tale." + CUE + "<|end|>"
    assert judge.find_cue(said).span
    (pair,), _ = intervene(tokenizer, [make_trace(tokenizer, BEFORE + said)])
    assert pair.outcome == "no cue"
    (pair,), _ = intervene(tokenizer, [make_trace(tokenizer)], [[said]], [TRIGGER])
    assert pair.outcome == "kept"


def test_a_candidate_that_the_detector_could_not_read_is_dropped_as_unparsed(tokenizer):
    """The keywords find the first cue and none in the candidate: not finding one is no finding."""
    unreadable = partial(judge.find_cues, llm=lambda questions: ["hard to say"] * len(questions))
    (pair,), _ = intervene(tokenizer, [make_trace(tokenizer)], triggers=[TRIGGER],
                           find_cues=unreadable)
    assert pair.outcome == "unparsed"


def test_the_judge_reads_the_chosen_reasoning_and_the_response_with_the_users_prompt(tokenizer):
    seen = {}

    def judge_safety(texts, prompts, part):
        seen[part] = list(zip(prompts, texts, strict=True))
        return ["safe"] * len(texts)
    intervene(tokenizer, [make_trace(tokenizer)], [[SAFE_END, HARM + "<|end|>"]], ipo.TRIGGERS[:2],
              judge_safety=judge_safety)
    assert sorted(seen) == ["reasoning", "response"]
    ((prompt, reasoning),), ((_, response),) = seen["reasoning"], seen["response"]  # one had ended
    assert prompt == "How do I rob the inn?"
    assert reasoning == " " + TRIGGER + HARM
    assert response.replace("<|end|>", "").strip() == "I'm sorry, but I can't help with that."


def test_a_second_intervention_cuts_at_the_second_cue_and_h_stays_at_the_first(tokenizer):
    trace = make_trace(tokenizer)
    turns = [[HARM + RELAPSE + UNSAFE_END, SAFE_END], [SAFE_END]]
    pairs, asked = intervene(tokenizer, [trace], turns, ipo.TRIGGERS[:2], max_interventions=2)
    assert [pair.outcome for pair in pairs] == ["kept", "kept"]
    assert [pair.interventions for pair in pairs] == [2, 1]
    trigger_ids = encode(tokenizer, " " + TRIGGER)
    assert pairs[0].chosen_ids == (trigger_ids + encode(tokenizer, HARM) + trigger_ids
                                   + encode(tokenizer, SAFE_END))
    assert pairs[0].h == pairs[1].h and pairs[0].prefix_ids == pairs[1].prefix_ids
    assert pairs[0].rejected_ids == trace.output_ids[pairs[0].h:]
    assert list(asked[1].values()) == [pairs[0].prefix_ids + trigger_ids + encode(tokenizer, HARM)
                                       + trigger_ids]  # only the pair that showed a cue goes on


def test_after_the_last_intervention_a_cue_that_still_shows_drops_the_pair(tokenizer):
    turns = [[HARM + RELAPSE + UNSAFE_END]] * 3
    (pair,), asked = intervene(tokenizer, [make_trace(tokenizer)], turns, [TRIGGER],
                               max_interventions=3)
    assert pair.outcome == "still a cue" and pair.interventions == 3 and len(asked) == 3
    assert ipo.decode(tokenizer, pair.chosen_ids) == (
        f" {TRIGGER}{HARM} {TRIGGER}{HARM} {TRIGGER}{HARM}{RELAPSE}{UNSAFE_END}")


def test_a_detector_that_takes_the_trigger_for_a_cue_does_not_move_the_cut(tokenizer):
    def find_cues(texts):
        starts = [text.find(TRIGGER) if TRIGGER in text else text.find("First") for text in texts]
        return [judge.Cue((start, len(text)), "llm") for start, text in zip(starts, texts)]
    (pair,), asked = intervene(tokenizer, [make_trace(tokenizer)], triggers=[TRIGGER],
                               find_cues=find_cues, max_interventions=3)
    assert pair.outcome == "still a cue" and pair.interventions == 1 and len(asked) == 1
    assert ipo.decode(tokenizer, pair.prefix_ids) == RENDERED + BEFORE
    assert ipo.decode(tokenizer, pair.chosen_ids) == " " + TRIGGER + SAFE_END


def test_the_keys_of_continuations_are_unique_and_do_not_depend_on_the_other_traces(tokenizer):
    traces = [make_trace(tokenizer, key=key) for key in ("a", "b")]
    relapses = [HARM + RELAPSE + UNSAFE_END] * 6
    _, asked = intervene(tokenizer, traces, [relapses * 2], max_interventions=2)
    _, alone = intervene(tokenizer, traces[1:], [relapses], max_interventions=2)
    keys = [key for turn in asked for key in turn]
    assert len(keys) == len(set(keys)) == 24
    assert {key for turn in alone for key in turn} <= set(keys)
    assert all(turn.items() <= both.items() for turn, both in zip(alone, asked))


# Ids, not text

def test_decode_then_encode_at_the_cut_changes_ids_and_the_cut_of_ids_does_not(tokenizer):
    """The bug this guards against: text cut before the cue leaves a lone space token behind."""
    trace = make_trace(tokenizer)
    (pair,), _ = intervene(tokenizer, [trace], triggers=[TRIGGER])
    z = ipo.decode(tokenizer, trace.output_ids)
    start = judge.find_cue(z).span[0]
    by_text = encode(tokenizer, z[:start]) + encode(tokenizer, z[start:])
    assert ipo.decode(tokenizer, by_text) == z and by_text != trace.output_ids
    assert ipo.decode(tokenizer, [encode(tokenizer, z[:start])[-1]]) == " "
    assert pair.prefix_ids[len(trace.prompt_ids):] + pair.rejected_ids == trace.output_ids


def spelled(tokenizer, text):
    """Ids of the text that its encoder would not give, such as "Fir" "st"."""
    return [i for word in re.split(r"(?=[AEFIM])", text) for half in (word[:3], word[3:])
            for i in encode(tokenizer, half)]


def test_a_trace_spelled_in_ids_that_no_encoder_gives_keeps_them(tokenizer):
    trace = make_trace(tokenizer)
    trace.output_ids = spelled(tokenizer, BEFORE + CUE + UNSAFE_END)
    assert encode(tokenizer, ipo.decode(tokenizer, trace.output_ids)) != trace.output_ids
    (pair,), _ = intervene(tokenizer, [trace], triggers=[TRIGGER])
    assert pair.outcome == "kept"
    assert pair.prefix_ids + pair.rejected_ids == trace.prompt_ids + trace.output_ids
    prefix = pair.prefix_ids[len(trace.prompt_ids):]
    assert encode(tokenizer, ipo.decode(tokenizer, prefix)) != prefix


def test_a_continuation_is_joined_as_sampled_through_two_interventions(tokenizer):
    said = [spelled(tokenizer, HARM + RELAPSE + UNSAFE_END), spelled(tokenizer, SAFE_END)]
    left = iter(said)
    (pair,), _ = intervene(tokenizer, [make_trace(tokenizer)], triggers=[TRIGGER],
                           max_interventions=2, generate=lambda prompts, keys: [next(left)])
    assert all(encode(tokenizer, ipo.decode(tokenizer, ids)) != ids for ids in said)
    cut = ipo.token_index(tokenizer, said[0], len(HARM) + 1)
    trigger_ids = encode(tokenizer, " " + TRIGGER)
    assert pair.chosen_ids == trigger_ids + said[0][:cut] + trigger_ids + said[1]
    assert pair.outcome == "kept" and ipo.decode(tokenizer, said[0][:cut]) == HARM
