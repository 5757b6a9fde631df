"""LoRA on fused experts: the update of every expert is B A, and folders are HF PEFT's, which calls such places ``target_parameters``."""

import json

import pytest
import safetensors.torch
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lightning_peft import (
    Adapter,
    LoRA,
    QLoRA,
    Targets,
    adapter_layers,
    adapter_state_dict,
    inject,
    load_adapter,
    merge_adapters,
    save_adapter,
    set_active_adapters,
    unmerge_adapters,
)
from lightning_peft.adapter_layer import unwrapped
from lightning_peft.arithmetic.low_rank_experts import LowRankExperts, without_parameters
from lightning_peft.errors import (
    AdapterConfigError,
    AdapterMismatchError,
    InjectionError,
    LightningPEFTWarning,
    TargetError,
)
from lightning_peft.testing import MethodConformance, token_batch
from lightning_peft.testing.toys import VOCABULARY

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning:peft", "ignore::RuntimeWarning:peft"
)

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "use_cache": False,
    "pad_token_id": 0,
}
DEEPSEEK = {
    "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
}  # fmt: skip
KINDS = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss"]


def tiny(kind="mixtral", implementation="eager", **changes):
    changes = {**SIZES, **(DEEPSEEK if kind == "deepseek_v3" else {}), **changes}
    config = transformers.AutoConfig.for_model(kind, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
        with torch.no_grad():  # with the usual zeros, biases that are mistreated would not be noticed
            for name, parameter in model.named_parameters():
                if parameter.dim() == 3 or "bias" in name:
                    parameter.normal_(std=0.05)
    return model.eval()


def shake(model, std=0.05):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
    return model


@torch.no_grad()
def logits(model):
    return model(**token_batch()).logits


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def experts(model):
    return {path: layer for path, layer in adapter_layers(model).items() if path.endswith(".experts")}


class TestOnMixtral(MethodConformance):
    """Every expert is chosen: with fewer, a rounding before the router may choose others. ``eager`` cannot be compiled in one graph."""

    method = LoRA(rank=3)

    def model(self):
        return tiny("mixtral", "batched_mm", num_experts_per_tok=4, hidden_size=64, head_dim=16)


class TestOnTransposedExpertsWithBiases(MethodConformance):
    method = LoRA(rank=2, alpha=5.0, rslora=True)
    targets = ["re:.*experts", "q_proj"]  # noqa: RUF012

    def model(self):
        return tiny("gpt_oss", "batched_mm")


# -- the formula -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_has_the_weight_plus_its_own_product(kind, implementation):
    """The reference writes W + s B A into the weights of a bare model, expert after expert, in float64."""
    method = LoRA(rank=3, alpha=7.0)
    model, reference = tiny(kind, implementation), tiny(kind)
    inject(model, method, "re:.*experts")
    assert torch.equal(logits(model), logits(tiny(kind, implementation)))
    shake(model)
    assert experts(model)
    for path, layer in experts(model).items():
        adapter, module = layer.adapters["default"], reference.get_submodule(path)
        files = adapter.export_state()
        for name, depth in (("down_proj", 0), ("gate_up_proj", 1)):
            weight = module.get_parameter(name)
            A = files["base_layer." * depth + "lora_A.weight"].double().reshape(4, 3, -1)
            B = files["base_layer." * depth + "lora_B.weight"].double().reshape(-1, 3, 4)
            for expert in range(4):
                delta = 7.0 / 3 * B[:, :, expert] @ A[expert]  # (out, in)
                with torch.no_grad():
                    weight[expert] += (delta.t() if kind == "gpt_oss" else delta).float()
    assert relative(logits(model), logits(reference)) <= 1e-5
    assert relative(logits(tiny(kind)), logits(reference)) > 1e-3


def test_adapters_add_up_and_merge_together():
    model = tiny()
    for name in ("one", "two"):
        inject(model, LoRA(rank=2), "experts", name=name)
        shake(model)
    set_active_adapters(model, ["one", "two"])
    both = logits(model)
    weights = {path: unwrapped(layer).down_proj.clone() for path, layer in experts(model).items()}
    merge_adapters(model)
    for path, layer in experts(model).items():
        deltas = [layer.adapters[name].merged_parameters(layer.base_layer)["down_proj"] for name in ("one", "two")]
        wanted = weights[path] + sum(delta - layer.base_layer.down_proj for delta in deltas)
        assert torch.allclose(layer.base_layer.down_proj, wanted, atol=1e-6)
    assert relative(logits(model), both) <= 1e-5
    unmerge_adapters(model)
    assert torch.equal(logits(model), both)
    assert all(torch.equal(unwrapped(layer).down_proj, weights[path]) for path, layer in experts(model).items())


def test_an_adapter_of_another_kind_inside_is_refused():
    class Doubled(Adapter):
        def reset_parameters(self, base_layer):
            pass

        def forward(self, base, *args):
            return 2 * base(*args)

    model = tiny()
    inject(model, LoRA(rank=2), "experts")
    for layer in experts(model).values():
        layer.add("other", Doubled(), trainable=True)
    set_active_adapters(model, ["other", "default"])
    with pytest.raises(InjectionError, match="acts on their weights and cannot stand around a Doubled; activate one"):
        logits(model)
    set_active_adapters(model, ["default", "other"])
    assert torch.isfinite(logits(model)).all()


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_takes_the_experts_too(kind):
    model = tiny(kind)
    paths = inject(model, LoRA(rank=2), "all_linear").paths
    fused = {path.rpartition(".")[0] for path, p in tiny(kind).named_parameters() if p.dim() == 3}
    assert fused
    assert fused == {path for path in paths if path.endswith("experts")}
    assert all(isinstance(layer.adapters["default"], LowRankExperts) for layer in experts(model).values())


def test_the_role_names_them_and_they_can_be_excluded():
    assert inject(tiny(), LoRA(rank=2), "experts").paths == [f"model.layers.{n}.mlp.experts" for n in range(2)]
    paths = inject(tiny(), LoRA(rank=2, dropout=0.1), Targets(include="all_linear", exclude="experts")).paths
    assert paths
    assert not any("experts" in path for path in paths)


def test_experts_of_an_unknown_layout_are_refused_by_name_and_told_by_all_linear():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 4, 4))

    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "experts": Experts()})
    with pytest.raises(TargetError, match="target 'experts' matches 'experts', a Experts, which LoRA cannot adapt"):
        inject(model, LoRA(rank=2), "experts")
    with pytest.warns(
        LightningPEFTWarning, match="1 three-dimensional parameters such as 'experts.weight' are not adapted by LoRA"
    ):
        assert inject(model, LoRA(rank=2), "all_linear").paths == ["linear"]


