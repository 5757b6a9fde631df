import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from lightning_peft import (
    Bottleneck,
    DoRA,
    LoRA,
    PiSSA,
    adapter_layers,
    adapter_state_dict,
    inject,
    load_adapter,
    merge_adapters,
    pad_adapter_rank,
    save_adapter,
    set_active_adapters,
    swap_adapter,
)
from lightning_peft.errors import AdapterMismatchError, AdapterNotFoundError, ConfigError, InjectionError, MergeError
from lightning_peft.testing.toys import tiny_gpt2, tiny_llama, token_batch

from .test_scaling import distance, logits, shake


def written(folder, method, seed, make=tiny_llama, targets=("query", "value")):
    """Write an adapter with random values and return what the model says with it."""
    model = make()
    inject(model, method, list(targets))
    shake(model, seed=seed)
    save_adapter(model, folder)
    return logits(model)


def tensors(model):
    return {name: (id(t), t.data_ptr(), t.shape) for name, t in model.state_dict(keep_vars=True).items()}


ADAPTERS = [
    LoRA(rank=2, alpha=4),
    LoRA(rank=8, alpha=24),
    LoRA(rank=5, alpha=1, rslora=True),
    LoRA(rank=3, alpha=7, rank_pattern={"query": 1}, alpha_pattern={"value": -2.5}),
]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_compiled_model_sees_one_graph(make, tmp_path):
    methods = ADAPTERS if make is tiny_llama else ADAPTERS[:3]  # patterns cannot mean one slice of a fused projection
    expected = [written(tmp_path / str(i), method, i, make) for i, method in enumerate(methods)]
    model = make()
    load_adapter(model, tmp_path / "0")
    pad_adapter_rank(model, 8)
    assert distance(logits(model), expected[0]) < 1e-6
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    assert distance(logits(compiled), expected[0]) < 1e-5
    before, frames = tensors(model), counter.frame_count
    assert frames >= 1
    for i in [*range(1, len(methods)), 0]:
        swap_adapter(compiled, tmp_path / str(i))
        assert distance(logits(compiled), expected[i]) < 1e-5, i
        assert distance(logits(model), expected[i]) < 1e-5, i
    assert counter.frame_count == frames
    assert tensors(model) == before


def test_without_room_the_graph_would_be_compiled_again(tmp_path):
    """The counter of the test above counts: loading under another name and switching does recompile."""
    for i in (0, 1):
        written(tmp_path / str(i), ADAPTERS[i], i)
    model = tiny_llama()
    load_adapter(model, tmp_path / "0", name="a")
    load_adapter(model, tmp_path / "1", name="b")
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    logits(compiled)
    frames = counter.frame_count
    set_active_adapters(model, "a")
    logits(compiled)
    assert counter.frame_count > frames


def test_outputs_are_those_of_hf_pefts_hot_swap(tmp_path):
    import peft
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    for i in (0, 1):
        written(tmp_path / str(i), ADAPTERS[i], i)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "0").eval()
    prepare_model_for_compiled_hotswap(theirs, target_rank=8)
    ours = tiny_llama()
    load_adapter(ours, tmp_path / "0")
    pad_adapter_rank(ours, 8)
    assert distance(logits(ours), logits(theirs)) < 1e-5
    hotswap_adapter(theirs, str(tmp_path / "1"), adapter_name="default", torch_device="cpu")
    before = logits(ours)
    swap_adapter(ours, tmp_path / "1")
    assert distance(logits(ours), before) > 1e-3
    assert distance(logits(ours), logits(theirs)) < 1e-5


def test_a_folder_written_by_hf_peft_is_swapped_in(tmp_path):
    import peft

    written(tmp_path / "ours", LoRA(rank=4), 0, targets=["q_proj", "v_proj"])
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(tiny_llama(), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny_llama()
    load_adapter(model, tmp_path / "ours")
    swap_adapter(model, tmp_path / "theirs")
    assert distance(logits(model), logits(theirs)) < 1e-5


def test_saving_writes_the_rank_and_the_scaling_that_were_swapped_in(tmp_path):
    for i in (0, 3):
        written(tmp_path / str(i), ADAPTERS[i], i)
    model = tiny_llama()
    load_adapter(model, tmp_path / "0")
    pad_adapter_rank(model, 16)
    save_adapter(model, tmp_path / "padded")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "padded" / file).read_bytes() == (tmp_path / "0" / file).read_bytes(), file
    swap_adapter(model, tmp_path / "3")
    save_adapter(model, tmp_path / "swapped")
    config = [json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("3", "swapped")]
    assert config[0] == config[1]
    first, second = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("3", "swapped"))
    assert first.keys() == second.keys()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=3e-7, atol=0)


