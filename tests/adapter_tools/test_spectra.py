"""What training did to weights: against the definitions of the papers, computed another way with numpy and scipy."""

import json

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import nn

from lightning_peft import (
    BitFit,
    DoRA,
    FullFineTuning,
    LoRA,
    PrefixTuning,
    QLoRA,
    analyze_weights,
    inject,
    save_adapter,
    spectrum,
    subspace_similarity,
)
from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.adapter_tools.spectra import change_spectrum
from lightning_peft.cli import main
from lightning_peft.errors import AdapterMismatchError, ConfigError, MergeError
from lightning_peft.quantized_layers import dense_weight
from lightning_peft.testing.toys import tiny_gpt2, tiny_llama


def shaken(model, method, targets=None, scale=0.2, seed=0, name="default"):
    inject(model, method, targets, name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def weights_of(model, method, targets):
    """A weight of the base and the tuned one, by path, as numpy."""
    from lightning_peft import merge_adapters, unmerge_adapters

    def taken():
        return {
            path: m.weight.detach().double().numpy().copy() for path, m in model.named_modules() if hasattr(m, "weight")
        }

    before = taken()
    merge_adapters(model)
    after = taken()
    unmerge_adapters(model)
    return before, after


@pytest.mark.parametrize("method", [LoRA(rank=3), DoRA(rank=3), FullFineTuning()], ids=lambda m: m.name)
def test_an_analysis_is_that_of_the_written_out_weights(method):
    model = shaken(tiny_llama(), method)
    before, after = weights_of(model, method, None)
    found = analyze_weights(model, top=6, threshold=0.9)
    assert found
    for label, one in found.items():
        key = next(key for key in before if key.replace(".base_layer", "") == label)
        W0, W1 = before[key], after[key]
        if key.endswith("embed_tokens.base_layer"):
            W0, W1 = W0.T, W1.T
        U0, S0, _ = np.linalg.svd(W0, full_matrices=False)
        U1, S1, _ = np.linalg.svd(W1, full_matrices=False)
        U, S, Vh = np.linalg.svd(W1 - W0, full_matrices=False)
        np.testing.assert_allclose(one.base_values, S0, rtol=1e-5)
        np.testing.assert_allclose(one.tuned_values, S1, rtol=1e-4)
        np.testing.assert_allclose(one.values, S, rtol=1e-3, atol=1e-5)
        assert one.relative_norm == pytest.approx(np.linalg.norm(W1 - W0) / np.linalg.norm(W0), rel=1e-4)
        cosines = np.abs(U0.T @ U1[:, :6]).max(axis=0)
        assert one.intruders == (cosines < 0.9).sum()
        assert one.top == 6
        between = U[:, : one.rank].T @ W0 @ Vh[: one.rank].T
        assert one.amplification == pytest.approx(np.linalg.norm(W1 - W0) / np.linalg.norm(between), rel=1e-3)
        shares = S1 / S1.sum()
        assert one.tuned_effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    assert any(one.intruders for one in found.values())


def test_intruders_are_directions_that_the_base_has_not():
    """A base of rank three whose outputs are in the first three features, and an update that writes to the last one."""
    model = nn.Sequential(nn.Linear(6, 8, bias=False))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[:3, :3] = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    inject(model, LoRA(rank=1, alpha=1), "0")
    with torch.no_grad():
        lora = model[0].adapters["default"]
        lora.lora_A.copy_(torch.eye(6)[5:])
        lora.lora_B.zero_()
        lora.lora_B[0, 7] = 10.0
    one = analyze_weights(model, top=4)["0"]
    assert one.rank == 1
    assert one.intruders == 1
    assert one.amplification == float("inf")  # nothing of the base is between these directions
    with torch.no_grad():  # along a direction that is there
        lora.lora_A.copy_(torch.eye(6)[:1])
        lora.lora_B.zero_()
        lora.lora_B[0, 0] = 10.0
    one = analyze_weights(model, top=3)["0"]
    assert one.intruders == 0
    assert one.amplification == pytest.approx(10 / 3)


def test_the_spectrum_of_a_change_is_that_of_its_factors():
    model = shaken(tiny_gpt2(), LoRA(rank=2), ["qkv", "down"])
    low, dense = spectrum((model, "default")), change_spectrum(model)
    assert low.keys() == dense.keys()
    for label, one in low.items():
        assert dense[label].rank == one.rank == 2
        torch.testing.assert_close(dense[label].values[:2], one.values, rtol=1e-6, atol=1e-8)
        assert dense[label].effective_rank == pytest.approx(one.effective_rank, rel=1e-5)


def test_packed_weights_are_unpacked_one_at_a_time():
    method = QLoRA(rank=2, skip=["up"], compute_dtype="float32")
    model = shaken(tiny_llama(), method)
    dense = {
        path: dense_weight(unwrapped(held)).double().numpy()
        for path, held in base_modules(model)
        if isinstance(unwrapped(held), nn.Linear)
    }
    found = analyze_weights(model, top=4, threshold=0.9)
    assert len(found) == 14
    for label, one in found.items():
        adapter = model.get_submodule(label).adapters["default"]
        update = adapter.scaling * (adapter.lora_B.detach().t().double() @ adapter.lora_A.detach().double()).numpy()
        np.testing.assert_allclose(one.base_values, np.linalg.svd(dense[label], compute_uv=False), rtol=1e-9)
        np.testing.assert_allclose(one.tuned_values, np.linalg.svd(dense[label] + update, compute_uv=False), rtol=1e-5)
        assert one.rank == 2


def test_biases_alone_are_no_matrices():
    assert analyze_weights(shaken(tiny_gpt2(), BitFit())) == {}


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(MergeError):
        analyze_weights(shaken(tiny_llama(), PrefixTuning(num_virtual_tokens=2)))


@pytest.mark.parametrize(
    ("options", "message"), [({"top": 0}, "top must be"), ({"threshold": 1.5}, "threshold must be")]
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        analyze_weights(shaken(tiny_llama(), LoRA(rank=1)), **options)


# -- subspace similarity -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["A", "B"])
def test_similarity_is_that_of_principal_angles(of):
    """The mean squared cosine of the angles between the spaces of the first i and j directions, from scipy."""
    a = shaken(tiny_llama(), LoRA(rank=2), ["query"], seed=1)
    b = shaken(tiny_llama(), LoRA(rank=5), ["query"], seed=2)
    found = subspace_similarity((a, "default"), (b, "default"), of=of)
    assert len(found) == 2
    for path, grid in found.items():
        assert grid.shape == (2, 5)
        vectors = []
        for model in (a, b):
            lora = model.get_submodule(path).adapters["default"]
            matrix = (
                (lora.lora_A if of == "A" else lora.lora_B).detach().double().numpy().T
            )  # both are held (rank, features)
            vectors.append(np.linalg.svd(matrix, full_matrices=False)[0])
        for i in range(2):
            for j in range(5):
                angles = subspace_angles(vectors[0][:, : i + 1], vectors[1][:, : j + 1])
                assert float(grid[i, j]) == pytest.approx(np.mean(np.cos(angles) ** 2), abs=1e-9)


def test_an_adapter_is_like_itself_and_folders_are_read(tmp_path):
    model = shaken(tiny_llama(), LoRA(rank=3), ["query"])
    save_adapter(model, tmp_path / "a")
    for grid in subspace_similarity(tmp_path / "a", (model, "default")).values():
        torch.testing.assert_close(grid.diagonal(), torch.ones(3, dtype=torch.float64))


def test_what_cannot_be_compared_is_refused():
    a, b = shaken(tiny_llama(), LoRA(rank=2), ["query"]), shaken(tiny_llama(), LoRA(rank=2), ["value"])
    with pytest.raises(ConfigError, match="no weight in common"):
        subspace_similarity((a, "default"), (b, "default"))
    with pytest.raises(ConfigError, match="must be 'A' or 'B'"):
        subspace_similarity((a, "default"), (a, "default"), of="C")
    wide = shaken(tiny_llama(hidden_size=48, head_dim=12), LoRA(rank=2), ["query"])
    with pytest.raises(AdapterMismatchError, match="features"):
        subspace_similarity((a, "default"), (wide, "default"))


# -- the program -------------------------------------------------------------------------------------------------------


def test_inspect_with_the_weights_of_the_base(llama_dir, llama, tmp_path, capsys):
    save_adapter(shaken(llama, DoRA(rank=2), ["query"]), tmp_path / "a")
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "a"), "--weights"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "intruders" in out[0]
    assert len(out) == 3
    assert main(["inspect", str(tmp_path / "a"), "--base", llama_dir, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = analyze_weights(llama)
    assert found.keys() == expected.keys()
    for label, one in expected.items():
        assert found[label]["values"] == pytest.approx(one.values.tolist(), rel=1e-6)
        assert found[label]["intruders"] == one.intruders
        assert found[label]["relative_norm"] == pytest.approx(one.relative_norm)


def test_inspect_against_another_adapter(llama, tmp_path, capsys):
    save_adapter(shaken(llama, LoRA(rank=2), ["query"]), tmp_path / "a")
    save_adapter(shaken(llama, LoRA(rank=4), ["query"], seed=3, name="b"), tmp_path / "b", name="b")
    assert main(["inspect", str(tmp_path / "a"), "--against", str(tmp_path / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    grids = subspace_similarity(tmp_path / "a", tmp_path / "b")
    label, grid = next(iter(grids.items()))
    assert lines[1].split() == [label, f"{float(grid[0, 0]):.4g}", f"{float(grid[1, 1]):.4g}"]
    assert main(["inspect", str(tmp_path / "a"), "--against", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[label] == grid.tolist()
    assert main(["inspect", str(tmp_path / "a"), "--against", str(tmp_path / "b"), "--weights"]) == 2
    assert "leave out --weights" in capsys.readouterr().err
