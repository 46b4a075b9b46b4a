"""python train.py: base model -> traces -> pairs -> two stages of training -> saved model, in a run folder.

With no flags it makes the kingdom's small base model (data.py) and aligns it, on a CPU, in minutes. With
--model NAME_OR_FOLDER it does the same for a Hugging Face causal reasoning model. A stopped run goes on
where it was: every stage writes its file whole, or shard by shard, and training leaves checkpoints.
"""

import contextlib
import copy
import hashlib
import inspect
import json
import math
import random
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, safe_open, save_file
from tqdm import tqdm
from transformers import HfArgumentParser, LlamaForCausalLM

import data
import eval as evaluation
import ipo
import judge
from data import UserError


@dataclass
class Config:
    model: str | None = data.flag("a Hugging Face reasoning model, name or folder (default: the kingdom's own)")
    out: str = data.flag("the run folder", "runs/kingdom")
    seed: int = data.flag("seeds the kingdom's base, the sampling and the order of training", 0)
    prompts: str | None = data.flag("harmful training prompts: a file or a public set (with --model: star-1)")
    benign: str | None = data.flag("benign training prompts (with --model: star-benign-915; none: no stage 2)")
    limit: int | None = data.flag("use at most this many prompts of each file")
    sets: str | None = data.flag("evaluation sets, as KIND:FILE_OR_NAME,... with KIND harmful, benign or math")
    judge: str = data.flag("keywords, self (the untouched base) or a model (default: keywords; with --model self)", None)
    judge_url: str | None = data.flag("where --judge is served, an OpenAI-compatible http://.../v1")
    max_interventions: int = data.flag("how often one candidate is cut and continued", 1)
    supervise: str = data.flag("reasoning: the loss sees from h through </think>; all: the response too", "reasoning")
    beta: float | None = data.flag("DPO's beta (0.1; the kingdom's traces are ten times shorter: 0.5)")
    sft_weight: float = data.flag("the SFT term's coefficient", 0.2)
    lora_rank: int = data.flag("train adapters of this rank instead of all weights", 0)
    device: str | None = data.flag("cpu or cuda (default: cuda where there is one)")
    lr: float | None = data.flag("peak learning rate")
    epochs: int | None = data.flag("passes over the pairs in each stage")
    batch_pairs: int | None = data.flag("pairs an optimizer step")
    max_new_tokens: int | None = data.flag("the token limit of a trace")
    sample_batch: int | None = data.flag("rows sampled together")
    micro_tokens: int | None = data.flag("tokens, padding included, of one forward and backward pass")


# What a mode fills in where a flag was not given; the only other source of a setting.
DEFAULTS = {
    "kingdom": dict(judge="keywords", limit=160, sets="kingdom", beta=0.5, lr=5e-5, epochs=1, batch_pairs=16,
                    max_new_tokens=200, sample_batch=256, micro_tokens=8192),
    "model": dict(judge="self", prompts="star-1", benign="star-benign-915", beta=0.1, lr=1e-6, epochs=1,
                  sets="harmful:jailbreakbench,benign:xstest,math:math-500", batch_pairs=32,
                  max_new_tokens=4096, sample_batch=64, micro_tokens=16384),
}
LOGGED = ("dpo", "margin", "accuracy", "chosen", "rejected")
WARMUP, MAX_GRAD_NORM, SAVE_EVERY = 0.1, 1.0, 20
BASE_STEPS, BASE_BATCH, BASE_LR = 1200, 16, 5e-3  # the kingdom's base model


# ---- the run folder ---------------------------------------------------------------------------------

def open_run(cfg, base):
    """The run folder, its config.json written or compared: a folder made otherwise is refused."""
    run = Path(cfg.out)
    settings, path = asdict(cfg), run / "config.json"
    if path.exists():
        old = json.loads(path.read_text())["settings"]
        differ = [f"{k}={old.get(k)} (now {v})" for k, v in settings.items() if k != "out" and old.get(k) != v]
        if differ:
            raise UserError(f"{run} was made with other settings: {', '.join(differ)}; give another --out")
    else:
        run.mkdir(parents=True, exist_ok=True)
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        made_by = {"torch": torch.__version__, "transformers": transformers.__version__,
                   "commit": git.stdout.strip(), "device": cfg.device}
        data.write_text(path, json.dumps({"settings": settings, "made_by": made_by, "base": str(base)}, indent=1))
    return run


# ---- models -----------------------------------------------------------------------------------------

def _kingdom_texts(n, seed):
    return data.kingdom_texts(n, seed, ipo.TRIGGERS, partial(judge.cue_question, brief=True),
                              partial(judge.safety_question, brief=True))


