"""The contract of plugins, as a test suite to import.

::

    from lightning_peft.testing import MethodConformance

    class TestMyMethod(MethodConformance):
        method = MyMethod(strength=2.0)

It needs pytest: ``pip install 'lightning-peft[test]'``.
"""

try:
    import pytest  # noqa: F401 (here for its absence)
except ImportError as error:
    raise ImportError(
        "lightning_peft.testing needs pytest; install it with: pip install 'lightning-peft[test]'"
    ) from error

from lightning_peft.testing.conformance import MethodConformance
from lightning_peft.testing.toys import tiny_gpt2, tiny_llama, token_batch

__all__ = ["MethodConformance", "tiny_gpt2", "tiny_llama", "token_batch"]
