"""Small offline models: random Llama, Qwen2 and Qwen3, and a tokenizer of the kingdom's kind."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import data
import ipo
import judge

torch.set_num_threads(1)  # the models are tiny, and two threads wait for each other

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def tiny_model(family="llama", vocab_size=400, seed=0, dtype=torch.float32, spread=0.3):
    """A random model of 2 layers, its weights spread: distributions far from uniform."""
    config_class, model_class = FAMILIES[family]
    extra = {"head_dim": 8} if family == "qwen3" else {}
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        **extra,
    )
    torch.manual_seed(seed)
    model = model_class(config).to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(std=spread)
    return model


@pytest.fixture(scope="session")
def kingdom_texts():
    return data.kingdom_texts(
        1500,
        0,
        ipo.TRIGGERS,
        lambda s: judge.cue_question(s, style="brief"),
        lambda t: judge.safety_question(t, style="brief"),
    )


@pytest.fixture(scope="session")
def tokenizer(kingdom_texts):
    return data.kingdom_tokenizer(kingdom_texts)


@pytest.fixture(params=sorted(FAMILIES))
def family(request):
    return request.param