def test_a_method_that_cannot_adapt_experts_says_so():
    from lightning_peft import BitFit

    model = tiny("qwen2_moe", qkv_bias=True)
    with pytest.warns(
        LightningPEFTWarning, match="4 three-dimensional parameters .* are not adapted by BitFit and stay frozen"
    ):
        inject(model, BitFit(), "all_linear")


@pytest.mark.parametrize(
    ("method", "kind", "message"),
    [
        (
            LoRA(dropout=0.1),
            "mixtral",
            "LoRA with dropout=0.1 was asked for at 'model.layers.0.mlp.experts', the experts",
        ),
        (LoRA(bias="lora_only"), "gpt_oss", "LoRA with the training of biases was asked for at"),
    ],
)
def test_dropout_and_biases_are_refused(method, kind, message):
    with pytest.raises(TargetError, match=message):
        inject(tiny(kind), method, "all_linear")
    inject(tiny(), LoRA(bias="lora_only"), "all_linear")  # without biases there is nothing to refuse


# -- HF PEFT -----------------------------------------------------------------------------------------------------------

METHODS = {
    "plain": (LoRA(rank=3, alpha=7.0), "all_linear"),
    "rslora": (LoRA(rank=4, alpha=3, rslora=True), ["re:.*experts"]),
    "patterns": (
        LoRA(rank=4, rank_pattern={"re:.*1.mlp.experts": 2, "o_proj": 3}, alpha_pattern={"re:.*1.mlp.experts": 5.0}),
        ["re:.*experts", "o_proj"],
    ),
}


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_folders_load_both_ways(kind, case, tmp_path):
    method, targets = METHODS[case]
    if (kind, case) == ("deepseek_v3", "plain"):
        targets = [
            "o_proj",
            "re:.*experts",
        ]  # HF PEFT 0.21.2 takes any gate_proj, up_proj and down_proj there for old experts
    ours = tiny(kind)
    inject(ours, method, targets)
    shake(ours)
    save_adapter(ours, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert {name.rpartition(".")[2] for name in config["target_parameters"]} == {"gate_up_proj", "down_proj"}
    assert not any("experts" in name.split(".")[-1] for name in config["target_modules"])
    theirs = PeftModel.from_pretrained(tiny(kind), tmp_path / "ours").eval()
    assert relative(logits(theirs), logits(ours)) <= 1e-5
    assert relative(logits(tiny(kind)), logits(ours)) > 1e-3
    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny(kind)
    load_adapter(again, tmp_path / "theirs")
    before, after = adapter_state_dict(ours), adapter_state_dict(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert relative(logits(again), logits(ours)) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_made_by_hf_peft_from_scratch_loads(kind, tmp_path):
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "o_proj"] if kind != "deepseek_v3" else ["o_proj"],
        target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
        rank_pattern={"experts.down_proj": 2, "experts.gate_up_proj": 2},
        task_type="CAUSAL_LM",
    )
    theirs = shake(get_peft_model(tiny(kind), config)).eval()
    theirs.save_pretrained(tmp_path)
    ours = tiny(kind)
    injection = load_adapter(ours, tmp_path)
    assert injection.method.rank_pattern == {"mlp.experts": 2}
    assert relative(logits(ours), logits(theirs)) <= 1e-5
    assert sum(t.numel() for t in adapter_state_dict(ours).values()) == sum(
        p.numel() for name, p in theirs.named_parameters() if "lora_" in name
    )


