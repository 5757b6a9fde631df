"""GGUF files of LoRA adapters: read back with llama.cpp's own reader, and compared with the weights as llama.cpp holds and scales them."""

import json

import numpy as np
import pytest
import torch

from lightning_peft import (
    DoRA,
    GGUFAdapter,
    GGUFFile,
    LoRA,
    NormTuning,
    PiSSA,
    VeRA,
    get_registry,
    inject,
    load_adapter,
    merged_copy,
    save_adapter,
    scale_adapters,
)
from lightning_peft.adapter_layer import adapters_named
from lightning_peft.cli import main
from lightning_peft.errors import AdapterFileError, AdapterMismatchError, ConfigError, ExportError
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch

gguf = pytest.importorskip("gguf", reason="the extra 'gguf'")

LINEAR = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA = {f"blk.{i}.{theirs}.weight": f"model.layers.{i}.{ours}" for i in (0, 1) for theirs, ours in LINEAR.items()}


def adapted(model, method, targets="all_linear", **options):
    inject(model, method, targets, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model


def written(model, folder, **options):
    GGUFAdapter(**options).export(model, folder)
    return folder / "adapter.gguf"


def content(file):
    """Return what the file says, and its tensors in the shapes of numpy, in float64."""
    reader = gguf.GGUFReader(file)
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return said, {
        one.name: gguf.dequantize(one.data, one.tensor_type).astype(np.float64).copy() for one in reader.tensors
    }


def deltas(file):
    """Return what llama.cpp adds to each weight: alpha / rank times the product, where the rank is that of the tensor, and zero means unscaled."""
    said, tensors = content(file)
    found = {}
    for name in tensors:
        if name.endswith(".lora_b"):
            base, up, down = name.removesuffix(".lora_b"), tensors[name], tensors[name.removesuffix("b") + "a"]
            rank = up.shape[1]  # ne[0] of lora_b
            # A row of lora_a is looked up for each token, so it has one row a token there.
            product = down @ up.T if base == "token_embd.weight" else up @ down
            alpha = said["adapter.lora.alpha"]
            found[base] = (alpha / rank if alpha else 1.0) * product
    return found


def as_llama_cpp(weight, heads):
    """Return the rows of a weight in llama.cpp's order, row by row: features i and i + half of a head become neighbours."""
    moved, size = np.empty_like(weight), len(weight) // heads
    for row in range(len(weight)):
        head, feature = divmod(row, size)
        half, pair = divmod(feature, size // 2)
        moved[head * size + 2 * pair + half] = weight[row]
    return moved


def array(model, place):
    return model.get_submodule(place).weight.detach().double().numpy()


METHODS = {
    "one alpha": (LoRA(rank=4, alpha=6), 6.0),
    "rsLoRA": (LoRA(rank=4, alpha=6, rslora=True), 12.0),
    "ranks and alphas that differ": (
        LoRA(
            rank=4,
            alpha=6,
            rslora=True,
            rank_pattern={"key": 3, "re:.*up_proj": 2},
            alpha_pattern={"re:.*0.self_attn.q_proj": 5.0},
        ),
        12.0,
    ),
    "from the largest singular values": (PiSSA(rank=2, alpha=3), 6.0),
}


@pytest.mark.parametrize(("method", "alpha"), METHODS.values(), ids=METHODS)
def test_base_and_file_are_the_adapted_weights(method, alpha, tmp_path):
    base, model = tiny_llama(), adapted(tiny_llama(), method)
    scale_adapters(model, {"default": 1.5})
    said, tensors = content(file := written(model, tmp_path))
    assert said == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.file_type": 0,
        "adapter.type": "lora",
        "adapter.lora.alpha": pytest.approx(1.5 * alpha),
    }
    assert set(tensors) == {f"{name}.lora_{half}" for name in LLAMA for half in "ab"}
    merged, heads = merged_copy(model), {"attn_q": 4, "attn_k": 2}
    for name, delta in deltas(file).items():
        rows = heads.get(name.split(".")[2])
        order = (lambda weight, rows=rows: as_llama_cpp(weight, rows)) if rows else np.copy
        wanted = order(array(merged, LLAMA[name]))
        np.testing.assert_allclose(order(array(base, LLAMA[name])) + delta, wanted, atol=1e-6)
        assert np.abs(delta).max() > 0.1


def test_rows_of_query_and_key_are_where_the_rotary_embedding_of_llama_cpp_wants_them(tmp_path):
    """llama.cpp turns features 2i and 2i + 1 of a Llama's head by the angle of i: then scores are those of transformers."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    base, model = tiny_llama(), adapted(tiny_llama(), LoRA(rank=4), ["query", "key"])
    found, merged, x = deltas(written(model, tmp_path)), merged_copy(model), torch.randn(5, 64, dtype=torch.float64)
    angles = torch.arange(5.0)[:, None] / 10000 ** (torch.arange(0, 16, 2) / 16)  # (position, pair)
    both = torch.cat([angles, angles], dim=-1)[None]
    ours, theirs = [], []
    for part, heads in (("q", 4), ("k", 2)):
        place = f"model.layers.1.self_attn.{part}_proj"
        y = (x @ torch.from_numpy(array(merged, place)).T).unflatten(-1, (heads, 16)).transpose(0, 1)
        ours.append(apply_rotary_pos_emb(y[None], y[None], both.cos(), both.sin())[0][0])
        weight = torch.from_numpy(as_llama_cpp(array(base, place), heads) + found[f"blk.1.attn_{part}.weight"])
        pairs = torch.view_as_complex((x @ weight.T).unflatten(-1, (heads, 8, 2)).transpose(0, 1).contiguous())
        theirs.append(torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2))
    scores = [q.unflatten(0, (2, 2)) @ k[:, None].transpose(-1, -2) for q, k in (ours, theirs)]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "bits", "file_type"), [("float16", 11, 1), ("bfloat16", 8, 32)])
def test_a_file_in_half_precision_is_rounded_once(dtype, bits, file_type, tmp_path):
    model = adapted(tiny_llama(), LoRA(rank=4))
    _, exact = content(written(model, tmp_path / "exact"))
    said, rounded = content(file := written(model, tmp_path / dtype, dtype=dtype))
    assert said["general.file_type"] == file_type
    assert {one.tensor_type.name for one in gguf.GGUFReader(file).tensors} == {"F16" if bits == 11 else "BF16"}
    for name, tensor in exact.items():
        np.testing.assert_array_equal(
            rounded[name], torch.from_numpy(tensor).to(getattr(torch, dtype)).double().numpy()
        )


def test_an_embedding_and_a_head_of_their_own(tmp_path):
    targets = ["re:model.embed_tokens", "re:lm_head"]
    base, model = tiny_llama(), adapted(tiny_llama(), LoRA(rank=4), targets)
    _, tensors = content(file := written(model, tmp_path))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "token_embd.weight.lora_a": (128, 4),
        "token_embd.weight.lora_b": (64, 4),
        "output.weight.lora_a": (4, 64),
        "output.weight.lora_b": (128, 4),
    }
    merged = merged_copy(model)
    for name, place in {"token_embd.weight": "model.embed_tokens", "output.weight": "lm_head"}.items():
        np.testing.assert_allclose(array(base, place) + deltas(file)[name], array(merged, place), atol=1e-6)
    other = tiny_llama()
    load_adapter(other, file)
    assert_same(model, other)


def test_gpt2_whose_weights_lie_and_slices_of_its_fused_projection(tmp_path):
    base, model = tiny_gpt2(), adapted(tiny_gpt2(), LoRA(rank=4), ["query", "value", "re:.*c_proj"])
    found, merged = deltas(written(model, tmp_path)), merged_copy(model)
    names = {"attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_down": "mlp.c_proj"}
    assert set(found) == {f"blk.{i}.{name}.weight" for i in (0, 1) for name in names}
    for name, delta in found.items():
        place = f"transformer.h.{name.split('.')[1]}.{names[name.split('.')[2]]}"
        np.testing.assert_allclose(array(base, place).T + delta, array(merged, place).T, atol=1e-6)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEVEN = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
ATTENTION = {"attn_q", "attn_k", "attn_v", "attn_output"}
ARCHITECTURES = {
    # class: (architecture, places, whether query and key are reordered)
    "Gemma": ("gemma", SEVEN, False),
    "Gemma2": ("gemma2", SEVEN, False),
    "Gemma3": ("gemma3", SEVEN, False),
    "Granite": ("granite", SEVEN, True),
    "Mistral": ("llama", SEVEN, True),
    "Mixtral": ("llama", ATTENTION, True),
    "Olmo": ("olmo", SEVEN, True),
    "Olmo2": ("olmo2", SEVEN, False),
    "Phi": ("phi2", ATTENTION | {"ffn_up", "ffn_down"}, False),
    "Phi3": ("phi3", {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}, False),
    "Qwen2": ("qwen2", SEVEN, False),
    "Qwen2Moe": ("qwen2moe", ATTENTION, False),
    "Qwen3": ("qwen3", SEVEN, False),
    "Qwen3Moe": ("qwen3moe", ATTENTION, False),
    "SmolLM3": ("smollm3", SEVEN, True),
    "Starcoder2": ("starcoder2", ATTENTION | {"ffn_up", "ffn_down"}, False),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_holds_all_its_linear_layers(kind, tmp_path):
    import transformers

    architecture, places, reordered = ARCHITECTURES[kind]
    settings = getattr(transformers, f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config")(**SMALL)
    model = getattr(transformers, f"{kind}ForCausalLM")(settings).eval()
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    targets = "re:.*self_attn.[qkvo]_proj" if places is ATTENTION else "all_linear"
    adapted(model, LoRA(rank=2), targets)
    said, _ = content(file := written(model, tmp_path))
    found, merged = deltas(file), merged_copy(model)
    assert said["general.architecture"] == architecture
    assert {name.split(".")[2] for name in found} == places
    assert len(found) == 2 * len(places)
    layer = {}
    for name, weight in merged.named_parameters():
        change = (weight.detach().double() - before[name].double()).numpy()
        if ".layers.1.self_attn.q_proj" in name or ".layers.1.self_attn.k_proj" in name:
            heads = settings.num_attention_heads if "q_proj" in name else settings.num_key_value_heads
            change = as_llama_cpp(change, heads) if reordered and name.endswith("weight") else change
        if ".layers.1." in name and np.abs(change).max() > 0:
            layer[name] = change
    assert len(layer) == len(places)
    for change in layer.values():  # every changed weight is one of the file's
        assert any(
            delta.shape == change.shape and np.allclose(delta, change, atol=1e-6)
            for name, delta in found.items()
            if name.startswith("blk.1.")
        )


# -- and back ----------------------------------------------------------------------------------------------------------


def assert_same(model, other):
    found = {path: adapter.export_state() for path, adapter in adapters_named(other, "default").items()}
    wanted = {path: adapter.export_state() for path, adapter in adapters_named(model, "default").items()}
    assert set(found) == set(wanted)
    for path, state in wanted.items():
        for key, tensor in state.items():
            assert torch.equal(found[path][key], tensor), (path, key)
    with torch.no_grad():
        assert torch.equal(other(**token_batch()).logits, model(**token_batch()).logits)


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    model, other = adapted(tiny_llama(), LoRA(rank=4, rank_pattern={"key": 2})), tiny_llama()
    file = written(model, tmp_path / "once")
    injection = load_adapter(other, file)
    assert (injection.method.rank, injection.method.alpha) == (4, 16)
    assert_same(model, other)
    assert written(other, tmp_path / "twice").read_bytes() == file.read_bytes()


def test_folded_scales_compute_the_same_when_read_back(tmp_path):
    model, other = adapted(tiny_llama(), METHODS["ranks and alphas that differ"][0]), tiny_llama()
    load_adapter(other, written(model, tmp_path).parent, format="gguf")
    with torch.no_grad():
        torch.testing.assert_close(other(**token_batch()).logits, model(**token_batch()).logits, rtol=1e-5, atol=1e-5)


def foreign(folder, tensors, alpha=6.0, arch="llama", **fields):
    """Write a file as llama.cpp's own converter names things."""
    writer = gguf.GGUFWriter(folder / "theirs.gguf", arch)
    for key, value in {"general.type": "adapter", "adapter.type": "lora", **fields}.items():
        writer.add_string(key, value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, (tensor, kind) in tensors.items():
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(tensor, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "theirs.gguf"


def pair(name, rank=2, out=32, width=64, kind="F32"):
    random = np.random.default_rng(0)
    shapes = {"a": (rank, width), "b": (out, rank)}
    return {
        f"{name}.lora_{half}": (random.normal(size=shape).astype(np.float32), kind) for half, shape in shapes.items()
    }


def test_no_alpha_means_no_scaling(tmp_path):
    tensors = pair("blk.0.attn_v.weight", 2) | pair("blk.1.attn_v.weight", 4)
    for alpha in (0.0, None):
        base, model = tiny_llama(), tiny_llama()
        load_adapter(model, foreign(tmp_path, tensors, alpha=alpha))
        for i in (0, 1):
            place = f"model.layers.{i}.self_attn.v_proj"
            up, down = (tensors[f"blk.{i}.attn_v.weight.lora_{half}"][0] for half in "ba")
            np.testing.assert_allclose(array(merged_copy(model), place), array(base, place) + up @ down, atol=1e-5)


def test_quantised_tensors_are_read_as_what_they_stand_for(tmp_path):
    tensors = pair("blk.0.attn_v.weight", rank=32, kind="Q8_0")
    model = tiny_llama()
    load_adapter(model, foreign(tmp_path, tensors))
    adapter = adapters_named(model, "default")["model.layers.0.self_attn.v_proj"]
    exact = tensors["blk.0.attn_v.weight.lora_a"][0]
    found = adapter.lora_A.detach().numpy()
    assert 0 < np.abs(found - exact).max() < 2 * np.abs(exact).max() / 127


V = "blk.0.attn_v.weight"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda f: foreign(f, pair(V), **{"general.type": "model"}), AdapterFileError, "must have general.type 'adapter'"),
        (lambda f: foreign(f, pair(V), arch="qwen2"), AdapterMismatchError, "'qwen2', the model is 'llama' in llama.cpp"),
        (lambda f: foreign(f, pair("blk.7.attn_v.weight")), AdapterMismatchError, "which is no part of an update of 'llama'"),
        (lambda f: foreign(f, {"blk.0.attn_norm.weight": pair(V)[f"{V}.lora_a"]}), AdapterMismatchError, "is no part of an update"),
        (lambda f: foreign(f, {f"{V}.lora_a": pair(V)[f"{V}.lora_a"]}), AdapterMismatchError, "without the other half"),
        (lambda f: foreign(f, pair(V), alpha=None, **{"adapter.lora.alpha": "much"}), AdapterFileError, "alpha must be a number, found 'much'"),
        (lambda f: foreign(f, {}), AdapterMismatchError, "holds no adapter tensor"),
        (lambda f: foreign(f, pair("blk.0.attn_q.weight", out=63)), AdapterMismatchError, "needs two matrices for 4 heads"),
        (lambda f: foreign(f, pair(V, out=31)), AdapterMismatchError, "shape"),
    ],
)  # fmt: skip
def test_other_files_are_refused_and_the_model_stays(make, error, message, tmp_path):
    model = tiny_llama()
    with pytest.raises(error, match=message):
        load_adapter(model, make(tmp_path))
    assert not list(adapters_named_or_none(model))


