"""LoRA files of LitGPT, written here row by row from known pairs after LitGPT's published layout, not by the reader's code."""

import pytest
import torch
import yaml

from lightning_peft import LitGPTFile, load_adapter
from lightning_peft.errors import AdapterConfigError, AdapterFileError, AdapterMismatchError
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch

RANK, ALPHA = 4, 6
WIDTHS = {"query": 64, "key": 32, "value": 32}
"""Output features in the toy: 4 heads of 16 for queries, 2 for keys and values."""
OTHERS = {"attn.proj": ("o_proj", 64, 64), "mlp.fc_1": ("gate_proj", 64, 128), "mlp.fc_2": ("up_proj", 64, 128), "mlp.proj": ("down_proj", 128, 64)}  # fmt: skip


def logits(model):
    with torch.no_grad():
        return model(**token_batch()).logits


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def randn(*shape):
    return torch.randn(shape) * 0.1


def fixture(folder, enabled=("query", "value"), others=(), head=False, fused="qkv", hyperparameters=True):
    """Write a folder as LitGPT does and return it with the updates (out, in) by path of transformers' module."""
    tensors, updates = {}, {}
    for layer in (0, 1):
        pairs = [
            (part, randn(RANK, 64), randn(WIDTHS[part], RANK)) for part in ("query", "key", "value") if part in enabled
        ]
        if pairs:
            downs, ups = (
                torch.empty(len(pairs) * RANK, 64),
                torch.empty(sum(WIDTHS[part] for part, _, _ in pairs), RANK),
            )
            row = 0
            for number, (part, down, up) in enumerate(pairs):
                for index in range(RANK):
                    downs[number * RANK + index] = down[index]
                for vector in up:  # the rows of a part stand together, in the order of the heads
                    ups[row] = vector
                    row += 1
                updates[f"model.layers.{layer}.self_attn.{part[0]}_proj"] = up @ down
            tensors[f"transformer.h.{layer}.attn.{fused}.lora_A"] = downs
            tensors[f"transformer.h.{layer}.attn.{fused}.lora_B"] = ups
        for name in others:
            short, width, out = OTHERS[name]
            down, up = randn(RANK, width), randn(out, RANK)
            tensors[f"transformer.h.{layer}.{name}.lora_A"], tensors[f"transformer.h.{layer}.{name}.lora_B"] = down, up
            updates[f"model.layers.{layer}.{'mlp' if 'mlp' in name else 'self_attn'}.{short}"] = up @ down
    if head:
        tensors["lm_head.lora_A"], tensors["lm_head.lora_B"] = randn(RANK, 64), randn(128, RANK)
        updates["lm_head"] = tensors["lm_head.lora_B"] @ tensors["lm_head.lora_A"]
    torch.save({"model": tensors}, folder / "lit_model.pth.lora")
    if hyperparameters:
        said = {"lora_r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.05, "precision": "bf16-true"}
        said |= {f"lora_{part}": part in enabled for part in WIDTHS}
        (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(said))
    return folder, updates


def with_updates(updates):
    model = tiny_llama()
    with torch.no_grad():
        for path, delta in updates.items():
            model.get_submodule(path).weight.add_(ALPHA / RANK * delta)
    return model


@pytest.mark.parametrize(
    "layout",
    [
        {"enabled": ("query", "value")},
        {"enabled": ("query", "key")},
        {"enabled": ("key",)},
        {"enabled": ("value",)},
        {"enabled": ("query", "key", "value")},
        {"enabled": ("query", "value"), "fused": "attn"},
        {"enabled": (), "others": tuple(OTHERS)},
        {"enabled": ("query", "key", "value"), "others": tuple(OTHERS), "head": True},
    ],
)
def test_a_file_computes_what_litgpt_merges(layout, tmp_path):
    folder, updates = fixture(tmp_path, **layout)
    for path in (folder, folder / "lit_model.pth.lora"):
        model = tiny_llama()
        injection = load_adapter(model, path)
        assert set(injection.paths) == set(updates)
        assert (injection.method.rank, injection.method.alpha, injection.method.dropout) == (RANK, ALPHA, 0.05)
        assert relative(logits(model), logits(with_updates(updates))) <= 1e-5


def test_without_hyperparameters_they_are_given(tmp_path):
    folder, updates = fixture(tmp_path, hyperparameters=False)
    with pytest.raises(
        AdapterConfigError,
        match=r"no hyperparameters.yaml with lora_alpha beside it; give it: format=LitGPTFile\(alpha=",
    ):
        load_adapter(tiny_llama(), folder)
    with pytest.raises(AdapterMismatchError, match="holds 2 updates, but query, key, value = .* does not say which"):
        load_adapter(tiny_llama(), folder, format=LitGPTFile(alpha=ALPHA))
    model = tiny_llama()
    load_adapter(model, folder, format=LitGPTFile(alpha=ALPHA, query=True, key=False, value=True))
    assert relative(logits(model), logits(with_updates(updates))) <= 1e-5


def change(folder, edit):
    path = folder / "lit_model.pth.lora"
    tensors = torch.load(path, weights_only=True)["model"]
    edit(tensors)
    torch.save({"model": tensors}, path)


QKV, PROJ = "transformer.h.0.attn.qkv", "transformer.h.0.attn.proj"
REFUSED = {
    "missing": (lambda t: t.pop(f"{PROJ}.lora_B"), r"Missing: \['model.layers.0.self_attn.o_proj.lora_B.weight'\]"),
    "missing of the fused": (lambda t: t.pop(f"{QKV}.lora_A"), r"needs lora_A \(n \* r, in\) and lora_B \(out, r\), found \(None, "),
    "missing B of the fused": (lambda t: t.pop(f"{QKV}.lora_B"), "has 'transformer.h.0.attn.qkv.lora_A' without its lora_B"),
    "extra": (lambda t: t.update({"transformer.h.0.mlp.fc.lora_A": randn(4, 64)}), "which no layer of a Llama is called in LitGPT"),
    "of the base": (lambda t: t.update({"transformer.wte.weight": randn(128, 64)}), "'transformer.wte.weight', which no layer"),
    "of another base": (lambda t: t.update({f"{QKV}.lora_B": randn(100, 4)}), r"lora_B has 100 rows, the adapted ones of query, key and value have \[64, 32\]"),
    "misshapen": (lambda t: t.update({f"{PROJ}.lora_A": randn(4, 63)}), r"shape \(4, 63\), this model needs \(4, 64\)"),
    "of two ranks": (lambda t: t.update({f"{PROJ}.lora_B": randn(64, 3)}), r"must have one rank at all places, found \[3, 4\]"),
    "not finite": (lambda t: t[f"{QKV}.lora_B"].fill_(float("nan")), "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_damaged_file_is_refused_and_the_model_is_what_it_was(case, tmp_path):
    edit, message = REFUSED[case]
    folder, _ = fixture(tmp_path, others=("attn.proj",))
    change(folder, edit)
    model = tiny_llama()
    with pytest.raises(AdapterMismatchError, match=message):
        load_adapter(model, folder)
    assert torch.equal(logits(model), logits(tiny_llama()))


def test_another_rank_in_the_hyperparameters_is_refused(tmp_path):
    folder, _ = fixture(tmp_path)
    (folder / "hyperparameters.yaml").write_text(
        "lora_r: 8\nlora_alpha: 6\nlora_query: true\nlora_key: false\nlora_value: true\n"
    )
    with pytest.raises(AdapterMismatchError, match="has rank 4, but hyperparameters.yaml says 8"):
        load_adapter(tiny_llama(), folder)
    (folder / "hyperparameters.yaml").write_text("lora_r: [")
    with pytest.raises(AdapterFileError, match="hyperparameters.yaml' cannot be read as YAML"):
        load_adapter(tiny_llama(), folder)


def test_a_model_that_is_no_llama_is_refused(tmp_path):
    with pytest.raises(AdapterMismatchError, match="the model has no 'model.layers.0.self_attn.q_proj': wrong base"):
        load_adapter(tiny_gpt2(), fixture(tmp_path)[0])


def test_updates_of_all_three_over_interleaved_rows_are_refused(tmp_path):
    folder, _ = fixture(tmp_path, enabled=tuple(WIDTHS), fused="attn")
    with pytest.raises(
        AdapterMismatchError, match="comes from a LitGPT that interleaved query, key and value by heads"
    ):
        load_adapter(tiny_llama(), folder)
