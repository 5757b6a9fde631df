"""(IA)^3 keeps the contract: on Linear layers, and on the slices of a fused ``Conv1D``."""

from lightning_peft_ia3 import IA3

from lightning_peft.testing import MethodConformance, tiny_gpt2


class TestIA3(MethodConformance):
    method = IA3()


class TestIA3OnGPT2(MethodConformance):
    method = IA3()

    def model(self):
        return tiny_gpt2()
