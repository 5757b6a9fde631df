"""Loading while a method changes the base. The reference is the same load without that, and ``prepare`` after it."""

import json
import subprocess
import sys
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from lightning_peft import NF4, CausalLMLoader, LoRA, PEFTModule, QLoRA, inject
from lightning_peft.errors import ConfigError, InjectionError, LightningPEFTWarning, TargetError
from lightning_peft.interfaces import Method
from lightning_peft.layer_preparation import LayerPreparation, prepare_layers
from lightning_peft.loaders import ModelLoader
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch

METHOD = QLoRA(rank=2, compute_dtype="float32")
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 128, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
OPT = {"ffn_dim": 128, "word_embed_proj_dim": 64, "tie_word_embeddings": True}


def contents(model):
    """Every tensor of a model by name: parameters, buffers of both kinds, and what belongs to packed weights."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in list(tensors.items()):
        state = getattr(tensor, "quant_state", None)
        if state is not None:
            tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        if getattr(tensor, "SCB", None) is not None:
            tensors[f"{name}.SCB"] = tensor.SCB
    return tensors


def assert_same(one, other):
    first, second = contents(one), contents(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert second[name].dtype == value.dtype, name
        assert second[name].requires_grad == value.requires_grad, name
        assert torch.equal(second[name], value), name
    assert str(one) == str(other)
    assert [module.training for module in one.modules()] == [module.training for module in other.modules()]
    assert vars(one).keys() == vars(other).keys()
    assert one.config.to_dict() == other.config.to_dict()
    assert one.generation_config.to_dict() == other.generation_config.to_dict()
    shared = [{n for n, p in contents(m).items() if p is m.get_input_embeddings().weight} for m in (one, other)]
    assert shared[0] == shared[1]


def both(folder, method=METHOD, **options):
    """The base of ``folder`` loaded and then prepared, and prepared while it is loaded."""
    loader = CausalLMLoader(path=str(folder), **options)
    reference = loader.load()
    method.prepare(reference)
    return reference, loader.load_for(method)


def count_packed(monkeypatch, kind=NF4):
    """Count the layers that are packed while from_pretrained runs, and those packed outside it."""
    seen = {"inside": 0, "outside": 0, "loading": False}
    quantize, load = kind.quantize, AutoModelForCausalLM.from_pretrained

    def counted(self, linear):
        seen["inside" if seen["loading"] else "outside"] += 1
        return quantize(self, linear)

    def watched(*args, **kwargs):
        seen["loading"] = True
        try:
            return load(*args, **kwargs)
        finally:
            seen["loading"] = False

    monkeypatch.setattr(kind, "quantize", counted)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", watched)
    return seen


# -- the same bits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "method",
    [
        METHOD,
        QLoRA(quantization="fp4", double_quantization=False),
        QLoRA(quantization="int8", skip=["down", "*.0.*.q_proj"]),
    ],
    ids=["nf4", "fp4", "int8"],
)
def test_a_sharded_base_is_what_load_and_prepare_give(method, dtype, tmp_path):
    tiny_llama(attention_bias=True, mlp_bias=True).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    assert_same(*both(tmp_path, method, dtype=dtype))


@pytest.mark.filterwarnings("ignore:QLoRA leaves .* modules of fused experts")
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("opt", OPT),
        ("gpt_neox", {}),
        ("bloom", {"n_layer": 2, "n_head": 4}),
        ("phi3", {}),
        ("gemma3_text", {"head_dim": 16}),
        ("mixtral", EXPERTS),
        ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 128, "mlp_only_layers": [0]}),
    ],
)
def test_other_kinds_of_models_too(kind, settings, tmp_path, monkeypatch):
    """Tied embeddings; fused projections; weights that transformers puts together from several of the checkpoint."""
    config = AutoConfig.for_model(kind, **{**SMALL, **settings})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size="100KB")
    reference, loaded = both(tmp_path)
    assert_same(reference, loaded)
    packed = sum(type(module).__name__ == "Linear4bit" for module in loaded.modules())
    seen = count_packed(monkeypatch)
    CausalLMLoader(path=str(tmp_path)).load_for(METHOD)
    assert seen["inside"] == packed > 4
    assert seen["outside"] == 0
    batch = token_batch()
    with torch.no_grad():
        assert torch.equal(reference.eval()(**batch).logits, loaded.eval()(**batch).logits)


@pytest.mark.filterwarnings("ignore:QLoRA leaves .* modules of fused experts")
def test_a_checkpoint_of_experts_has_other_names_than_the_model(tmp_path):
    """Else the case above would not be about conversion."""
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **{**SMALL, **EXPERTS})).save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    assert any(".experts.3." in key for key in keys)
    assert not any(
        ".experts.3." in name for name, _ in CausalLMLoader(path=str(tmp_path)).load_for(METHOD).named_parameters()
    )


def test_checkpoints_that_are_not_safetensors_too(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same(*both(tmp_path))


def test_layers_that_share_a_weight_are_packed_from_what_they_share(tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    tied = {
        "model.layers.1.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
        "lm_head.weight": "model.embed_tokens.weight",
    }
    monkeypatch.setattr(LlamaForCausalLM, "_tied_weights_keys", tied)
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "model.layers.1.mlp.up_proj.weight" not in load_file(tmp_path / "model.safetensors")
    seen = count_packed(monkeypatch)
    loaded = CausalLMLoader(path=str(tmp_path)).load_for(METHOD)
    assert (seen["inside"], seen["outside"]) == (12, 2)
    reference = CausalLMLoader(path=str(tmp_path)).load()
    METHOD.prepare(reference)
    assert_same(reference, loaded)


def test_layers_off_the_block_size_stay_and_are_named_once(tmp_path):
    tiny_llama(intermediate_size=100).save_pretrained(tmp_path)
    with pytest.warns(
        LightningPEFTWarning, match=r"QLoRA leaves 2 of 14 linear layers unquantised: .*0.mlp.down_proj, "
    ) as seen:
        model = CausalLMLoader(path=str(tmp_path)).load_for(METHOD)
    assert sum(issubclass(warning.category, LightningPEFTWarning) for warning in seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject(model, METHOD)
    with pytest.warns(LightningPEFTWarning, match="QLoRA leaves 2 of 14"):
        assert_same(*both(tmp_path))


# -- what is not in the checkpoint -------------------------------------------------------------------------------------


def changed(folder, change, **config):
    """A folder whose checkpoint went through ``change``."""
    tiny_llama(attention_bias=True, **config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


PLACE = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("missing", [f"{PLACE}.weight", f"{PLACE}.bias", "model.norm.weight", "lm_head.weight"])
def test_what_is_missing_is_reported_and_made_up_as_from_pretrained_does(missing, tmp_path, monkeypatch):
    changed(tmp_path, lambda tensors: tensors.pop(missing))
    reports = []
    monkeypatch.setattr(
        "transformers.modeling_utils.log_state_dict_report", lambda **kwargs: reports.append(kwargs["loading_info"])
    )
    torch.manual_seed(3)
    reference = CausalLMLoader(path=str(tmp_path)).load()
    METHOD.prepare(reference)
    torch.manual_seed(3)
    assert_same(reference, CausalLMLoader(path=str(tmp_path)).load_for(METHOD))
    assert [report.missing_keys for report in reports] == [{missing}] * 2


def test_what_is_unexpected_is_reported_as_from_pretrained_does(tmp_path, monkeypatch):
    changed(tmp_path, lambda tensors: tensors.update({f"{PLACE}.scale": torch.ones(3), "x": torch.ones(3)}))
    reports = []
    monkeypatch.setattr(
        "transformers.modeling_utils.log_state_dict_report", lambda **kwargs: reports.append(kwargs["loading_info"])
    )
    assert_same(*both(tmp_path))
    assert [report.unexpected_keys for report in reports] == [{f"{PLACE}.scale", "x"}] * 2


@pytest.mark.parametrize("name", [f"{PLACE}.weight", f"{PLACE}.bias", "model.norm.weight"])
def test_a_tensor_of_another_shape_is_refused_as_from_pretrained_does(name, tmp_path, monkeypatch):
    changed(tmp_path, lambda tensors: tensors.update({name: torch.ones(3)}))
    found = []
    report = "transformers.modeling_utils.log_state_dict_report"

    def refuse(loading_info, **kwargs):
        found.append(loading_info.mismatched_keys)
        raise RuntimeError("as transformers would")

    loader = CausalLMLoader(path=str(tmp_path))
    for load in (loader.load, lambda: loader.load_for(METHOD)):
        with pytest.raises(RuntimeError, match="thus raising an error. For details look at the above report"):
            load()
        with monkeypatch.context() as patch:
            patch.setattr(report, refuse)
            with pytest.raises(RuntimeError, match="as transformers would"):
                load()
    assert found[0] == found[1]
    assert {key for key, *_ in found[0]} == {name}


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no causal language model could be loaded from 'no/such/folder'"):
        CausalLMLoader(path="no/such/folder").load_for(METHOD)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no causal language model could be loaded from"):
        CausalLMLoader(path=str(tmp_path)).load_for(METHOD)


# -- what the method says ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    return str(path)


def test_a_target_of_skip_that_matches_nothing_is_refused_before_a_weight_is_read(folder, monkeypatch):
    monkeypatch.setattr("transformers.modeling_utils.safe_open", lambda *args, **kwargs: pytest.fail("read"))
    with pytest.raises(TargetError, match="target 'dwn' matches no module of LlamaForCausalLM; did you mean 'down'"):
        CausalLMLoader(path=folder).load_for(QLoRA(skip=["dwn"]))


def test_an_error_while_a_layer_is_packed_is_the_error_of_the_load(folder, monkeypatch):
    def broken(self, linear):
        raise ImportError("bitsandbytes is not installed")

    monkeypatch.setattr(NF4, "quantize", broken)
    with pytest.raises(ImportError, match="^bitsandbytes is not installed$"):
        CausalLMLoader(path=folder).load_for(METHOD)


def test_a_base_without_a_layer_to_quantise_is_refused(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path)
    with pytest.raises(InjectionError, match="QLoRA found no layer to quantise among 8 linear layers"):
        CausalLMLoader(path=str(tmp_path)).load_for(METHOD)


@dataclass(frozen=True, kw_only=True)
class ReadsTheWeights(QLoRA):
    def prepare(self, model):
        assert all(parameter.is_floating_point() for parameter in model.parameters())


@pytest.mark.parametrize("method", [LoRA(rank=2), ReadsTheWeights(rank=2)])
def test_a_method_that_does_not_go_layer_by_layer_gets_the_base_as_it_is(method, folder):
    model = CausalLMLoader(path=folder).load_for(method)
    assert_same(CausalLMLoader(path=folder).load(), model)
    method.prepare(model)


def test_a_checkpoint_that_is_quantised_already_is_loaded_as_it_is(folder, tmp_path, monkeypatch):
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=four, device_map="cpu").save_pretrained(tmp_path)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    seen = count_packed(monkeypatch)
    model = CausalLMLoader(path=str(tmp_path)).load_for(METHOD)
    inject(model, METHOD)
    assert (seen["inside"], seen["outside"]) == (0, 0)
    assert sum(type(module).__name__ == "Linear4bit" for module in model.modules()) == 14


def test_any_method_may_change_the_layers_while_they_are_loaded(folder):
    """The contract, with a change of our own: linear layers twice as large."""
    met = []

    class Doubling(LayerPreparation):
        def replacement(self, path, layer):
            assert not any(parameter.is_meta for parameter in layer.parameters())
            met.append(path)
            made = nn.Linear(layer.in_features, layer.out_features, bias=False)
            made.weight = nn.Parameter(2 * layer.weight.detach())
            return made

        def finish(self):
            met.append("finish")

    @dataclass(frozen=True, kw_only=True)
    class Doubled(LoRA):
        def layer_preparation(self, model):
            assert all(parameter.is_meta for parameter in model.parameters())
            return Doubling({path for path, module in model.named_modules() if isinstance(module, nn.Linear)})

    plain = CausalLMLoader(path=folder).load()
    model = CausalLMLoader(path=folder).load_for(Doubled(rank=2))
    linear = {path for path, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert met[-1] == "finish"
    assert sorted(met[:-1]) == sorted(linear)
    for name, value in plain.named_parameters():
        factor = 2 if name.removesuffix(".weight") in linear else 1
        assert torch.equal(model.get_parameter(name), factor * value)


def test_a_layer_at_two_places_is_replaced_once():
    class Same(LayerPreparation):
        def replacement(self, path, layer):
            return nn.Identity()

    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Sequential(shared), nn.Linear(4, 4))
    prepare_layers(model, Same({"0"}))
    assert type(model[0]) is nn.Identity
    assert model[0] is model[1][0]
    assert type(model[2]) is nn.Linear


def test_a_loader_that_only_loads_leaves_the_preparation_to_the_injection():
    @dataclass(frozen=True, kw_only=True)
    class Own(ModelLoader):
        def load(self):
            return tiny_llama()

    module = PEFTModule(Own(), METHOD)
    module.configure_model()
    assert sum(type(part).__name__ == "Linear4bit" for part in module.modules()) == 14
    assert Method.layer_preparation(LoRA(), tiny_llama()) is None


# -- memory ------------------------------------------------------------------------------------------------------------


def test_the_module_packs_each_weight_before_the_next_one_is_read(folder, monkeypatch):
    alive, weights = [], []
    quantize = NF4.quantize

    def counted(self, linear):
        weights.append(weakref.ref(linear.weight))
        alive.append(sum(weight() is not None for weight in weights))
        return quantize(self, linear)

    monkeypatch.setattr(NF4, "quantize", counted)
    module = PEFTModule(CausalLMLoader(path=folder, dtype="bfloat16"), METHOD)
    module.configure_model()
    assert alive == [1] * 14
    assert not any(weight() is not None for weight in weights)


MEASURE = """
import sys, threading, time