def test_room_stays_empty_when_the_adapter_is_trained(tmp_path):
    model = tiny_llama()
    inject(model, LoRA(rank=2), ["query", "value"])
    shake(model)
    pad_adapter_rank(model, 6)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**token_batch()).logits.square().mean().backward()
        optimizer.step()
    assert adapter_state_dict(model)["model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0] == 2
    save_adapter(model, tmp_path)
    again = tiny_llama()
    load_adapter(again, tmp_path)
    assert distance(logits(again), logits(model)) < 1e-6


def test_every_low_rank_kind_has_room():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.conv = nn.Embedding(7, 8), nn.Conv1d(8, 8, 3, padding=1)
            self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

        def forward(self, ids):
            x = self.conv(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
            return self.out(self.attention(x, x, x)[0])

    model = Net().eval()
    inject(model, LoRA(rank=2), ["embedding", "conv", "attention", "out"])
    shake(model)
    ids = torch.arange(14).view(2, 7) % 7
    before, state = model(ids), adapter_state_dict(model)
    pad_adapter_rank(model, 5)
    torch.testing.assert_close(model(ids), before)
    padded = adapter_state_dict(model)
    assert padded.keys() == state.keys()
    assert all(torch.equal(padded[key], value) for key, value in state.items())
    assert model.out.adapters["default"].lora_A.shape == (5, 8)


def refused(model, folder, message, error=AdapterMismatchError, **options):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        swap_adapter(model, folder, **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_what_does_not_fit_is_refused_and_nothing_changes(tmp_path):
    model = tiny_llama()
    inject(model, LoRA(rank=4), ["query", "value"])
    shake(model)
    written(tmp_path / "rank", LoRA(rank=5), 1)
    refused(model, tmp_path / "rank", r"has rank 5, and there is room for 4; call pad_adapter_rank\(model, 5\)")
    written(tmp_path / "places", LoRA(rank=4), 1, targets=["query"])
    refused(model, tmp_path / "places", "they have different places, such as .*v_proj")
    written(tmp_path / "dropout", LoRA(rank=4, dropout=0.1), 1)
    refused(model, tmp_path / "dropout", "it has dropout=0.1, the model 0.0, which a swap cannot change")
    written(tmp_path / "method", DoRA(rank=4), 1)
    refused(model, tmp_path / "method", "it holds 'dora', the model 'lora'")
    written(tmp_path / "base", LoRA(rank=4), 1, make=lambda: tiny_llama(seed=1))
    refused(model, tmp_path / "base", "was trained on the base", error=Exception)
    refused(model, tmp_path / "base", "no such adapter", error=AdapterNotFoundError, name="other")
    swap_adapter(model, tmp_path / "base", check_base=False)


@pytest.mark.parametrize("damage", ["nan", "missing", "shape"])
def test_a_damaged_file_is_refused_and_nothing_changes(tmp_path, damage):
    written(tmp_path, LoRA(rank=4), 1)
    (tmp_path / "lightning_peft.json").unlink()  # what vouches for the weights
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    key = sorted(state)[-1]
    state[key] = {"nan": state[key] * float("nan"), "shape": state[key][:, :-1].contiguous()}.get(damage, state[key])
    if damage == "missing":
        del state[key]
    save_file(state, file)
    model = tiny_llama()
    inject(model, LoRA(rank=4), ["query", "value"])
    refused(model, tmp_path, "finite|does not hold|has shape|does not fit")


def test_values_that_overflow_under_the_scaling_here_are_refused(tmp_path):
    model = tiny_llama()
    inject(model, LoRA(rank=1, alpha=1e30), "query")
    shake(model, std=1e-30)
    save_adapter(model, tmp_path)
    other = tiny_llama()
    inject(other, LoRA(rank=1, alpha=1e-30), "query")
    refused(other, tmp_path, "is not finite in torch.float32 under the scaling")


def test_merged_adapters_are_not_swapped_or_padded(tmp_path):
    written(tmp_path, LoRA(rank=4), 1)
    model = tiny_llama()
    load_adapter(model, tmp_path)
    merge_adapters(model)
    refused(model, tmp_path, "is merged into the base", error=MergeError)
    with pytest.raises(MergeError, match="is merged into the base"):
        pad_adapter_rank(model, 8)


@pytest.mark.parametrize("method", [PiSSA(rank=2), Bottleneck(reduction_factor=8)])
def test_other_kinds_swap_at_equal_shapes_but_have_no_room(tmp_path, method):
    expected = []
    for i in (0, 1):
        model = tiny_llama()
        inject(model, method)
        shake(model, seed=i)
        save_adapter(model, tmp_path / str(i))
        expected.append(logits(model))
    model = tiny_llama()
    load_adapter(model, tmp_path / "0")
    before = tensors(model)
    swap_adapter(model, tmp_path / "1")
    assert distance(logits(model), expected[1]) < 1e-5
    assert distance(logits(model), expected[0]) > 1e-3
    assert tensors(model) == before
    with pytest.raises(InjectionError, match="which holds its values at their own rank only"):
        pad_adapter_rank(model, 8)


def test_a_rank_that_is_too_small_or_none_is_refused():
    model = tiny_llama()
    inject(model, LoRA(rank=4, rank_pattern={"value": 6}), ["query", "value"])
    before = tensors(model)
    with pytest.raises(ConfigError, match="has rank 6 at .* which cannot be padded to 5"):
        pad_adapter_rank(model, 5)
    with pytest.raises(ConfigError, match="needs a rank as an integer, got 8.0"):
        pad_adapter_rank(model, 8.0)
    assert tensors(model) == before


def test_the_biases_of_a_low_rank_adapter_are_swapped_too(tmp_path):
    def make():
        return tiny_llama(attention_bias=True)

    expected = [written(tmp_path / str(r), LoRA(rank=r, bias="all"), r, make) for r in (2, 4)]
    model = make()
    load_adapter(model, tmp_path / "2")
    pad_adapter_rank(model, 4)
    swap_adapter(model, tmp_path / "4")
    assert distance(logits(model), expected[1]) < 1e-5
    assert all("default" in layer.adapters for layer in adapter_layers(model).values())
