"""Small models with random weights, built offline from a seed: the ground on which methods are tried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 128
"""Tokens the toys know."""


def tiny_llama(seed: int = 0, **config: Any) -> nn.Module:
    """Return a Llama of two layers and width 64 in eval mode: grouped attention, gated MLP, embedding and head of their own.

    Args:
        seed: of the random weights.
        config: fields of transformers' ``LlamaConfig`` to set otherwise, such as ``attention_bias=True``.

    Example:
        >>> tiny_llama().lm_head
        Linear(in_features=64, out_features=128, bias=False)
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "use_cache": False,
        **config,
    }
    return _seeded(lambda: LlamaForCausalLM(LlamaConfig(**settings)), seed)


def tiny_gpt2(seed: int = 0, **config: Any) -> nn.Module:
    """Return a GPT-2 of two layers and width 64 in eval mode: fused ``Conv1D`` projections with biases, tied embeddings.

    Args:
        seed: of the random weights.
        config: fields of transformers' ``GPT2Config`` to set otherwise.

    Example:
        >>> tiny_gpt2().transformer.h[0].attn.c_attn
        Conv1D(nf=192, nx=64)
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "use_cache": False,
        **config,
    }
    return _seeded(lambda: GPT2LMHeadModel(GPT2Config(**settings)), seed)


def token_batch(seed: int = 0, rows: int = 3, length: int = 12) -> dict[str, Tensor]:
    """Return a batch of random tokens: ``input_ids`` (rows, length).

    Example:
        >>> token_batch()["input_ids"].shape
        torch.Size([3, 12])
    """
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, VOCABULARY, (rows, length), generator=generator)}


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _with_biases(make()).eval()


@torch.no_grad()
def _with_biases(model: nn.Module) -> nn.Module:
    """Give biases random values: with the usual zeros, a method that mistreats them would not be noticed."""
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and not parameter.is_meta:
            parameter.normal_(std=0.02)
    return model
