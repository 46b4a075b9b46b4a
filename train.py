"""python train.py: base model -> rollouts -> pairs -> two stages of training -> a saved model.

With no flags it makes the kingdom's small base model (data.py) and aligns it, on a CPU, in minutes.
With --model NAME_OR_FOLDER it does the same for a Hugging Face causal reasoning model. The defaults
that --help shows are those with --model; without it KINGDOM in train.py has others. The run folder:

  config.json        settings, versions, what the run was made from
  base/              the kingdom's base model (without --model)
  traces.jsonl       step 1-4: each harmful prompt's rollout and its candidates  (shard by shard)
  pairs.jsonl        step 4: the candidates that were kept
  eval_before.jsonl  the base's answers to held-out prompts                      (shard by shard)
  log.jsonl          step 5-6: a row per optimizer step
  stage1.safetensors step 5: the trained weights
  benign.jsonl       step 6: the base's and stage 1's answers to benign prompts  (shard by shard)
  model/             the trained model
  eval_after.jsonl   its answers to the same held-out prompts                    (shard by shard)
  eval_traces.jsonl  both answers, in place of the two files (stage1.safetensors goes as well)
  eval.json          the ratios; report.html shows them

A run that was stopped or killed goes on with the same command: a shard of 64 prompts, or a training
stage (the base is one, too), is repeated at most. Changed code needs another --out.
"""

import copy
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

import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

import data
import eval as evaluation
import ipo
import judge
from data import UserError, flag
from ipo import PreferencePair, ReasoningModel, Rollout, Sampler, decode


@dataclass
class Config(data.Settings):
    """The flags of train.py. The defaults are those of a real model; KINGDOM has the others."""
    out: str = flag("the run folder", "runs/model")
    prompts: str = flag("harmful training prompts: a file, a public set, or kingdom", "star-1")
    benign: str = flag("benign prompts, as --prompts; none: no stage 2", "star-benign-915")
    triggers: str | None = flag("a .txt file with one trigger a line (ipo.TRIGGERS)")
    max_interventions: int = flag("how often one candidate is cut and continued; usual 1 to 5", 1)
    until: str | None = flag("pairs: stop when pairs.jsonl is written")
    supervise: str = flag("reasoning: the loss stops at </think>; all: it sees the response too",
                          "reasoning")
    beta: float = flag("DPO's beta: the larger, the closer to the base; usual 0.01 to 1", 0.1)
    sft_weight: float = flag("weight of the SFT term on opening and chosen side; usual 0 to 1",
                             0.2)
    lora_rank: int = flag("rank of the adapters; usual 8 to 64; 0: all weights, in float32", 16)
    lr: float = flag("peak learning rate; usual 5e-5 for adapters, 5e-6 for all weights", 5e-5)
    epochs: int = flag("passes over the pairs in stage 1; stage 2 is one. Stage 1 should go on until "
                       "it refuses some benign prompts: stage 2 repairs what it is shown", 2)
    batch_pairs: int = flag("at least so many pairs an optimizer step; usual 16 to 128", 64)
    micro_tokens: int = flag("tokens, padding included, of one forward and backward pass", 16384)


KINGDOM = dict(     # without --model these take the place of Config's defaults
    out="runs/kingdom", prompts="kingdom", benign="kingdom", sets="kingdom", judge="keywords",
    max_new_tokens=200, judge_tokens=200, sample_batch=256, lora_rank=0, lr=2e-4, epochs=1, beta=1.0,
    sft_weight=1.0, supervise="all", batch_pairs=8, micro_tokens=1536)
BASE_TEXTS = 18000      # how the kingdom's base model is trained, once a run folder
BASE_BATCH = 8
BASE_LR = 3e-3
KINGDOM_PROMPTS = {"harmful": 120, "benign": 480, "math": 40}
WARMUP = 0.1            # of the steps
MAX_GRAD_NORM = 1.0
# Settings that may change when a run goes on:
MAY_CHANGE = ["out", "device", "sample_batch", "micro_tokens", "sampler_url", "judge_url", "until"]