def build_base(seed, device, folder):
    """The kingdom's base model, trained from scratch on the grammar's text and saved to the folder."""
    torch.manual_seed(seed)
    texts = _kingdom_texts(BASE_STEPS * BASE_BATCH, seed)
    tokenizer = data.kingdom_tokenizer(texts[:4000])
    model = LlamaForCausalLM(data.kingdom_config(tokenizer)).to(device)
    rows = [(data.render(tokenizer, prompt), tokenizer.encode(output) + [tokenizer.eos_token_id])
            for prompt, output in texts]
    rng, batches = random.Random(seed), []
    for start in range(0, len(rows), 16 * BASE_BATCH):  # like lengths share a batch
        near = sorted(rows[start:start + 16 * BASE_BATCH], key=lambda row: len(row[0]) + len(row[1]))
        group = [near[i:i + BASE_BATCH] for i in range(0, len(near), BASE_BATCH)]
        batches += rng.sample(group, len(group))
    optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_LR, betas=(0.9, 0.95), weight_decay=0.05)
    with tqdm(batches, desc="base model", unit="step", disable=None) as bar:
        for step, batch in enumerate(bar):
            for group in optimizer.param_groups:
                group["lr"] = BASE_LR * min((step + 1) / 50, 1.02 - step / len(batches))
            logps = ipo.sequence_logps(model, [p + o for p, o in batch], [len(p) for p, _ in batch])
            loss = -logps.sum() / sum(len(o) for _, o in batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    save_model(model, tokenizer, folder)


def save_model(model, tokenizer, folder):
    """A plain Hugging Face folder, written beside and renamed."""
    beside = Path(folder).with_name(Path(folder).name + ".part")
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    beside.rename(folder)


def base_folder(cfg):
    """Where the base is: --model, or the kingdom's own, cached beside the runs under a hash of its making."""
    if cfg.model:
        return cfg.model
    made_of = (_kingdom_texts(500, cfg.seed), inspect.getsource(build_base), inspect.getsource(data.kingdom_config),
               inspect.getsource(data.kingdom_tokenizer), BASE_STEPS, BASE_BATCH, BASE_LR, cfg.seed, cfg.device)
    return Path(cfg.out).parent / f"base-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]}"


# ---- adapters and the optimizer ---------------------------------------------------------------------

class LoRA(torch.nn.Module):
    """A frozen linear layer plus a float32 adapter of rank r: W x + (alpha / r) B A x, with alpha = 2 r."""
    scale = 2.0

    def __init__(self, linear, rank):
        super().__init__()
        self.linear, self.on = linear.requires_grad_(False), True
        new = partial(torch.zeros, device=linear.weight.device, dtype=torch.float32)
        self.A = torch.nn.Parameter(new(rank, linear.in_features).normal_(std=linear.in_features ** -0.5))
        self.B = torch.nn.Parameter(new(linear.out_features, rank))  # zero: at step 0 nothing changes

    def forward(self, x):
        out = self.linear(x)
        return out + (self.scale * (x.float() @ self.A.T) @ self.B.T).to(out.dtype) if self.on else out

    def merged(self):
        self.linear.weight.data += (self.scale * self.B @ self.A).to(self.linear.weight.dtype)
        return self.linear


def linear_layers(model, kind):
    """[(parent, name, layer)] of all layers of that kind, the output head left out."""
    head = model.get_output_embeddings()
    return [(parent, name, layer) for parent in model.modules() for name, layer in parent.named_children()
            if isinstance(layer, kind) and layer is not head and not isinstance(parent, LoRA)]


def add_adapters(model, rank):
    model.requires_grad_(False)
    for parent, name, layer in linear_layers(model, torch.nn.Linear):
        setattr(parent, name, LoRA(layer, rank))


@contextlib.contextmanager
def reference(policy, base, device):
    """The untouched base on the device: a second model, or the policy itself with its adapters off."""
    layers = [layer for _, _, layer in linear_layers(policy, LoRA)] if policy is base else []
    for layer in layers:
        layer.on = False
    yield base.to(device)
    for layer in layers:
        layer.on = True
    if policy is not base and device == "cuda":
        base.to("cpu")


def stochastic_round_(target, value, generator):
    """target = value, rounded to bf16 up or down at random so that the mean is kept; exact for float32.

    bf16 keeps 8 bits: an update under 1/256 of a weight is lost each time when rounded to the nearest.
    """
    if target.dtype == torch.bfloat16:
        bits = value.contiguous().view(torch.int32)
        noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
        value = ((bits + noise) & -65536).view(torch.float32)  # the upper 16 bits are the bf16
    target.copy_(value)


class AdamW:
    """Adam with its two moments in the weights' own dtype: 8 bytes a bf16 parameter with its gradient."""

    def __init__(self, named, betas=(0.9, 0.999), eps=1e-8, seed=0):
        self.named, self.betas, self.eps, self.seed, self.step_count = dict(named), betas, eps, seed, 0
        self.state = {f"{m}.{name}": torch.zeros_like(p) for name, p in self.named.items() for m in "mv"}

    @torch.no_grad()
    def step(self, lr):
        self.step_count += 1
        fix_m, fix_v = (1 - beta ** self.step_count for beta in self.betas)
        for i, (name, p) in enumerate(self.named.items()):
            generator = torch.Generator(p.device).manual_seed(hash((self.seed, self.step_count, i)) % 2 ** 63)
            m, v = self.state[f"m.{name}"], self.state[f"v.{name}"]
            grad = p.grad.float()
            new_m = m.float().lerp(grad, 1 - self.betas[0])
            new_v = v.float().lerp(grad * grad, 1 - self.betas[1])
            update = (new_m / fix_m) / ((new_v / fix_v).sqrt() + self.eps)
            for target, value in ((m, new_m), (v, new_v), (p, p.float() - lr * update)):
                stochastic_round_(target, value, generator)
            p.grad = None


# ---- training ---------------------------------------------------------------------------------------

def plan(groups, cfg, stage):
    """[[group, ...] of one optimizer step] for all epochs: shuffled, about batch_pairs pairs a step."""
    rng, steps = random.Random(f"{cfg.seed} {stage}"), []
    for _ in range(cfg.epochs):
        room = 0
        for group in rng.sample(groups, len(groups)):
            if room <= 0:
                steps.append([])
                room = cfg.batch_pairs
            steps[-1].append(group)
            room -= len(group.chosen)
    return steps


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
def add_reference(model, groups, cfg):
    """Fill in each group's reference log-probabilities: once a stage, before it, by the same function."""
    batches = micro_batches(groups, cfg.micro_tokens)
    for batch in tqdm(batches, desc="reference", unit="batch", disable=None):
        for group, logps in zip(batch, ipo.group_logps(model, batch)):
            group.ref_logps = logps.tolist()


def train_stage(policy, groups, cfg, run, stage):
    """One pass of IPO (ipo.ipo_loss) over the groups, from the checkpoint if there is one of this stage."""
    named = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    optimizer = AdamW(named, seed=cfg.seed)
    steps, first = plan(groups, cfg, stage), resume(run, stage, named, optimizer)
    if first is None:
        return
    log = [row for row in data.read_jsonl(run / "log.jsonl") if (row["stage"], row["step"]) < (stage, first)]
    data.write_jsonl(run / "log.jsonl", log)
    policy.train()
    bar = tqdm(steps[first:], initial=first, total=len(steps), desc=f"stage {stage}", unit="step", disable=None)
    for step, batch in enumerate(bar, first):
        lr = learning_rate(step, len(steps), cfg.lr)
        pairs, stats = sum(len(group.chosen) for group in batch), Counter()
        for micro in micro_batches(batch, cfg.micro_tokens):
            loss, seen = ipo.ipo_loss(policy, micro, cfg.beta, cfg.sft_weight)
            (loss / pairs).backward()
            stats.update(seen)
        norm = torch.nn.utils.clip_grad_norm_(named.values(), MAX_GRAD_NORM).item()
        if not math.isfinite(norm):
            raise UserError(f"stage {stage}, step {step}: the gradient is not finite; the weights are untouched "
                            f"and step {step // SAVE_EVERY * SAVE_EVERY} is saved; try a lower --lr in a new --out")
        optimizer.step(lr)
        row = {"stage": stage, "step": step, "lr": lr, "grad_norm": norm, "tokens": stats["tokens"],
               "pairs": stats["pairs"], "sft": stats["sft"] / stats["sides"],
               **{name: stats[name] / max(1, stats["pairs"]) for name in LOGGED}}
        data.append_jsonl(run / "log.jsonl", [row])
        bar.set_postfix(dpo=row["dpo"], margin=row["margin"], sft=row["sft"], refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == len(steps):
            save_checkpoint(run, stage, step + 1, named, optimizer)
    policy.eval()


def learning_rate(step, steps, peak):
    """Linear warm-up over the first tenth, then a cosine to a tenth of the peak."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def save_checkpoint(run, stage, step, named, optimizer):
    beside = run / "checkpoint.part"
    save_file({**{f"p.{name}": p.detach() for name, p in named.items()}, **optimizer.state}, beside,
              metadata={"stage": str(stage), "step": str(step)})
    beside.replace(run / "checkpoint.safetensors")


def resume(run, stage, named, optimizer):
    """Load this stage's checkpoint, if there is one; the step to go on from, None if a later stage began."""
    path = run / "checkpoint.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        saved = {key: int(value) for key, value in file.metadata().items()}
    if saved["stage"] != stage:
        return 0 if saved["stage"] < stage else None
    tensors = load_file(path)
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(tensors[f"p.{name}"])
    for name, value in optimizer.state.items():
        value.copy_(tensors[name])
    optimizer.step_count = saved["step"]
    return saved["step"]


# ---- the run ----------------------------------------------------------------------------------------

def make_pairs(shard, model, tokenizer, cfg, ask):
    """Steps 1 to 4 for a shard of (key, record): each prompt's trace and what its interventions gave."""
    generate, (_, think_end) = evaluation.sampler(model, tokenizer, cfg), data.think_ids(tokenizer)
    prompts = data.render_all(tokenizer, model, [record for _, record in shard])
    outputs = generate(prompts, [key for key, _ in shard])
    traces = [ipo.Trace(record["prompt"], prompt_ids, output_ids, key)
              for (key, record), prompt_ids, output_ids in zip(shard, prompts, outputs)]
    pairs = ipo.intervene(traces, ipo.TRIGGERS, tokenizer=tokenizer, eos_ids=data.eos_ids(model, tokenizer),
                          think_end=think_end, generate=generate, find_cues=ask.find_cues,
                          judge_safety=ask.judge_safety, max_interventions=cfg.max_interventions)
    return [{**asdict(trace), "text": ipo.decode(tokenizer, trace.output_ids),
             "pairs": [asdict(pair) for pair in pairs if pair.key == trace.key]} for trace in traces]


def write_pairs(path, traces, tokenizer):
    """pairs.jsonl: what was kept, with the text columns that preference-data tools read."""
    show = partial(ipo.decode, tokenizer)
    kept = [pair for trace in traces for pair in trace["pairs"] if pair["outcome"] == "kept"]
    outcomes = [pair["outcome"] for trace in traces for pair in trace["pairs"]]
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in sorted(set(outcomes)))
    print(f"{len(traces)} traces gave {len(outcomes)} candidates: {counts}")
    if not kept:
        raise UserError(f"no pair was kept ({counts}); try more prompts, another --judge, more "
                        f"--max-interventions or more --max-new-tokens")
    data.write_jsonl(path, [{"prompt": show(pair["prefix_ids"]), "chosen": show(pair["chosen_ids"]),
                             "rejected": show(pair["rejected_ids"]),
                             **{k: pair[k] for k in ("key", "trigger", "interventions", "h", "prefix_ids",
                                                     "chosen_ids", "rejected_ids")}} for pair in kept])


def harmful_groups(pairs, think_end, supervise):
    """One Group a prompt: its pairs share prefix and rejected side."""
    groups = {}
    for pair in pairs:
        cut = partial(ipo.supervised, think_end=think_end, supervise=supervise)
        group = groups.setdefault(pair["key"], ipo.Group(pair["prefix_ids"], [], cut(pair["rejected_ids"])))
        group.chosen.append(cut(pair["chosen_ids"]))
    return list(groups.values())


def sample_benign(shard, model, tokenizer, cfg):
    """A trace of each benign prompt, and whether its response refuses; None where it did not end."""
    prompts = data.render_all(tokenizer, model, [record for _, record in shard])
    rows = []
    outputs = evaluation.sampler(model, tokenizer, cfg)(prompts, [key for key, _ in shard])
    for (key, record), prompt_ids, output_ids in zip(shard, prompts, outputs):
        response = ipo.split_output(output_ids, data.think_ids(tokenizer)[1])[1]
        ended = response is not None and output_ids[-1] in data.eos_ids(model, tokenizer)
        rows.append({"key": key, "prompt": record["prompt"], "prompt_ids": prompt_ids, "output_ids": output_ids,
                     "refused": judge.is_refusal(ipo.decode(tokenizer, response)) if ended else None})
    return rows


def benign_groups(base_rows, stage1_rows, think_end, supervise):
    """Stage 2: the base's answer, preferred to the stage-1 model's where that refuses; else SFT alone."""
    cut = partial(ipo.supervised, think_end=think_end, supervise=supervise)
    return [ipo.Group(base["prompt_ids"], [cut(base["output_ids"])],
                      cut(now["output_ids"]) if now["refused"] else None)
            for base, now in zip(base_rows, stage1_rows) if base["refused"] is False]


def training_prompts(cfg):
    """[(key, record)] of the harmful and of the benign training prompts."""
    if not cfg.model and not cfg.prompts:
        harmful = data.kingdom_prompts("train", "harmful", cfg.limit, cfg.seed)
        benign = [record for kind, n in (("benign", 3 * cfg.limit // 2), ("math", cfg.limit // 2))
                  for record in data.kingdom_prompts("train", kind, n, cfg.seed)]
    else:
        harmful = data.load_prompts(cfg.prompts)[:cfg.limit]
        benign = data.load_prompts(cfg.benign)[:cfg.limit] if cfg.benign not in (None, "none") else []
    return [[(f"{kind}/{i}", record) for i, record in enumerate(records)]
            for kind, records in (("harmful", harmful), ("benign", benign))]


def run_all(cfg):
    """The whole method, stage by stage; every stage finds what an earlier, stopped run has finished."""
    run = open_run(cfg, base_folder(cfg))
    if (run / "eval.json").exists():
        return print(evaluation.report(run))
    if not cfg.model and not base_folder(cfg).exists():
        build_base(cfg.seed, cfg.device, base_folder(cfg))
    tokenizer, base = data.load_model(base_folder(cfg), cfg.device)
    policy, (_, think_end) = base, data.think_ids(tokenizer)

    def base_sample(prompts):  # the judge is never the model under training
        with reference(policy, base, cfg.device) as model:
            return evaluation.greedy(model, tokenizer, cfg)(prompts)

    ask = evaluation.judges(cfg, tokenizer, base_sample)
    harmful, benign = training_prompts(cfg)
    sets = [(f"{record['set']}/{i}", record) for i, record in enumerate(evaluation.load_sets(cfg.sets, cfg.limit))]
    if cfg.model:
        print(f"{run} will hold harmful text (traces, rejected sides): keep it where you keep such things")

    def evaluate(side, model):
        rows = partial(evaluation.make_rows, side=side, generate=evaluation.sampler(model, tokenizer, cfg), llm=ask.llm,
                       render_all=partial(data.render_all, tokenizer, model), tokenizer=tokenizer)
        return data.in_shards(run / f"eval_{side}.jsonl", sets, rows)

    before = evaluate("before", base)
    traces = data.in_shards(run / "traces.jsonl", harmful,
                       partial(make_pairs, model=base, tokenizer=tokenizer, cfg=cfg, ask=ask))
    if not (run / "pairs.jsonl").exists():
        write_pairs(run / "pairs.jsonl", traces, tokenizer)
    groups = harmful_groups(data.read_jsonl(run / "pairs.jsonl"), think_end, cfg.supervise)
    benign_base = data.in_shards(run / "benign_base.jsonl", benign,
                            partial(sample_benign, model=base, tokenizer=tokenizer, cfg=cfg))
    add_reference(base, groups, cfg)
    if cfg.lora_rank:
        add_adapters(policy, cfg.lora_rank)
    else:
        policy = copy.deepcopy(base)
    train_stage(policy, groups, cfg, run, 1)
    if benign:
        benign_now = data.in_shards(run / "benign_stage1.jsonl", benign,
                               partial(sample_benign, model=policy, tokenizer=tokenizer, cfg=cfg))
        more = benign_groups(benign_base, benign_now, think_end, cfg.supervise)
        print(f"stage 1 refuses {sum(group.rejected is not None for group in more)} of {len(more)} benign prompts")
        with reference(policy, base, cfg.device) as model:
            add_reference(model, more, cfg)
        train_stage(policy, groups + more, cfg, run, 2)
    after = evaluate("after", policy)
    data.write_jsonl(run / "eval_traces.jsonl", before + after)
    for parent, name, layer in linear_layers(policy, LoRA):
        setattr(parent, name, layer.merged())
    if not (run / "model").exists():
        save_model(policy, tokenizer, run / "model")
    data.write_text(run / "eval.json", json.dumps(evaluation.summarise(before + after, cfg.judge), indent=1))
    print(evaluation.report(run))


def parse(argv=None):
    cfg, = HfArgumentParser(Config, description=__doc__).parse_args_into_dataclasses(argv)
    for name, value in DEFAULTS["model" if cfg.model else "kingdom"].items():
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    cfg.device = data.pick_device(cfg.device)
    if cfg.supervise not in ("reasoning", "all"):
        raise UserError(f"--supervise {cfg.supervise}: use reasoning or all")
    return cfg


def main(argv=None):
    try:
        run_all(parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
