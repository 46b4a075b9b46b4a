"""python train.py: base model -> traces -> pairs -> two stages of training -> a saved model.

With no flags it makes the kingdom's small base model (data.py) and aligns it, on a CPU, in minutes.
With --model NAME_OR_FOLDER it does the same for a Hugging Face causal reasoning model. A stopped
run goes on where it was: every stage writes its file whole or shard by shard in the run folder.
It says which step of ipo.py's header it is at: [1-4], [5], [6].
"""

import contextlib
import copy
import hashlib
import inspect
import json
import math
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import safetensors.torch
import torch
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, LlamaForCausalLM

import data
import eval as evaluation
import ipo
import judge
from data import UserError, flag


@dataclass
class Config:
    model: str | None = flag("a Hugging Face reasoning model, name or folder (the kingdom's own)")
    out: str = flag("the run folder", "runs/kingdom")
    seed: int = flag("seeds the kingdom's base, the sampling and the order of training", 0)
    prompts: str | None = flag("harmful training prompts: a file or a public set")
    traces: str | None = flag("instead of --prompts: rollouts made elsewhere, a .jsonl file with "
                              "columns prompt and output (text) or output_ids")
    triggers: str | None = flag("a .txt file with one trigger a line (the pool of six)")
    benign: str | None = flag("benign training prompts, as --prompts; none: no stage 2")
    limit: int | None = flag("use at most this many prompts of each file")
    sets: str | None = flag("evaluation sets: KIND:FILE_OR_NAME,... (KIND harmful, benign, math)")
    allow_overlap: bool = flag("evaluate on prompts that training sees", False)
    judge: str | None = flag("keywords, self (the untouched base), or a model's name or folder")
    judge_url: str | None = flag("where --judge is served, an OpenAI-compatible http://.../v1")
    max_interventions: int = flag("how often one candidate is cut and continued", 1)
    supervise: str = flag("reasoning: from h through </think>; all: the response too", "reasoning")
    beta: float | None = flag("DPO's beta: how dear it is to leave the base model")
    sft_weight: float = flag("the SFT term's coefficient", 0.2)
    lora_rank: int = flag("train adapters of this rank instead of all weights", 0)
    device: str | None = flag("cpu or cuda (default: cuda where there is one)")
    lr: float | None = flag("peak learning rate")
    epochs: int = flag("passes over the pairs in stage 1; stage 2 is one", 1)
    batch_pairs: int | None = flag("pairs an optimizer step")
    max_new_tokens: int | None = flag("the token limit of a trace")
    sample_batch: int | None = flag("rows sampled together")
    micro_tokens: int | None = flag("tokens, padding included, of one forward and backward pass")


# What a mode fills in where a flag was not given; the only other source of a setting.
DEFAULTS = {
    "kingdom": dict(judge="keywords", sets="kingdom", max_new_tokens=200, sample_batch=256, lr=2e-4,
                    micro_tokens=1536, batch_pairs=16, beta=0.5),  # short traces: a nat is dearer
    "model": dict(judge="self", prompts="star-1", benign="star-benign-915", **evaluation.REAL,
                  micro_tokens=16384, batch_pairs=32, lr=1e-6, beta=0.1),
    "model with adapters": dict(lr=2e-5),  # goes before "model"
}
FREE = ("out", "device", "sample_batch", "micro_tokens")  # may change when a run goes on
LOGGED = ("dpo", "margin", "accuracy", "chosen", "rejected")
WARMUP, MAX_GRAD_NORM, SAVE_EVERY = 0.1, 1.0, 20
KINGDOM_PROMPTS = {"harmful": 120, "benign": 480, "math": 40}
BASE_TEXTS, BASE_BATCH, BASE_LR = 17600, 16, 5e-3  # the kingdom's base model


def check_run(cfg):
    """The run folder; one that was made with other settings is refused."""
    run, path, now = Path(cfg.out), Path(cfg.out, "config.json"), asdict(cfg)
    old = json.loads(path.read_text())["settings"] if path.exists() else now
    differ = ", ".join(f"{name}={old.get(name)} (now {value})" for name, value in now.items()
                       if name not in FREE and old.get(name) != value)
    if differ:
        raise UserError(f"{run} was made with other settings: {differ}; give another --out")
    return run


