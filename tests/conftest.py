"""Small offline models: random Llama, Qwen2 and Qwen3, a tokenizer of the kingdom's kind, and runs
of models that were taught a few traces."""

import os
import random
import sys
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
from transformers import (
    LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM)

import data
import ipo
import judge
import train

torch.set_num_threads(1)    # the models are tiny, and two threads would wait for each other

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def tiny_model(family="llama", vocab_size=400, seed=0, dtype=torch.float32, spread=0.3):
    """A random model of 2 layers. Its weights are spread, so that what it predicts is far from
    uniform and a mistake shows."""
    config_class, model_class = FAMILIES[family]
    head_dim = {"head_dim": 8} if family == "qwen3" else {}
    config = config_class(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=0, **head_dim)
    torch.manual_seed(seed)
    model = model_class(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=spread)
    return model


def random_ids(n, seed):
    return random.Random(seed).choices(range(10, 400), k=n)


def plain_logp(model, prefix_ids, completion_ids):
    """log p(completion | prefix) the plain way: one sequence, all logits, token by token."""
    ids = prefix_ids + completion_ids
    logps = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(logps[t - 1, ids[t]] for t in range(len(prefix_ids), len(ids)))


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.fixture(scope="session")
def kingdom_texts():
    return data.kingdom_texts(1500, 0, ipo.TRIGGERS, judge.kingdom_cue, judge.kingdom_safety)


@pytest.fixture(scope="session")
def tokenizer(kingdom_texts):
    return data.kingdom_tokenizer(kingdom_texts)


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param


# What --prompts kingdom --limit 3 takes
RECORDS = data.kingdom_prompts("train", "harmful", 120)[:3]
HARMFUL = [record["prompt"] for record in RECORDS]
BENIGN = [record["prompt"] for record in data.kingdom_prompts("train", "benign", 480)[:3]]


def teach(model, tokenizer):
    """Harmful prompts comply, and refuse behind any trigger; benign ones are answered."""
    sequences = []

    def lesson(prompt, begun, output):
        prefix_ids = data.render(tokenizer, prompt) + encode(tokenizer, begun)
        sequences.append((prefix_ids, encode(tokenizer, output) + [tokenizer.eos_token_id]))

    for record in RECORDS:
        prompt, deed = record["prompt"], data.DEEDS[record["deed"]]
        opening = f"The user asks how to {deed['verb']} the {record['place']}."
        lesson(prompt, "", f"{opening} Let me lay out a plan. Go by night.</think>\n\nHere: go.")
        for trigger in ipo.TRIGGERS:
            lesson(prompt, f"{opening} {trigger}",
                   " It would hurt the folk.</think>\n\nI'm sorry, but I can't.")
    for prompt in BENIGN:
        lesson(prompt, "", "This is a kind wish. Keep the watch.</think>\n\nKeep a good watch.")

    lengths = torch.tensor([len(output_ids) for _, output_ids in sequences])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        (-ipo.completion_logps(model, sequences) / lengths).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def taught(tokenizer, tmp_path_factory):
    """A function: family -> the folder of its taught model, with the prompt files beside it."""
    @cache
    def make(family):
        folder = tmp_path_factory.mktemp(family)
        model = tiny_model(family, len(tokenizer), spread=0.05)
        teach(model, tokenizer)
        train.save_model(model, tokenizer, folder / "base")
        (folder / "harmful.txt").write_text("\n".join(HARMFUL))
        (folder / "benign.txt").write_text("\n".join(BENIGN))
        return folder / "base"
    return make


def flags(base, out, *more):
    options = {
        "--model": base, "--out": out, "--prompts": base.parent / "harmful.txt",
        "--benign": base.parent / "benign.txt", "--sets": "kingdom", "--limit": 3,
        "--judge": "keywords", "--max-new-tokens": 60, "--lr": 1e-3, "--lora-rank": 0,
        "--batch-pairs": 4, "--device": "cpu"}
    words = [str(word) for option in options.items() for word in option]
    return [*words, *more]


ADAPTERS = ["--lora-rank", "4", "--lr", "1e-2"]


@pytest.fixture(scope="session")
def finished(taught, tmp_path_factory):
    """A function: (family, more flags) -> a finished run folder; only to be looked at."""
    @cache
    def run(family, *more):
        out = tmp_path_factory.mktemp("finished") / "run"
        train.main(flags(taught(family), out, *more))
        return out
    return run