def align(config: Config, run: Path) -> None:
    """The six steps of ipo.py's header; what an earlier, stopped run has finished is kept."""
    data.check_names(config)
    harmful, benign = training_prompts(config)
    held_out = evaluation.load_sets(config.sets, config.limit)
    trained_on = [record["prompt"] for record in harmful + benign]
    evaluation.check_overlap(held_out, trained_on, config.allow_overlap)
    triggers = load_triggers(config)
    made_from = data.fingerprint(
        harmful, benign, held_out, triggers, data.model_state(config.model))
    check_run(run, config, made_from)
    if (run / "eval.json").exists():
        print(f"{run} was finished before; nothing was run")
        return

    base = load_base(config, run, harmful + benign + held_out)
    base_sampler = data.make_sampler(base, config, url=config.sampler_url)
    the_judge = judge.load_judge(config, base, config.sampler_url)
    write_config(run, config, triggers, made_from)      # only now: a refused run leaves none

    print("[1-4] pairs: where the base first turns toward helping, a trigger takes the cue's place")
    pairs = make_pairs(run, harmful, triggers, base, base_sampler, the_judge, config)
    if config.until == "pairs":
        return
    before = evaluation.evaluate(
        run / "eval_before.jsonl", "before", held_out, base, base_sampler, the_judge)
    if config.sampler_url:
        print(f"the trained model is sampled here; {config.sampler_url} serves the base alone")
    if not (run / "model").exists():
        train(run, pairs, benign, base, base_sampler, the_judge, config)
    trained = data.load_model(run / "model", config.device)     # what was saved is evaluated
    after = evaluation.evaluate(
        run / "eval_after.jsonl", "after", held_out, trained,
        data.make_sampler(trained, config), the_judge)
    finish(run, config, before + after)


def train(run: Path, pairs: list[PreferencePair], benign: list[dict], base: ReasoningModel,
          base_sampler: Sampler, the_judge: judge.Judge, config: Config) -> None:
    """Steps 5 and 6: both stages of training, and the saved model."""
    policy = make_policy(base, config)
    print("[5] stage 1: DPO from the cut on, the corrected reasoning over the model's own, and SFT")
    train_stage(1, policy, pairs, base, config, run)
    if benign:
        print("[6] stage 2, against over-refusal: the pairs again, and the base's benign answers over "
              "stage 1's refusals")
        pairs = pairs + benign_pairs(run, benign, base, base_sampler, policy, the_judge, config)
        train_stage(2, policy, pairs, base, config, run)
    merge_adapters(policy)
    save_model(policy, base.tokenizer, run / "model")


def parse(argv: list[str] | None = None) -> Config:
    parser = HfArgumentParser(Config, description=__doc__, formatter_class=data.HelpFormatter)
    if parser.parse_args(argv).model is None:
        parser.set_defaults(**KINGDOM)
    config = Config(**vars(parser.parse_args(argv)))
    data.check_settings(config)
    if config.supervise not in ("reasoning", "all"):
        raise UserError(f"--supervise {config.supervise}: use reasoning or all")
    if config.until not in (None, "pairs"):
        raise UserError(f"--until {config.until}: use pairs, or leave it out")
    return config


def training_prompts(config: Config) -> tuple[list[dict], list[dict]]:
    """The harmful and the benign training prompts."""
    def of_kingdom(kind: str) -> list[dict]:
        prompts = data.kingdom_prompts("train", kind, KINGDOM_PROMPTS[kind], config.seed)
        return prompts[:config.limit]

    if config.prompts == "kingdom":
        harmful = of_kingdom("harmful")
    else:
        harmful = data.load_prompts(config.prompts)[:config.limit]
    if config.benign == "kingdom":
        benign = of_kingdom("benign") + of_kingdom("math")  # sums, so that they are not unlearned
    elif config.benign == "none":
        benign = []
    else:
        benign = data.load_prompts(config.benign)[:config.limit]
    return harmful, benign