def write_config(cfg, run, base):
    """config.json: the settings, and what they ran on. Written when all inputs have been read."""
    run.mkdir(parents=True, exist_ok=True)
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent,
                         capture_output=True, text=True)  # through the shell: git may be missing
    made_by = {"torch": torch.__version__, "transformers": transformers.__version__,
               "commit": git.stdout.strip(), "device": cfg.device}
    base = str(Path(base).resolve() if Path(base).exists() else base)  # eval.py runs from anywhere
    config = {"settings": asdict(cfg), "triggers": pool(cfg), "made_by": made_by, "base": base}
    data.write_text(run / "config.json", json.dumps(config, indent=1))


def pool(cfg):
    """The triggers: ipo.TRIGGERS, or one a line of --triggers FILE."""
    if cfg.triggers is None:
        return ipo.TRIGGERS
    triggers = [record["prompt"].strip() for record in data.load_prompts(cfg.triggers)]
    if len({*triggers}) < len(triggers):
        raise UserError(f"{cfg.triggers}: a trigger stands there twice; drop one")
    return triggers


def check_memory(folder, cfg):
    """Say the expected peak memory, from the model's config alone; refuse what cannot fit."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError):
        return  # loading it, the next step, says what is wrong
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    cuda, width, layers = cfg.device == "cuda", config.hidden_size, config.num_hidden_layers
    size, params = 2 if cuda else 4, [p.numel() for p in model.parameters()]
    head_dim = getattr(config, "head_dim", None) or width // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    keys = 2 * layers * heads * head_dim * size  # and values, of one token
    keys *= cfg.sample_batch * (cfg.max_new_tokens + 256)
    kept = layers if cuda else layers * 16  # checkpointing keeps a layer's input
    wide = getattr(config, "intermediate_size", 4 * width)
    activations = cfg.micro_tokens * size * (width * (kept + 8) + 6 * wide)
    weights, adapters = size * sum(params), cfg.lora_rank * sum(
        linear.in_features + linear.out_features
        for _, _, linear in linear_layers(model, torch.nn.Linear))
    state = weights + 16 * adapters if adapters else 4 * weights
    # with the activations a chunk of logits; while a weight is updated seven float32 copies of it
    training = state + max(activations + 10 * 2 ** 26, 0 if adapters else 28 * max(params))
    peak = max(training, weights + keys * (1 + 1 / layers)) / 2 ** 30
    print(f"expected peak memory: {peak:.1f} GiB (weights and optimizer {state / 2 ** 30:.1f}, "
          f"key-value cache while sampling {keys / 2 ** 30:.1f})")
    if cuda and peak > (room := torch.cuda.mem_get_info()[1] / 2 ** 30):
        raise UserError(f"about {peak:.0f} GiB are needed and the GPU has {room:.0f}; use "
                        f"--lora-rank 16, a smaller --sample-batch, --max-new-tokens or "
                        f"--micro-tokens, or a smaller model")


def base_texts(n, seed):
    return data.kingdom_texts(n, seed, ipo.TRIGGERS, partial(judge.cue_question, style="brief"),
                              partial(judge.safety_question, style="brief"))


def base_folder(cfg):
    """The base: --model, or the kingdom's own, made once beside the runs, named by what made it."""
    if cfg.model:
        here = Path(cfg.model)
        if len(here.parts) > 1 and here.parent.is_dir() and not here.exists():
            raise UserError(f"{here}: no such folder, and beside others here it is no hub name")
        return cfg.model
    made_of = [base_texts(500, cfg.seed), BASE_TEXTS, BASE_BATCH, BASE_LR, cfg.seed, cfg.device]
    made_of += map(inspect.getsource, (build_base, data.kingdom_config, data.kingdom_tokenizer))
    name = f"base-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]}"
    folder = Path(cfg.out).parent / name
    if not folder.exists():
        print(f"[0] training the kingdom's small base model, once, into {folder}")
        build_base(cfg, folder)
    shutil.rmtree(folder.with_name(f"{name}.work"), ignore_errors=True)
    return folder


