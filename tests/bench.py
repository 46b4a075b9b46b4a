"""OMP_NUM_THREADS=1 python tests/bench.py: our sampler and training step against the usual ones.

The rivals are transformers and TRL (pip install trl); medians of CPU seconds, repeats interleaved.
--device cuda measures an 8B model with random weights instead; with --hidden 256 a small one, to
see on a CPU that the code runs.
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
from functools import partial
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import ipo
import train

SAMPLING = {"7M": (256, 4096, 64), "27M": (512, 8192, 64), "7M, 16 at once": (256, 4096, 16)}
USUAL = transformers.GenerationConfig(do_sample=True, temperature=0.6, top_p=0.95, top_k=0,
                                      max_new_tokens=400, eos_token_id=0, pad_token_id=0)
BLOCKS = dict(page_size=32, num_blocks=1024, max_batch_tokens=512)
PAGED = [{}, BLOCKS, BLOCKS | {"max_batch_tokens": 64}, BLOCKS | {"max_requests_per_batch": 16}]
STEPS = {"ipo": None, "TRL": dict(per_device_train_batch_size=6, gradient_checkpointing=False),
         "TRL, checkpointing": dict(per_device_train_batch_size=6),  # its default
         "TRL, checkpointing, pair by pair": dict(per_device_train_batch_size=1,
                                                  gradient_accumulation_steps=6)}
RATES = {"NVIDIA H200": (4.8e12, 989e12), "NVIDIA H100 80GB HBM3": (3.35e12, 989e12)}  # B/s, FLOP/s


def llama(hidden, vocab, layers=6, heads=4, kv_heads=4, wide=43 / 16, dtype=torch.float32):
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=int(hidden * wide),
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=8192, bos_token_id=None, eos_token_id=0), dtype=dtype).eval()


def peaked(model, eos=0.0):
    """A bias on the head: 128 likely tokens, and the EOS, id 0, with probability eos."""
    weight = model.lm_head.weight.detach()
    others = 128 * math.exp((0.02 / 0.6) ** 2 * weight.shape[1] / 2)  # sum of e^(logit / 0.6)
    bias = torch.full_like(weight[:, 0], -20)
    bias[1:129], bias[0] = 0, 0.6 * math.log(0.95 * others * eos / (1 - eos)) if eos else -20
    weight[0], model.lm_head.bias = 0, torch.nn.Parameter(bias)  # 0.95: what top_p leaves
    return model


def some_ids(n, vocab=32_000, seed=0):
    return random.Random(f"{seed} {n}").choices(range(1, vocab), k=n)


def show(what, figures, ratio):
    (_, ours), *rivals = [(name, median(values)) for name, values in figures.items()]
    for name, theirs in rivals:
        print(f"| {what} | {ours:,.4g} | {theirs:,.4g} ({name}) | {ratio(ours, theirs):.2f} |")


def generate(model, prompts, batch, seed):
    torch.manual_seed(seed)
    outputs, prompts = [], sorted(prompts, key=len)  # like ipo.sample
    for some in (prompts[i:i + batch] for i in range(0, len(prompts), batch)):
        n = max(map(len, some))
        ids = torch.tensor([[0] * (n - len(p)) + p for p in some])
        mask = torch.tensor([[0] * (n - len(p)) + [1] * len(p) for p in some])
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=USUAL)[:, n:]
        outputs += [o[:o.index(0) + 1] if 0 in o else o for o in out.tolist()]
    return outputs


def generate_batch(model, prompts, settings, seed):
    batching = transformers.ContinuousBatchingConfig(seed=seed, **settings)
    out = model.generate_batch(prompts, USUAL, continuous_batching_config=batching).values()
    assert len(out) == len(prompts) and not any(o.error for o in out), "requests were lost"
    return [o.generated_tokens for o in out]


def sampling(what, repeats):
    """Useful tokens (through the EOS) a CPU-second: 64 prompts, outputs of 80 tokens on average."""
    hidden, vocab, batch = SAMPLING[what]
    model, paged = (peaked(llama(hidden, vocab), 1 / 80) for _ in range(2))
    prompts = [some_ids(16 + i * 29 % 49, vocab, i) for i in range(64)]
    ours = partial(ipo.sample, model, prompts, max_new_tokens=400, eos_ids={0}, temperature=0.6,
                   top_p=0.95, batch_size=batch)
    ways = {"ipo": lambda n: ours(seed=n), "generate": partial(generate, model, prompts, batch)}
    ways |= {f"generate_batch {s}": partial(generate_batch, paged, prompts, s) for s in PAGED}
    for repeat in range(1 + repeats):
        if repeat < 2:  # repeat 0 warms up and finds generate_batch's best settings
            speeds, lengths = defaultdict(list), defaultdict(list)
        for name, way in ways.items():
            start = time.process_time()
            tokens = sum(map(len, way(repeat)))
            speeds[name].append(tokens / (time.process_time() - start))
            lengths[name].append(tokens / len(prompts))
        if repeat == 0:
            print(f"  {what}, once:", {name: round(*n) for name, n in speeds.items()}, flush=True)
            best = max(list(ways)[2:], key=speeds.get)
            ways = {name: ways[name] for name in ("ipo", "generate", best)}
    show(f"sampling {what}: tokens a CPU-second", speeds, lambda ours, theirs: ours / theirs)
    print("  mean lengths:", {name: round(mean(n), 1) for name, n in lengths.items()}, flush=True)


def step(who):
    """The figures of one step on the six pairs of a prompt; in a process of its own."""
    sys.stdout = sys.stderr  # TRL prints much
    torch.set_num_threads(1)
    status = Path("/proc/self/status")  # VmHWM is its peak memory; ru_maxrss starts at the parent's
    peak_gb = lambda: int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) / 2 ** 20
    if STEPS[who]:
        import trl.trainer.dpo_trainer
        from datasets import Dataset
        from tokenizers import Tokenizer, models
    model, counts, clock = llama(256, 32_000).train(), [], []
    prefix, rejected = some_ids(100), some_ids(600)
    chosen, base = [some_ids(250, seed=i) for i in range(6)], peak_gb()
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True)

    @torch.no_grad()
    def begin(*_, **__):  # the reference is known: leave it, for a loss other than log 2
        torch.manual_seed(1)
        for p in model.parameters():
            p += 1e-3 * torch.randn_like(p)
        counts.clear()
        clock.append(time.process_time())

    end = lambda *_, **__: clock.append(time.process_time())
    if STEPS[who]:
        timer = transformers.TrainerCallback()
        timer.on_step_begin, timer.on_step_end = begin, end
        config = trl.DPOConfig(
            tempfile.mkdtemp(), max_length=None, beta=0.1, loss_type=["sigmoid"], bf16=False,
            precompute_ref_log_probs=True, num_train_epochs=1, learning_rate=1e-6, use_cpu=True,
            max_grad_norm=0.0, report_to="none", save_strategy="no", **STEPS[who])
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<eos>": 0}, "<eos>")), eos_token="<eos>")
        trl.DPOTrainer._prepare_dataset = lambda self, dataset, *_: dataset  # these are ids already
        pairs = [dict(prompt_ids=prefix, chosen_ids=c, rejected_ids=rejected) for c in chosen]
        loss = trl.DPOTrainer(model, args=config, train_dataset=Dataset.from_list(pairs),
                              processing_class=tokenizer, callbacks=[timer]).train().training_loss
    else:
        optimizer = train.AdamW(model.named_parameters())
        group = ipo.Group(prefix, chosen, rejected)
        with torch.no_grad():
            group.ref_logps = ipo.group_logps(model, [group])[0].tolist()
        begin()
        loss = ipo.ipo_loss(model, [group], 0.1, 0.0)[0] / 6
        loss.backward()
        optimizer.step(1e-6)
        end()
    return {"CPU seconds": clock[1] - clock[0], "peak GiB over the loaded model": peak_gb() - base,
            "tokens through the model": sum(counts), "loss": float(loss)}


def training(repeats):
    seen = defaultdict(lambda: defaultdict(list))
    for who in list(STEPS) * repeats:
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            for what, figure in fresh.apply(step, [who]).items():
                seen[what][who].append(figure)
    for what, figures in seen.items():
        show(f"training step: {what}", figures, lambda ours, theirs: theirs / ours)
    losses = sum(seen["loss"].values(), [])
    assert max(losses) - min(losses) < 1e-4, f"the losses differ: {losses}"


def seconds(work, *args, **kwargs):
    times = []
    for _ in range(3):  # the first warms up
        start = time.perf_counter()
        work(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def on_device(device, hidden):
    """Llama-3 8B's shape; another hidden size shrinks everything, lengths too, for a dry run."""
    cuda, n = device == "cuda", lambda size: max(8, size * hidden // 4096)
    name = torch.cuda.get_device_name() if cuda else "a dry run on a CPU, no measurement"
    bandwidth, peak_flops = RATES.get(name, (math.nan, math.nan))  # nan: unknown
    vocab, layers = n(128_256), n(32)
    with torch.device(device):
        model = peaked(llama(hidden, vocab, layers, 32, 8, 3.5, torch.bfloat16))
    params, head = sum(p.numel() for p in model.parameters()), vocab * hidden
    print(f"{name}: {params / 1e9:.2f}B parameters")
    ids = lambda size, seed=0: some_ids(n(size), vocab, seed)
    for batch in (256, 64):
        sample = partial(seconds, ipo.sample, model, [ids(1000, i) for i in range(batch)], seed=0,
                         eos_ids=set(), temperature=0.6, top_p=0.95, batch_size=batch)
        a_step, context = (sample(max_new_tokens=68) - sample(max_new_tokens=4)) / 64, n(1000) + 36
        read = 2 * (params - head) + batch * context * layers * hidden  # of keys, values: 2 * D / 4
        print(f"decoding {batch} rows at context {context}: {batch / a_step:,.0f} tokens/s, "
              f"{read / a_step / bandwidth:.1%} of the bandwidth")
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    backward = lambda group: ipo.ipo_loss(model, [group], 0.1, 0.2)[0].backward()
    group = ipo.Group(ids(512), [ids(1000, i) for i in range(6)], ids(1500), [0.0] * 7)
    lengths, spent = [len(group.prefix_ids + s) for s in group.sides], seconds(backward, group)
    flops = 6 * ((params - 2 * head) * sum(lengths) + head * sum(map(len, group.sides))
                 + layers * hidden * sum(size ** 2 for size in lengths))  # causal attention
    print(f"ipo_loss, checkpointing, sequences of {lengths}: {sum(lengths) / spent:,.0f} tokens/s, "
          f"{flops / spent / peak_flops:.1%} of peak FLOP/s, what is run twice counted once")
    pair = ipo.Group(ids(512), [ids(1536)], ids(1536, 1), [0.0] * 2)
    for what in ("all weights", "LoRA, rank 16"):
        if what != "all weights":
            train.add_adapters(model, 16)
        model.zero_grad()
        optimizer = train.AdamW((k, p) for k, p in model.named_parameters() if p.requires_grad)
        torch.cuda.reset_peak_memory_stats() if cuda else None
        backward(pair)
        optimizer.step(1e-6)
        peak = torch.cuda.max_memory_allocated() / 2 ** 30 if cuda else math.nan
        print(f"a step on two sequences of {n(512) + n(1536)} tokens, {what}: peak {peak:.1f} GiB")
        del optimizer
    sampled = 1000 * 1000 + 6000 * 500 + 2 * 915 * 800  # once, six continuations, benign twice
    trained = 467 * (4 * 512 + 3 * 1000 + 1500)         # 1,400 pairs, three a prompt
    hours = [sampled * a_step / 64 / 0.75 / 3600, trained * 1.25 * spent / sum(lengths) / 3600]
    print(f"projected: {hours[0]:.2f} h to sample {sampled / 1e6:.1f}M tokens (traces of 1,000, "
          f"continuations 500, benign 800; 64 rows, 3/4 of them busy), {hours[1]:.2f} h to train "
          f"on 1,400 pairs (prefix 512, chosen 1,000, rejected 1,500), reference pass included")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.device == "cuda" or args.hidden != 4096:
        on_device(args.device, args.hidden)
    else:
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        print("| what | ours | rival | ours is better by |\n|---|---|---|---|")
        training(args.repeats)
        for what in SAMPLING:
            sampling(what, args.repeats + 2)
