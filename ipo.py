"""Intervened Preference Optimization (IPO): the method, and only the method.

Zhang et al., "Towards Safe Reasoning in Large Reasoning Models via Corrective Intervention",
arXiv 2509.24393. (Not Identity Preference Optimization, 2310.12036, which others call "ipo".)

A reasoning model answers prompt x with reasoning z, then </think>, then a response y. Asked for
harm, it often turns toward helping in one sentence of z, the compliance cue. IPO cuts there, puts a
safety trigger in the cue's place and lets the model continue:

  1. sample       z, y for each harmful prompt, from the model itself
  2. find_cues    the first compliance cue in z (judge.py); h is the token where it starts
  3. intervene    continue x + z[:h] + trigger, for each trigger; where a cue shows again, again
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
  keeps safe candidates                       only if ended, think closed, none unparsed

B sequences, T tokens, N supervised tokens, D hidden size, V vocabulary; `_ids` are lists of ints.
"""

import bisect
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
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
    by: str = ""                                             # who found the first cue (judge.Cue)
    outcome: str = "no cue"                                  # "kept", or why it was dropped


def split_output(output_ids, think_end):
    """(reasoning ids, response ids); the response is None where the think was never closed."""
    if think_end not in output_ids:
        return output_ids, None
    end = output_ids.index(think_end)
    return output_ids[:end], output_ids[end + 1:]


def padded(rows, side, device):
    """(B, T): the rows, lists of ints, filled up with zeros on their "left" or "right" side."""
    return pad_sequence([*map(torch.tensor, rows)], batch_first=True, padding_side=side).to(device)


@torch.no_grad()
def sample(model, prompts, *, max_new_tokens, eos_ids, temperature=0.6, top_p=0.95, seed=0,
           batch_size=64, keys=None):
    """Step 1. Continue each prompt (a list of ids) to an EOS or max_new_tokens; the new ids.
    A sampled EOS is kept; temperature=0 is greedy. Each row draws from its own uniform numbers,
    seeded by (seed, its key; by default its place): its draws do not depend on its batch."""
    uniform = [random.Random(f"{seed} {key}").random for key in keys or range(len(prompts))]
    outputs, rows = [[] for _ in prompts], []  # rows: the batch, as places in prompts
    waiting = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))  # little padding
    while rows or waiting:
        try:
            if not rows or (waiting and len(rows) <= batch_size // 2):  # more join, all prefill
                rows, waiting = (rows + waiting)[:batch_size], (rows + waiting)[batch_size:]
                texts = [prompts[row] + outputs[row] for row in rows]
                ids = padded(texts, "left", model.device)                                 # (B, T)
                mask = padded([[1] * len(text) for text in texts], "left", model.device)  # (B, T)
                cache = DynamicCache(config=model.config)  # by place below: its name has changed
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]              # as ids
            logits = model(ids, mask, positions, cache, use_cache=True, logits_to_keep=1).logits
            uniforms = torch.tensor([uniform[row]() for row in rows], device=model.device)
            tokens = next_tokens(logits[:, -1], uniforms, temperature, top_p)             # (B,)
            for row, token in zip(rows, tokens.tolist()):
                outputs[row].append(token)
            keep = [i for i, row in enumerate(rows) if outputs[row][-1] not in eos_ids
                    and len(outputs[row]) < max_new_tokens]
            if len(keep) < len(rows):  # finished rows leave
                rows = [rows[i] for i in keep]
                cache.batch_select_indices(torch.tensor(keep, dtype=int, device=model.device))
                tokens, mask = tokens[keep], mask[keep]
            ids, mask = tokens[:, None], F.pad(mask, (0, 1), value=1)               # (B, 1), (B, T)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size, rows, waiting = batch_size // 2, [], rows + waiting
            print(f"out of memory: sampling goes on with {batch_size} rows", file=sys.stderr)
    return outputs


def next_tokens(logits, uniforms, temperature, top_p, k=64):
    """(B, V) logits, (B,) uniforms -> (B,) tokens: inverse CDF over the nucleus, likeliest first.
    Only the k likeliest are sorted: a whole vocabulary costs more than a small model's step."""
    if temperature == 0:
        return logits.argmax(-1)
    vocab_size = logits.shape[-1]
    top, tokens = (logits.float() / temperature).softmax(-1).topk(min(k, vocab_size))
    cdf = top.cumsum(-1)                                    # (B, k)
    size = 1 + (cdf[:, :-1] < top_p).sum(-1, keepdim=True)  # (B, 1) the fewest that reach top_p
    goal = uniforms[:, None] * cdf.gather(-1, size - 1)
    place = torch.minimum((cdf <= goal).sum(-1, keepdim=True), size - 1)
    picked = tokens.gather(-1, place).squeeze(-1)
    if k < vocab_size and (short := cdf[:, -1] < top_p).any():  # these rows need more than k
        picked[short] = next_tokens(logits[short], uniforms[short], temperature, top_p, vocab_size)
    return picked