def build_base(cfg, folder):
    """The kingdom's base model, trained from scratch on the grammar's text: the SFT term alone."""
    torch.manual_seed(cfg.seed)
    texts, work = base_texts(BASE_TEXTS, cfg.seed), folder.with_name(f"{folder.name}.work")
    tokenizer = data.kingdom_tokenizer(texts[:4000])
    model = LlamaForCausalLM(data.kingdom_config(tokenizer)).to(cfg.device)
    groups = [ipo.Group(data.render(tokenizer, prompt),
                        [tokenizer.encode(output) + [tokenizer.eos_token_id]])
              for prompt, output in texts]
    work.mkdir(parents=True, exist_ok=True)
    cfg = replace(cfg, lr=BASE_LR, epochs=1, batch_pairs=BASE_BATCH)
    train_stage(model, groups, cfg, work, 1)
    save_model(model, tokenizer, folder)


def save_model(model, tokenizer, folder):
    """A plain Hugging Face folder, written beside and renamed."""
    beside = Path(folder).with_name(Path(folder).name + ".part")
    shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed while saving
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    beside.rename(folder)


class LoRA(torch.nn.Module):
    """A frozen linear layer and a float32 adapter of rank r: W x + (alpha / r) B A x."""
    scale, on = 2.0, True  # alpha / r; whether the adapters, all of them, are in use

    def __init__(self, linear, rank):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        new = partial(torch.zeros, device=linear.weight.device, dtype=torch.float32)
        self.A = torch.nn.Parameter(new(rank, linear.in_features))
        self.B = torch.nn.Parameter(new(linear.out_features, rank))  # 0: at first nothing changes
        torch.nn.init.normal_(self.A, std=linear.in_features ** -0.5)

    def forward(self, x):
        out = self.linear(x)
        if self.on:
            out = out + (self.scale * (x.float() @ self.A.T) @ self.B.T).to(out.dtype)
        return out

    def merged(self):  # rounded at random: most of a small update is below bf16's resolution
        weight = self.linear.weight.data
        generator = torch.Generator(weight.device).manual_seed(0)
        stochastic_round_(weight, (weight + self.scale * self.B @ self.A).float(), generator)
        return self.linear


def linear_layers(model, kind):
    """[(parent, name, layer)] of all layers of that kind, the output head left out."""
    head = model.get_output_embeddings()
    return [(parent, name, layer) for parent in model.modules() if not isinstance(parent, LoRA)
            for name, layer in parent.named_children()
            if isinstance(layer, kind) and layer is not head]


def add_adapters(model, rank):
    model.requires_grad_(False)
    for parent, name, layer in linear_layers(model, torch.nn.Linear):
        setattr(parent, name, LoRA(layer, rank))


@contextlib.contextmanager
def reference(models, device):
    """The untouched base: a second model, or the policy itself with its adapters off."""
    try:
        LoRA.on = False
        yield models.base.to(device)
    finally:
        LoRA.on = True
        if models.base is not models.policy and device == "cuda":
            models.base.to("cpu")  # beside a policy in training there is no room for it


def stochastic_round_(target, value, generator):
    """target = value, rounded to bf16 up or down at random so that the mean is kept: bf16 has 8
    bits, and rounded to the nearest, each update under 1/256 of its weight would be lost."""
    if target.dtype == torch.bfloat16:
        bits = value.contiguous().view(torch.int32)
        noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device,
                              generator=generator)
        value = ((bits + noise) & -65536).view(torch.float32)  # the upper 16 bits are the bf16
    target.copy_(value)


class AdamW:
    """Adam, its moments in the weights' own dtype: 8 bytes a bf16 parameter with its gradient."""

    def __init__(self, named, betas=(0.9, 0.95), eps=1e-8, seed=0):
        self.named, self.betas, self.eps, self.seed, self.steps = dict(named), betas, eps, seed, 0
        self.state = {f"{m}.{name}": p.detach() if m == "p" else torch.zeros_like(p)
                      for name, p in self.named.items() for m in "pmv"}  # what a checkpoint holds

    @torch.no_grad()
    def step(self, lr):
        self.steps += 1
        fix_m, fix_v = (1 - beta ** self.steps for beta in self.betas)
        generator = torch.Generator(next(iter(self.named.values())).device)
        generator.manual_seed(self.seed * 1_000_003 + self.steps)
        for name, p in self.named.items():
            m, v, grad = self.state[f"m.{name}"], self.state[f"v.{name}"], p.grad.float()
            new_m = m.float().lerp(grad, 1 - self.betas[0])
            new_v = v.float().lerp(grad * grad, 1 - self.betas[1])
            update = (new_m / fix_m) / ((new_v / fix_v).sqrt() + self.eps)
            for target, value in ((m, new_m), (v, new_v), (p, p.float() - lr * update)):
                stochastic_round_(target, value, generator)
            p.grad = None