def load_triggers(config: Config) -> list[str]:
    """ipo.TRIGGERS, or one a line of --triggers FILE."""
    if config.triggers is None:
        return ipo.TRIGGERS
    if not Path(config.triggers).is_file():
        raise UserError(f"--triggers {config.triggers}: no such file; give one with a trigger a line")
    triggers = [record["prompt"].strip() for record in data.load_prompts(config.triggers)]
    if len(set(triggers)) < len(triggers):
        raise UserError(f"{config.triggers}: a trigger stands there twice; drop one")
    return triggers


def check_run(run: Path, config: Config, made_from: str) -> None:
    """Refuse a run folder that was made with other settings, prompts or another model."""
    if not (run / "config.json").exists():
        return
    old = json.loads((run / "config.json").read_text())
    differ = [f"{name}={old['settings'].get(name)} (now {value})"
              for name, value in asdict(config).items()
              if name not in MAY_CHANGE and old["settings"].get(name) != value]
    if not differ and old["made_from"] != made_from:
        differ = ["the prompts, the triggers or the model, whose files have changed since"]
    if differ:
        raise UserError(f"{run} was made with other settings: {', '.join(differ)}; give another --out")


def write_config(run: Path, config: Config, triggers: list[str], made_from: str) -> None:
    """config.json: the settings, and what they ran on."""
    if (run / "config.json").exists():
        return
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent,
                         capture_output=True, text=True)    # without a shell a missing git raises
    device = torch.cuda.get_device_name() if config.device == "cuda" else config.device
    made_by = {"torch": torch.__version__, "transformers": transformers.__version__,
               "commit": git.stdout.strip(), "device": device}
    base = Path(config.model or run / "base")
    if base.exists():
        base = base.resolve()       # a folder; eval.py may be called from anywhere
    run.mkdir(parents=True, exist_ok=True)
    data.write_text(run / "config.json", json.dumps(
        {"settings": asdict(config), "triggers": triggers, "made_from": made_from,
         "made_by": made_by, "base": str(base)}, indent=1))
    if config.model:
        print(f"{run} will hold harmful text (traces, rejected sides): keep it to yourself")


def finish(run: Path, config: Config, rows: list[dict]) -> None:
    """eval_traces.jsonl, the model card and, last of all, eval.json: the run is done."""
    data.write_jsonl(run / "eval_traces.jsonl", rows)
    summary = evaluation.summarise(rows, config.judge)
    lines = evaluation.table({"before": summary["before"], "after": summary["after"]})
    settings = ", ".join(f"{name} {value}" for name, value in asdict(config).items())
    origin = f"base_model: {config.model}" if config.model else "license: mit"
    world = "." if config.model else " on a synthetic world; no evidence about real models."
    data.write_text(
        run / "model" / "README.md",
        f"---\n{origin}\ntags: [ipo, safety]\n---\n"
        f"Trained with Intervened Preference Optimization (arXiv 2509.24393){world}\n\n"
        f"```\n{evaluation.as_text(lines)}\n```\n\nJudge: {config.judge}. Settings: {settings}.")
    data.write_text(run / "eval.json", json.dumps(summary, indent=1))


def load_base(config: Config, run: Path, records: list[dict]) -> ReasoningModel:
    """The base, checked against all prompts; without its weights where nothing needs them."""
    if config.model is None:
        folder = run / "base"
        if folder.exists() and kingdom_seed(folder) != config.seed:
            raise UserError(f"{folder} is not the kingdom's base of seed {config.seed}; give another "
                            "--out")
        if not folder.exists():
            print(f"[0] training the kingdom's small base model, a minute or more, into {folder}")
            build_base(config, folder)
    else:
        folder = Path(config.model)

    judge_needs_no_weights = config.judge_url or config.judge in ("self", "keywords")
    if config.until == "pairs" and config.sampler_url and judge_needs_no_weights:
        base = data.load_without_weights(str(folder))
    else:
        dtype = torch.bfloat16 if config.device == "cuda" and config.lora_rank else torch.float32
        base = data.load_model(str(folder), config.device, dtype)
    data.render_all(records, base)
    if config.sampler_url:
        data.check_served(config.sampler_url, base, records[0]["prompt"])
    return base


