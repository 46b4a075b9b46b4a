"""OMP_NUM_THREADS=1 python tests/experiments/bench.py: ipo.sample against transformers' generate
and generate_batch, and a training step of ipo_loss against TRL's DPOTrainer (pip install trl).

Medians of CPU seconds, repeats interleaved, so that a busy machine hurts both sides alike. --short
does one repeat of the small cases, to see that the code runs. --only shortcut asks what sampling
gains from sorting only the 64 likeliest tokens.
"""

import argparse
import math
import multiprocessing
import random
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import data
import eval as evaluation
import ipo
from ipo import PreferencePair, TokenIds

EOS = 0


def make_llama(hidden: int, vocab: int) -> LlamaForCausalLM:
    """A Llama of 6 layers with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=hidden * 43 // 16,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=8192, bos_token_id=None, eos_token_id=EOS)
    return LlamaForCausalLM(config).eval()


def end_after(model: LlamaForCausalLM, tokens: int, likely: int = 128) -> LlamaForCausalLM:
    """Give the output head a bias: some likely tokens, and an EOS that ends an output after
    `tokens` of them on average, at temperature 0.6 and top-p 0.95; lengths vary as real ones do."""
    weight = model.lm_head.weight.detach()
    p_end = 1 / tokens
    # The likely tokens' sum of exp(logit / 0.6), their logits being random with deviation 0.02.
    others = likely * math.exp((0.02 / 0.6)**2 * weight.shape[1] / 2)
    bias = torch.full_like(weight[:, 0], -20)
    bias[1:1 + likely] = 0
    bias[EOS] = 0.6 * math.log(0.95 * others * p_end / (1 - p_end))
    weight[EOS] = 0
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


def some_ids(n: int, vocab: int, seed: int) -> TokenIds:
    return random.Random(f"{seed} {n}").choices(range(1, vocab), k=n)


# Sampling


@dataclass
class Case:
    """What is sampled: prompts of 16 to 64 tokens, outputs of 80 on average, 400 at most."""
    name: str
    hidden: int
    vocab: int
    batch: int
    prompts: int = 64


CASES = [Case("7 M parameters", 256, 4096, 64), Case("27 M parameters", 512, 8192, 64),
         Case("7 M parameters, 16 at once", 256, 4096, 16)]
MAX_NEW_TOKENS = 400
USUAL = transformers.GenerationConfig(
    do_sample=True, temperature=0.6, top_p=0.95, top_k=0, max_new_tokens=MAX_NEW_TOKENS,
    eos_token_id=EOS, pad_token_id=EOS)
# generate_batch's settings that are tried; the best one is measured.
BLOCKS = {"page_size": 32, "num_blocks": 1024, "max_batch_tokens": 512}
PAGED = [{}, BLOCKS, {**BLOCKS, "max_batch_tokens": 64}, {**BLOCKS, "max_requests_per_batch": 16}]


def with_sample(model: PreTrainedModel, prompts: list[TokenIds], case: Case, seed: int
                ) -> list[TokenIds]:
    return ipo.sample(model, prompts, max_new_tokens=MAX_NEW_TOKENS, eos_ids=[EOS],
                      temperature=0.6, top_p=0.95, batch_size=case.batch, seed=seed)


def with_generate(model: PreTrainedModel, prompts: list[TokenIds], case: Case, seed: int
                  ) -> list[TokenIds]:
    torch.manual_seed(seed)
    outputs = []
    prompts = sorted(prompts, key=len)      # as ipo.sample does
    for start in range(0, len(prompts), case.batch):
        ids, mask = ipo.left_pad(prompts[start:start + case.batch], model.device)
        batch = model.generate(input_ids=ids, attention_mask=mask, generation_config=USUAL)
        for output_ids in batch[:, ids.shape[1]:].tolist():
            if EOS in output_ids:
                output_ids = output_ids[:output_ids.index(EOS) + 1]
            outputs.append(output_ids)
    return outputs


def with_generate_batch(
    settings: dict, model: PreTrainedModel, prompts: list[TokenIds], case: Case, seed: int
) -> list[TokenIds]:
    batching = transformers.ContinuousBatchingConfig(seed=seed, **settings)
    requests = model.generate_batch(prompts, USUAL, continuous_batching_config=batching).values()
    failed = [request.error for request in requests if request.error]
    if failed or len(requests) != len(prompts):
        raise RuntimeError(f"generate_batch lost requests: {failed}")
    return [request.generated_tokens for request in requests]


def bench_sampling(case: Case, repeats: int) -> list[list[str]]:
    """Useful tokens (through the EOS) a CPU second: ours, generate, the best generate_batch."""
    model = end_after(make_llama(case.hidden, case.vocab), 80)
    paged = end_after(make_llama(case.hidden, case.vocab), 80)  # generate_batch changes its model
    prompts = [some_ids(16 + i * 29 % 49, case.vocab, i) for i in range(case.prompts)]
    ways = {"ipo.sample": partial(with_sample, model), "generate": partial(with_generate, model)}
    for settings in PAGED:
        ways[f"generate_batch {settings}"] = partial(with_generate_batch, settings, paged)

    once = {name: tokens_a_second(way, prompts, case, 0)[0] for name, way in ways.items()}
    best = max(list(ways)[2:], key=once.get)
    speeds = defaultdict(list)
    lengths = defaultdict(list)
    for repeat in range(1, 1 + repeats):
        for name in ("ipo.sample", "generate", best):
            speed, length = tokens_a_second(ways[name], prompts, case, repeat)
            speeds[name].append(speed)
            lengths[name].append(length)
    lines = []
    for name in list(speeds)[1:]:
        ours = median(speeds["ipo.sample"])
        theirs = median(speeds[name])
        lines.append([
            f"sampling, {case.name}: tokens a CPU second", f"{ours:,.0f}", f"{theirs:,.0f}", name,
            f"{ours / theirs:.2f}",
            f"mean length {mean(lengths['ipo.sample']):.0f} and {mean(lengths[name]):.0f}"])
    return lines


def tokens_a_second(way: Callable, prompts: list[TokenIds], case: Case, seed: int
                    ) -> tuple[float, float]:
    """(tokens a CPU second, mean length) of one call."""
    start = time.process_time()
    outputs = way(prompts, case, seed)
    seconds = time.process_time() - start
    tokens = sum(len(output_ids) for output_ids in outputs)
    return tokens / seconds, tokens / len(prompts)


# The shortcut that ipo.pick_tokens takes

WITH_SHORTCUT = ipo.pick_tokens


def sort_all(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """ipo.pick_tokens without its shortcut: the whole vocabulary is sorted."""
    return WITH_SHORTCUT(logits, uniforms, temperature, top_p, k=logits.shape[-1])


def bench_shortcut(repeats: int) -> list[list[str]]:
    """ipo.sample as it is and with the shortcut, where the nucleus is narrower than 64 tokens (the
    shortcut's best case) and where it holds about 120."""
    lines = []
    for vocab in (1_000, 32_000):
        for name, likely in (("narrow", 32), ("wide", 128)):
            case = Case("", 256, vocab, 64)
            model = end_after(make_llama(case.hidden, case.vocab), 80, likely)
            prompts = [some_ids(16 + i * 29 % 49, vocab, i) for i in range(case.prompts)]
            way = partial(with_sample, model)
            sorting_all = []
            sorting_few = []
            for repeat in range(1 + repeats):
                sorting_few.append(tokens_a_second(way, prompts, case, repeat)[0])
                ipo.pick_tokens = sort_all
                sorting_all.append(tokens_a_second(way, prompts, case, repeat)[0])
                ipo.pick_tokens = WITH_SHORTCUT
            ours = median(sorting_few[1:])      # the first repeat warms up
            theirs = median(sorting_all[1:])
            lines.append([f"sampling, vocabulary {vocab:,}, {name} nucleus: tokens a CPU second",
                          f"{ours:,.0f}", f"{theirs:,.0f}", "all sorted",
                          f"{ours / theirs:.2f}", ""])
    return lines


# A training step on the six pairs of a prompt


@dataclass
class StepCase:
    """Lengths of the parts, in tokens, and the model's size."""
    prefix: int = 100
    chosen: int = 250
    rejected: int = 600
    hidden: int = 256
    vocab: int = 32_000


SHORT_STEP = StepCase(20, 40, 60, 64, 500)
PAIRS = 6


@dataclass
class Trl:
    name: str
    settings: dict = field(default_factory=dict)


TRLS = [
    Trl("TRL", {"per_device_train_batch_size": PAIRS, "gradient_checkpointing": False}),
    Trl("TRL, checkpointing (its default)", {"per_device_train_batch_size": PAIRS}),
    Trl("TRL, checkpointing, pair by pair",
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": PAIRS}),
]


def pair_parts(case: StepCase) -> tuple[TokenIds, list[TokenIds], TokenIds]:
    chosen = [some_ids(case.chosen, case.vocab, i) for i in range(PAIRS)]
    return (some_ids(case.prefix, case.vocab, -1), chosen,
            some_ids(case.rejected, case.vocab, -2))


def peak_gb() -> float:
    """This process' highest memory so far, in GiB. (ru_maxrss would begin with the parent's.)"""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20


class Meter:
    """CPU seconds of one step, tokens through the model, and memory beyond the loaded model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.tokens = 0
        self.loaded_gb = peak_gb()
        model.model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, _: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        self.tokens += kwargs["input_ids"].numel()

    @torch.no_grad()
    def begin(self, *args: object, **kwargs: object) -> None:
        """The reference is known by now. Step off it, so that the loss is not simply log 2."""
        torch.manual_seed(1)
        for parameter in self.model.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
        self.tokens = 0
        self.started = time.process_time()

    def end(self, *args: object, **kwargs: object) -> None:
        self.seconds = time.process_time() - self.started


def measure_step(name: str, case: StepCase) -> dict[str, float]:
    """The figures of one step, ours or TRL's; run in a process of its own."""
    sys.stdout = sys.stderr     # TRL prints much
    torch.set_num_threads(1)
    rivals = {rival.name: rival for rival in TRLS}
    if name in rivals:
        # What is only loaded for TRL does not count as the step's memory.
        import datasets  # noqa: F401
        import trl.trainer.dpo_trainer  # noqa: F401
    model = make_llama(case.hidden, case.vocab).train()
    meter = Meter(model)
    loss = trl_step(model, meter, case, rivals[name]) if name in rivals else our_step(
        model, meter, case)
    return {"CPU seconds": meter.seconds, "peak GiB over the loaded model":
            peak_gb() - meter.loaded_gb, "tokens through the model": meter.tokens, "loss": loss}


def our_step(model: PreTrainedModel, meter: Meter, case: StepCase) -> float:
    prefix, chosen, rejected = pair_parts(case)
    pairs = [PreferencePair("", prefix, side, rejected) for side in chosen]
    with torch.no_grad():
        chosen_logps, rejected_logps, _ = ipo.pair_logps(model, pairs)
    for pair, chosen_logp, rejected_logp in zip(pairs, chosen_logps, rejected_logps):
        pair.ref_chosen_logp = chosen_logp.item()
        pair.ref_rejected_logp = rejected_logp.item()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    meter.begin()
    loss, _ = ipo.ipo_loss(model, pairs, beta=0.1, sft_weight=0.0)
    (loss / PAIRS).backward()
    optimizer.step()
    meter.end()
    return loss.item() / PAIRS


def trl_step(model: PreTrainedModel, meter: Meter, case: StepCase, rival: Trl) -> float:
    """The same pairs and loss in DPOTrainer; the reference is computed before its step."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models

    timer = transformers.TrainerCallback()
    timer.on_step_begin = meter.begin
    timer.on_step_end = meter.end
    config = trl.DPOConfig(
        tempfile.mkdtemp(), max_length=None, beta=0.1, loss_type=["sigmoid"], bf16=False,
        precompute_ref_log_probs=True, num_train_epochs=1, learning_rate=1e-6, use_cpu=True,
        max_grad_norm=0.0, report_to="none", save_strategy="no", **rival.settings)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<eos>": EOS}, "<eos>")), eos_token="<eos>")

    class TrainerOnIds(trl.DPOTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: object) -> Dataset:
            return dataset      # it holds ids already

    prefix, chosen, rejected = pair_parts(case)
    rows = [{"prompt_ids": prefix, "chosen_ids": side, "rejected_ids": rejected}
            for side in chosen]
    trainer = TrainerOnIds(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        callbacks=[timer])
    return trainer.train().training_loss


def bench_step(case: StepCase, repeats: int) -> list[list[str]]:
    names = ["ours"] + [rival.name for rival in TRLS]
    figures = defaultdict(lambda: defaultdict(list))        # what -> who -> values
    for _ in range(repeats):
        for name in names:
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                for what, value in fresh.apply(measure_step, [name, case]).items():
                    figures[what][name].append(value)
    losses = [value for values in figures["loss"].values() for value in values]
    if max(losses) - min(losses) > 5e-4:
        raise RuntimeError(f"the losses differ, so these are not the same step: {losses}")
    lines = []
    for what, values_of in figures.items():
        ours = median(values_of["ours"])
        for name in names[1:]:
            theirs = median(values_of[name])
            ratio = f"{theirs / ours:.2f}" if what != "loss" else ""
            lines.append([
                f"training step: {what}", f"{ours:,.4g}", f"{theirs:,.4g}", name, ratio, ""])
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=["step", "sampling", "shortcut"],
                        default=["step", "sampling"])
    parser.add_argument("--short", action="store_true",
                        help="one repeat of small cases; its figures mean nothing")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    repeats = 1 if options.short else options.repeats
    with data.errors_in_one_line():
        lines = [["what", "ours", "theirs", "who", "ours is better by", ""]]
        if "step" in options.only:
            lines += bench_step(SHORT_STEP if options.short else StepCase(), repeats)
        if "sampling" in options.only:
            cases = [Case("tiny", 64, 1000, 8, 8)] if options.short else CASES
            for case in cases:
                lines += bench_sampling(case, repeats)
        if "shortcut" in options.only:
            lines += bench_shortcut(repeats)
        print(evaluation.as_text(lines))


if __name__ == "__main__":
    main()
