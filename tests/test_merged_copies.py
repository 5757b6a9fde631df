import pytest
import torch

from lightning_peft import LoRA, QLoRA, adapter_layers, inject, merge_adapters, merged_copy, unmerge_adapters
from lightning_peft.errors import AdapterNotFoundError, MergeError
from lightning_peft.merging import outputs
from lightning_peft.quantized_layers import packed_layers
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch

BATCH = token_batch()


def adapted(model, method=None, targets=None, **options):
    inject(model, method or LoRA(rank=2), targets, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for parameter in layer.adapters.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def places(model):
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}


def tensors(model):
    return {name: t.detach().clone() for name, t in (*model.named_parameters(), *model.named_buffers())}


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_the_copy_is_the_merged_model_and_the_original_stays(make, share):
    model = adapted(make(), targets=["query", "value"])  # fused in GPT-2, whose embeddings are tied
    before, out = tensors(model), outputs(model, BATCH)
    twin = merged_copy(model, share_unchanged=share)
    assert not adapter_layers(twin)
    merge_adapters(model)
    assert torch.equal(outputs(twin, BATCH), outputs(model, BATCH))
    unmerge_adapters(model)
    assert all(torch.equal(before[name], value) for name, value in tensors(model).items())
    assert torch.equal(outputs(model, BATCH), out)
    own = {
        p.untyped_storage().data_ptr(): p
        for p in twin.parameters()
        if p.untyped_storage().data_ptr() not in places(model)
    }
    if share:  # what merging changed, and nothing else
        assert len(own) == len(adapter_layers(model))
    else:
        assert not places(model) & places(twin)
    tied = make is tiny_gpt2
    assert (twin.get_input_embeddings().weight is twin.get_output_embeddings().weight) == tied
    with torch.no_grad():
        next(iter(own.values())).zero_()
    assert torch.equal(outputs(model, BATCH), out)


@pytest.mark.parametrize("share", [False, True])
def test_weights_that_are_adapted_together_stay_tied_in_the_copy(share):
    model = adapted(tiny_llama(tie_word_embeddings=True), LoRA(rank=2, tied="both"), ["head"])
    out = outputs(model, BATCH)
    twin = merged_copy(model, share_unchanged=share)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    torch.testing.assert_close(outputs(twin, BATCH), out)
    assert torch.equal(outputs(model, BATCH), out)


@pytest.mark.parametrize("how", ["requantize", "dequantize"])
@pytest.mark.parametrize("share", [False, True])
def test_a_quantised_model_is_copied_as_it_is_asked_for(how, share):
    model = adapted(tiny_llama(), QLoRA(rank=4, compute_dtype="float32"), ["query"])
    out = outputs(model, BATCH)
    with pytest.raises(MergeError, match="packed weights cannot take an update"):
        merged_copy(model)
    twin = merged_copy(model, quantized=how, share_unchanged=share)
    assert len(packed_layers(twin)) == (14 if how == "requantize" else 0)  # the unadapted layers too
    assert len(packed_layers(model)) == 14
    merge_adapters(model, quantized=how)
    torch.testing.assert_close(outputs(twin, BATCH), outputs(model, BATCH))
    unmerge_adapters(model)
    assert torch.equal(outputs(model, BATCH), out)


def test_named_adapters_are_merged_and_what_is_merged_stays_so():
    model = adapted(tiny_llama(), name="a")
    adapted(model, name="b")  # the active one now
    only_a = outputs(merged_copy(model, "a"), BATCH)
    merge_adapters(model, "b")
    b = outputs(merged_copy(model), BATCH)
    assert torch.equal(b, outputs(model, BATCH))
    assert not torch.allclose(only_a, b)
    unmerge_adapters(model)
    assert model.model.layers[0].self_attn.q_proj.merged == ()


def test_a_model_without_adapters_is_not_copied():
    with pytest.raises(AdapterNotFoundError, match="no such adapter: it holds none"):
        merged_copy(tiny_llama())