def kingdom_seed(folder: Path) -> int | None:
    """The seed that a base of ours was made with."""
    path = folder / "config.json"
    return json.loads(path.read_text()).get("kingdom_seed") if path.exists() else None


def build_base(config: Config, folder: Path) -> None:
    """The kingdom's base model, trained from scratch on the grammar's text: the SFT term alone."""
    torch.manual_seed(config.seed)
    texts = data.kingdom_texts(
        BASE_TEXTS, config.seed, ipo.TRIGGERS, judge.kingdom_cue, judge.kingdom_safety)
    tokenizer = data.kingdom_tokenizer(texts[:4000])
    model = transformers.LlamaForCausalLM(data.kingdom_config(tokenizer)).to(config.device)
    pairs = []
    for i, (prompt, output) in enumerate(texts):
        chosen_ids = tokenizer.encode(output) + [tokenizer.eos_token_id]
        prompt_ids = data.render(tokenizer, prompt)
        pairs.append(PreferencePair(prompt, prompt_ids, chosen_ids, key=str(i)))
    model.config.kingdom_seed = config.seed
    optimize(model, pairs, replace(config, lr=BASE_LR, batch_pairs=BASE_BATCH), "base", None)
    save_model(model, tokenizer, folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A plain Hugging Face folder, written beside and renamed."""
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)   # of a run that was killed while saving
    beside.mkdir(parents=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    beside.rename(folder)


def make_pairs(run: Path, records: list[dict], triggers: list[str], base: ReasoningModel,
               generate: Sampler, the_judge: judge.Judge, config: Config) -> list[PreferencePair]:
    """Steps 1 to 4: the kept pairs; writes traces.jsonl and pairs.jsonl."""
    def intervene_in(shard: list[dict]) -> list[dict]:
        rollouts = data.roll_out(shard, [record["key"] for record in shard], base, generate)
        candidates = ipo.intervene(
            rollouts, triggers, reasoner=base, generate=generate, find_cues=the_judge.find_cues,
            judge_safety=the_judge.judge_safety, max_interventions=config.max_interventions)
        rows = []
        for rollout in rollouts:
            own = [asdict(pair) for pair in candidates if pair.key == rollout.key]
            rows.append({**asdict(rollout), "text": decode(base.tokenizer, rollout.output_ids),
                         "candidates": own})
        return rows

    keyed = [{**record, "key": f"harmful/{i}"} for i, record in enumerate(records)]
    traces = data.in_shards(run / "traces.jsonl", keyed, intervene_in)
    candidates = []
    for trace in traces:
        candidates += [PreferencePair(**candidate) for candidate in trace["candidates"]]
    counts = Counter(pair.status for pair in candidates)
    summary = ", ".join(f"{n} {status}" for status, n in sorted(counts.items()))
    print(f"{len(traces)} traces gave {len(candidates)} candidates: {summary}")
    kept = [pair for pair in candidates if pair.status == "kept"]
    if not kept:
        raise UserError(f"no pair was kept ({summary}); try more prompts, another --judge, more "
                        "--max-interventions or more --max-new-tokens")
    data.write_jsonl(run / "pairs.jsonl", [pair_row(pair, base.tokenizer) for pair in kept])
    return kept


def pair_row(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase) -> dict:
    """A row of pairs.jsonl: what training reads, and text columns for TRL and its like. Those
    tokenize the text again, put the tokenizer's BOS before the prompt and an EOS behind each side;
    exact_text says whether that gives our ids."""
    prompt = decode(tokenizer, pair.prefix_ids)
    if tokenizer.encode("") == [tokenizer.bos_token_id]:
        prompt = prompt.removeprefix(tokenizer.bos_token)   # or there would be two
    chosen = decode(tokenizer, pair.chosen_ids)
    rejected = decode(tokenizer, pair.rejected_ids)
    exact = tokenizer.encode(prompt) == pair.prefix_ids
    for side, ids in ((chosen, pair.chosen_ids), (rejected, pair.rejected_ids)):
        same_ids = tokenizer.encode(prompt + side) == pair.prefix_ids + ids
        exact = exact and same_ids and side.endswith(tokenizer.eos_token)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "exact_text": exact,
            "trigger": pair.trigger, "interventions": pair.interventions, "key": pair.key,
            "h": pair.h, "prefix_ids": pair.prefix_ids, "chosen_ids": pair.chosen_ids,
            "rejected_ids": pair.rejected_ids}


def benign_pairs(run: Path, records: list[dict], base: ReasoningModel, base_sampler: Sampler,
                 policy: PreTrainedModel, the_judge: judge.Judge, config: Config,
                 ) -> list[PreferencePair]:
    """Step 6: the base's answer over the stage-1 policy's refusal; where that does not refuse, the
    answer alone, for the SFT term. What the base itself does not comply with is left out."""
    trained = replace(base, model=policy)
    policy_sampler = data.make_sampler(trained, config)

    def answer(shard: list[dict]) -> list[dict]:
        keys = [record["key"] for record in shard]
        by_base = data.roll_out(shard, keys, base, base_sampler)
        by_policy = data.roll_out(shard, keys, trained, policy_sampler)
        base_classes = compliance(by_base, base, the_judge)
        policy_classes = compliance(by_policy, base, the_judge)
        rows = []
        for i, rollout in enumerate(by_base):
            rows.append({**asdict(rollout), "base": base_classes[i], "policy": policy_classes[i],
                         "policy_ids": by_policy[i].output_ids})
        return rows

    keyed = [{**record, "key": f"benign/{i}"} for i, record in enumerate(records)]
    rows = data.in_shards(run / "benign.jsonl", keyed, answer)
    pairs = []
    for row in rows:
        if row["base"] == "complied":
            refusal = row["policy_ids"] if row["policy"] == "refused" else []
            pairs.append(PreferencePair(row["prompt"], row["prompt_ids"], row["output_ids"], refusal,
                                        key=row["key"]))
    refused = sum(bool(pair.rejected_ids) for pair in pairs)
    print(f"of {len(rows)} benign prompts the base answers {len(pairs)}; stage 1 refuses {refused} of "
          "those")
    if not refused:
        print("no refusal to prefer the answers to: if benign compliance falls, try more --epochs")
    return pairs


def compliance(rollouts: list[Rollout], reasoner: ReasoningModel,
               the_judge: judge.Judge) -> list[str]:
    """"complied", "refused", "partial" or "unparsed", or how it ended otherwise, per rollout."""
    classes = [ipo.how_it_ended(rollout.output_ids, reasoner) for rollout in rollouts]
    finished = [i for i, how in enumerate(classes) if how == "finished"]
    responses = [ipo.texts_of(rollouts[i].output_ids, reasoner)[1] for i in finished]
    verdicts = the_judge.judge_compliance(responses, [rollouts[i].prompt for i in finished])
    for i, verdict in zip(finished, verdicts):
        classes[i] = verdict
    return classes


class LoRA(torch.nn.Module):
    """A frozen linear layer and a float32 adapter of rank r: W x + (alpha / r) B A x."""
    scale = 2.0     # alpha / r

    def __init__(self, linear: torch.nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        device = linear.weight.device
        self.A = torch.nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.B = torch.nn.Parameter(torch.zeros(linear.out_features, rank, device=device))
        torch.nn.init.normal_(self.A, std=linear.in_features**-0.5)     # B = 0: nothing changes yet

    def forward(self, x: Tensor) -> Tensor:
        down = F.linear(x, self.A.to(x.dtype))      # products in the layer's own precision
        return self.linear(x) + self.scale * F.linear(down, self.B.to(x.dtype))


def make_policy(base: ReasoningModel, config: Config) -> PreTrainedModel:
    """The model to train; the base stays as the reference. All weights: a copy of the base.
    Adapters: a model that shares the base's frozen weights and has only its adapters for itself."""
    base.model.requires_grad_(False)
    if config.lora_rank == 0:
        return copy.deepcopy(base.model).requires_grad_(True)
    # deepcopy skips what memo lists: the parameters stay those of the base.
    shared = {id(parameter): parameter for parameter in base.model.parameters()}
    policy = copy.deepcopy(base.model, memo=shared)
    torch.manual_seed(config.seed)
    for parent, name, layer in layers_of(policy, torch.nn.Linear):
        setattr(parent, name, LoRA(layer, config.lora_rank))
    return policy


def layers_of(model: PreTrainedModel, kind: type) -> list[tuple]:
    """(parent, name, layer) of all layers of that kind, the output head left out."""
    head = model.get_output_embeddings()
    return [(parent, name, layer) for parent in model.modules()
            for name, layer in parent.named_children() if isinstance(layer, kind) and layer is not head]


@torch.no_grad()
def merge_adapters(model: PreTrainedModel) -> None:
    """Put each adapter into a new weight of its layer, as the old one is the base's too."""
    for parent, name, layer in layers_of(model, LoRA):
        weight = layer.linear.weight.float() + layer.scale * layer.B @ layer.A
        layer.linear.weight = torch.nn.Parameter(weight.to(layer.linear.weight.dtype))
        setattr(parent, name, layer.linear)


def train_stage(stage: int, policy: PreTrainedModel, pairs: list[PreferencePair],
                base: ReasoningModel, config: Config, run: Path) -> None:
    """Step 5 (stage 1) or 6 (stage 2). Stage 1 leaves stage1.safetensors, or loads it if found."""
    saved = run / "stage1.safetensors"
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    if stage == 1 and saved.exists():
        for name, value in safetensors.torch.load_file(saved).items():
            parameters[name].data.copy_(value)
        return
    cut = partial(ipo.supervised, think_end=base.think_end, supervise=config.supervise)
    pairs = [replace(pair, chosen_ids=cut(pair.chosen_ids), rejected_ids=cut(pair.rejected_ids))
             for pair in pairs]     # copies: add_reference writes into them
    add_reference(base.model, pairs, config)
    log = run / "log.jsonl"         # without the rows of a try that was killed
    data.write_jsonl(log, [row for row in data.read_jsonl(log) if row["stage"] < stage])
    optimize(policy, pairs, config, stage, log)
    if stage == 1:
        values = {name: p.detach().contiguous() for name, p in parameters.items()}
        beside = saved.with_suffix(".part")
        beside.write_bytes(safetensors.torch.save(values))
        beside.replace(saved)


@torch.no_grad()
def add_reference(base: PreTrainedModel, pairs: list[PreferencePair], config: Config) -> None:
    """Fill in the pairs' log-probabilities under the reference, the untouched base."""
    for batch in tqdm(micro_batches(pairs, config.micro_tokens), desc="reference", disable=None):
        with mixed_precision(config.device):
            chosen_logps, rejected_logps, _ = ipo.pair_logps(base, batch)
        for pair, chosen, rejected in zip(batch, chosen_logps.tolist(), rejected_logps.tolist()):
            pair.ref_chosen_logp = chosen
            pair.ref_rejected_logp = rejected


def mixed_precision(device: str) -> torch.autocast:
    """bf16 products on CUDA; the weights that are trained stay float32."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def optimize(policy: PreTrainedModel, pairs: list[PreferencePair], config: Config,
             stage: int | str, log: Path | None) -> None:
    """Minimise ipo.ipo_loss over the pairs with AdamW: warm-up, then a cosine to 0."""
    steps = training_steps(pairs, config, stage)
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, partial(learning_rate_factor, steps=len(steps)))
    policy.train()      # gradient checkpointing works in train mode alone; Llama and Qwen have no dropout
    if config.device == "cuda":
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if log:
        print(f"stage {stage}: {len(pairs)} pairs, {len(steps)} optimizer steps")
    bar = tqdm(steps, desc=f"stage {stage}", unit="step", disable=None)
    for step, batch in enumerate(bar):
        # The gradient of the mean loss over the step's pairs, a few pairs at a time.
        losses = []
        terms = []
        for micro_batch in micro_batches(batch, config.micro_tokens):
            with mixed_precision(config.device):
                loss, loss_terms = ipo.ipo_loss(policy, micro_batch, config.beta, config.sft_weight)
            loss = loss / len(batch)
            loss.backward()
            losses.append(loss.item())
            terms.append(loss_terms)

        # Clip it, and stop where it is not a number.
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM).item()
        if not math.isfinite(norm):
            raise UserError(f"stage {stage}, step {step}: the gradient is not finite; try a lower "
                            "--lr in a new --out")

        # Log, then update.
        row = {"stage": stage, "step": step, "lr": schedule.get_last_lr()[0], "grad_norm": norm,
               "loss": sum(losses), **log_means(terms)}
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if log:
            data.append_jsonl(log, [row])
        bar.set_postfix(loss=row["loss"], margin=row["margin"], refresh=False)
    policy.eval()


def learning_rate_factor(step: int, steps: int) -> float:
    """Of the peak learning rate: up over the first tenth of the steps, then down a cosine to 0."""
    warmup = math.ceil(WARMUP * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def log_means(terms: list[dict[str, Tensor]]) -> dict[str, float | None]:
    """A step's row of log.jsonl: means of ipo_loss's terms, sft over all pairs, the others over those
    that have a rejected side."""
    columns = {}
    for name in terms[0]:
        columns[name] = torch.cat([part[name] for part in terms])
    with_rejected = columns.pop("has_rejected")
    row: dict[str, float | None] = {"with_rejected": int(with_rejected.sum())}
    for name, values in columns.items():
        if name != "sft":
            values = values[with_rejected]
        row[name] = values.mean().item() if len(values) else None
    return row


def training_steps(pairs: list[PreferencePair], config: Config,
                   stage: int | str) -> list[list[PreferencePair]]:
    """The pairs of each optimizer step: at least batch_pairs of them, but in a pass's last step; those
    with the same key stay together."""
    by_key: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        by_key.setdefault(pair.key, []).append(pair)
    rng = random.Random(f"{config.seed} {stage}")
    steps: list[list[PreferencePair]] = []
    for _ in range(config.epochs if stage == 1 else 1):
        steps.append([])
        for group in rng.sample(list(by_key.values()), len(by_key)):
            if len(steps[-1]) >= config.batch_pairs:
                steps.append([])
            steps[-1] += group
    return steps


def micro_batches(pairs: list[PreferencePair], budget: int) -> list[list[PreferencePair]]:
    """Pairs of like length together, as many as fit the budget of padded tokens; at least one.
    The pairs of a prompt stay side by side, so that their common rejected side is run once."""
    def length_and_key(pair: PreferencePair) -> tuple[int, str]:
        return len(pair.prefix_ids) + len(pair.rejected_ids or pair.chosen_ids), pair.key

    batches = []
    for pair in sorted(pairs, key=length_and_key):
        if not batches or padded_tokens(batches[-1] + [pair]) > budget:
            batches.append([])
        batches[-1].append(pair)
    return batches


def padded_tokens(pairs: list[PreferencePair]) -> int:
    lengths = [len(prefix) + len(side) for prefix, side in ipo.distinct_sequences(pairs)]
    return len(lengths) * max(lengths)


def main(argv: list[str] | None = None) -> None:
    with data.errors_in_one_line():
        config = parse(argv)
        run = Path(config.out)
        align(config, run)
        if (run / "eval.json").exists():
            for name in ("stage1.safetensors", "eval_before.jsonl", "eval_after.jsonl"):
                (run / name).unlink(missing_ok=True)    # a finished run needs them no more
            print(evaluation.report(run))
        else:
            print(f"{run / 'pairs.jsonl'} is written; next: the same command without --until")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)     # in a log, too, each line is there at once
    main()
