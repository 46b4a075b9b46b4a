"""Small offline models: random Llama, Qwen2 and Qwen3, and a tokenizer of the kingdom's kind."""

import os
import random
import sys
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
