"""LoRA keeps the contract, in the variants whose arithmetic differs."""

from lightning_peft import LoRA, fuse_blocks
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama


class TestLoRA(MethodConformance):
    method = LoRA()


class TestRankStabilisedWithDropout(MethodConformance):
    method = LoRA(rank=4, alpha=8, rslora=True, dropout=0.1, rank_pattern={"down": 2}, alpha_pattern={"query": 4.0})
    targets = ["query", "value", "down"]  # noqa: RUF012


class TestWithBiases(MethodConformance):
    method = LoRA(bias="lora_only")

    def model(self):
        return tiny_llama(attention_bias=True, mlp_bias=True)


class TestGaussianInThePrecisionOfTheBase(MethodConformance):
    method = LoRA(init="gaussian", dtype="base")
    adapter_dtype = None


class TestSlicesOfAFusedProjection(MethodConformance):
    """GPT-2's query, key and value are one ``Conv1D``."""

    method = LoRA()
    targets = ["query", "value", "down"]  # noqa: RUF012

    def model(self):
        return tiny_gpt2()


class TestOnFusedBlocks(MethodConformance):
    """Norms and MLPs keep less for backward, and the adapters that read them too; dropout keeps masks."""

    method = LoRA(dropout=0.1)
    targets = "all_linear"

    def model(self):
        return fuse_blocks(tiny_llama())