def adapters_named_or_none(model):
    return [name for name, _ in model.named_modules() if "adapters" in name]


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    file = written(adapted(tiny_llama(), LoRA(rank=4)), tmp_path)
    whole = file.read_bytes()
    for length in (5, 100, len(whole) // 2):
        file.write_bytes(whole[:length])
        with pytest.raises(AdapterFileError, match="cannot be read as GGUF"):
            load_adapter(tiny_llama(), file)
    file.write_bytes(b"none of it")
    with pytest.raises(AdapterFileError, match="is a file that no registered format reads"):
        load_adapter(tiny_llama(), file)


# -- what the format cannot hold ---------------------------------------------------------------------------------------


def tied_llama():
    return tiny_llama(tie_word_embeddings=True)


def classifier():
    from transformers import LlamaForSequenceClassification

    return LlamaForSequenceClassification(tiny_llama().config)


@pytest.mark.parametrize(
    ("model", "method", "options", "message"),
    [
        (tiny_llama, DoRA(rank=2), {}, r"not one low-rank product but \['lora_magnitude_vector"),
        (lambda: tiny_llama(attention_bias=True), LoRA(rank=2, bias="lora_only"), {"targets": "query"}, "trains the bias of"),
        (classifier, LoRA(rank=2), {"modules_to_save": ["score"]}, "trains 'score' in full"),
        (tiny_llama, VeRA(rank=2), {"targets": "query"}, "is a 'vera' adapter"),
        (tiny_llama, NormTuning(), {"targets": None}, "is a 'norm_tuning' adapter"),
        (classifier, LoRA(rank=2), {"targets": "re:score"}, "'score', a Linear, has no matrix of its own"),
        (tied_llama, LoRA(rank=2), {"targets": "re:lm_head"}, "'lm_head' shares its weight with 'model.embed_tokens'"),
        (tied_llama, LoRA(rank=2, tied="both"), {"targets": "re:model.embed_tokens"}, "has no update for an embedding that is the head too"),
        (lambda: torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRA(rank=2), {"targets": "0"}, r"a Sequential \(model_type None\)"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*only the target is adapted")
@pytest.mark.filterwarnings("ignore:.*tied")
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(model, method, options, message, tmp_path):
    model = adapted(model(), method, **options)
    with pytest.raises(ExportError, match=message):
        GGUFAdapter().export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_in_the_file_are_refused(tmp_path):
    model = adapted(tiny_llama(), LoRA(rank=4), "query")
    with torch.no_grad():
        next(iter(adapters_named(model, "default").values())).lora_A.fill_(1e5)
    written(model, tmp_path / "wide")
    with pytest.raises(ExportError, match="'blk.0.attn_q.weight.lora_a' has values that are not finite in float16"):
        GGUFAdapter(dtype="float16").export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_scale_of_zero_stays_zero(tmp_path):
    model = adapted(tiny_llama(), LoRA(rank=4), "query")
    scale_adapters(model, {"default": 0.0})
    assert all((delta == 0).all() for delta in deltas(written(model, tmp_path)).values())


def test_words_out_of_range_are_refused():
    with pytest.raises(ConfigError, match="GGUFAdapter dtype must be one of float32, float16, bfloat16, got 'q4'"):
        GGUFAdapter(dtype="q4")


def test_both_ways_are_registered():
    assert get_registry().get("exporter", "gguf_adapter") is GGUFAdapter
    assert get_registry().get("adapter format", "gguf") is GGUFFile


def test_the_command_line_writes_and_reads_it(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = adapted(tiny_llama(), LoRA(rank=4))
    save_adapter(model, tmp_path / "adapter")
    base = ["--base", str(tmp_path / "base")]
    line = ["merge", "--adapter", str(tmp_path / "adapter"), "--output", str(tmp_path / "out"), *base]
    assert main([*line, "--exporter", "gguf_adapter", "--options", json.dumps({"dtype": "float32"})]) == 0
    file = tmp_path / "out" / "adapter.gguf"
    assert main(["convert", "--adapter", str(file), "--output", str(tmp_path / "back"), *base]) == 0
    assert "lora at 14 places" in capsys.readouterr().out
    other = tiny_llama()
    load_adapter(other, tmp_path / "back")
    assert_same(model, other)
