"""Which base model an adapter belongs to: sampled weights, compared up to the rounding of a change of precision.

From every floating-point parameter of the base a few elements at fixed places are taken and rounded to bfloat16::

    {"model.norm.weight": "64:3f803f803f80...", ...}       shape, then the elements as bfloat16 in hexadecimal

A float32 checkpoint loaded in float16 may round the other way, and does not hold very small values as exactly. So two
elements are the same if they differ by one step of bfloat16 at most. Packed weights of a quantised base are left out.

On request a full fingerprint is taken too: a hash of every element of every parameter and of packed weights, which sees any change.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_peft.adapter_layer import AdapterLayer, adapter_layers, base_modules, base_parameters, unwrapped
from lightning_peft.arithmetic.parameter_copies import replaced_names
from lightning_peft.errors import ConfigError
from lightning_peft.quantized_layers import packed_layers
from lightning_peft.saved_modules import SavedParameters, inside, new_modules
from lightning_peft.unread_weights import Unread, unread

SAMPLES = 16
"""Elements taken from each parameter."""
_RELATIVE, _ABSOLUTE = 2.0**-7, 2.0**-24
"""One step of bfloat16, and the smallest number of float16."""


FINGERPRINTS = ("sampled", "complete")
"""What may be asked for: sampled weights, or a hash of them all too."""
_CHUNK = 1 << 24
"""Elements hashed at a time."""


@dataclass(frozen=True)
class Fingerprint:
    """Sampled weights of a base model.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> a, b = fingerprint(model), fingerprint(model.to(torch.float16))
        >>> a.differences(b), len(a.digest)
        ([], 16)
    """

    tensors: Mapping[str, str]
    """Parameter name to its shape and samples."""

    @property
    def digest(self) -> str:
        """One short hash of them all, to be read by people: it depends on rounding."""
        joined = "\n".join(f"{name} {value}" for name, value in sorted(self.tensors.items()))
        return hashlib.sha256(joined.encode()).hexdigest()[:16]

    def differences(self, other: Fingerprint, quantized: Set[str] = frozenset()) -> list[str]:
        """Return the names of parameters that are not the same in ``other``, but for those ``quantized`` in either."""
        names = sorted((self.tensors.keys() | other.tensors.keys()) - quantized)
        return [name for name in names if not _same(self.tensors.get(name), other.tensors.get(name))]


def fingerprint(model: nn.Module) -> Fingerprint | None:
    """Return the fingerprint of the base of ``model``, or None while its weights are on the meta device and not in a file.

    Merged adapters do not count: the fingerprint is that of the weights before the merge. Of sharded weights each process samples its
    part and the samples are put together, so all processes must call this; no weight is gathered.
    """
    if id(model) in _remembered:
        return _remembered[id(model)][0]
    named = [(name, tensor) for name, tensor in _base_tensors(model) if tensor.is_floating_point()]
    waiting = _unread(model)
    if not named or any(tensor.is_meta and name not in waiting for name, tensor in named):
        return None
    samples = _put_together(
        [_sample_in_file(waiting[name], tensor) if tensor.is_meta else _sample(tensor) for name, tensor in named],
        [tensor for _, tensor in named],
    )
    by_device: dict[torch.device, list[int]] = {}
    for index, sample in enumerate(samples):
        by_device.setdefault(sample.device, []).append(index)
    for indices in by_device.values():  # one transfer a device, not one a parameter
        joined = torch.cat([samples[index] for index in indices]).cpu()
        sizes = [samples[index].numel() for index in indices]
        for index, part in zip(indices, torch.split(joined, sizes), strict=True):
            samples[index] = part
    return Fingerprint(
        {name: described(tensor.shape, sample) for (name, tensor), sample in zip(named, samples, strict=True)}
    )


def quantized_names(model: nn.Module) -> frozenset[str]:
    """Return the names of base parameters that hold packed, not floating-point, values."""
    return frozenset(name for name, tensor in _base_tensors(model) if not tensor.is_floating_point())


def packed_digests(model: nn.Module) -> dict[str, str]:
    """Return a hash of the packed weight and the scales of every quantised linear layer of the base, by path."""
    found = {}
    for path, module in packed_layers(model, original=True).items():
        state = module.state_dict()  # the scales are no parameters, but they are here
        digest = hashlib.sha256()
        for key in sorted(key for key in state if key != "bias"):
            value = state[key]
            raw = (
                value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
                if isinstance(value, Tensor)
                else value
            )
            digest.update(key.encode() + b"=" + (raw.tobytes() if isinstance(value, Tensor) else repr(raw).encode()))
        found[path] = digest.hexdigest()[:32]
    return found


def full_digests(model: nn.Module) -> dict[str, str]:
    """Return a hash of all elements of every base parameter, and of every packed layer, by name.

    Elements are hashed as float32 (float64 stays), so a checkpoint in 16 bits has the same hashes when it is loaded in 32; one in
    32 bits that is loaded in 16 has not. It reads every weight: about a second a gigabyte of float32. Merged adapters do
    not count. Sharded weights are gathered one at a time, so all processes must call this.
    """
    if id(model) in _remembered:
        return _remembered[id(model)][1]
    found = {}
    waiting = _unread(model)
    for name, tensor in _base_tensors(model):
        if tensor.is_floating_point() and (not tensor.is_meta or name in waiting):
            whole: Any = waiting[name].read() if tensor.is_meta else tensor.detach()
            flat = (whole.full_tensor() if hasattr(whole, "full_tensor") else whole).reshape(-1)
            digest = hashlib.sha256("x".join(map(str, tensor.shape)).encode())
            for part in flat.split(_CHUNK):
                values = part.cpu() if part.dtype == torch.float64 else part.cpu().float()
                digest.update(memoryview(values.contiguous().numpy()).cast("B"))
            found[name] = digest.hexdigest()[:32]
    return found | {f"{path} (packed)": digest for path, digest in packed_digests(model).items()}


_remembered: dict[int, tuple[Fingerprint | None, dict[str, str]]] = {}


@contextlib.contextmanager
def remembered(models: Iterable[nn.Module], *, full: bool) -> Iterator[None]:
    """Take the fingerprints of ``models`` now, by all processes, so that one of them can ask for these in a ``with`` block alone.

    Args:
        models: whose weights may be sharded and do not change in the block.
        full: whether to hash all weights too.
    """
    taken = {id(model): (fingerprint(model), full_digests(model) if full else {}) for model in models}
    _remembered.update(taken)
    try:
        yield
    finally:
        for key in taken:
            del _remembered[key]


def full_differences(stored: Mapping[str, Any], model: nn.Module, left_out: Set[str] = frozenset()) -> list[str]:
    """Return the names in a stored ``complete`` fingerprint that differ from the base of ``model``.

    Parameters that only one side has, packed there or trained, are left to the comparison of samples.
    """
    here = full_digests(model)
    return sorted(name for name in (stored.keys() & here.keys()) - left_out if stored[name] != here[name])


def check_kind(kind: str) -> None:
    """Refuse a kind of fingerprint that there is not.

    Raises:
        ConfigError: it is neither ``sampled`` nor ``complete``.
    """
    if kind not in FINGERPRINTS:
        raise ConfigError(f"fingerprint must be one of {', '.join(FINGERPRINTS)}, got {kind!r}")


def digest_of(digests: Mapping[str, str]) -> str:
    """Return one short hash of them all, to be read by people."""
    return hashlib.sha256("\n".join(f"{name} {value}" for name, value in sorted(digests.items())).encode()).hexdigest()[
        :16
    ]


def to_json(model: nn.Module, *, packed: bool = False, full: bool = False) -> dict[str, Any]:
    """Return the fingerprint of the base of an adapted ``model`` as it is stored.

    Parameters of the base that are trained, of which an adapter has its own copy in ``modules_to_save``, or that a merge overwrote for good,
    are listed with the quantised ones: they are not compared, and a new head may have started from other random values.

    Args:
        model: the adapted model.
        packed: whether to hash the packed weights too, which takes seconds for each gigabyte.
        full: whether to hash all weights too, which takes about as long.
    """
    found = fingerprint(model)
    if found is None:
        return {"digest": None, "tensors": {}, "quantized": []}
    trained = {name for name, parameter in base_parameters(model) if parameter.requires_grad}
    trained |= _given_up(model)
    left_out = sorted(quantized_names(model) | trained)
    kept = {name: sample for name, sample in found.tensors.items() if name not in trained}
    found_packed = {"packed": packed_digests(model)} if packed else {}
    if full:
        found_packed["complete"] = {name: value for name, value in full_digests(model).items() if name not in trained}
    return {"digest": Fingerprint(kept).digest, "tensors": kept, "quantized": left_out, **found_packed}


def _given_up(model: nn.Module) -> frozenset[str]:
    """Return the names of base parameters that were overwritten by a merge, or that do not matter to an adapter, which has its own copies."""
    given_up, new = set(), new_modules(model)
    for path, layer in adapter_layers(model).items():
        names = {name for name, _ in layer.base_layer.named_parameters(recurse=False)}
        adapters = [layer._adapter(name) for name in layer.adapters]
        if not layer.permanent and not any(isinstance(adapter, SavedParameters) for adapter in adapters):
            # Of other methods only what no checkpoint has: elsewhere the base they started from is worth a check.
            names &= {name for one in adapters for name in replaced_names(one)} if inside(path, new) else set()
        given_up |= {f"{path}.{name}" if path else name for name in names}
    return frozenset(given_up)


def _sample(tensor: Tensor) -> Tensor:
    """Return the sampled elements of a tensor; of one that is sharded, zero for those of other processes."""
    here: Any = tensor.detach()
    if _in_parts(here):
        local = here.to_local()
        shape, first = compute_local_shape_and_global_offset(here.shape, here.device_mesh, here.placements)
        place = torch.unravel_index(sampled_places(here.numel()).to(local.device), here.shape)
        inside = [at - start for at, start in zip(place, first, strict=True)]
        own = torch.stack([(at >= 0) & (at < size) for at, size in zip(inside, shape, strict=True)]).all(0)
        sample: Tensor = local.new_zeros(len(own))
        sample[own] = local[tuple(at[own] for at in inside)]
    else:
        flat: Tensor = (here.full_tensor() if hasattr(here, "full_tensor") else here).reshape(-1)
        sample = flat[sampled_places(flat.numel()).to(flat.device)]
    return sample.to(torch.float32).to(torch.bfloat16)


def _sample_in_file(value: Unread, tensor: Tensor) -> Tensor:
    return value.elements(sampled_places(tensor.numel()).tolist()).to(torch.float32).to(torch.bfloat16)


def _unread(model: nn.Module) -> dict[str, Unread]:
    """Return the parameters of the base whose values are still in their file, by name."""
    return {
        f"{path}.{name}" if path else name: value
        for path, module in base_modules(model)
        for name, value in unread(unwrapped(module)).items()
    }


def _in_parts(tensor: Any) -> bool:
    """Tell whether a tensor is sharded over processes, each of which holds one block of it."""
    placements = getattr(tensor, "placements", ())
    return any(not one.is_replicate() for one in placements) and tensor.numel() > 0


def _put_together(samples: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Return the samples with those elements that other processes hold, in one exchange for each group of them."""
    of_groups: dict[tuple[Any, ...], list[int]] = {}
    for number, tensor in enumerate(tensors):
        here: Any = tensor
        if _in_parts(here):
            sharded = [dim for dim, placement in enumerate(here.placements) if not placement.is_replicate()]
            of_groups.setdefault(tuple(here.device_mesh.get_group(dim) for dim in sharded), []).append(number)
    for groups, numbers in of_groups.items():
        joined = torch.cat([samples[number] for number in numbers]).float()
        for group in groups:
            torch.distributed.all_reduce(joined, group=group)  # every element is zero with all but one
        parts = torch.split(joined.to(torch.bfloat16), [samples[number].numel() for number in numbers])
        for number, part in zip(numbers, parts, strict=True):
            samples[number] = part
    return samples


