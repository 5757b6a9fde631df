"""Prefix tuning keeps the contract, on models whose attention differs."""

from lightning_peft import PrefixTuning
from lightning_peft.testing import MethodConformance, tiny_gpt2


class TestPrefixTuning(MethodConformance):
    method = PrefixTuning()


class TestOnGPT2(MethodConformance):
    method = PrefixTuning(num_virtual_tokens=5, init_std=0.5)

    def model(self):
        return tiny_gpt2()


class TestReparametrized(MethodConformance):
    method = PrefixTuning(num_virtual_tokens=6, reparametrize=True, hidden_size=16)
