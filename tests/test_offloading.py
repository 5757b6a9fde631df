from pathlib import Path

import pytest
import torch

from lightning_peft import (
    LoRA,
    adapter_rows,
    bring_back_adapters,
    delete_adapter,
    inject,
    list_adapters,
    load_adapter,
    materialize_adapters,
    merge_adapters,
    offload_adapters,
    rename_adapter,
    save_adapter,
    set_active_adapters,
    set_row_adapters,
    unmerge_adapters,
)
from lightning_peft.errors import AdapterNotFoundError, ConfigError, InjectionError
from lightning_peft.testing.toys import tiny_llama

from .test_scaling import logits, shake, two


def on_disk(model, name):
    """Tell for each tensor of an adapter whether its memory is the map of a file."""
    files = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if ".adapter-" in line:
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            files.append((start, end))
    held = [p for key, p in model.named_parameters() if f".adapters.{name}." in key]
    assert held
    return [any(start <= p.data_ptr() < end for start, end in files) for p in held]


pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the memory maps of Linux")


def test_what_is_inactive_is_on_disk_and_comes_back_with_its_values(tmp_path):
    model = two()
    outputs = {}
    for name in ("a", "b"):
        set_active_adapters(model, name)
        outputs[name] = logits(model)
    identities = {key: id(p) for key, p in model.named_parameters()}
    offload_adapters(model, to=tmp_path / "away")
    assert all(on_disk(model, "a"))
    assert not any(on_disk(model, "b"))
    assert [info.device for info in list_adapters(model)] == [str(tmp_path / "away"), "cpu"]
    assert list((tmp_path / "away").iterdir()) == []
    for name, other in (("a", "b"), ("b", "a"), ("a", "b")):
        set_active_adapters(model, name)
        assert torch.equal(logits(model), outputs[name])
        assert not any(on_disk(model, name))
        assert all(on_disk(model, other))
    assert {key: id(p) for key, p in model.named_parameters()} == identities


