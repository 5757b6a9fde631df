"""The dense weight of a layer, whether or not a quantizer packed it."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_peft.errors import TargetError
from lightning_peft.registry import get_registry


def dense_weight(module: nn.Module) -> Tensor:
    """Return the weight of ``module``: the parameter itself, or what a registered quantizer unpacks it to.

    Raises:
        TargetError: the weight is packed in a way that no registered quantizer knows.

    Example:
        >>> import torch
        >>> from lightning_peft import NF4
        >>> packed = NF4().quantize(torch.nn.Linear(64, 32))
        >>> packed.weight.shape, dense_weight(packed).shape
        (torch.Size([1024, 1]), torch.Size([32, 64]))
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.is_floating_point() and getattr(weight, "quant_state", None) is None:
        return weight
    for quantizer in get_registry().quantizers.values():
        if quantizer.packs(module):
            return quantizer().dequantized(module)
    raise TargetError(
        f"the dense weight of a {type(module).__name__} was asked for, but it is packed as {weight.dtype} and none of the registered "
        f"quantizers ({', '.join(sorted(get_registry().quantizers))}) unpacks it; load the base in 16 or 32 bit"
    )
