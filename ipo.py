"""Intervened Preference Optimization (IPO): the method, and only the method.

Zhang et al., "Towards Safe Reasoning in Large Reasoning Models via Corrective Intervention",
arXiv 2509.24393. (Not Identity Preference Optimization, arXiv 2310.12036, which TRL and other
libraries call "ipo".) What is said here of the paper was read in notes about it, not in the paper.

A reasoning model answers a prompt x with reasoning z, then </think>, then a response y. When it is
asked for harm, its reasoning often turns toward helping in one particular sentence, the compliance
cue ("Okay, let me think about how to do it."). IPO cuts the reasoning there, puts a safety trigger
in the cue's place ("I shouldn't be helping someone do that.") and lets the model continue. Then it
trains the model to prefer what it wrote behind the trigger to what it wrote behind the cue:

  1. sample     reasoning z and response y for each harmful prompt, from the model itself
  2. find cues  the first compliance cue in z (judge.py); h is the token where it starts
  3. intervene  continue x + z[:h] + trigger, for each trigger of a pool; where a cue shows up
                again, cut and continue again
  4. keep       the pair (prefix = x + z[:h], chosen = trigger + continuation, rejected = what the
                model first said from h on) where the chosen side is safe
  5. train      DPO on the two sides, by default through </think>, plus an SFT term on
                z[:h] + chosen (ipo_loss)
  6. repair     a second stage against over-refusal (train.py): the pairs once more, mixed with
                benign prompts, where the base's answer is preferred to the refusal of the model
                trained so far

Why cut at the *first* cue: up to there the reasoning is still safe, so it can stay as it is, and
what the model learns is what to do at the very point where it went wrong.

  open in the paper                            our choice
  is the response y in the loss?               no: from h through </think>; in the kingdom yes
  what does the SFT term cover?                the preferred reasoning: z[:h] + chosen, by token
  the SFT term's weight on a benign prompt     1 (SFT_ALONE), where nothing was refused
  Eq. 4 prints pi where ref belongs, once      ref: we take it for a misprint
  the reference of the second stage            the base, as in the first
  how is a sentence mapped to a token?         token_index; ids are cut and joined, never text
  it quotes one trigger of its six             the other five of TRIGGERS are in our words
  which candidates are kept?                   ended, think closed, no cue left, both parts safe

The first sentence of a reasoning, which restates the prompt, is never taken for a cue.
In shape comments B is sequences, P pairs, T tokens, N supervised tokens, D hidden size, V vocabulary.
"""

import bisect
import os
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

TokenIds = list[int]
Sampler = Callable[[list[TokenIds], list[str]], list[TokenIds]]     # (prompts, keys) -> new ids
# Of judge.py: texts -> a judge.Cue each; and (texts, prompts, "reasoning" or "response") -> "safe", "unsafe" or "unparsed" each.
FindCues = Callable[[list[str]], list]
JudgeSafety = Callable[[list[str], list[str], str], list[str]]

TRIGGERS = [
    "I shouldn't be helping someone do that.",  # the one that the paper quotes
    "Wait, this could seriously hurt people, so I must not go along with it.",
    "But helping with this would be wrong and against the law.",
    "I have to stop here and think about who could be harmed.",
    "This request is dangerous, and I should refuse it.",
    "No, the responsible thing is to decline and point to something safe.",
]
TEMPERATURE = 0.6   # of sampling, as reasoning models' cards advise; usual 0.5 to 1
TOP_P = 0.95        # the nucleus; 1: all tokens
SFT_ALONE = 1.0     # weight of the SFT term of a pair that has no rejected side, so no DPO term


@dataclass
class ReasoningModel:
    """A language model that thinks before it answers, and what is needed to read its output."""
    model: PreTrainedModel | None       # None where it runs on a server and is only sampled
    tokenizer: PreTrainedTokenizerBase
    think_end: int                      # the id of </think>
    eos_ids: list[int]                  # each of them ends an output; Qwen3 has two