def test_what_was_trained_in_between_is_kept(tmp_path):
    model = two()
    offload_adapters(model, to=tmp_path)
    shake(model, "b", seed=5)
    output = logits(model)
    model(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits.sum().backward()
    set_active_adapters(model, "a")
    assert all(p.grad is None for key, p in model.named_parameters() if ".b." in key)
    set_active_adapters(model, "b")
    assert torch.equal(logits(model), output)


def test_an_unchanged_adapter_is_written_once(tmp_path, monkeypatch):
    import safetensors.torch

    written = []
    save = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", lambda state, file: (written.append(file), save(state, file)))
    model = two()
    offload_adapters(model, to=tmp_path)
    for name in ("a", "b", "a", "b"):
        set_active_adapters(model, name)
    assert len(written) == 2


def test_saving_renaming_merging_and_deleting_do_not_mind(tmp_path):
    model = two()
    set_active_adapters(model, "a")
    output = logits(model)
    set_active_adapters(model, "b")
    offload_adapters(model, to=tmp_path / "away")
    save_adapter(model, tmp_path / "saved", name="a")
    again = tiny_llama()
    load_adapter(again, tmp_path / "saved")
    assert torch.equal(logits(again), output)
    rename_adapter(model, "a", "c")
    assert all(on_disk(model, "c"))
    set_active_adapters(model, [])
    assert all([*on_disk(model, "b"), *on_disk(model, "c")])
    merge_adapters(model, "c")
    assert not any(on_disk(model, "c"))
    assert torch.allclose(logits(model), output, atol=1e-5)
    unmerge_adapters(model)
    set_active_adapters(model, "c")
    assert torch.equal(logits(model), output)
    delete_adapter(model, "b")
    inject(model, LoRA(rank=1), "query", name="b")
    assert not any(on_disk(model, "b"))


def test_adapters_that_come_later_go_too_until_all_are_brought_back(tmp_path):
    model = two()
    offload_adapters(model, to=tmp_path)
    inject(model, LoRA(rank=1), "query", name="c")
    inject(model, LoRA(rank=1), "query", name="d")
    assert all(on_disk(model, "c"))
    assert not any(on_disk(model, "d"))
    bring_back_adapters(model)
    assert not any(flag for name in "abcd" for flag in on_disk(model, name))
    set_active_adapters(model, "a")
    assert not any(on_disk(model, "d"))


def test_names_choose_what_is_offloaded(tmp_path):
    model = two()
    set_active_adapters(model, [])
    offload_adapters(model, "a", to=tmp_path)
    assert all(on_disk(model, "a"))
    assert not any(on_disk(model, "b"))


def test_a_device_is_asked_for_the_inactive_and_the_base_for_the_active(monkeypatch):
    """No second device is needed to see which moves are asked for."""
    model = two()
    moves = []
    to = torch.Tensor.to

    def seen(tensor, *args, **options):
        if args and isinstance(args[0], torch.device):
            moves.append((tuple(tensor.shape), str(args[0])))
        return to(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", seen)
    offload_adapters(model, to="cpu")
    shapes = {name: [tuple(p.shape) for k, p in model.named_parameters() if f".{name}." in k] for name in "ab"}
    assert moves == [(shape, "cpu") for shape in shapes["a"]]
    moves.clear()
    set_active_adapters(model, "a")
    assert moves == [(shape, "cpu") for shape in shapes["a"] + shapes["b"]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_inactive_adapters_leave_the_gpu():
    model = two().cuda()
    offload_adapters(model)
    assert [info.device for info in list_adapters(model)] == ["cpu", "cuda:0"]
    set_active_adapters(model, "a")
    assert [info.device for info in list_adapters(model)] == ["cuda:0", "cpu"]
    model(input_ids=torch.zeros(1, 3, dtype=torch.long, device="cuda")).logits.sum().backward()


def test_adapters_that_are_trained_by_rows_stay(tmp_path):
    model = two()
    set_active_adapters(model, [])
    offload_adapters(model, to=tmp_path)
    set_row_adapters(model, "a")
    set_active_adapters(model, [])
    assert [info.device for info in list_adapters(model)] == ["cpu", str(tmp_path)]
    with adapter_rows(model, ["a", "b"]):
        model(input_ids=torch.zeros(2, 3, dtype=torch.long)).logits.sum().backward()
    offload_adapters(model, to=tmp_path / "elsewhere")
    assert all(p.grad is not None for key, p in model.named_parameters() if ".adapters.a." in key)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_rows_bring_adapters_to_the_gpu():
    model = two().cuda()
    offload_adapters(model)
    with adapter_rows(model, ["a", "b"]):
        model(input_ids=torch.zeros(2, 3, dtype=torch.long, device="cuda"))
    assert [info.device for info in list_adapters(model)] == ["cuda:0", "cuda:0"]


def test_what_cannot_be_offloaded_is_refused_and_nothing_changes(tmp_path):
    model = two()
    with pytest.raises(AdapterNotFoundError, match="'c' was asked for"):
        offload_adapters(model, ["a", "c"], to=tmp_path)
    with pytest.raises(ConfigError, match="cannot use the meta device"):
        offload_adapters(model, to="meta")
    with pytest.raises(ConfigError, match="needs a device, a Path or a path with a slash as to=, got 'nowhere'"):
        offload_adapters(model, to="nowhere")
    set_active_adapters(model, [])
    assert not any([*on_disk(model, "a"), *on_disk(model, "b")])
    with torch.device("meta"):
        empty = tiny_llama_on_meta()
    inject(empty, LoRA(rank=1), "query")
    with pytest.raises(InjectionError, match="is on the meta device; offload plain tensors with values"):
        offload_adapters(empty, to=tmp_path)
    with pytest.raises(InjectionError, match="is on the meta device"):
        materialize_adapters(empty)


def tiny_llama_on_meta():
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(tiny_llama().config)