def plan(groups, cfg, stage):
    """The groups of each optimizer step, for all epochs: shuffled, about batch_pairs pairs each."""
    rng, steps = random.Random(f"{cfg.seed} {stage}"), []
    for _ in range(cfg.epochs if stage == 1 else 1):
        room = 0
        for group in rng.sample(groups, len(groups)):
            if room <= 0:
                steps.append([])
                room = cfg.batch_pairs
            steps[-1].append(group)
            room -= len(group.chosen)
    return steps


def split(groups, budget):
    """Groups over the budget of tokens in parts of fewer chosen sides, which the loss sums over."""
    parts = []
    for group in groups:
        k, length = len(group.chosen), len(group.prefix_ids) + max(map(len, group.sides))
        n = max(1, budget // length - (group.rejected is not None))
        parts += [ipo.Group(group.prefix_ids, group.chosen[i:i + n], group.rejected,
                            group.ref_logps[:k][i:i + n] + group.ref_logps[k:])
                  for i in range(0, k, n)]
    return parts


def micro_batches(groups, budget):
    """Groups of like length together, as many as fit the budget of padded tokens; at least one."""
    length = lambda group: len(group.prefix_ids) + max(map(len, group.sides))
    batches, rows = [], 0
    for group in sorted(groups, key=length):
        if not batches or (rows + len(group.sides)) * length(group) > budget:
            batches, rows = batches + [[]], 0
        batches[-1].append(group)
        rows += len(group.sides)
    return batches


@torch.no_grad()
def add_reference(models, groups, cfg):
    """Fill in each group's reference log-probabilities: once, before its stage."""
    batches = micro_batches(groups, cfg.micro_tokens)
    with reference(models, cfg.device) as model:
        for batch in tqdm(batches, desc="reference", unit="batch", disable=None):
            for group, logps in zip(batch, ipo.group_logps(model, batch)):
                group.ref_logps = logps.tolist()


def train_stage(policy, groups, cfg, run, stage):
    """IPO (ipo.ipo_loss) over the groups, from this stage's checkpoint if there is one."""
    named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    optimizer, log = AdamW(named, seed=cfg.seed), run / "log.jsonl"
    steps, first = plan(groups, cfg, stage), resume(run, stage, optimizer)
    if first is None:
        return
    data.write_jsonl(log, [row for row in data.read_jsonl(log)
                           if (row["stage"], row["step"]) < (stage, first)])
    policy.train()  # activation checkpointing works in train mode alone; there is no dropout
    if cfg.device == "cuda":
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    bar = tqdm(steps[first:], initial=first, total=len(steps), desc=f"stage {stage}", unit="step",
               disable=None)
    for step, batch in enumerate(bar, first):
        lr = learning_rate(step, len(steps), cfg.lr)
        pairs, stats = sum(len(group.chosen) for group in batch), Counter()
        for micro in micro_batches(split(batch, cfg.micro_tokens), cfg.micro_tokens):
            loss, seen = ipo.ipo_loss(policy, micro, cfg.beta, cfg.sft_weight)
            (loss / pairs).backward()
            stats.update(seen, loss=loss.item())
        norm = torch.nn.utils.clip_grad_norm_(named.values(), MAX_GRAD_NORM).item()
        if not math.isfinite(norm):
            raise UserError(f"stage {stage}, step {step}: the gradient is not finite; the weights "
                            f"were not touched; try a lower --lr in a new --out")
        optimizer.step(lr)
        row = {"stage": stage, "step": step, "lr": lr, "grad_norm": norm, "tokens": stats["tokens"],
               "loss": stats["loss"] / pairs, "pairs": stats["pairs"],
               "sft": stats["sft"] / stats["sides"],
               **{name: stats[name] / max(1, stats["pairs"]) for name in LOGGED}}
        data.append_jsonl(log, [row])
        bar.set_postfix(dpo=row["dpo"], margin=row["margin"], sft=row["sft"], refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == len(steps):
            save_checkpoint(run, stage, step + 1, optimizer)
    policy.eval()


def learning_rate(step, steps, peak):
    """Linear warm-up over the first tenth, then a cosine to 0."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.5 + 0.5 * math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def save_checkpoint(run, stage, step, optimizer):
    for left in run.glob(".tmp*"):  # what safetensors was writing when an earlier run was killed
        left.unlink()
    beside, at = run / "checkpoint.part", {"stage": str(stage), "step": str(step)}
    safetensors.torch.save_file(optimizer.state, beside, metadata=at)
    beside.replace(run / "checkpoint.safetensors")


def resume(run, stage, optimizer):
    """Load this stage's checkpoint; the step to go on from, None if a later stage has begun."""
    path = run / "checkpoint.safetensors"
    if not path.exists():
        return 0
    with safetensors.safe_open(path, "pt") as file:
        saved = {key: int(value) for key, value in file.metadata().items()}
        if saved["stage"] != stage:
            return 0 if saved["stage"] < stage else None
        for name, value in optimizer.state.items():
            value.copy_(file.get_tensor(name))
    optimizer.steps = saved["step"]
    return saved["step"]


def make_pairs(shard, model, tokenizer, cfg, ask, triggers):
    """Steps 1 to 4 for a shard of (key, record): each prompt's trace and its interventions."""
    traces = evaluation.rollouts(shard, model, tokenizer, cfg, given=cfg.traces)
    pairs = ipo.intervene(
        traces, triggers, tokenizer=tokenizer, eos_ids=data.eos_ids(model, tokenizer),
        think_end=data.think_ids(tokenizer)[1], find_cues=ask.find_cues,
        judge_safety=ask.judge_safety, max_interventions=cfg.max_interventions,
        generate=evaluation.sampler(model, tokenizer, cfg))
    return [{**asdict(trace), "text": ipo.decode(tokenizer, trace.output_ids),
             "pairs": [asdict(pair) for pair in pairs if pair.key == trace.key]}
            for trace in traces]


def write_pairs(path, traces, tokenizer):
    """pairs.jsonl: what was kept, with the text columns that preference-data tools read."""
    show = partial(ipo.decode, tokenizer)
    pairs = [pair for trace in traces for pair in trace["pairs"]]
    counts = Counter(pair["outcome"] for pair in pairs)
    told = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
    by = Counter(trace["pairs"][0]["by"] for trace in traces)["unparsed"]
    print(f"{len(traces)} traces gave {len(pairs)} candidates: {told}"
          + f"; {by} first cues by keywords, the judge could not be read" * (by > 0))
    if not counts["kept"]:
        raise UserError(f"no pair was kept ({told}); try more prompts, another --judge, more "
                        f"--max-interventions or more --max-new-tokens")
    columns = ("key", "trigger", "interventions", "h", "prefix_ids", "chosen_ids", "rejected_ids")
    data.write_jsonl(path, [
        {"prompt": show(pair["prefix_ids"]), "chosen": show(pair["chosen_ids"]),
         "rejected": show(pair["rejected_ids"]), **{name: pair[name] for name in columns}}
        for pair in pairs if pair["outcome"] == "kept"])


def harmful_groups(pairs, think_end, supervise):
    """One Group a prompt: its pairs share prefix and rejected side."""
    groups, cut = {}, partial(ipo.supervised, think_end=think_end, supervise=supervise)
    for pair in pairs:
        group = ipo.Group(pair["prefix_ids"], [], cut(pair["rejected_ids"]))
        groups.setdefault(pair["key"], group).chosen.append(cut(pair["chosen_ids"]))
    return list(groups.values())


def sample_benign(shard, model, tokenizer, cfg):
    """A trace of each benign prompt, and whether it refuses; None where it did not end."""
    think_end, eos_ids = data.think_ids(tokenizer)[1], data.eos_ids(model, tokenizer)
    rows = [asdict(trace) for trace in evaluation.rollouts(shard, model, tokenizer, cfg)]
    for row in rows:
        response = ipo.split_output(row["output_ids"], think_end)[1]
        ended = response is not None and row["output_ids"][-1] in eos_ids
        row["refused"] = judge.is_refusal(ipo.decode(tokenizer, response)) if ended else None
    return rows


def benign_groups(base_rows, stage1_rows, think_end, supervise):
    """Stage 2: the base's answer over the stage-1 model's refusal if any; else SFT alone."""
    cut = partial(ipo.supervised, think_end=think_end, supervise=supervise)
    return [ipo.Group(base["prompt_ids"], [cut(base["output_ids"])],
                      cut(now["output_ids"]) if now["refused"] else None)
            for base, now in zip(base_rows, stage1_rows) if base["refused"] is False]


def training_prompts(cfg):
    """[(key, record)] of the harmful and of the benign training prompts."""
    harmful, benign, sums = [data.kingdom_prompts("train", kind, n, cfg.seed)[:cfg.limit]
                             for kind, n in KINGDOM_PROMPTS.items()]
    benign += sums
    if source := cfg.traces or cfg.prompts:
        harmful, benign = data.load_prompts(source)[:cfg.limit], []
    if cfg.benign:
        benign = [] if cfg.benign == "none" else data.load_prompts(cfg.benign)[:cfg.limit]
    return [[(f"{kind}/{i}", record) for i, record in enumerate(records)]
            for kind, records in (("harmful", harmful), ("benign", benign))]


def align(cfg, run, tokenizer, models, ask, harmful, benign):
    """Steps 1 to 6: traces, pairs, both stages of training; the policy ends in models.policy."""
    base, think_end = models.base, data.think_ids(tokenizer)[1]
    print("[1-4] sampling the base on harmful prompts; where its reasoning first turns toward "
          "doing the harm, the cue, a safety trigger takes over and the base goes on (Fig. 5, 6)")
    traces = data.in_shards(run / "traces.jsonl", harmful, make_pairs, base, tokenizer, cfg, ask,
                            pool(cfg))
    if not (run / "pairs.jsonl").exists():
        write_pairs(run / "pairs.jsonl", traces, tokenizer)
    pairs = data.read_jsonl(run / "pairs.jsonl")
    for side, what in (("rejected", "cue"), ("chosen", "trigger")):  # what stands at the cut
        text, before = pairs[0][side], pairs[0]["prompt"][-80:]
        end = judge.split_sentences(text)[0][1]
        text = f"...{before} [{what}: {text[:end].strip()}] {text[end:end + 150]}..."
        print(f"  {side:9}{evaluation.printable(' '.join(text.split()))}")
    groups = harmful_groups(pairs, think_end, cfg.supervise)
    answers = data.in_shards(run / "benign_base.jsonl", benign, sample_benign, base, tokenizer, cfg)
    print("[5] stage 1: DPO from the cut on, the corrected reasoning over the model's own (Eq. 4), "
          "and a little SFT on it")
    add_reference(models, groups, cfg)
    if cfg.lora_rank:
        torch.manual_seed(cfg.seed)
        add_adapters(base, cfg.lora_rank)
    else:
        models.policy = copy.deepcopy(base)
        base.to("cpu")  # room for the optimizer; `reference` brings it back where it is needed
    train_stage(models.policy, groups, cfg, run, 1)
    if not benign:
        return
    print("[6] stage 2, against over-refusal: benign prompts join the pairs; where stage 1 refuses "
          "one, the base's answer is preferred to that")
    now = data.in_shards(run / "benign_stage1.jsonl", benign, sample_benign, models.policy,
                         tokenizer, cfg)
    more = benign_groups(answers, now, think_end, cfg.supervise)
    refused = [row for row in now if row["refused"]]
    print(f"stage 1 refuses {len(refused)} of {len(now)} benign prompts, by keywords; {len(more)} "
          f"join, the others the base itself refused or did not finish")
    for row in refused[:1]:
        text = f"{row['prompt']} ... {ipo.decode(tokenizer, row['output_ids'])[-120:]}"
        print(f"  {evaluation.printable(' '.join(text.split()))}")
    add_reference(models, more, cfg)
    train_stage(models.policy, groups + more, cfg, run, 2)


def run_all(cfg, run):
    """The whole method; every stage finds what an earlier, stopped run has finished."""
    folder = base_folder(cfg)
    check_memory(folder, cfg)
    tokenizer, base = data.load_model(folder, cfg.device)
    models = SimpleNamespace(base=base, policy=base)

    def base_sample(prompts):  # the judge is never the model under training
        with reference(models, cfg.device) as model:
            return evaluation.sampler(model, tokenizer, cfg, temperature=0)(prompts)

    ask = evaluation.judges(cfg, tokenizer, base_sample)
    sets, prompts = evaluation.load_sets(cfg.sets, cfg.limit), training_prompts(cfg)
    trained = [record for part in prompts for _, record in part]
    evaluation.check_overlap(sets, trained, cfg.allow_overlap)
    data.render_all(tokenizer, base, sets + trained)
    given = [data.given_output(tokenizer, r) for _, r in prompts[0]] if cfg.traces else []
    if given and not any(data.think_ids(tokenizer)[1] in output for output in given):
        raise UserError(f"{cfg.traces}: no output closes its think; they must keep their </think>")
    if not (run / "config.json").exists():
        write_config(cfg, run, folder)
    if cfg.model:
        print(f"{run} will hold harmful text (traces, rejected sides): keep it to yourself")
    evaluate = partial(evaluation.evaluate, sets=sets, tokenizer=tokenizer, cfg=cfg, ask=ask)
    print("[-] before: the base on held-out prompts")
    rows = evaluate(run / "eval_before.jsonl", "before", base)
    align(cfg, run, tokenizer, models, ask, *prompts)
    print("[-] after: the same prompts and seeds")
    rows += evaluate(run / "eval_after.jsonl", "after", models.policy)
    for parent, name, layer in linear_layers(models.policy, LoRA):
        setattr(parent, name, layer.merged())
    if not (run / "model").exists():
        save_model(models.policy, tokenizer, run / "model")
    data.write_jsonl(run / "eval_traces.jsonl", rows)
    summary = evaluation.summarise(rows, cfg.judge)
    write_card(run, cfg, summary)
    data.write_text(run / "eval.json", json.dumps(summary, indent=1))  # the last: the run is done


def write_card(run, cfg, summary):
    """The model card of the saved folder: what it is, its settings and its results."""
    table = evaluation.table({side: summary[side] for side in evaluation.SIDES})
    head, *rows = [f"| {' | '.join(line)} |" for line in table]
    settings = ", ".join(f"{name} {value}" for name, value in asdict(cfg).items() if name != "out")
    world = "." if cfg.model else " on a synthetic world; no evidence about real models."
    data.write_text(run / "model" / "README.md", "\n".join([
        "---", f"base_model: {cfg.model}" if cfg.model else "license: mit", "tags: [ipo, safety]",
        "---", f"Trained with Intervened Preference Optimization (arXiv 2509.24393){world}", "",
        head, "|---" * 3 + "|", *rows, "", f"Judge: {summary['judge']}. Settings: {settings}."]))


def parse(argv=None):
    told = "; ".join(f"{mode}: {', '.join(f'{name} {value}' for name, value in of.items())}"
                     for mode, of in DEFAULTS.items())
    parser = HfArgumentParser(Config, description=__doc__, formatter_class=data.HelpFormatter,
                              epilog=f"Defaults by mode: {told}")
    cfg = Config(**vars(parser.parse_args(argv)))
    modes = ["model with adapters"] * (cfg.lora_rank > 0) + ["model"] if cfg.model else ["kingdom"]
    for name, value in [item for mode in modes for item in DEFAULTS[mode].items()]:
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    cfg.device = data.pick_device(cfg.device)
    for name in ("lr", "beta", "epochs", "limit", "batch_pairs", "max_new_tokens", "sample_batch"):
        if (value := getattr(cfg, name)) is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number above 0")
    if cfg.supervise not in ("reasoning", "all"):
        raise UserError(f"--supervise {cfg.supervise}: use reasoning or all")
    return cfg


def main(argv=None):
    with data.errors_in_one_line():
        cfg = parse(argv)
        run = check_run(cfg)
        if not (run / "eval.json").exists():
            run_all(cfg, run)
        (run / "checkpoint.safetensors").unlink(missing_ok=True)
        print(evaluation.report(run))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # in a log too each line is there when it is said
    main()
