"""Bottleneck adapters: the contract, in the variants whose arithmetic differs."""

from lightning_peft import Bottleneck
from lightning_peft.testing import MethodConformance, tiny_gpt2


class TestHoulsby(MethodConformance):
    method = Bottleneck.houlsby()


class TestPfeiffer(MethodConformance):
    method = Bottleneck.pfeiffer(bottleneck_size=6, dropout=0.1)


class TestLin(MethodConformance):
    """A layer norm of its own, around the whole block."""

    method = Bottleneck.lin(bottleneck_size=6)


class TestScaledParallel(MethodConformance):
    method = Bottleneck.scaled_parallel()


class TestParallelToAttention(MethodConformance):
    """Llama calls its attention with keyword arguments and gets a tuple."""

    method = Bottleneck.parallel(sublayers=["attention", "mlp"], reduction_factor=8, activation="silu")


class TestWithALayerNormAfter(MethodConformance):
    method = Bottleneck(layer_norm="after", activation="tanh", init="gaussian")


class TestInThePrecisionOfTheBase(MethodConformance):
    method = Bottleneck(layer_norm="before", dtype="base")
    adapter_dtype = None


class TestHoulsbyOnGPT2(MethodConformance):
    """GPT-2's projections are ``Conv1D``."""

    method = Bottleneck.houlsby()

    def model(self):
        return tiny_gpt2()


class TestScaledParallelOnGPT2(MethodConformance):
    method = Bottleneck.scaled_parallel(layer_norm="before")

    def model(self):
        return tiny_gpt2()


class TestDroppedLayers(MethodConformance):
    method = Bottleneck.pfeiffer(drop_layers=1)


class TestWholeSublayers(MethodConformance):
    """The roles of whole modules, whose output may be a tuple."""

    method = Bottleneck(bottleneck_size=4)
    targets = ["attention", "mlp"]  # noqa: RUF012