def decode(tokenizer, ids):
    """The text of ids, untouched: some tokenizers would tidy the spaces, and h would slip."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def token_index(tokenizer, ids, char):
    """h: the index of the token that holds the first byte of character `char` of the decoded ids;
    the next one if that token also holds non-space text left of `char` (the sentence before)."""
    text, tokens = decode(tokenizer, ids), tokenizer.convert_ids_to_tokens(ids)

    def whole(n):  # how many characters of the text the first n tokens hold in full
        end = n
        while end and re.fullmatch("<0x[0-9A-F]{2}>", tokens[end - 1] or ""):
            end -= 1  # a run of byte tokens: where its end is missing, decoders break all of it
        run = bytes(int(token[3:5], 16) for token in tokens[end:n]).decode(errors="ignore")
        return len(os.path.commonprefix([decode(tokenizer, ids[:end]) + run, text]))
    h = bisect.bisect_left(range(len(ids) + 1), char, key=whole)  # the fewest that hold text[:char]
    if len(decode(tokenizer, ids[:h])) > char and not text[whole(h - 1):char].strip():
        h -= 1  # the last of them brings char along, and nothing but space before it
    return h


def encode_trigger(tokenizer, trigger, ids, h):
    """The trigger's ids in place of ids[h:], with a leading space just where token h had one.
    Metaspace tokenizers add a space themselves: of four ways, the first that reads right."""
    before, with_h = decode(tokenizer, ids[:h]), decode(tokenizer, ids[:h + 1])
    space = " " if trigger and with_h[len(before):].startswith(" ") else ""  # "" only deletes
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
    glued = encode("\n" + trigger)
    ways = [encode(space + trigger), encode(trigger), glued[1:], glued[2:]]
    reads_right = lambda way: decode(tokenizer, ids[:h] + way) == before + space + trigger
    return next(filter(reads_right, ways), ways[0])


def intervene(traces, triggers, *, tokenizer, eos_ids, think_end, generate, find_cues,
              judge_safety, max_interventions=1):
    """Steps 2 to 4: a Pair for each trace and trigger; for a trace without a cue, one "no cue".
    generate(prompts, keys) -> outputs is `sample` bound to a model; find_cues(texts) -> cues and
    judge_safety(texts, prompts, part) -> verdicts are judge.py's. (The paper's Fig. 6.)"""
    def first_cues(outputs):  # [(the token where an output's first cue starts or None, by whom)]
        zs = [split_output(ids, think_end)[0] for ids in outputs]
        return [(token_index(tokenizer, z, cue.span[0]) if cue.span else None, cue.by)
                for z, cue in zip(zs, find_cues([decode(tokenizer, z) for z in zs]))]

    pairs, todo = [], []  # todo: (pair, its output as it is now, the token where its cue starts)
    for trace, (h, by) in zip(traces, first_cues([trace.output_ids for trace in traces])):
        x, ids = trace.prompt_ids, trace.output_ids
        new = [Pair(trace.key, trace.prompt, trigger, x + ids[:h], [], ids[h:], h, by=by)
               for trigger in triggers if h is not None]
        pairs += new or [Pair(trace.key, trace.prompt, by=by)]  # no trigger: "no cue"
        todo += [(pair, ids, h) for pair in new]
    for turn in range(max_interventions):
        tried = [pair for pair, _, _ in todo]
        heads = [ids[:cut] + encode_trigger(tokenizer, pair.trigger, ids, cut)
                 for pair, ids, cut in todo]  # the trigger replaces the cue and all that follows
        tails = generate([pair.prefix_ids + head[pair.h:] for pair, head in zip(tried, heads)],
                         [f"{pair.key}/{triggers.index(pair.trigger)}/{turn}" for pair in tried])
        outputs, todo = [head + tail for head, tail in zip(heads, tails)], []
        for pair, head, ids, (cut, by) in zip(tried, heads, outputs, first_cues(outputs)):
            pair.chosen_ids, pair.interventions = ids[pair.h:], turn + 1
            pair.outcome = ("unparsed" if by == "unparsed" else
                            "still a cue" if cut is not None else
                            "token limit" if ids[-1] not in eos_ids else
                            "think not closed" if think_end not in ids else "ended")
            if cut is not None and cut >= len(head):  # one in head would come back for ever
                todo.append((pair, ids, cut))
    _keep_or_drop([p for p in pairs if p.outcome == "ended"], tokenizer, think_end, judge_safety)
    return pairs


def _keep_or_drop(pairs, tokenizer, think_end, judge_safety):
    """Step 4. Of pairs that ended without a cue keep those whose chosen side is judged safe."""
    prompts = [pair.prompt for pair in pairs]
    parts = [split_output(pair.chosen_ids, think_end) for pair in pairs]
    zs = judge_safety([decode(tokenizer, z) for z, _ in parts], prompts, "reasoning")
    ys = judge_safety([decode(tokenizer, y[:-1]) for _, y in parts], prompts, "response")  # no EOS
    for pair, z_verdict, y_verdict in zip(pairs, zs, ys):
        pair.outcome = ("unsafe reasoning" if z_verdict == "unsafe" else
                        "unsafe response" if y_verdict == "unsafe" else
                        "unparsed" if "unparsed" in (z_verdict, y_verdict) else "kept")


@dataclass
class Group:
    """What one prompt gives to the loss: k chosen sides against one rejected side. A benign prompt
    that is not refused has no rejected side: only its SFT term counts, in full."""
    prefix_ids: list[int]
    chosen: list[list[int]]
    rejected: list[int] | None = None
    ref_logps: list[float] = field(default_factory=list)  # of `sides`, from the reference model

    @property
    def sides(self):  # each distinct sequence of the prompt's pairs, to be run once
        return self.chosen + ([self.rejected] if self.rejected else [])


def supervised(completion_ids, think_end, supervise):
    """The ids the loss sees: "reasoning" ends with </think> (if there is one), "all" with EOS."""
    z, _ = split_output(completion_ids, think_end)
    return completion_ids if supervise == "all" else completion_ids[:len(z) + 1]


def group_logps(model, groups):
    """[(sides,) float32] of the groups: the sum of log p(side | prefix), with gradients. The logit
    at t-1 predicts token t. Logits, the largest tensor by far, are formed for sides only, chunk by
    chunk, and again for the backward. Causal attention never looks right, at the pads: no mask."""
    rows = [(g.prefix_ids, side) for g in groups for side in g.sides]                 # B of them
    ids = padded([prefix + side for prefix, side in rows], "right", model.device)     # (B, T)
    mask = padded([[0] * len(p) + [1] * len(s) for p, s in rows], "right", model.device)  # (B, T)
    row, t = mask.nonzero(as_tuple=True)                                              # (N,) each
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state    # (B, T, D)
    hidden, targets = hidden[row, t - 1], ids[row, t]                                 # (N, D), (N,)
    head = model.get_output_embeddings()

    def token_logps(hidden, targets):
        logits = head(hidden)                                                         # (N, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bf16 errs by 0.001
        return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)
    size = max(1, (2 ** 26 if ids.is_cuda else 2 ** 22) // head.weight.shape[0])  # fits CPU caches
    logps = torch.cat([checkpoint(token_logps, *chunk, use_reentrant=False)
                       for chunk in zip(hidden.split(size), targets.split(size))])    # (N,)
    logps = torch.stack([part.sum() for part in logps.split([len(side) for _, side in rows])])
    return logps.split([len(g.sides) for g in groups])


def completion_logps(model, prefix_ids, completions):
    """(len(completions),) float32: the sum of log p(completion | prefix), with gradients."""
    return group_logps(model, [Group(prefix_ids, completions)])[0]


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """-log sigmoid(margin) and both implicit rewards, (B,) each, a shared rejected side (): Eq. 4.
    Inputs are sums of log p, not means. At step 0 the rewards are 0 and the loss is log 2."""
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    return -F.logsigmoid(chosen_rewards - rejected_rewards), chosen_rewards, rejected_rewards


def ipo_loss(policy, groups, beta=0.1, sft_weight=0.2):
    """Step 5: (loss, statistics), summed over pairs: DPO + sft_weight * SFT on the chosen side.
    Divide by the chosen sides of the whole optimizer step, so that each counts the same."""
    total, stats = 0.0, Counter()
    for group, logps in zip(groups, group_logps(policy, groups)):
        k = len(group.chosen)
        sft = -logps[:k] / torch.tensor([len(side) for side in group.chosen], device=logps.device)
        total = total + (sft_weight if group.rejected else 1.0) * sft.sum()
        stats.update(sides=k, sft=sft.sum().item(),
                     tokens=sum(len(group.prefix_ids + side) for side in group.sides))
        if group.rejected:
            ref = torch.tensor(group.ref_logps, device=logps.device, dtype=logps.dtype)
            losses, r_chosen, r_rejected = dpo_loss(logps[:k], logps[k], ref[:k], ref[k], beta)
            total = total + losses.sum()
            stats.update(pairs=k, dpo=losses.sum().item(), chosen=logps[:k].sum().item(),
                         margin=(r_chosen - r_rejected).sum().item(), rejected=k * logps[k].item(),
                         accuracy=(r_chosen > r_rejected).sum().item())
    return total, stats
