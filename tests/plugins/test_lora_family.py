"""What holds for every method that descends from LoRA: where it has no arithmetic of its own, it says no, clearly."""

import pytest

from lightning_peft import LoRA, adapter_layers, get_registry, inject
from lightning_peft.arithmetic.low_rank_experts import LowRankExperts
from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.testing import tiny_llama

FAMILY = {
    name: method
    for name, method in get_registry().methods.items()
    if issubclass(method, LoRA) and method.__module__.startswith("lightning_peft.")
}
OWN_ARITHMETIC = {name: method for name, method in FAMILY.items() if not method.ties}


def tiny_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    return MixtralForCausalLM(config).eval()


def test_the_family_is_there():
    assert {"lora", "qlora"} <= FAMILY.keys()
    assert OWN_ARITHMETIC


@pytest.mark.parametrize("method", OWN_ARITHMETIC.values(), ids=OWN_ARITHMETIC)
def test_shared_weights_cannot_share_an_adapter(method):
    with pytest.raises(ConfigError, match=f"{method.__name__} tied must be one of one, error, got 'both'"):
        method(tied="both")


@pytest.mark.filterwarnings("ignore:.* leaves 1 modules of fused experts")
@pytest.mark.parametrize("method", OWN_ARITHMETIC.values(), ids=OWN_ARITHMETIC)
def test_fused_experts_are_refused_by_name_or_adapted_as_loras(method):
    model = tiny_mixtral()
    (path,) = [path for path, module in model.named_modules() if type(module).__name__ == "MixtralExperts"]
    if method().supports(model.get_submodule(path)):
        inject(model, method(), ["experts"])
        (adapter,) = adapter_layers(model)[path].adapters.values()
        assert type(adapter) is LowRankExperts
        return
    with pytest.raises(TargetError, match=rf"MixtralExperts.* {method.__name__} cannot adapt"):
        inject(model, method(), ["experts"])


@pytest.mark.parametrize("method", FAMILY.values(), ids=FAMILY)
def test_a_wrong_choice_names_the_class(method):
    with pytest.raises(ConfigError, match=f"^{method.__name__} bias must be one of"):
        method(bias="some")


def test_llama_is_not_a_mixture():
    with pytest.raises(TargetError):
        inject(tiny_llama(), LoRA(), ["experts"])
