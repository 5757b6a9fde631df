"""What a plugin implements to read the adapters of other software: :class:`AdapterFormat`.

::

    a file or folder  --reads(path)-->  whose is it?  --read(path, model)-->  ForeignAdapter: a method, tensors by module path

Names and layouts are all that a format knows. Whether the tensors are what the model needs (none missing, none too many, right
shapes, finite values, nothing of the base) is checked afterwards, for every format in the same way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_peft.interfaces import Method, Slice
from lightning_peft.named import Named

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter of other software, as a format read it."""

    file: Path
    """The file that the tensors come from, for messages."""
    method: Method
    """The method that acts as the other software does."""
    tensors: Mapping[str, Tensor]
    """The tensors by ``<module path>.<tensor>``, such as ``model.layers.0.self_attn.q_proj.lora_A.weight``: the last part is
    named, and the tensor shaped, as in the files of HF PEFT. Tensors of modules trained in full keep their own names."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained in full, by the ends of their paths."""
    slices: Mapping[str, tuple[Slice, ...]] = field(default_factory=dict)
    """Path of a fused projection to the slices of it that are adapted, where not the whole module is."""
    hf_config: Mapping[str, Any] | None = None
    """HF PEFT's ``adapter_config.json``, where there is one: its ``target_modules`` must agree with the tensors."""
    hf_names: bool = False
    """The names are those of HF PEFT's file, with the prefix before each path."""


class AdapterFormat(Named, ABC):
    """A layout in which other software writes adapters. A frozen dataclass, like a method.

    Its fields are what the files do not say, such as a scale; ``None`` stands for "not given". ``load_adapter(model, path)`` asks
    every registered format whether it reads ``path``; ``format=`` names one, or gives it with its fields.
    """

    @abstractmethod
    def reads(self, path: Path) -> bool:
        """Tell whether ``path``, which may be anything, is a file or folder of this format. Only one format may say so."""

    @abstractmethod
    def read(self, path: Path, model: nn.Module) -> ForeignAdapter:
        """Read ``path`` for ``model``, the base without the adapter, which is left as it is.

        Raises:
            AdapterFileError: it cannot be read.
            AdapterConfigError: something is missing that the format needs, such as a field that was not given.
            AdapterMismatchError: it is not for this model.
        """
