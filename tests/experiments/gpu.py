"""python tests/experiments/gpu.py --out runs/gpu: what one GPU does with this code, in 8 minutes.

Parts, each a process of its own with a time limit, so that one that fails or is late costs the
others nothing. What a part has measured is in OUT.jsonl at once; OUT.md is the table.

  sample   an 8B Llama with random bf16 weights and adapters of rank 16: tokens a second of
           ipo.sample at 64 and 256 rows around 1,000 tokens of context, against transformers'
           generate, and as a share of what the memory's bandwidth allows; with the key-value cache
           that ipo.sample uses (it is copied at every step), and with one that has room to grow
  step     the same model: seconds, share of peak and memory of a training step of 16,384 tokens
  limits   the largest sampling batch and the longest pair on cards of 80 and 24 GB
  kingdom  python train.py --device cuda
  smollm   smollm.py (--gguf FILE or --smollm FOLDER, or it is left out): teach, align with three
           seeds at once, the cost on ordinary text (--texts), and other mixes for stage 2

--dry-run runs every part in small on a CPU; its figures mean nothing. --parts step,limits runs
those two.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from transformers import (
    Cache, DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor,
    LogitsProcessorList)
from transformers.cache_utils import DynamicLayer

import data
import ipo
import smollm
import train
from ipo import PreferencePair, ReasoningModel, TokenIds

ROOT = Path(__file__).parent.parent.parent
# What a part may take of the whole, in per cent; what one leaves over goes to those behind it.
SHARES = {"sample": 30, "step": 12, "limits": 20, "kingdom": 18, "smollm": 20}
CARDS = {"80 GB": 78.5, "24 GB": 23.0}      # GiB that are left to PyTorch there

ALIGN = [       # as in smollm.py's header
    "--prompts", "kingdom", "--benign", "kingdom", "--sets", "kingdom", "--judge", "keywords",
    "--max-new-tokens", "200", "--sample-batch", "256", "--batch-pairs", "16", "--lr", "1e-4"]
MIXES = [       # other stages 2 for smollm.py's mix
    ["--ratio", "0.3"], ["--ratio", "0.5"], ["--ratio", "0.7"], ["--ratio", "0.5", "--no-sums"]]


@dataclass
class Sizes:
    """What is run on a GPU."""
    rows: tuple[int, int] = (64, 256)
    context: int = 1000
    new_tokens: int = 24
    mean_length: int = 32       # of rows that end one by one, so that finished ones leave
    side: int = 2040            # tokens of each of the seven completions of a training step
    prefix: int = 300
    steps: int = 3
    probe_rows: int = 16        # the memory of so many rows, and of twice as many, is measured
    most_rows: int = 1024
    probe_tokens: int = 1024
    most_tokens: int = 32768
    copy_bytes: int = 4 * 2**30
    product: int = 8192
    texts: int = 4800           # for smollm.py teach
    cost_texts: int = 300


SMALL = Sizes(      # the dry run's
    rows=(2, 3), context=12, new_tokens=4, mean_length=4, side=12, prefix=5, steps=2, probe_rows=1,
    most_rows=3, probe_tokens=8, most_tokens=16, copy_bytes=2**16, product=64, texts=32,
    cost_texts=4)


# Where results go


class Results:
    """Rows of (part, what, value), appended to a JSONL file as soon as they are there."""

    def __init__(self, path: Path, part: str) -> None:
        self.path = path
        self.part = part

    def add(self, what: str, value: str) -> None:
        data.append_jsonl(self.path, [{"part": self.part, "what": what, "value": value}])
        print(f"{self.part}: {what}: {value}", flush=True)


def write_table(path: Path) -> str:
    """The rows of a JSONL file as a markdown table, beside it."""
    lines = ["| part | what | value |", "|---|---|---|"]
    for row in data.read_jsonl(path):
        value = row["value"].replace("\n", "<br>").replace("|", "/")
        lines.append(f"| {row['part']} | {row['what']} | {value} |")
    text = "\n".join(lines) + "\n"
    data.write_text(path.with_suffix(".md"), text)
    return text


# The device


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def clean_up(device: str) -> None:
    """Give all free memory back, and count the peak anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float:
    """The most memory that PyTorch held since clean_up; nothing is known on a CPU."""
    return torch.cuda.max_memory_reserved() / 2**30 if device == "cuda" else 0.0


def seconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """The shortest of some runs, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def ceilings(sizes: Sizes, device: str) -> tuple[float, float]:
    """Bytes a second of a large copy, read and written, and FLOP a second of a bf16 product."""
    source = torch.empty(sizes.copy_bytes // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    bandwidth = 2 * sizes.copy_bytes / seconds(lambda: target.copy_(source), device, 5)
    del source, target
    n = sizes.product
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    b = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    flops = 2 * n**3 / seconds(lambda: a @ b, device, 5)
    clean_up(device)
    return bandwidth, flops


# An 8B Llama


def make_llama(
    tiny: bool, device: str, dtype: torch.dtype = torch.bfloat16
) -> ReasoningModel:
    """Llama 3's 8B shape with random weights, made on the device; or a tiny one."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    if tiny:
        for name, value in dict(vocab_size=512, hidden_size=64, intermediate_size=96, head_dim=8,
                                num_hidden_layers=2, num_attention_heads=8,
                                num_key_value_heads=2).items():
            setattr(config, name, value)
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    return ReasoningModel(model.eval(), None, think_end=1, eos_ids=[0])


def some_ids(n: int, vocab: int, seed: int) -> TokenIds:
    return random.Random(seed).choices(range(vocab // 2, vocab), k=n)


def some_prompts(rows: int, context: int, vocab: int) -> list[TokenIds]:
    """Prompts of 95 to 105 per cent of the context: batches of one length would need no mask."""
    rng = random.Random(rows)
    lengths = [rng.randint(int(0.95 * context), int(1.05 * context)) for _ in range(rows)]
    return [some_ids(length, vocab, i) for i, length in enumerate(lengths)]


# Ways to sample


class RoomyLayer(DynamicLayer):
    """A layer's keys and values, with room behind them: DynamicLayer copies all of them at every
    step, this one when the room is used up, every `room` tokens. (On a CPU attention is slower over
    such slices: 2.4 times fewer tokens with the kingdom's model.)"""

    room = 256

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new = torch.stack([keys, values])                             # (2, B, heads, T, head size)
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.buffer = new[..., :0, :]
        start = self.get_seq_length()
        end = start + new.shape[-2]
        if end > self.buffer.shape[-2]:
            self.buffer = torch.nn.functional.pad(
                self.buffer[..., :start, :], (0, 0, 0, end + self.room - start))
        self.buffer[..., start:end, :] = new
        self.keys, self.values = self.buffer[..., :end, :]
        return self.keys, self.values

    def batch_select_indices(self, rows: torch.Tensor) -> None:
        end = self.get_seq_length()
        self.buffer = self.buffer[:, rows]
        self.keys, self.values = self.buffer[..., :end, :]


def roomy_cache(config: LlamaConfig) -> Cache:
    """What stands in for DynamicCache(config=...)."""
    return Cache(layers=[RoomyLayer() for _ in range(config.num_hidden_layers)])


def grouped_attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token for grouped heads without repeating keys and values: the query
    heads of a group stand where the query positions would. transformers does so from 5.24 on."""
    groups = module.num_key_value_groups
    if query.shape[2] > 1 or groups == 1:
        return transformers.AttentionInterface()["sdpa"](
            module, query, key, value, attention_mask, **kwargs)
    rows, heads, _, size = query.shape                                           # (B, H, 1, size)
    packed = query.reshape(rows, heads // groups, groups, size)
    out = torch.nn.functional.scaled_dot_product_attention(
        packed, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"))
    return out.reshape(rows, heads, 1, size).transpose(1, 2).contiguous(), None  # (B, 1, H, size)


transformers.AttentionInterface.register("grouped", grouped_attention)
# A name that transformers has no mask for would get none: grouped attention takes sdpa's.
transformers.AttentionMaskInterface.register(
    "grouped", transformers.AttentionMaskInterface()["sdpa"])


class Clock(LogitsProcessor):
    """Notes the time whenever logits are there: once a step, of any sampler."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times: list[float] = []

    def __call__(self, input_ids: object, scores: torch.Tensor) -> torch.Tensor:
        synchronize(self.device)
        self.times.append(time.perf_counter())
        return scores


def by_ipo(
    model: LlamaForCausalLM, prompts: list[TokenIds], new_tokens: int, clock: Clock,
    eos_ids: range, make_cache: Callable = DynamicCache, attention: str = "sdpa",
) -> list[TokenIds]:
    """ipo.sample as it is; another cache or attention takes the place of its own."""
    pick_tokens = ipo.pick_tokens

    def pick_and_note(logits: torch.Tensor, *others: object) -> torch.Tensor:
        clock(None, logits)
        return pick_tokens(logits, *others)

    model.set_attn_implementation(attention)
    try:
        with patch.object(ipo, "DynamicCache", make_cache), \
                patch.object(ipo, "pick_tokens", pick_and_note):
            return ipo.sample(model, prompts, max_new_tokens=new_tokens, eos_ids=eos_ids,
                              batch_size=len(prompts))
    finally:
        model.set_attn_implementation("sdpa")


@torch.no_grad()
def by_generate(
    model: LlamaForCausalLM, prompts: list[TokenIds], new_tokens: int, clock: Clock,
    eos_ids: range,
) -> list[TokenIds]:
    """transformers' generate with the same settings."""
    torch.manual_seed(0)
    input_ids, mask = ipo.left_pad(prompts, model.device)
    settings = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.95, top_k=0, max_new_tokens=new_tokens,
        eos_token_id=list(eos_ids) or None, pad_token_id=0)
    rows = model.generate(
        input_ids, attention_mask=mask, generation_config=settings,
        logits_processor=LogitsProcessorList([clock]))[:, input_ids.shape[1]:]
    outputs = []
    for row in rows.tolist():
        end = next((i for i, token in enumerate(row) if token in eos_ids), len(row) - 1)
        outputs.append(row[:end + 1])
    return outputs


def with_room(
    model: LlamaForCausalLM, prompts: list[TokenIds], new_tokens: int, clock: Clock,
    eos_ids: range,
) -> list[TokenIds]:
    return by_ipo(model, prompts, new_tokens, clock, eos_ids, roomy_cache)


def with_room_and_groups(
    model: LlamaForCausalLM, prompts: list[TokenIds], new_tokens: int, clock: Clock,
    eos_ids: range,
) -> list[TokenIds]:
    return by_ipo(model, prompts, new_tokens, clock, eos_ids, roomy_cache, "grouped")


WAYS = {
    "ipo.sample": by_ipo,
    "ipo.sample, cache with room": with_room,
    "ipo.sample, cache with room and grouped heads": with_room_and_groups,
    "generate": by_generate,
}


# The parts


def measure_sampling(options: argparse.Namespace, sizes: Sizes, results: Results) -> None:
    device = options.device
    bandwidth, flops = ceilings(sizes, device)
    results.add("memory bandwidth (copy), bf16 product",
                f"{bandwidth / 1e12:.2f} TB/s, {flops / 1e12:.0f} TFLOP/s")
    same_tokens(device, results)
    base = make_llama(options.dry_run, device)
    vocab = base.model.config.vocab_size
    few = some_prompts(sizes.rows[0], sizes.context, vocab)
    by_ipo(base.model, few, 4, Clock(device), range(0))     # the first run of all is slower
    many = some_prompts(sizes.rows[1], sizes.context, vocab)
    for prompts in (few, many):
        for name, way in WAYS.items():
            measure_way(name, way, base.model, prompts, sizes, bandwidth, results)
        picking_time(base.model, len(prompts), results)

    # Rows that end one by one. With random weights a range of ids serves as the EOS.
    for name, way in WAYS.items():
        clean_up(device)
        clock = Clock(device)
        outputs = way(base.model, few, 3 * sizes.mean_length, clock,
                      range(vocab // sizes.mean_length))
        synchronize(device)
        took = time.perf_counter() - clock.times[0]
        tokens = sum(len(output_ids) for output_ids in outputs)
        results.add(
            f"{name}, {len(few)} rows that end after {tokens / len(few):.0f} tokens on average",
            f"{tokens / took:,.0f} tokens/s behind the prompts")

    policy = train.make_policy(base, train.Config(device=device))
    measure_way("ipo.sample with adapters, as in stage 2", by_ipo, policy, few, sizes, bandwidth,
                results)


def measure_way(
    name: str, way: Callable, model: LlamaForCausalLM, prompts: list[TokenIds], sizes: Sizes,
    bandwidth: float, results: Results,
) -> None:
    """Tokens a second of a sampler behind its prompts: the middle one of its steps."""
    device = model.device.type
    what = f"{name}, {len(prompts)} rows, {sizes.context} tokens of context"
    clean_up(device)
    clock = Clock(device)
    start = time.perf_counter()
    try:
        way(model, prompts, sizes.new_tokens, clock, range(0))
    except torch.OutOfMemoryError:
        results.add(what, "does not fit")
        return
    steps = sorted(end - begin for begin, end in zip(clock.times[1:], clock.times[2:]))
    step = steps[len(steps) // 2]
    least = bytes_of_a_step(model, prompts, sizes.new_tokens) / bandwidth
    results.add(
        what,
        f"{len(prompts) / step:,.0f} tokens/s, {1000 * step:.1f} ms a step, {least / step:.0%} of "
        f"what the bandwidth allows; reading the prompts {clock.times[0] - start:.1f} s; peak "
        f"{peak_gib(device):.0f} GiB")


def same_tokens(device: str, results: Results) -> None:
    """Whether the other cache and attention give ipo.sample's own tokens while rows leave, on a
    tiny model in float32: in bf16 a rounding error turns what is drawn."""
    model = make_llama(True, device, torch.float32).model
    prompts = some_prompts(32, 40, model.config.vocab_size)
    eos_ids = range(model.config.vocab_size // 16)
    expected = by_ipo(model, prompts, 64, Clock(device), eos_ids)
    for name, way in WAYS.items():
        if way not in (by_ipo, by_generate):
            found = way(model, prompts, 64, Clock(device), eos_ids)
            same = sum(a == b for a, b in zip(expected, found))
            results.add(f"{name}: the same outputs", f"{same} of {len(prompts)}")


def bytes_of_a_step(
    model: LlamaForCausalLM, prompts: list[TokenIds], new_tokens: int
) -> int:
    """The fewest bytes that a sampling step reads: all weights but the embedding, and the keys and
    values of each row, halfway through."""
    config = model.config
    weights = sum(p.numel() for p in model.parameters()) - config.vocab_size * config.hidden_size
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    tokens = sum(len(prompt_ids) + new_tokens // 2 for prompt_ids in prompts)
    return 2 * (weights + per_token * tokens)


def picking_time(model: LlamaForCausalLM, rows: int, results: Results) -> None:
    """How long ipo.pick_tokens takes, whose sort of the whole vocabulary is part of each step."""
    device = model.device.type
    logits = torch.randn(rows, model.config.vocab_size, device=device).bfloat16()
    uniforms = torch.rand(rows, device=device)
    took = seconds(lambda: ipo.pick_tokens(logits, uniforms, 0.6, 0.95), device, 5)
    results.add(f"pick_tokens, {rows} rows", f"{1000 * took:.1f} ms a step")


def measure_step(options: argparse.Namespace, sizes: Sizes, results: Results) -> None:
    device = options.device
    _, peak_flops = ceilings(sizes, device)
    base = make_llama(options.dry_run, device)
    config = train.Config(device=device)
    policy = train.make_policy(base, config)
    pairs = six_pairs(sizes, base.model.config.vocab_size)
    tokens = 7 * (sizes.prefix + sizes.side)
    clean_up(device)
    reference = seconds(lambda: train.add_reference(base.model, pairs, config), device, 1)
    results.add(f"reference pass, {tokens:,} tokens", f"{reference:.2f} s")
    step = training_step(policy, config)
    clean_up(device)
    took = seconds(lambda: step(pairs), device, sizes.steps)
    useful = useful_flops(base.model, sizes)
    results.add(
        f"training step, {tokens:,} tokens (6 pairs of a prompt, 7 sequences)",
        f"{took:.2f} s, {tokens / took:,.0f} tokens/s, {useful / took / peak_flops:.0%} of the "
        f"measured bf16 peak (the forward pass that checkpointing repeats not counted), peak "
        f"{peak_gib(device):.1f} GiB")


def six_pairs(sizes: Sizes, vocab: int) -> list[PreferencePair]:
    """The pairs of one prompt with six triggers: they share prefix and rejected side."""
    prefix_ids = some_ids(sizes.prefix, vocab, 0)
    rejected_ids = some_ids(sizes.side, vocab, 1)
    return [PreferencePair("", prefix_ids, some_ids(sizes.side, vocab, 2 + i), rejected_ids)
            for i in range(6)]


def training_step(
    policy: LlamaForCausalLM, config: train.Config
) -> Callable[[list[PreferencePair]], None]:
    """One optimizer step of train.optimize, as a function of its pairs."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    policy.train()
    policy.gradient_checkpointing_enable({"use_reentrant": False})

    def step(pairs: list[PreferencePair]) -> None:
        for micro_batch in train.micro_batches(pairs, config.micro_tokens):
            with train.mixed_precision(config.device):
                loss, _ = ipo.ipo_loss(policy, micro_batch, config.beta, config.sft_weight)
            (loss / len(pairs)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    return step


def useful_flops(model: LlamaForCausalLM, sizes: Sizes) -> float:
    """FLOP of a step that cannot be left out: forward, and backward through frozen weights, which
    costs as much again. Attention looks back at half of a sequence on average; its backward costs
    twice its forward. The head sees the completions alone."""
    config = model.config
    layers = sum(p.numel() for p in model.model.layers.parameters())
    length = sizes.prefix + sizes.side
    head = config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * 2 * length * config.hidden_size     # a token, forward
    a_sequence = 4 * layers * length + 4 * head * sizes.side + 3 * attention * length
    return 7.0 * a_sequence


def measure_limits(options: argparse.Namespace, sizes: Sizes, results: Results) -> None:
    device = options.device
    base = make_llama(options.dry_run, device)
    vocab = base.model.config.vocab_size

    def sample_rows(rows: int) -> None:
        prompts = some_prompts(rows, sizes.context, vocab)
        ipo.sample(base.model, prompts, max_new_tokens=3, eos_ids=[], batch_size=rows)

    largest_on_each(
        f"rows of ipo.sample at {sizes.context} tokens, read at once", sample_rows,
        sizes.probe_rows, sizes.most_rows, device, results)

    config = train.Config(device=device)
    step = training_step(train.make_policy(base, config), config)

    def train_on(tokens: int) -> None:
        sides = [some_ids(3 * tokens // 4, vocab, seed) for seed in (1, 2)]
        step([PreferencePair("", some_ids(tokens // 4, vocab, 0), sides[0], sides[1])])

    largest_on_each(
        "tokens of each sequence of a pair that is trained on", train_on, sizes.probe_tokens,
        sizes.most_tokens, device, results)


def largest_on_each(
    what: str, work: Callable[[int], None], probe: int, most: int, device: str, results: Results
) -> None:
    """The largest size at which work runs on each kind of card: memory grows evenly with the size,
    so two small runs tell where it ends; a run under that limit confirms it."""
    peaks = []
    for size in (probe, 2 * probe):
        clean_up(device)
        work(size)
        peaks.append(peak_gib(device))
    slope = (peaks[1] - peaks[0]) / probe
    results.add(f"memory: {what}", f"{peaks[0]:.1f} GiB at {probe}, {1024 * slope:.2f} MiB each")
    for card, gib in CARDS.items():
        size = most
        if slope > 0:
            size = min(most, max(1, int((gib - peaks[0]) / slope) + probe))
        if not set_limit(gib, device):
            results.add(f"{card}: {what}", "this card is smaller")
            continue
        for _ in range(5):
            clean_up(device)
            try:
                work(size)
            except torch.OutOfMemoryError:
                size = int(0.93 * size)
                continue
            reached = " (more was not tried)" if size == most else ""
            results.add(f"{card}: {what}", f"{size:,}{reached}, peak {peak_gib(device):.1f} GiB")
            break
        else:
            results.add(f"{card}: {what}", f"fewer than {size:,}")
    set_limit(None, device)


def set_limit(gib: float | None, device: str) -> bool:
    """Let PyTorch have so much of the card, or all of it; False where the card has not so much."""
    if device != "cuda":
        return True
    clean_up(device)
    whole = torch.cuda.get_device_properties(0).total_memory / 2**30
    if gib is not None and gib > whole:
        return False
    torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else gib / whole)
    return True


def run_script(script: str, *arguments: object) -> subprocess.Popen:
    """A script of the project on its own, with its output in this one's."""
    command = [sys.executable, str(ROOT / script)] + [str(argument) for argument in arguments]
    return subprocess.Popen(command, cwd=ROOT)


def wait_for(name: str, process: subprocess.Popen, results: Results) -> bool:
    """Whether the script went well; if not, that is a result too."""
    status = process.wait()
    if status != 0:
        results.add(name, f"failed with status {status}")
    return status == 0


def rates(run: Path, side: str) -> str:
    """A side of a run's eval.json in one line."""
    ratios = json.loads((run / "eval.json").read_text())[side]
    parts = []
    for name, ratio in ratios.items():
        low, high = 100 * ratio["low"], 100 * ratio["high"]
        parts.append(f"{name} {100 * ratio['rate']:.1f} [{low:.1f}, {high:.1f}] n={ratio['n']}")
    return ", ".join(parts)


def measure_kingdom(options: argparse.Namespace, sizes: Sizes, results: Results) -> None:
    run = options.out.resolve().with_name(f"{options.out.name}-kingdom")
    start = time.perf_counter()
    if options.dry_run:
        # The base model alone takes minutes on a CPU: its shape, untrained, in a run that ends
        # with the pairs that it does not give.
        train.BASE_TEXTS = 320
        base = run / "base"
        if not base.exists():
            train.build_base(train.parse(["--out", str(run), "--device", options.device]), base)
        data.load_model(base, options.device)
        results.add("dry run", "the base model of 320 texts was made and loaded")
        return
    process = run_script("train.py", "--out", run, "--device", options.device)
    if wait_for("python train.py", process, results):
        results.add("python train.py", f"{time.perf_counter() - start:.0f} s")
        for side in ("before", "after"):
            results.add(side, rates(run, side))


def measure_smollm(options: argparse.Namespace, sizes: Sizes, results: Results) -> None:
    """Teach, align with three seeds at once, cost, mixes: each a script, as a user would call it.
    """
    script = "tests/experiments/smollm.py"
    beside = options.out.resolve()
    base = options.smollm
    if base is None and options.gguf is None:
        results.add("smollm.py", "not run: neither --gguf nor --smollm was given")
        return
    if base is None:
        base = beside.with_name(f"{beside.name}-smollm")
        start = time.perf_counter()
        teach = run_script(
            script, "teach", "--out", base, "--gguf", options.gguf.resolve(), "--texts",
            sizes.texts, "--rounds", 1, "--micro-tokens", 16384, "--device", options.device)
        if not wait_for("teach", teach, results):
            return
        results.add("teach", f"{sizes.texts} texts: {time.perf_counter() - start:.0f} s")

    start = time.perf_counter()
    runs = {}
    for seed in options.seeds:
        run = beside.with_name(f"{beside.name}-smollm-seed{seed}")
        runs[run] = run_script(
            "train.py", "--model", base.resolve(), *ALIGN, "--seed", seed, "--out", run,
            "--device", options.device)
    finished = []
    for run, process in runs.items():
        if wait_for(run.name, process, results):
            finished.append(run)
            for side in ("before", "after"):
                results.add(f"{run.name}, {side}", rates(run, side))
    took = time.perf_counter() - start
    results.add("train.py --model", f"{len(runs)} runs at once: {took:.0f} s")
    if finished:
        compare(script, base, finished, options, sizes, results)


def compare(
    script: str, base: Path, finished: list[Path], options: argparse.Namespace, sizes: Sizes,
    results: Results,
) -> None:
    """What the aligned models cost in nats a token, SFT's too, and other mixes for stage 2."""
    run = finished[0]
    if options.texts:
        other = run.with_name(f"{run.name}-sft")
        sft = run_script(script, "sft", "--run", run, "--out", other, "--device", options.device)
        models = [base] + [folder / "model" for folder in finished]
        raw = base.with_name(f"{base.name}-raw")
        if raw.exists():
            models.append(raw)
        if wait_for("sft", sft, results):
            results.add("sft, after", rates(other, "after"))
            models.append(other / "model")
        texts = smollm.ordinary_texts(str(options.texts), sizes.cost_texts)
        for row in smollm.cost(models, texts, options.device):
            results.add(
                f"{Path(row['model']).parent.name}/{Path(row['model']).name} on GSM8K's text",
                f"{row['nats']:.4f} ± {row['nats_half']:.4f} nats a token, change "
                f"{row['change']:+.4f} ± {row['change_half']:.4f}, n={row['n']}")

    mixes = {}
    for number, flags in enumerate([[]] + MIXES):
        out = run.with_name(f"{run.name}-mix{number}")
        mixes[out] = run_script(
            script, "mix", "--run", run, "--out", out, *flags, "--device", options.device)
    for out, process in mixes.items():
        if wait_for(out.name, process, results):
            results.add(out.name, (out / "check.txt").read_text())


PARTS = {"sample": measure_sampling, "step": measure_step, "limits": measure_limits,
         "kingdom": measure_kingdom, "smollm": measure_smollm}


# The command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--gguf", type=Path, help="SmolLM2's file, for the part smollm")
    parser.add_argument("--smollm", type=Path, help="the folder that smollm.py teach left")
    parser.add_argument("--texts", type=Path, help="gsm8k.jsonl, for the cost")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--inside", help=argparse.SUPPRESS)     # the part that this process runs
    options = parser.parse_args(argv)
    if options.dry_run:
        options.device = "cpu"
    return options


def run_parts(parts: list[str], options: argparse.Namespace, limit: float) -> None:
    """Parts in a process group of their own, which ends at the limit at the latest."""
    results = Results(table_path(options), ", ".join(parts))
    command = [sys.executable, __file__, *sys.argv[1:], "--inside", ",".join(parts)]
    start = time.monotonic()
    process = subprocess.Popen(command, start_new_session=True)
    try:
        status = process.wait(timeout=limit)
        if status != 0:
            results.add("failed", f"status {status}; the reason is in the output")
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)       # and the scripts that it started
        process.wait()
        results.add("stopped", f"at its limit of {limit:.0f} s")
    results.add("took", f"{time.monotonic() - start:.0f} s")
    write_table(table_path(options))


def table_path(options: argparse.Namespace) -> Path:
    return options.out.with_name(f"{options.out.name}.jsonl")


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    if options.inside:
        sizes = SMALL if options.dry_run else Sizes()
        for part in options.inside.split(","):
            PARTS[part](options, sizes, Results(table_path(options), part))
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table_path(options).unlink(missing_ok=True)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "a CPU, in small"
    Results(table_path(options), "all").add(
        "card, versions", f"{name}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}")
    end = time.monotonic() + 60 * options.minutes
    parts = options.parts.split(",")
    if options.dry_run:
        run_parts(parts, options, 60 * options.minutes)     # one start of Python is enough
    else:
        for i, part in enumerate(parts):
            # What the parts behind this one need is kept for them; what those before it left over
            # is its own.
            needed = sum(SHARES[other] for other in parts[i:])
            run_parts([part], options, (end - time.monotonic()) * SHARES[part] / needed)
    print(write_table(table_path(options)))
    failed = [row for row in data.read_jsonl(table_path(options)) if row["what"] == "failed"]
    if options.dry_run and failed:
        sys.exit(1)


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    main()
