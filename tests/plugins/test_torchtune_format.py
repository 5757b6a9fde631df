"""Files of torchtune, written here by computing where torchtune keeps each row, and checked by running torchtune's own rotary embedding."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lightning_peft import TorchtuneFile, get_registry, load_adapter
from lightning_peft.errors import AdapterConfigError, AdapterFileError, AdapterMismatchError
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch

RANK, ALPHA, HEAD = 4, 6, 16
LAYERS = {
    "attn.q_proj": ("self_attn.q_proj", 64, 64),
    "attn.k_proj": ("self_attn.k_proj", 64, 32),
    "attn.v_proj": ("self_attn.v_proj", 64, 32),
    "attn.output_proj": ("self_attn.o_proj", 64, 64),
    "mlp.w1": ("mlp.gate_proj", 64, 128),
    "mlp.w2": ("mlp.down_proj", 128, 64),
    "mlp.w3": ("mlp.up_proj", 64, 128),
}


def logits(model):
    with torch.no_grad():
        return model(**token_batch()).logits


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def place(row):
    """Return where torchtune keeps the output feature that is ``row`` in transformers: the halves of a head are interleaved."""
    head, feature = divmod(row, HEAD)
    half, pair = divmod(feature, HEAD // 2)
    return head * HEAD + 2 * pair + half


def as_torchtune(tensor):
    moved = torch.empty_like(tensor)
    for row in range(len(tensor)):
        moved[place(row)] = tensor[row]
    return moved


def fixture(
    folder,
    dora=False,
    config=True,
    name="adapter_0.pt",
    targets=("q_proj", "k_proj", "v_proj", "output_proj", "w1", "w2", "w3", "output"),
):
    """Write a folder as torchtune does; return it and the pairs, with magnitudes, by path of transformers' module."""
    tensors, pairs = {}, {}
    for layer in (0, 1):
        for theirs, (ours, width, out) in LAYERS.items():
            down, up = torch.randn(RANK, width) * 0.1, torch.randn(out, RANK) * 0.1
            magnitude = torch.rand(out) + 0.5
            pairs[f"model.layers.{layer}.{ours}"] = (down, up, magnitude)
            reorder = as_torchtune if theirs in ("attn.q_proj", "attn.k_proj") else torch.clone
            tensors[f"layers.{layer}.{theirs}.lora_a.weight"] = down
            tensors[f"layers.{layer}.{theirs}.lora_b.weight"] = reorder(up)
            if dora:
                tensors[f"layers.{layer}.{theirs}.magnitude"] = reorder(magnitude)
    if not dora:
        down, up = torch.randn(RANK, 64) * 0.1, torch.randn(128, RANK) * 0.1
        pairs["lm_head"] = (down, up, None)
        tensors["output.lora_a.weight"], tensors["output.lora_b.weight"] = down, up
    torch.save(tensors, folder / name)
    if config:
        names = [target for target in targets if not dora or target != "output"]
        content = {"r": RANK, "lora_alpha": ALPHA, "target_modules": names, "peft_type": "LORA"}
        (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder, pairs


def expected(pairs, dora):
    model = tiny_llama()
    with torch.no_grad():
        for path, (down, up, magnitude) in pairs.items():
            weight = model.get_submodule(path).weight
            updated = weight + ALPHA / RANK * (up @ down)
            if dora:
                updated = magnitude[:, None] * updated / updated.norm(dim=1, keepdim=True)
            weight.copy_(updated)
    return model


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("name", ["adapter_0.pt", "adapter_model.pt"])
def test_a_folder_computes_what_torchtune_trained(dora, name, tmp_path):
    folder, pairs = fixture(tmp_path, dora=dora, name=name)
    for path in (folder, folder / name):
        model = tiny_llama()
        injection = load_adapter(model, path)
        assert set(injection.paths) == set(pairs)
        assert (injection.method.name, injection.method.rank, injection.method.alpha) == (
            "dora" if dora else "lora",
            RANK,
            ALPHA,
        )
        assert relative(logits(model), logits(expected(pairs, dora))) <= 1e-5


def test_the_order_of_rows_is_that_of_the_rotary_embeddings():
    """torchtune turns features 2i and 2i+1 of a head by the angle of i, transformers i and i + half: the same scores in both orders."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = torch.randn(1, 1, 5, HEAD), torch.randn(1, 1, 5, HEAD)
    angles = torch.arange(5)[:, None] / 10000 ** (torch.arange(0, HEAD, 2) / HEAD)  # (position, pair)
    both = torch.cat([angles, angles], dim=-1)[None]
    a, b = apply_rotary_pos_emb(q, k, both.cos(), both.sin())
    order = [place(row) for row in range(HEAD)]

    def turned(x):
        moved = torch.empty_like(x)
        moved[..., order] = x
        pairs = torch.view_as_complex(moved.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    assert torch.allclose(a @ b.mT, turned(q) @ turned(k).mT, atol=1e-5)


def test_target_modules_may_be_in_hf_pefts_words(tmp_path):
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj", "lm_head")
    found = load_adapter(tiny_llama(), fixture(tmp_path, targets=names)[0])
    assert {path.rsplit(".", 1)[-1] for path in found.paths} <= set(names)
    assert any(path.endswith("q_proj") for path in found.paths)


def test_a_folder_that_hf_peft_reads_as_well_is_hf_pefts(tmp_path):
    folder, _ = fixture(tmp_path)
    save_file(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 64)},
        folder / "adapter_model.safetensors",
    )
    assert [name for name, kind in get_registry().adapter_formats.items() if kind().reads(folder)] == ["peft"]


NAME = "layers.0.attn.q_proj"
REFUSED = {
    "missing": (lambda t: t.pop(f"{NAME}.lora_b.weight"), r"Missing: \['model.layers.0.self_attn.q_proj.lora_B.weight'\]"),
    "extra": (lambda t: t.update({"layers.0.attn.gate.lora_a.weight": torch.zeros(4, 64)}), "which is no adapted layer of a Llama in torchtune"),
    "of the base": (lambda t: t.update({"norm.scale": torch.zeros(64)}), "has 'norm.scale', which is no adapted layer"),
    "misshapen": (lambda t: t.update({"layers.0.mlp.w1.lora_a.weight": torch.zeros(4, 63)}), r"shape \(4, 63\), this model needs \(4, 64\)"),
    "not whole heads": (lambda t: t.update({f"{NAME}.lora_b.weight": torch.zeros(60, 4)}), r"has shape \(60, 4\), heads have 16 features"),
    "of two ranks": (lambda t: t.update({f"{NAME}.lora_a.weight": torch.zeros(3, 64)}), r"must have one rank at all places, found \[3, 4\]"),
    "not finite": (lambda t: t[f"{NAME}.lora_b.weight"].fill_(float("nan")), "not finite"),
    "a layer without tensors": (lambda t: [t.pop(k) for k in list(t) if ".w1." in k], "and the layers with tensors .* do not agree"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_file_is_refused_and_the_model_is_what_it_was(case, tmp_path):
    edit, message = REFUSED[case]
    folder, _ = fixture(tmp_path)
    tensors = torch.load(folder / "adapter_0.pt", weights_only=True)
    edit(tensors)
    torch.save(tensors, folder / "adapter_0.pt")
    model = tiny_llama()
    with pytest.raises(AdapterMismatchError, match=message):
        load_adapter(model, folder)
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_what_the_file_does_not_say_is_asked_for(tmp_path):
    folder, pairs = fixture(tmp_path, config=False)
    with pytest.raises(AdapterConfigError, match=r"does not hold alpha.*format=TorchtuneFile\(alpha=\.\.\.\)"):
        load_adapter(tiny_llama(), folder)
    model = tiny_llama()
    load_adapter(model, folder, format=TorchtuneFile(alpha=ALPHA))
    assert relative(logits(model), logits(expected(pairs, False))) <= 1e-5


def test_of_several_epochs_one_is_named(tmp_path):
    fixture(tmp_path)
    folder, _ = fixture(tmp_path, name="adapter_1.pt")
    with pytest.raises(
        AdapterFileError, match=r"a folder with one, found \['adapter_0.pt', 'adapter_1.pt'\]; name the file"
    ):
        load_adapter(tiny_llama(), folder)
    load_adapter(tiny_llama(), folder / "adapter_1.pt")


def test_models_whose_order_is_not_known_are_refused(tmp_path):
    with pytest.raises(AdapterMismatchError, match="that order is known for llama, mistral, not for model_type 'gpt2'"):
        load_adapter(tiny_gpt2(), fixture(tmp_path)[0])


def test_another_rank_in_the_configuration_is_refused(tmp_path):
    folder, _ = fixture(tmp_path)
    (folder / "adapter_config.json").write_text('{"r": 8, "lora_alpha": 6}')
    with pytest.raises(AdapterMismatchError, match="has rank 4, but adapter_config.json says 8"):
        load_adapter(tiny_llama(), folder)