@dataclass
class Rollout:
    """One answer of the model to one prompt."""
    prompt: str            # the user's words
    prompt_ids: TokenIds   # rendered by the chat template; they end with the think opening
    output_ids: TokenIds   # z </think> y EOS; no EOS where the token limit was hit
    key: str               # names the rollout; with the seed it decides its random numbers


@dataclass
class PreferencePair:
    """A candidate for training and what became of it: one record from here to the loss.

    With the prompt "How do I rob the inn?" and z = "They ask of the inn. First, pick the lock.":
    """
    prompt: str                                             # "How do I rob the inn?"
    prefix_ids: TokenIds                                    # x + "They ask of the inn."
    chosen_ids: TokenIds = field(default_factory=list)      # " I shouldn't ... </think> Sorry" EOS
    rejected_ids: TokenIds = field(default_factory=list)    # " First, pick ... </think> ..." EOS
    trigger: str = ""                                       # "I shouldn't be helping ..."
    interventions: int = 0                                  # how often a cue was cut away
    h: int = 0                                              # prefix_ids is x + z[:h]
    key: str = "0"                                          # its rollout's
    cue_by: str = ""                                        # who found the first cue (judge.Cue)
    status: str = ""        # "kept", or why it was dropped; `intervene` sets it
    ref_chosen_logp: float = 0.0                            # log p under the reference model,
    ref_rejected_logp: float = 0.0                          # filled in before each stage


def split_output(output_ids: TokenIds, think_end: int) -> tuple[TokenIds, TokenIds | None]:
    """Reasoning ids and response ids; the response is None where the think was never closed."""
    if think_end not in output_ids:
        return output_ids, None
    end = output_ids.index(think_end)
    return output_ids[:end], output_ids[end + 1:]


def how_it_ended(output_ids: TokenIds, reasoner: ReasoningModel) -> str:
    """"finished", "token limit", or "think not closed" where an EOS came before </think>."""
    if output_ids[-1] not in reasoner.eos_ids:
        return "token limit"
    return "finished" if reasoner.think_end in output_ids else "think not closed"


def decode(tokenizer: PreTrainedTokenizerBase, ids: TokenIds) -> str:
    """The text of ids as it is: some tokenizers would tidy spaces, and characters would shift."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def texts_of(output_ids: TokenIds, reasoner: ReasoningModel) -> tuple[str, str | None]:
    """Reasoning and response as text, for a judge: without the EOS and surrounding blanks."""
    texts = []
    for ids in split_output(output_ids, reasoner.think_end):
        if ids is None:
            texts.append(None)
            continue
        ids = [i for i in ids if i not in reasoner.eos_ids]
        texts.append(decode(reasoner.tokenizer, ids).strip())
    return texts[0], texts[1]


# Step 1: sample


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: list[TokenIds],
    *,
    max_new_tokens: int,
    eos_ids: list[int],
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
    seed: int = 0,
    batch_size: int = 64,
    keys: list[str] | None = None,
) -> list[TokenIds]:
    """Continue each prompt until an EOS (which is kept) or max_new_tokens; returns the new ids.

    temperature=0 is greedy. Each row draws from its own random numbers, seeded by (seed, its key;
    by default its index), so what it draws does not depend, up to rounding, on the rows beside it.
    Finished rows leave the batch at once; when it is half empty, waiting prompts fill it up.
    """
    keys = keys or [str(i) for i in range(len(prompts))]
    streams = [random.Random(f"{seed} {key}") for key in keys]
    outputs: list[TokenIds] = [[] for _ in prompts]
    waiting = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))  # little padding
    running: list[int] = []  # the rows of the batch, as places in prompts

    while waiting or running:
        if waiting and len(running) <= batch_size // 2:
            # Fill the batch up. Caches of different lengths cannot be joined, so all rows
            # are computed again from their starts.
            while waiting and len(running) < batch_size:
                running.append(waiting.popleft())
            input_ids, mask = left_pad([prompts[i] + outputs[i] for i in running], model.device)
            cache = DynamicCache(config=model.config)

        # A token's place among the real tokens of its row; from the second pass on input_ids, and
        # so position_ids, hold the newest token only.
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1]:]
        # The cache is passed by position: its name differs between versions of transformers.
        logits = model(
            input_ids, mask, position_ids, cache, use_cache=True, logits_to_keep=1,
        ).logits[:, -1]                                                           # (B, V)
        uniforms = torch.tensor([streams[i].random() for i in running], device=model.device)
        next_ids = pick_tokens(logits, uniforms, temperature, top_p)              # (B,)
        for i, token in zip(running, next_ids.tolist()):
            outputs[i].append(token)

        # Finished rows leave the batch and its key-value cache.
        keep = [
            row for row, i in enumerate(running)
            if outputs[i][-1] not in eos_ids and len(outputs[i]) < max_new_tokens
        ]
        if len(keep) < len(running):
            running = [running[row] for row in keep]
            rows = torch.tensor(keep, dtype=torch.long, device=model.device)
            cache.batch_select_indices(rows)
            next_ids = next_ids[rows]
            mask = mask[rows]
        input_ids = next_ids[:, None]                                             # (B, 1)
        mask = F.pad(mask, (0, 1), value=1)                                       # (B, T)
    return outputs


def left_pad(rows: list[TokenIds], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, T) ids with zeros on the left, and the (B, T) mask that is 1 where an id stands."""
    ids = [torch.tensor(row) for row in rows]
    ones = [torch.ones_like(row) for row in ids]
    padded = pad_sequence(ids, batch_first=True, padding_side="left")
    mask = pad_sequence(ones, batch_first=True, padding_side="left")
    return padded.to(device), mask.to(device)


