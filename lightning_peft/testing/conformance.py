"""The contract of an adaptation method, as a test suite that its author subclasses."""

from __future__ import annotations

from lightning_peft.testing.arithmetic import ArithmeticTests
from lightning_peft.testing.definition import DefinitionTests
from lightning_peft.testing.lifecycle import LifecycleTests
from lightning_peft.testing.lightning import LightningTests
from lightning_peft.testing.merging import MergingTests
from lightning_peft.testing.rows import RowTests
from lightning_peft.testing.saved_modules import SavedModulesTests
from lightning_peft.testing.sharding import ShardingTests
from lightning_peft.testing.state import StateTests
from lightning_peft.testing.training import TrainingTests


class MethodConformance(
    DefinitionTests,
    TrainingTests,
    ArithmeticTests,
    RowTests,
    StateTests,
    SavedModulesTests,
    MergingTests,
    LifecycleTests,
    LightningTests,
    ShardingTests,
):
    """Every test that a method must pass. Subclass it in a test module and set ``method``.

    What a method declares (``identity_at_init``, ``mergeable``, ``row_routable``, ``composable``, ``quantized_base``,
    ``fsdp_ready``, ``peft_type``) decides which tests apply; the others are skipped and say why. Set ``targets``, ``tolerance``, ``adapter_dtype``
    or override ``model()`` and ``inputs(seed)`` where the method needs another ground than a tiny Llama and random tokens.

    Example:
        >>> from lightning_peft import LoRA
        >>> class TestLoRA(MethodConformance):
        ...     method = LoRA(rank=4)
        >>> TestLoRA().test_a_fresh_adapter_is_the_base()
    """
