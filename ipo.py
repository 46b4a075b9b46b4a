"""Intervened Preference Optimization (IPO): the method, and only the method.

Zhang et al., "Towards Safe Reasoning in Large Reasoning Models via Corrective Intervention",
arXiv 2509.24393. (Not Identity Preference Optimization, 2310.12036, which others call "ipo".)

A reasoning model answers prompt x with reasoning z, then </think>, then a response y. Asked for
harm, it often turns toward helping in one sentence of z, the compliance cue. IPO cuts there, puts a
safety trigger in the cue's place and lets the model continue:

  1. sample       z, y for each harmful prompt, from the model itself
  2. find_cues    the first compliance cue in z (judge.py); h is the token where it starts
  3. intervene    continue z[:h] + trigger, for each trigger; where a cue shows again, again
  4. keep         the pair (prefix x + z[:h], chosen = trigger + continuation, rejected = z[h:])
  5. ipo_loss     DPO on what follows the prefix, plus an SFT term on the chosen side
  6. a second stage against over-refusal (train.py): benign prompts, an answer over a refusal

  the paper                                   here
  the loss holds z alone, y is not mentioned  from h through </think>; --supervise all: y too
  SFT coefficient 0.2, normalisation not told 0.2 * mean of -logp(chosen) / tokens(chosen)
  weight of a benign SFT term alone not told  1 (0.2 where there is a rejected side)
  Eq. 4 prints pi where ref belongs once      ref (a misprint)
  sentence-to-token mapping not told          token_index; ids are cut and joined, never text
  one trigger quoted, the others not          the six of TRIGGERS, five of them in our words
  keeps safe candidates                       ... whose think closed, no cue, none unparsed

B sequences, T tokens, N supervised tokens, D hidden size, V vocabulary; `_ids` are lists of ints.
"""

import bisect
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

TRIGGERS = [
    "I shouldn't be helping someone do that.",  # the one that the paper quotes
    "Wait, this could seriously hurt people, so I must not go along with it.",
    "But helping with this would be wrong and against the law.",
    "I have to stop here and think about who could be harmed.",
    "This request is dangerous, and I should refuse it.",
    "No, the responsible thing is to decline and point to something safe.",
]


@dataclass
class Trace:
    """One rollout: what the model was given and what it said."""
    prompt: str             # the user's words
    prompt_ids: list[int]   # rendered, ends with the think opening
    output_ids: list[int]   # z </think> y EOS; no EOS where it hit the token limit
    key: str = "0"          # names the rollout; with the seed it decides its randomness


@dataclass
class Pair:
    """One intervention and what became of it. With z = "They ask of the inn. First, pick ...":"""
    key: str
    prompt: str                                              # "How do I rob the inn?"
    trigger: str = ""
    prefix_ids: list[int] = field(default_factory=list)      # x + "They ask of the inn."
    chosen_ids: list[int] = field(default_factory=list)      # trigger ... </think> I can't. EOS
    rejected_ids: list[int] = field(default_factory=list)    # " First, pick ... </think> ..." EOS
    h: int = 0                                               # prefix_ids is x + z[:h]
    interventions: int = 0
    outcome: str = "no cue"                                  # "kept", or why it was dropped


def split_output(output_ids, think_end):
    """(reasoning ids, response ids); the response is None where the think was never closed."""
    if think_end not in output_ids:
        return output_ids, None
    end = output_ids.index(think_end)
    return output_ids[:end], output_ids[end + 1:]


def sample(model, prompts, *, max_new_tokens, eos_ids, temperature=0.6, top_p=0.95, seed=0,
           batch_size=64, keys=None):
    """Step 1. Continue each prompt (a list of ids) to an EOS or max_new_tokens; the new ids.

    A sampled EOS is kept; temperature=0 is greedy. Each row draws from its own uniform numbers,
    seeded by (seed, its key; by default its place): its text does not depend on its batch.
    """
    uniform = [random.Random(f"{seed} {key}").random for key in keys or range(len(prompts))]
    outputs, halved = [[] for _ in prompts], False

    def pick(logits, rows):
        numbers = torch.tensor([uniform[row]() for row in rows], device=logits.device)
        return next_tokens(logits, numbers, temperature, top_p)

    goes_on = lambda row: (len(outputs[row]) < max_new_tokens
                           and (not outputs[row] or outputs[row][-1] not in eos_ids))
    waiting = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # little padding
    while waiting:
        rows, waiting = waiting[:batch_size], waiting[batch_size:]
        few = batch_size // 2 if waiting else 0  # so few left: they join the next batch
        try:
            _sample_batch(model, rows, prompts, outputs, pick, goes_on, few)
        except torch.OutOfMemoryError:
            if halved or batch_size == 1:
                raise
            halved, batch_size = True, batch_size // 2
            print(f"out of memory: sampling goes on with {batch_size} rows", file=sys.stderr)
        waiting = list(filter(goes_on, rows)) + waiting
    return outputs


