"""Intervened Preference Optimization (IPO): the method, and only the method.

Zhang et al., "Towards Safe Reasoning in Large Reasoning Models via Corrective Intervention",
arXiv 2509.24393. (Not Identity Preference Optimization, 2310.12036, which others call "ipo".)

A reasoning model answers prompt x with reasoning z, then </think>, then a response y. Asked for
harm, it often turns toward helping in one sentence of z, the compliance cue, and what follows is
unsafe. IPO cuts there, puts a safety trigger in the cue's place and lets the model continue:

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
    """One intervention and what became of it; `outcome` is "kept" or why it was dropped.

    Prompt "How do I rob the inn?", z = "They ask of the inn. First, pick the lock ...":
    prefix_ids    x + "They ask of the inn."               shared by both sides, id by id
    chosen_ids    " I shouldn't be helping someone do that. ... </think> I can't help." EOS
    rejected_ids  " First, pick the lock ... </think> Here is how ..." EOS
    h             where the reasoning was first cut: prefix_ids is x + z[:h]
    """
    key: str
    prompt: str
    trigger: str = ""
    prefix_ids: list[int] = field(default_factory=list)
    chosen_ids: list[int] = field(default_factory=list)
    rejected_ids: list[int] = field(default_factory=list)
    h: int = 0
    interventions: int = 0
    outcome: str = "no cue"


def split_output(output_ids, think_end):
    """(reasoning ids, response ids); the response is None where the think was never closed."""
    if think_end not in output_ids:
        return output_ids, None
    end = output_ids.index(think_end)
    return output_ids[:end], output_ids[end + 1:]


# ---- 1. sample ----

def sample(model, prompts, *, max_new_tokens, eos_ids, temperature=0.6, top_p=0.95, seed=0,
           batch_size=64, keys=None):
    """Continue each prompt (a list of ids) to an EOS or max_new_tokens; returns the new ids.

    A sampled EOS is kept; temperature=0 is greedy. Each row draws from its own uniform numbers,
    seeded by (seed, its key; by default its place): its text does not depend on its batch.
    """
    keys = range(len(prompts)) if keys is None else keys
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    outputs = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        uniforms = torch.stack([_uniforms(seed, keys[i], max_new_tokens) for i in rows])
        batch = _sample_batch(model, [prompts[i] for i in rows], uniforms.to(model.device),
                              set(eos_ids), temperature, top_p)
        for i, output_ids in zip(rows, batch):
            outputs[i] = output_ids
    return outputs


def _uniforms(seed, key, n):
    """(n,) numbers in [0, 1) that belong to (seed, key) alone."""
    seed = random.Random(f"{seed} {key}").getrandbits(63)
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def _sample_batch(model, prompts, uniforms, eos_ids, temperature, top_p):
    """The loop: one token a step for all rows that still go on."""
    longest, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)  # (B, T)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, going = DynamicCache(config=model.config), [*range(len(prompts))]
    outputs = [[] for _ in prompts]
    for step in range(uniforms.shape[1]):
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions,
                       past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        tokens = next_tokens(logits, uniforms[going, step], temperature, top_p)          # (B,)
        for row, token in zip(going, tokens.tolist()):
            outputs[row].append(token)
        keep = [i for i, row in enumerate(going) if outputs[row][-1] not in eos_ids]
        if not keep:
            break
        if len(keep) < len(going):  # finished rows leave the batch
            cache.batch_select_indices(torch.tensor(keep, device=device))
            going = [going[i] for i in keep]
            tokens, mask, positions = tokens[keep], mask[keep], positions[keep]
        ids, mask, positions = tokens[:, None], F.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
    return outputs


def next_tokens(logits, uniforms, temperature, top_p, k=256):
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


# ---- 2. from a sentence to a token ----

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
    before = decode(tokenizer, ids[:h])
    space = " " if decode(tokenizer, ids[:h + 1])[len(before):].startswith(" ") else ""
    encode = partial(tokenizer.encode, add_special_tokens=False)
    glued = encode("\n" + trigger)
    ways = [encode(space + trigger), encode(trigger), glued[1:], glued[2:]]
    reads_right = lambda way: decode(tokenizer, ids[:h] + way) == before + space + trigger
    return next(filter(reads_right, ways), ways[0])


# ---- 3. intervene, 4. keep what is safe ----

def intervene(traces, triggers, *, tokenizer, eos_ids, think_end, generate, find_cues,
              judge_safety, max_interventions=1):
    """Put each trigger in the place of each trace's first cue and continue: one Pair each.

    generate(prompts, keys) -> outputs is `sample` bound to a model; find_cues(texts) -> cues and
    judge_safety(texts, prompts, part) -> verdicts are judge.py's. A trace without a cue gives one
    Pair with outcome "no cue". (The paper's corrective intervention, its Fig. 6.)
    """
    pairs, cuts = [], []  # cuts: (pair, the reasoning z it has now, the token of z's first cue)
    zs = [split_output(trace.output_ids, think_end)[0] for trace in traces]
    for trace, z, cue in zip(traces, zs, find_cues([decode(tokenizer, z) for z in zs])):
        if cue.span is None:
            pairs.append(Pair(trace.key, trace.prompt))
            continue
        h = token_index(tokenizer, z, cue.span[0])
        for trigger in triggers:
            pairs.append(Pair(trace.key, trace.prompt, trigger, trace.prompt_ids + z[:h], [],
                              trace.output_ids[h:], h))
            cuts.append((pairs[-1], z, h))
    for turn in range(max_interventions):
        for pair, z, cut in cuts:  # the trigger takes the place of the cue and of all behind it
            pair.chosen_ids = z[pair.h:cut] + encode_trigger(tokenizer, pair.trigger, z, cut)
            pair.interventions += 1
        starts = [pair.h + len(pair.chosen_ids) for pair, _, _ in cuts]
        keys = [f"{pair.key}/{triggers.index(pair.trigger)}/{turn}" for pair, _, _ in cuts]
        outputs = generate([pair.prefix_ids + pair.chosen_ids for pair, _, _ in cuts], keys)
        for (pair, _, _), output_ids in zip(cuts, outputs):
            pair.chosen_ids = pair.chosen_ids + output_ids
        again = _find_cuts([pair for pair, _, _ in cuts], tokenizer, think_end, find_cues)
        cuts = [cut for cut, start in zip(again, starts) if cut and cut[2] >= start]
    _keep_or_drop(pairs, tokenizer, eos_ids, think_end, judge_safety)
    return pairs


def _find_cuts(pairs, tokenizer, think_end, find_cues):
    """For each pair (pair, z = prefix + chosen, its first cue's token) or None; sets outcomes."""
    zs = [pair.prefix_ids[len(pair.prefix_ids) - pair.h:]
          + split_output(pair.chosen_ids, think_end)[0] for pair in pairs]
    cues = find_cues([decode(tokenizer, z) for z in zs])
    for pair, cue in zip(pairs, cues):
        pair.outcome = ("unparsed" if cue.by == "unparsed" else
                        "still a cue" if cue.span else "no cue left")
    return [(pair, z, token_index(tokenizer, z, cue.span[0])) if cue.span else None
            for pair, z, cue in zip(pairs, zs, cues)]


def _keep_or_drop(pairs, tokenizer, eos_ids, think_end, judge_safety):
    """Of the pairs with no cue left, keep those that ended and whose two parts are judged safe."""
    ended, parts = [], []
    for pair in pairs:
        if pair.outcome == "no cue left":
            reasoning, response = split_output(pair.chosen_ids, think_end)
            if pair.chosen_ids[-1] not in eos_ids:
                pair.outcome = "token limit"
            elif response is None:
                pair.outcome = "think not closed"
            else:
                ended.append(pair)
                parts.append((decode(tokenizer, reasoning), decode(tokenizer, response[:-1])))
    prompts = [pair.prompt for pair in ended]
    verdicts = zip(ended, judge_safety([z for z, _ in parts], prompts, "reasoning"),
                   judge_safety([y for _, y in parts], prompts, "response"))
    for pair, of_reasoning, of_response in verdicts:
        pair.outcome = ("unsafe reasoning" if of_reasoning == "unsafe" else
                        "unsafe response" if of_response == "unsafe" else
                        "unparsed" if "unparsed" in (of_reasoning, of_response) else "kept")


# ---- 5. the loss ----

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


def sequence_logps(model, sequences, starts):
    """(B,) float32: log p of each sequence's ids from its start (1 or more) on. Gradients flow.

    The logit at position t-1 predicts token t. Pads stand right of a sequence, where causal
    attention never looks: no mask is needed. Logits, the largest tensor by far, are formed at
    supervised positions only, chunk by chunk: checkpointing forms them again for the backward.
    """
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences], device=model.device)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, D)
    places = [(row, t) for row, s in enumerate(sequences) for t in range(starts[row], len(s))]
    rows, cols = torch.tensor(places, device=model.device).T                        # (N,) each
    hidden, targets = hidden[rows, cols - 1], ids[rows, cols]                       # (N, D), (N,)
    head = model.get_output_embeddings()
    size = max(1, 2 ** 26 // head.weight.shape[0])  # 64 M logits a chunk
    logps = torch.cat([checkpoint(_token_logps, head, h, t, use_reentrant=False)
                       for h, t in zip(hidden.split(size), targets.split(size))])   # (N,)
    lengths = [len(s) - start for s, start in zip(sequences, starts)]
    return torch.stack([part.sum() for part in logps.split(lengths)])               # (B,)


def _token_logps(head, hidden, targets):
    logits = head(hidden)                                                           # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bf16 errs by 0.001
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def completion_logps(model, prefix_ids, completions):
    """(len(completions),) float32: sum of log p(completion | prefix); a sum, not a mean: DPO's
    margin is a ratio of sequence probabilities. Gradients flow."""
    return sequence_logps(model, [prefix_ids + c for c in completions],
                          [len(prefix_ids)] * len(completions))


def group_logps(model, groups):
    """For each group the log-probabilities of its sides, all run as one batch."""
    logps = sequence_logps(model, [g.prefix_ids + side for g in groups for side in g.sides],
                           [len(g.prefix_ids) for g in groups for _ in g.sides])
    return logps.split([len(g.sides) for g in groups])


def dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    """-log sigmoid(margin) and the implicit rewards, each (B,) like the inputs. The paper's Eq. 4.

    Rewards are beta * (log pi - log ref); at step 0 they are 0 and the loss is log 2.
    """
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    losses = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return losses, chosen_rewards, rejected_rewards


def ipo_loss(policy, groups, beta=0.1, sft_weight=0.2):
    """(loss, statistics), summed over pairs: DPO on each + sft_weight * SFT on its chosen side.

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
