"""Mixtures of low-rank experts: the contract, in the variants whose arithmetic differs."""

from lightning_peft import LoRAMixture, MixLoRA
from lightning_peft.testing import MethodConformance, tiny_gpt2


class TestMixLoRA(MethodConformance):
    method = MixLoRA(experts=4, rank=2)


class TestMixLoRAOfSegments(MethodConformance):
    """Three of five experts, without the losses."""

    method = MixLoRA(experts=5, top_k=3, rank=2, dropout=0.0, balance_coef=0.0, init="gaussian")


class TestMixLoRAAtOnce(MethodConformance):
    method = MixLoRA(experts=4, rank=2, implementation="wide", z_coef=1e-3, rslora=True)


class TestMixLoRAOnGPT2(MethodConformance):
    """An MLP without a gate, with biases and ``Conv1D``."""

    method = MixLoRA(experts=4, rank=2, experts_pattern={"h.1.mlp": 3})

    def model(self):
        return tiny_gpt2()


class TestLoRAMixture(MethodConformance):
    method = LoRAMixture(experts=4, rank=2, z_coef=1e-3)


class TestSoftLoRAMixture(MethodConformance):
    method = LoRAMixture.loramoe(experts=3, rank=2)
    targets = ["gate", "up", "down"]  # noqa: RUF012


class TestLoRAMixtureOnGPT2(MethodConformance):
    method = LoRAMixture(experts=4, rank=2, experts_pattern={"h.1.*": 2}, dropout=0.1)

    def model(self):
        return tiny_gpt2()