def pick_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, k: int = 64
) -> Tensor:
    """(B, V) logits and (B,) numbers from [0, 1) -> (B,) token ids, drawn from the nucleus.

    The nucleus is the fewest tokens whose probabilities reach top_p. A uniform number picks the
    token at which the running sum of the nucleus, likeliest first, passes it (inverse CDF). Only the
    k likeliest tokens are sorted, which as a rule is enough and much faster; where they do not reach
    top_p, all are.
    """
    if temperature == 0:
        return logits.argmax(-1)
    vocabulary = logits.shape[-1]
    probs = (logits.float() / temperature).softmax(-1)
    # 1. Sort, likeliest first; 2. sum up; 3. see where the nucleus ends; 4. draw within its mass.
    probs, tokens = probs.topk(min(k, vocabulary))                                # (B, k)
    cumulative = probs.cumsum(-1)                                                 # (B, k)
    last_rank = (cumulative[:, :-1] < top_p).sum(-1, keepdim=True)    # of the nucleus's last token
    goal = uniforms[:, None] * cumulative.gather(-1, last_rank)       # within the nucleus's mass
    rank = (cumulative <= goal).sum(-1, keepdim=True)                             # (B, 1)
    rank = torch.minimum(rank, last_rank)       # the sum may fall short of the goal by rounding
    picked = tokens.gather(-1, rank).squeeze(-1)
    wider = cumulative[:, -1] < top_p                                             # (B,)
    if k < vocabulary and wider.any():
        picked[wider] = pick_tokens(logits[wider], uniforms[wider], temperature, top_p, vocabulary)
    return picked


# Steps 2 to 4: find the cue, intervene, keep


def token_index(tokenizer: PreTrainedTokenizerBase, ids: TokenIds, char: int) -> int:
    """h: where to cut so that the sentence that starts at character `char` goes away.

    As a rule that is the first token that reaches past the character. Where this token also holds
    text of the sentence before (".\n\nFirst" as one token), it is the next one: the old sentence
    stays whole, at the price of leaving the new one's first word or a piece of it.
    """
    def characters_through(i: int) -> int:
        return len(decode(tokenizer, ids[:i + 1]))

    h = bisect.bisect_right(range(len(ids)), char, key=characters_through)
    text = decode(tokenizer, ids)
    # Where token h begins. (Not the length of what stands before it: half a character at its end
    # decodes as one of its own.)
    start = len(os.path.commonprefix([decode(tokenizer, ids[:h]), text]))
    return h + 1 if text[start:char].strip() else h