import torch

from lightning_peft import CausalLMLoader, QLoRA

method, (small, large) = QLoRA(rank=2), sys.argv[1:]


def anonymous():
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def peak(load):
    start, highest, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.is_set():
            highest[0] = max(highest[0], anonymous())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load()
    done.set()
    watcher.join()
    return highest[0] - start


def then_prepare():
    model = loader.load()
    method.prepare(model)


loader = CausalLMLoader(path=small, dtype="float32")  # what is imported and allocated once is not measured
loader.load_for(method)
method.quantizer.quantize(torch.nn.Linear(2048, 1024))
loader = CausalLMLoader(path=large, dtype="float32")
print(peak(lambda: loader.load_for(method)), peak(then_prepare))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from Linux")
def test_a_base_is_never_in_memory_in_full_precision(folder, tmp_path):
    """Memory of the process that is no mapped file, while 200 MB of float32 are read from a checkpoint of bfloat16."""
    wide = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", **{**SMALL, **wide}), dtype=torch.bfloat16
        )
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.1, 0.1)
    full = 4 * sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    del model
    # Every large tensor in memory of its own, which goes back to the system when the tensor is freed.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [
        "env",
        *(f"{key}={value}" for key, value in environment.items()),
        sys.executable,
        "-c",
        MEASURE,
        folder,
        str(tmp_path),
    ]
    out = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert out.returncode == 0, out.stderr
    layerwise, whole = map(int, out.stdout.split())
    assert full > 150e6
    assert whole > 0.9 * full
    assert layerwise < 0.5 * full