def test_a_folder_with_experts_alone_has_no_target_modules(tmp_path):
    model = tiny()
    inject(model, LoRA(rank=2), "experts")
    save_adapter(shake(model), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == []
    theirs = PeftModel.from_pretrained(tiny(), tmp_path).eval()
    assert relative(logits(theirs), logits(model)) <= 1e-5


def test_half_of_the_parameters_is_refused(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterMismatchError, match=r"Missing: \['model.layers.0.mlp.experts.base_layer.lora_A.weight'"):
        load_adapter(tiny(), tmp_path)


def test_a_configuration_that_names_other_parameters_than_the_file_is_refused(tmp_path):
    model = tiny()
    inject(model, LoRA(rank=2), ["experts", "q_proj"])
    save_adapter(model, tmp_path)
    (tmp_path / "lightning_peft.json").unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_parameters"] = config["target_parameters"][:2]  # those of the first layer
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterMismatchError, match=r"tensors for other modules: \['model.layers.1.mlp.experts'\]"):
        load_adapter(tiny(), tmp_path)
    config["target_parameters"] += ["1.mlp.experts.down_proj"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if "layers.1.mlp" not in key}
    safetensors.torch.save_file(kept, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterMismatchError, match=r"Modules without tensors: \['model.layers.1.mlp.experts'\]"):
        load_adapter(tiny(), tmp_path)


def test_patterns_that_part_the_parameters_of_one_module_are_refused():
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    with pytest.raises(
        AdapterConfigError, match="the parameters of 'mlp.experts' get different values, .*all parameters of one"
    ):
        without_parameters({"down_proj": 2}, names, 8)
    with pytest.raises(
        AdapterConfigError, match="matches the parameter 'mlp.experts.gate_up_proj'; only names are read"
    ):
        without_parameters({r"re:.*experts\..*": 2}, names, 8)


# -- training ----------------------------------------------------------------------------------------------------------


def test_it_trains_saves_loads_and_merges(tmp_path, make_trainer):
    from lightning.pytorch import LightningModule
    from torch.utils.data import DataLoader

    class Task(LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = tiny().train(), []
            inject(self.model, LoRA(rank=4), "all_linear")

        def training_step(self, batch, index):
            loss = self.model(input_ids=batch, labels=batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    task = Task()
    before = {key: value.clone() for key, value in task.model.named_parameters() if not value.requires_grad}
    make_trainer(tmp_path, max_epochs=12).fit(task, DataLoader(token_batch()["input_ids"], batch_size=3))
    assert task.losses[-1] < 0.9 * task.losses[0]
    assert all(torch.equal(value, dict(task.model.named_parameters())[key]) for key, value in before.items())
    trained = logits(task.model.eval())
    again = tiny()
    load_adapter(again, save_adapter(task.model, tmp_path / "adapter"))
    assert torch.equal(logits(again), trained)
    merge_adapters(again)
    assert relative(logits(again), trained) <= 1e-5


def test_qlora_adapts_experts_and_says_that_they_are_not_quantised():
    model = tiny("mixtral", hidden_size=64, head_dim=16)
    with pytest.warns(
        LightningPEFTWarning, match="2 modules of fused experts, .*such as 'model.layers.0.mlp.experts', unquantised"
    ):
        paths = inject(model, QLoRA(rank=2), "all_linear").paths
    assert "model.layers.0.mlp.experts" in paths
    assert model.model.layers[0].mlp.experts.base_layer.down_proj.dtype == torch.float32
    assert model.model.layers[0].self_attn.q_proj.base_layer.weight.dtype == torch.uint8
    shake(model)(**token_batch()).logits.square().mean().backward()
    assert all(p.grad is not None for layer in experts(model).values() for p in layer.adapters.parameters())
    model = tiny("mixtral", hidden_size=64, head_dim=16)
    inject(model, QLoRA(rank=2, skip=["experts"]), "all_linear")  # wanted, so nothing is told