def encode_trigger(
    tokenizer: PreTrainedTokenizerBase, trigger: str, removed_ids: TokenIds
) -> TokenIds:
    """The trigger's ids, with a leading space exactly where the removed text had one. An empty
    trigger, which only deletes the cue, stays empty (a control in tests/experiments)."""
    if trigger and decode(tokenizer, removed_ids[:1]).startswith(" "):
        trigger = " " + trigger
    return tokenizer.encode(trigger, add_special_tokens=False)


def locate_cues(
    outputs: list[TokenIds], reasoner: ReasoningModel, find_cues: FindCues
) -> list[tuple[int | None, str]]:
    """Step 2. For each output the token where its first compliance cue starts, or None, and who
    found that (judge.Cue.by)."""
    reasonings = [split_output(output_ids, reasoner.think_end)[0] for output_ids in outputs]
    cues = find_cues([decode(reasoner.tokenizer, ids) for ids in reasonings])
    located = []
    for ids, cue in zip(reasonings, cues):
        h = None if cue.span is None else token_index(reasoner.tokenizer, ids, cue.span[0])
        located.append((h, cue.by))
    return located


@dataclass
class Active:
    """A candidate that still holds a cue, while `intervene` works on it."""
    pair: PreferencePair
    rollout: Rollout
    output_ids: TokenIds    # as it stands; at first the rollout's own
    cut: int                # where its cue starts: the next turn cuts there


def intervene(
    rollouts: list[Rollout],
    triggers: list[str],
    *,
    reasoner: ReasoningModel,
    generate: Sampler,
    find_cues: FindCues,
    judge_safety: JudgeSafety,
    max_interventions: int = 1,
) -> list[PreferencePair]:
    """Steps 2 to 4, the heart of the method: a candidate for each rollout and trigger, each with
    its status. A rollout without a cue gives one candidate, "no cue".

    generate(prompts, keys) is `sample` bound to the model. The paper trains with
    max_interventions=1; its Fig. 6 shows how harm falls from 100 to 15 % with up to five.
    """
    # Step 2. Cut each rollout at its first cue. (Where an LLM could not be read, keywords say where the
    # cue is: enough to cut here, not to accept a chosen side below.)
    candidates = []
    active = []
    located = locate_cues([rollout.output_ids for rollout in rollouts], reasoner, find_cues)
    for rollout, (h, cue_by) in zip(rollouts, located):
        if h is None or h == len(rollout.output_ids):   # its one token belongs to the sentence before
            candidates.append(PreferencePair(
                rollout.prompt, rollout.prompt_ids, key=rollout.key, cue_by=cue_by,
                status="no cue"))
            continue
        for trigger in triggers:
            pair = PreferencePair(
                prompt=rollout.prompt, trigger=trigger, h=h, key=rollout.key, cue_by=cue_by,
                prefix_ids=rollout.prompt_ids + rollout.output_ids[:h],
                rejected_ids=rollout.output_ids[h:])
            candidates.append(pair)
            active.append(Active(pair, rollout, rollout.output_ids, h))

    # Step 3. The trigger replaces the cue and all that follows; the model continues from there.
    for turn in range(max_interventions):
        heads = []
        for item in active:
            removed_ids = item.output_ids[item.cut:]
            trigger_ids = encode_trigger(reasoner.tokenizer, item.pair.trigger, removed_ids)
            heads.append(item.output_ids[:item.cut] + trigger_ids)
        prompts = [item.rollout.prompt_ids + head for item, head in zip(active, heads)]
        keys = []
        for item in active:
            keys.append(f"{item.pair.key}/{triggers.index(item.pair.trigger)}/{turn}")
        continuations = generate(prompts, keys)
        outputs = [head + continuation for head, continuation in zip(heads, continuations)]
        located = locate_cues(outputs, reasoner, find_cues)

        still_active = []
        for item, head, output_ids, (cut, cue_by) in zip(active, heads, outputs, located):
            pair = item.pair
            pair.chosen_ids = output_ids[pair.h:]
            pair.interventions = turn + 1
            if cue_by == "unparsed":
                pair.status = "unparsed"    # a chosen side must have been read by the detector
            elif cut is None:
                pair.status = how_it_ended(pair.chosen_ids, reasoner)
            elif cut < len(head):
                # In the prefix, which is fixed, in a trigger, or in what an earlier turn kept.
                pair.status = "cue before the trigger's end"
            else:
                pair.status = "still a cue"
                item.output_ids = output_ids
                item.cut = cut
                still_active.append(item)
        active = still_active

    # Step 4. Keep what ended by itself and is safe.
    finished = [pair for pair in candidates if pair.status == "finished"]
    keep_the_safe(finished, reasoner, judge_safety)
    return candidates


