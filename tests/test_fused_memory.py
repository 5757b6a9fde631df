"""Bytes that autograd keeps for backward, and peak bytes, beside HF PEFT: exact, as they are counted and not timed."""

import sys
from pathlib import Path

import pytest
import torch

from lightning_peft import LoRA, fuse_blocks, inject

peft = pytest.importorskip("peft")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HIDDEN = 512


def llama(layers, dtype, vocabulary=64):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 1376, "num_attention_heads": 8, "num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, use_cache=False, **sizes))
    return model.to(dtype).requires_grad_(False)


def theirs(model, dropout=0.0, cast=True):
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, lora_dropout=dropout)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=cast).train()


def ours(model, dropout=0.0, fused=False):
    inject(model, LoRA(rank=8, dropout=dropout), LINEARS)
    return (fuse_blocks(model) if fused else model).train()


def kept(model, tokens):
    """Return the bytes of all storages, but those of parameters and buffers, that a forward keeps for backward."""
    own = {one.untyped_storage().data_ptr() for one in [*model.parameters(), *model.buffers()]}
    found, alive = {}, []

    def pack(one):
        storage = one.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        alive.append(one)  # so that no address is used twice
        return one

    ids = torch.arange(tokens)[None] % 64
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        model(input_ids=ids, labels=ids)
    return sum(found.values())


def per_token_and_layer(adapt, dtype):
    """In units of hidden size times bytes of an element: the difference of one layer, and of 64 tokens, so that no constant counts."""
    one, two = adapt(llama(1, dtype)), adapt(llama(2, dtype))
    more, less = (kept(two, tokens) - kept(one, tokens) for tokens in (160, 96))
    return (more - less) / 64 / HIDDEN / dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_kept_for_backward_per_token_and_layer(dtype):
    default = per_token_and_layer(theirs, dtype)
    linear = per_token_and_layer(ours, dtype)
    block = per_token_and_layer(lambda model: ours(model, fused=True), dtype)
    half = dtype is torch.bfloat16
    assert linear <= (0.63 if half else 1.0) * default
    assert block <= (0.42 if half else 0.73) * default
    # The residual stream twice, query, key, value, what attention gives, gate and up; the rest is products of low rank and sums by token.
    assert block <= 2 + 3 + 1 + 2 * 1376 / HIDDEN + 0.5


@pytest.mark.parametrize("fused", [False, True])
def test_peak_of_a_step_with_dropout(fused):
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    try:
        from paired import peak_bytes
    finally:
        sys.path.pop(0)
    ids = torch.randint(0, 1000, (2, 128))
    peaks = []
    for model in (theirs(llama(2, torch.float32, 1000), 0.05), ours(llama(2, torch.float32, 1000), 0.05, fused)):
        peaks.append(peak_bytes(lambda model=model: model(input_ids=ids, labels=ids).loss.backward()))
    assert peaks[1] <= (0.6 if fused else 0.73) * peaks[0]
