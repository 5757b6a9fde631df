"""Prompt tuning and p-tuning keep the contract, on models that count positions in different ways and on an encoder."""

from lightning_peft import PromptTuning, PTuning
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama


class TestPromptTuning(MethodConformance):
    method = PromptTuning()


class TestOnGPT2(MethodConformance):
    method = PromptTuning(num_virtual_tokens=5, init="random")

    def model(self):
        return tiny_gpt2()


class TestPTuning(MethodConformance):
    method = PTuning()


class TestLSTMOnGPT2(MethodConformance):
    method = PTuning(num_virtual_tokens=5, encoder="lstm", hidden_size=16)

    def model(self):
        return tiny_gpt2()


class TestWithACache(MethodConformance):
    method = PromptTuning(num_virtual_tokens=3)

    def model(self):
        return tiny_llama(use_cache=True)