def keep_the_safe(
    pairs: list[PreferencePair], reasoner: ReasoningModel, judge_safety: JudgeSafety
) -> None:
    """Step 4. Set each pair's status: "kept" where both parts of its chosen side are judged safe.
    (The prefix stands before the first cue: it counts as safe.)"""
    prompts = [pair.prompt for pair in pairs]
    texts = [texts_of(pair.chosen_ids, reasoner) for pair in pairs]
    reasonings = judge_safety([reasoning for reasoning, _ in texts], prompts, "reasoning")
    responses = judge_safety([response for _, response in texts], prompts, "response")
    for pair, reasoning, response in zip(pairs, reasonings, responses):
        if reasoning == "unsafe":
            pair.status = "unsafe reasoning"
        elif response == "unsafe":
            pair.status = "unsafe response"
        elif reasoning == "unparsed" or response == "unparsed":
            pair.status = "unparsed"
        else:
            pair.status = "kept"


# Step 5: the loss


def supervised(completion_ids: TokenIds, think_end: int, supervise: str) -> TokenIds:
    """The ids that the loss sees. supervise="reasoning": through </think>, or to the end where the
    think was never closed; "all": the response and its EOS too."""
    if supervise == "all" or think_end not in completion_ids:
        return completion_ids
    return completion_ids[:completion_ids.index(think_end) + 1]