def sampled_places(elements: int) -> Tensor:
    """Return which of so many elements are sampled."""
    return torch.linspace(0, max(0, elements - 1), min(SAMPLES, elements), dtype=torch.float64).long()


def described(shape: Sequence[int], sample: Tensor) -> str:
    """Return the entry of a parameter of that shape from its sampled elements."""
    rounded = sample.to(torch.float32).to(torch.bfloat16)
    return "x".join(map(str, shape)) + ":" + rounded.view(torch.int16).numpy().tobytes().hex()


def _same(one: str | None, other: str | None) -> bool:
    """Compare two entries of a fingerprint; what cannot be read is not the same."""
    if one == other:
        return True
    if not isinstance(one, str) or not isinstance(other, str) or one.split(":")[0] != other.split(":")[0]:
        return False
    try:
        a, b = (
            torch.frombuffer(bytearray.fromhex(text.split(":")[1]), dtype=torch.bfloat16).float()
            for text in (one, other)
        )
        return torch.allclose(a, b, rtol=_RELATIVE, atol=_ABSOLUTE)
    except (ValueError, IndexError, RuntimeError):
        return False


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for path, module in base_modules(model):
        base: nn.Module = module
        originals: Mapping[str, Tensor] = {}
        if isinstance(module, AdapterLayer):
            base, originals = module.original_base, module._originals
        for name, parameter in base.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{path}.{name}" if path else name), originals.get(name, parameter.data)