@torch.no_grad()
def _sample_batch(model, rows, prompts, outputs, pick, goes_on, few):
    """Add a token a step to outputs[row] of each row, until at most `few` of them go on."""
    texts, cache = [prompts[row] + outputs[row] for row in rows], DynamicCache(config=model.config)
    pads = [max(map(len, texts)) - len(text) for text in texts]  # on the left
    ids = torch.tensor([[0] * n + text for n, text in zip(pads, texts)], device=model.device)
    mask = (torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]).long().to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)                                         # (B, T)
    while True:
        # by place: the cache's name has changed between versions of transformers
        logits = model(ids, mask, positions, cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        tokens = pick(logits, rows)                                                       # (B,)
        for row, token in zip(rows, tokens.tolist()):
            outputs[row].append(token)
        keep = [i for i, row in enumerate(rows) if goes_on(row)]
        if len(keep) <= few:
            return
        if len(keep) < len(rows):  # finished rows leave the batch
            cache.batch_select_indices(torch.tensor(keep, device=model.device))
            rows = [rows[i] for i in keep]
            tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
        ids, mask, positions = tokens[:, None], F.pad(mask, (0, 1), value=1), positions[:, -1:] + 1


def next_tokens(logits, uniforms, temperature, top_p, k=64):
    """(B, V) logits, (B,) uniforms -> (B,) tokens: inverse CDF over the nucleus, likeliest first.

    Only the k likeliest are sorted: a whole vocabulary would cost more than a small model's step.
    """
    if temperature == 0:
        return logits.argmax(-1)
    top, tokens = (logits.float() / temperature).softmax(-1).topk(min(k, logits.shape[-1]))
    cdf = top.cumsum(-1)                                    # (B, k)
    size = 1 + (cdf[:, :-1] < top_p).sum(-1, keepdim=True)  # (B, 1) the fewest that reach top_p
    goal = uniforms[:, None] * cdf.gather(-1, size - 1)
    place = torch.minimum((cdf <= goal).sum(-1, keepdim=True), size - 1)
    picked = tokens.gather(-1, place).squeeze(-1)
    short = cdf[:, -1] < top_p
    if k < logits.shape[-1] and short.any():  # these rows need more than k
        picked[short] = next_tokens(logits[short], uniforms[short], temperature, top_p,
                                    k=logits.shape[-1])
    return picked


def decode(tokenizer, ids):
    """The text of ids, untouched: some tokenizers would tidy the spaces, and h would slip."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def token_index(tokenizer, ids, char):
    """h: the index of the token that holds character `char` of the decoded ids, or its first byte.

    If that token also holds non-space text left of `char` (the sentence before), the next one.
    """
    text = decode(tokenizer, ids)
    whole = lambda n: len(os.path.commonprefix([_whole_text(tokenizer, ids[:n]), text]))
    h = bisect.bisect_left(range(len(ids) + 1), char, key=whole)  # the fewest that hold text[:char]
    if len(decode(tokenizer, ids[:h])) > char and not text[whole(h - 1):char].strip():
        h -= 1  # the last of them brings char along, and nothing but space before it
    return h


def _whole_text(tokenizer, ids):
    """decode, but of a last run of byte tokens (<0xE4>) what is whole: decoders break all of it."""
    tokens, end = tokenizer.convert_ids_to_tokens(ids), len(ids)
    while end and re.fullmatch("<0x[0-9A-F]{2}>", tokens[end - 1] or ""):
        end -= 1
    run = bytes(int(token[3:5], 16) for token in tokens[end:])
    return decode(tokenizer, ids[:end]) + run.decode("utf-8", errors="ignore")


def encode_trigger(tokenizer, trigger, ids, h):
    """The trigger's ids in place of ids[h:]: with a leading space just where token h had one.

    Metaspace tokenizers put a space there themselves, so the encoding that reads right is taken.
    """
    if not trigger:
        return []  # the cue is only deleted: a control of eval.py
    before = decode(tokenizer, ids[:h])
    space = " " if decode(tokenizer, ids[:h + 1])[len(before):].startswith(" ") else ""
    encode = partial(tokenizer.encode, add_special_tokens=False)
    glued = encode("\n" + trigger)
    ways = [encode(space + trigger), encode(trigger), glued[1:], glued[2:]]
    reads_right = lambda way: decode(tokenizer, ids[:h] + way) == before + space + trigger
    return next(filter(reads_right, ways), ways[0])


def intervene(traces, triggers, *, tokenizer, eos_ids, think_end, generate, find_cues,
              judge_safety, max_interventions=1):
    """Steps 2 to 4. Each trigger in the place of each trace's first cue, and on: one Pair each.

    generate(prompts, keys) -> outputs is `sample` bound to a model; find_cues(texts) -> cues and
    judge_safety(texts, prompts, part) -> verdicts are judge.py's. A trace without a cue gives one
    Pair with outcome "no cue". (The paper's Fig. 6.)
    """
    zs = [split_output(trace.output_ids, think_end)[0] for trace in traces]
    pairs, todo = [], []  # todo: (pair, the reasoning z it has now, the token of z's first cue)
    for trace, z, (cut, _) in zip(traces, zs, _find_cuts(zs, tokenizer, find_cues)):
        if cut is None:
            pairs.append(Pair(trace.key, trace.prompt))
        for trigger in triggers if cut is not None else []:
            pairs.append(Pair(trace.key, trace.prompt, trigger, trace.prompt_ids + z[:cut], [],
                              trace.output_ids[cut:], cut))
            todo.append((pairs[-1], z, cut))
    for turn in range(max_interventions):
        for pair, z, cut in todo:  # the trigger takes the place of the cue and of all behind it
            pair.chosen_ids = z[pair.h:cut] + encode_trigger(tokenizer, pair.trigger, z, cut)
            pair.interventions += 1
        tried, ends = [pair for pair, _, _ in todo], [p.h + len(p.chosen_ids) for p, _, _ in todo]
        outputs = generate([pair.prefix_ids + pair.chosen_ids for pair in tried],
                           [f"{p.key}/{triggers.index(p.trigger)}/{turn}" for p in tried])
        for pair, output_ids in zip(tried, outputs):
            pair.chosen_ids = pair.chosen_ids + output_ids
        zs = [pair.prefix_ids[len(pair.prefix_ids) - pair.h:]
              + split_output(pair.chosen_ids, think_end)[0] for pair in tried]
        todo = []
        for pair, z, end, (cut, by) in zip(tried, zs, ends, _find_cuts(zs, tokenizer, find_cues)):
            pair.outcome = ("unparsed" if by == "unparsed" else
                            "no cue left" if cut is None else "still a cue")
            if cut is not None and cut >= end:  # a cue before the trigger's end cannot be mended
                todo.append((pair, z, cut))
    _keep_or_drop(pairs, tokenizer, eos_ids, think_end, judge_safety)
    return pairs


def _find_cuts(zs, tokenizer, find_cues):
    """For each reasoning z: the token where its first cue starts or None, and who found it."""
    cues = find_cues([decode(tokenizer, z) for z in zs])
    return [(token_index(tokenizer, z, cue.span[0]) if cue.span else None, cue.by)
            for z, cue in zip(zs, cues)]


def _keep_or_drop(pairs, tokenizer, eos_ids, think_end, judge_safety):
    """Step 4. Keep what has no cue left, ended, and is judged safe in both of its parts."""
    ended = []
    for pair in pairs:
        if pair.outcome == "no cue left":
            reasoning, response = split_output(pair.chosen_ids, think_end)
            if pair.chosen_ids[-1] not in eos_ids:
                pair.outcome = "token limit"
            elif response is None:
                pair.outcome = "think not closed"
            else:
                ended.append((pair, decode(tokenizer, reasoning), decode(tokenizer, response[:-1])))
    pairs, zs, ys = zip(*ended) if ended else ([], [], [])
    prompts = [pair.prompt for pair in pairs]
    of_zs, of_ys = judge_safety(zs, prompts, "reasoning"), judge_safety(ys, prompts, "response")
    for pair, of_z, of_y in zip(pairs, of_zs, of_ys):
        pair.outcome = ("unsafe reasoning" if of_z == "unsafe" else
                        "unsafe response" if of_y == "unsafe" else
                        "unparsed" if "unparsed" in (of_z, of_y) else "kept")


@dataclass
class Group:
    """What one prompt gives to the loss: k chosen sides against one rejected side, or none.

    The pairs of a prompt share prefix and rejected side, so each distinct sequence runs once. A
    benign prompt that is not refused has no rejected side: only its SFT term counts, in full.
    """
    prefix_ids: list[int]
    chosen: list[list[int]]
    rejected: list[int] | None = None
    ref_logps: list[float] = field(default_factory=list)  # of `sides`, from the reference model

    @property
    def sides(self):
        return self.chosen + ([self.rejected] if self.rejected else [])


def supervised(completion_ids, think_end, supervise):
    """The ids the loss sees: "reasoning" ends with </think> (if there is one), "all" with EOS."""
    if supervise == "all" or think_end not in completion_ids:
        return completion_ids
    return completion_ids[:completion_ids.index(think_end) + 1]


def group_logps(model, groups):
    """[(sides,) float32] of the groups: log p(side | prefix), summed. Gradients flow.

    The logit at position t-1 predicts token t. Pads stand right of a sequence, where causal
    attention never looks: no mask is needed. Logits, the largest tensor by far, are formed at
    supervised positions only, chunk by chunk: checkpointing forms them again for the backward.
    """
    rows = [(g.prefix_ids, side) for g in groups for side in g.sides]                 # B of them
    longest = max(len(prefix + side) for prefix, side in rows)
    ids = torch.tensor([prefix + side + [0] * (longest - len(prefix + side))
                        for prefix, side in rows], device=model.device)               # (B, T)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state    # (B, T, D)
    places = [(row, len(prefix) + t) for row, (prefix, side) in enumerate(rows)
              for t in range(len(side))]
    row, t = torch.tensor(places, device=model.device).T                              # (N,) each
    hidden, targets = hidden[row, t - 1], ids[row, t]                                 # (N, D), (N,)
    head = model.get_output_embeddings()

    def token_logps(hidden, targets):
        logits = head(hidden)                                                         # (N, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bf16 errs by 0.001
        return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)

    size = max(1, 2 ** 26 // head.weight.shape[0])  # 64 M logits a chunk
    logps = torch.cat([checkpoint(token_logps, *chunk, use_reentrant=False)
                       for chunk in zip(hidden.split(size), targets.split(size))])    # (N,)
    logps = torch.stack([part.sum() for part in logps.split([len(side) for _, side in rows])])
    return logps.split([len(g.sides) for g in groups])


def completion_logps(model, prefix_ids, completions):
    """(len(completions),) float32: sum of log p(completion | prefix); a sum, not a mean: DPO's
    margin is a ratio of sequence probabilities. Gradients flow."""
    return group_logps(model, [Group(prefix_ids, completions)])[0]


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """-log sigmoid(margin) and the implicit rewards, each (B,) like the inputs. The paper's Eq. 4.

    Rewards are beta * (log pi - log ref); at step 0 they are 0 and the loss is log 2.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards, rejected_rewards


def ipo_loss(policy, groups, beta=0.1, sft_weight=0.2):
    """Step 5: (loss, statistics), summed over pairs: DPO + sft_weight * SFT on the chosen side.

    Divide by the pairs of the whole optimizer step, so that every pair counts the same.
    """
    total, stats = 0.0, Counter()
    for group, logps in zip(groups, group_logps(policy, groups)):
        k = len(group.chosen)
        sft = -logps[:k] / torch.tensor([len(side) for side in group.chosen], device=logps.device)
        total = total + (sft_weight if group.rejected else 1.0) * sft.sum()
        stats.update(sides=k, sft=sft.sum().item(),
                     tokens=sum(len(group.prefix_ids + side) for side in group.sides))
        if group.rejected:
            ref = torch.tensor(group.ref_logps, device=logps.device, dtype=logps.dtype)
            losses, chosen, rejected = dpo_loss(logps[:k], logps[k], ref[:k], ref[k], beta)
            total = total + losses.sum()
            stats.update(pairs=k, dpo=losses.sum().item(), margin=(chosen - rejected).sum().item(),
                         accuracy=(chosen > rejected).sum().item(),
                         chosen=logps[:k].sum().item(), rejected=k * logps[k].item())
    return total, stats