def completion_logps(
    model: PreTrainedModel, sequences: list[tuple[Sequence[int], Sequence[int]]]
) -> Tensor:
    """(len(sequences),) sums of log p(completion | prefix), in float32 or wider, with gradients.

    sequences: (prefix_ids, completion_ids) each. (The same, one sequence and token after the other:
    plain_logp in tests/conftest.py.) Logits, by far the largest tensor, are formed for
    the completions' tokens only, chunk by chunk, and formed again for the backward pass.
    """
    ids = [torch.tensor(prefix + completion) for prefix, completion in sequences]
    is_completion = [torch.arange(len(p) + len(c)) >= len(p) for p, c in sequences]
    ids = pad_sequence(ids, batch_first=True).to(model.device)                        # (B, T)
    is_completion = pad_sequence(is_completion, batch_first=True).to(model.device)    # (B, T)

    # Right padding needs no attention mask: causal attention never looks right.
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state    # (B, T, D)
    row, position = is_completion.nonzero(as_tuple=True)                              # (N,)
    hidden = hidden[row, position - 1]    # the state at t-1 predicts token t         # (N, D)
    targets = ids[row, position]                                                      # (N,)
    head = model.get_output_embeddings()

    def token_logps(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden)                                                         # (N, V)
        # At least float32: a bf16 log-softmax errs by about 0.001 a token.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)

    logits_in_chunk = 2**26 if ids.is_cuda else 2**22       # on a CPU what stays in its cache
    size = max(1, logits_in_chunk // head.weight.shape[0])
    chunks = [
        checkpoint(token_logps, states, tokens, use_reentrant=False)
        for states, tokens in zip(hidden.split(size), targets.split(size))
    ]
    logps = torch.cat(chunks)                                                         # (N,)
    sums = torch.zeros(len(sequences), dtype=logps.dtype, device=logps.device)
    return sums.index_add(0, row, logps)                                              # (B,)


def sequences_of(pair: PreferencePair) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The three (prefix, completion) of a pair: its chosen side, its rejected side, and the opening
    z[:h] that they share, behind x."""
    prefix = tuple(pair.prefix_ids)
    x_length = len(prefix) - pair.h
    return [(prefix, tuple(pair.chosen_ids)), (prefix, tuple(pair.rejected_ids)),
            (prefix[:x_length], prefix[x_length:])]


def distinct_sequences(pairs: list[PreferencePair]) -> dict[tuple, int]:
    """Each distinct sequence of the pairs and its place among them. The pairs of a prompt share
    opening and rejected side: six triggers have 8 sequences, not 18."""
    place_of: dict[tuple, int] = {}
    for pair in pairs:
        for sequence in sequences_of(pair):
            if sequence[1]:     # a rejected side or an opening can be missing
                place_of.setdefault(sequence, len(place_of))
    return place_of


def pair_logps(model: PreTrainedModel, pairs: list[PreferencePair]) -> Tensor:
    """(3, P) log p of each pair's chosen side, rejected side and opening; 0 for what is missing.
    Each distinct sequence is run once."""
    place_of = distinct_sequences(pairs)
    logps = completion_logps(model, list(place_of))
    logps = F.pad(logps, (0, 1))        # a 0 at place -1, for what is missing
    places = []
    for pair in pairs:
        places.append([place_of.get(sequence, -1) for sequence in sequences_of(pair)])
    return logps[torch.tensor(places, device=logps.device)].T


def dpo_loss(
    chosen_logps: Tensor, rejected_logps: Tensor,
    ref_chosen_logps: Tensor, ref_rejected_logps: Tensor, beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, chosen rewards and rejected rewards, (P,) each, from (P,) sums of log p (Eq. 4).

    A reward is beta * (log pi - log ref), the loss -log sigmoid(chosen reward - rejected reward).
    At step 0 of stage 1 the policy is the reference: rewards are 0 and every loss is log 2.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards, rejected_rewards


def ipo_loss(
    policy: PreTrainedModel, pairs: list[PreferencePair], beta: float, sft_weight: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Step 5: the loss summed over the pairs, and its terms for the log, (P,) each.

    L = -log sigmoid(beta * [log pi(chosen) - log ref(chosen) - log pi(rejected) + log ref(rejected)])
        - sft_weight * log pi(z[:h] + chosen) / tokens(z[:h] + chosen)

    The sides come already cut by `supervised`. The first term is given x + z[:h], the second, the SFT
    term, given x. beta says how much it costs to leave the reference model: a larger beta reaches the
    same margin with a smaller change. sft_weight keeps the preferred reasoning likely in absolute
    terms, where DPO only pulls the two sides apart. It covers the opening z[:h] as well: otherwise
    words that DPO makes likely behind the cut appear before it, too. The paper has 0.2. A pair without a rejected side (a benign prompt that was not refused) has the SFT term alone.
    """
    chosen_logps, rejected_logps, opening_logps = pair_logps(policy, pairs)           # (P,) each

    def column(values: list) -> Tensor:
        return torch.tensor(values, dtype=chosen_logps.dtype, device=chosen_logps.device)

    dpo, chosen_rewards, rejected_rewards = dpo_loss(                                 # (P,) each
        chosen_logps, rejected_logps,
        column([pair.ref_chosen_logp for pair in pairs]),
        column([pair.ref_rejected_logp for pair in pairs]), beta)
    tokens = column([pair.h + len(pair.chosen_ids) for pair in pairs])
    sft = -(opening_logps + chosen_logps) / tokens                                    # (P,)
    has_rejected = torch.tensor(                                                      # (P,)
        [bool(pair.rejected_ids) for pair in pairs], device=chosen_logps.device)
    # Without a rejected side the DPO term means nothing: it is left out.
    losses = torch.where(has_rejected, dpo + sft_weight * sft, SFT_ALONE * sft)

    margin = chosen_rewards - rejected_rewards
    terms = {"has_rejected": has_rejected, "dpo": dpo, "sft": sft, "margin": margin,
             "accuracy": (margin > 0).float(), "chosen_logp": chosen_logps,
             "rejected_logp": rejected_logps}
    return losses.sum(), {name: values.detach() for name, values in terms.items()}
