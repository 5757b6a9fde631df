"""Which base model an adapter belongs to: a fingerprint of sampled weights that survives a change of precision.

From every floating-point parameter of the base a few elements at fixed places are taken and rounded to bfloat16, so
that one checkpoint loaded in float32, float16 or bfloat16 has one fingerprint. Packed weights of a quantised base are
left out, and so are they when it is compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapter_layer import AdapterLayer, base_modules, unwrapped

SAMPLES = 32
"""Elements taken from each parameter."""


@dataclass(frozen=True)
class Fingerprint:
    """The sampled hash of a base model.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> a, b = fingerprint(model), fingerprint(model.to(torch.bfloat16))
        >>> a == b, len(a.digest)
        (True, 16)
    """

    tensors: Mapping[str, str]
    """Parameter name to the hash of its shape and samples, 8 hexadecimal digits."""

    @property
    def digest(self) -> str:
        """One short hash of them all."""
        joined = "\\n".join(f"{name} {value}" for name, value in sorted(self.tensors.items()))
        return hashlib.sha256(joined.encode()).hexdigest()[:16]

    def differences(self, other: Fingerprint, quantized: frozenset[str] = frozenset()) -> list[str]:
        """Return the names of parameters that are not the same in ``other``, but for those ``quantized`` in either."""
        names = sorted(self.tensors.keys() | other.tensors.keys())
        return [name for name in names if name not in quantized and self.tensors.get(name) != other.tensors.get(name)]


def fingerprint(model: nn.Module) -> Fingerprint | None:
    """Return the fingerprint of the base of ``model``, or None while its weights are on the meta device.

    Merged adapters do not count: the fingerprint is that of the weights before the merge.
    """
    named = [(name, tensor) for name, tensor in _base_tensors(model) if tensor.is_floating_point()]
    if not named or any(tensor.is_meta for _, tensor in named):
        return None
    samples = [_sample(tensor) for _, tensor in named]
    by_device: dict[torch.device, list[int]] = {}
    for index, sample in enumerate(samples):
        by_device.setdefault(sample.device, []).append(index)
    for indices in by_device.values():  # one transfer a device, not one a parameter
        joined = torch.cat([samples[index] for index in indices]).cpu()
        sizes = [samples[index].numel() for index in indices]
        for index, part in zip(indices, torch.split(joined, sizes), strict=True):
            samples[index] = part
    return Fingerprint(
        {
            name: hashlib.sha256(
                str(tuple(tensor.shape)).encode() + sample.view(torch.int16).numpy().tobytes()
            ).hexdigest()[:8]
            for (name, tensor), sample in zip(named, samples, strict=True)
        }
    )


def quantized_names(model: nn.Module) -> frozenset[str]:
    """Return the names of base parameters that hold packed, not floating-point, values."""
    return frozenset(name for name, tensor in _base_tensors(model) if not tensor.is_floating_point())


def to_json(model: nn.Module) -> dict[str, Any]:
    """Return the fingerprint of ``model`` as it is stored."""
    found = fingerprint(model)
    if found is None:
        return {"digest": None, "tensors": {}, "quantized": []}
    return {"digest": found.digest, "tensors": dict(found.tensors), "quantized": sorted(quantized_names(model))}


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    count = min(SAMPLES, flat.numel())
    places = torch.linspace(0, max(0, flat.numel() - 1), count, dtype=torch.float64).long().to(flat.device)
    return flat[places].to(torch.float32).to(torch.bfloat16)


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for path, module in base_modules(model):
        originals = module._originals if isinstance(module, AdapterLayer) else {}
        for name, parameter in unwrapped(module).named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{path}.{name}" if path else name), originals.get(name, parameter.data)
