"""What a plugin implements: :class:`Method` with its :class:`Adapter`, :class:`Quantizer`, :class:`EvalTask`, :class:`Exporter`.

::

    Method (frozen dataclass: hyperparameters)  --adapter(module, target)-->  Adapter (nn.Module: tensors and arithmetic)
                                                                                 |
    model ... --(module)--   becomes   model ... --(AdapterLayer)-- base_layer   the module that stood there
                                                        |---------- adapters     {"default": Adapter, "other": Adapter}

An adapter acts *around* the module it adapts: it is called with that module and its arguments, and decides what
happens before, after or instead of it. Low-rank deltas, scalings, bottlenecks, prefixes and mixtures of experts all
fit this one shape, and several active adapters compose by nesting.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_peft.errors import AdapterMismatchError, MergeError
from lightning_peft.named import Named

if TYPE_CHECKING:
    from lightning_peft.families import ModelFamily
    from lightning_peft.layer_preparation import LayerPreparation


HF_PREFIX = "base_model.model."
"""What HF PEFT puts before the path of a module in the names of an adapter file."""


@dataclass(frozen=True)
class Slice:
    """A part of the output features of a fused projection.

    The output, of width ``groups * width``, is seen as ``(groups, width)``; the slice is ``[:, start:stop]`` of it.
    GPT-2's fused query, key and value have one group; GPT-NeoX interleaves them in one group a head.

    Example:
        >>> Slice(role="key", groups=1, width=12, start=4, stop=8).features
        4
    """

    role: str
    """The role the slice plays, such as ``query``."""
    groups: int
    """How many groups the output features are made of."""
    width: int
    """Features in one group."""
    start: int
    """First feature of the slice in each group."""
    stop: int
    """One past the last feature of the slice in each group."""

    @property
    def features(self) -> int:
        """Output features in the slice."""
        return self.groups * (self.stop - self.start)

    def view(self, output: Tensor) -> Tensor:
        """Return the slice of ``output`` (..., groups * width) as a view (..., groups, stop - start)."""
        return torch.unflatten(output, -1, (self.groups, self.width))[..., self.start : self.stop]


@dataclass(frozen=True)
class Target:
    """One place of a model that a method adapts."""

    path: str
    """Dotted path of the module in the base model."""
    slices: tuple[Slice, ...] = ()
    """The slices of a fused projection that were asked for; empty for the whole module."""
    rule: str = ""
    """The target (role, glob or regular expression) that matched, for messages."""
    optional: bool = False
    """Whether a place that the method itself adds is left out where ``modules_to_save`` trains the module in full."""
    only_listens: bool = False
    """Whether the adapter at this place changes nothing, so that any other may act there too."""


class Adapter(nn.Module, ABC):
    """The tensors of one named adapter at one place, and how they act there.

    All parameters of an adapter are trained; a tensor that is not trained is a buffer. ``__init__`` allocates with
    ``torch.empty`` on the device of the adapted module and :meth:`reset_parameters` gives the values, so that adapters
    can be built on the meta device and materialised later. No state may stay on an adapter between two forwards.
    """

    tied_parameters: frozenset[str] = frozenset()
    """Parameters of the adapted module that other modules share, and that this adapter and theirs train as one."""
    lr_ratios: Mapping[str, float] = {}
    """What :meth:`learning_rate_ratios` returns, where the method says it and not the kind of adapter."""
    hands_on: bool = False
    """What the adapter returns is meant for other adapters of the same name, in the module that this place is a part of, and may have
    another shape than what the base returns. That module is then run once for each of such adapters in a batch."""
    only_listens: ClassVar[bool] = False
    """The adapter changes nothing at its place, so that any other may act there too."""
    replaces_base: ClassVar[bool] = False
    """The modules inside the adapted one do not run, so that adapters there would have no effect."""
    scalable: ClassVar[bool] = False
    """What the adapter changes of the output, and of the weights it is merged into, is multiplied by :attr:`scale`."""
    scale: float = 1.0
    """Factor of the effect; set for a whole adapter by :func:`~lightning_peft.scaling.scale_adapters`."""

    @abstractmethod
    def forward(self, base: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``base`` (the adapted module, or a further adapter around it) with this adapter in effect."""

    @abstractmethod
    def reset_parameters(self, base_layer: nn.Module) -> None:
        """Give every tensor its initial value. ``base_layer`` is the adapted module."""

    def grouped_rows(self) -> Callable[..., Any] | None:
        """Return a function that runs the rows of many adapters of this kind in one go; None to run each one's rows by forward.

        It is called as ``function(base, rows, *args, **kwargs)`` with a :class:`~lightning_peft.row_batches.AdapterRows`. Adapters
        that return the same function run together. Rows of index -1 get the base.
        """
        return None

    def learning_rate_ratios(self) -> Mapping[str, float]:
        """Return parameter name to the factor of its learning rate, for parameters where that is not one."""
        return self.lr_ratios

    def tensor_parallel_plan(self, style: str, index: int, count: int) -> Mapping[str, int | None] | None:
        """Act on part ``index`` of the ``colwise`` or ``rowwise`` base; return each parameter's split dimension (docs/strategies.md). None: refused."""
        return None

    def auxiliary_loss(self) -> Tensor | None:
        """Return a scalar that training adds to the loss, such as a penalty on the parameters; None for nothing."""
        return None

    def fit_to(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Take the shapes of tensors that are about to be loaded, where data or training decide them, such as a rank.

        ``shapes`` has names of :meth:`disk_tensors` (from a folder) or of the state dict (from a ``.ckpt``). What does not fit
        is left as it is: the comparison that follows refuses it.
        """

    def disk_tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the name and shape they have in an adapter file, as views wherever possible."""
        state: dict[str, Tensor] = dict(self.named_parameters())
        # Not by way of state_dict(): under FSDP2 that call frees gathered parameters such as those just listed.
        for path, module in self.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    state[f"{path}.{name}" if path else name] = buffer
        return state

    def export_state(self) -> dict[str, Tensor]:
        """Return what an adapter file holds for this place."""
        return {key: tensor.detach() for key, tensor in self.disk_tensors().items()}

    @torch.no_grad()
    def import_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the values of ``state``, whose keys and shapes are those of :meth:`export_state`."""
        for key, tensor in self.disk_tensors().items():
            tensor.copy_(state[key])

    def merged_parameters(self, base_layer: nn.Module) -> dict[str, Tensor]:
        """Return new values for parameters of ``base_layer`` that make it act as if this adapter were active.

        The keys are parameter names of ``base_layer``, the values have its shapes and dtypes. Nothing is changed.

        Raises:
            MergeError: the method is not mergeable, or not into this module.
        """
        raise MergeError(
            f"{type(self).__name__} cannot be merged into the base weights; keep the adapter active instead"
        )


class Method(Named, ABC):
    """An adaptation method: its hyperparameters and how it makes adapters.

    A subclass is a ``@dataclass(frozen=True, kw_only=True)``: the fields are the hyperparameters, each with a docstring
    below it (which becomes the help of the command line) and validated in ``__post_init__``. Class attributes declare
    what the method can do; the library and the conformance suite read them and never ask for a method by name.
    """

    default_targets: ClassVar[tuple[str, ...]] = ("all_linear",)
    """Targets used when none are given."""
    target_refusal: ClassVar[str] = "name the modules inside it, or another role"
    """How :class:`~lightning_peft.errors.TargetError` goes on where a target cannot be adapted; ``{model}`` is the class of the model."""
    identity_at_init: ClassVar[bool] = True
    """A fresh adapter leaves the output as it is, bit for bit."""
    mergeable: ClassVar[bool] = False
    """The adapter can be folded into the weights of the base."""
    merge_refusal: ClassVar[str] = "a method that cannot be merged into the base"
    """How :class:`~lightning_peft.errors.MergeError` goes on after naming the adapter, where ``mergeable`` is false."""
    merges_quantized: ClassVar[bool] = False
    """The adapter can be folded into a quantised base if that is asked for: see ``quantized`` of :func:`~lightning_peft.merge_adapters`."""
    row_routable: ClassVar[bool] = False
    """The adapter acts on each row (first dimension) of its input on its own."""
    composable: ClassVar[bool] = True
    """Several adapters of this method may be active at one place at once."""
    quantized_base: ClassVar[bool] = False
    """The method works over a base layer whose weights are quantised."""
    fsdp_ready: ClassVar[bool] = True
    """Adapters train under FSDP2's ``fully_shard`` as they do without."""
    exact_packed_base: ClassVar[bool] = False
    """The adapter belongs to the packed weights it was trained over, bit for bit: its folder names them and refuses others."""
    peft_type: ClassVar[str | None] = None
    """The ``peft_type`` under which HF PEFT knows the method, or None.

    Of registered methods that share one, the ancestor reads HF PEFT's files of that type, but for those that a descendant
    claims in :meth:`reads_hf_config`.
    """

    auxiliary_losses: ClassVar[bool] = False
    """Adapters of this method have an ``auxiliary_loss``, which training adds to the loss."""
    data_driven: ClassVar[bool] = False
    """Fresh adapters take their initial values from training data, in :meth:`initialize`."""

    swappable_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that may differ in an adapter that is swapped into the tensors of another one."""

    hf_prefix: ClassVar[str] = HF_PREFIX
    """What HF PEFT puts before the path of a module in files of ``peft_type``."""
    transformers_loads: ClassVar[bool] = True
    """``load_adapter`` of transformers reads the folders that HF PEFT does; pages of folders then say how."""

    @abstractmethod
    def supports(self, module: nn.Module) -> bool:
        """Tell whether the method can adapt ``module``."""

    @abstractmethod
    def adapter(self, module: nn.Module, target: Target) -> Adapter:
        """Make the adapter for ``module``, which stands at ``target``. Values come from ``reset_parameters`` later."""

    def prepare(self, model: nn.Module) -> None:
        """Change the base before adapters go in, for instance quantise it.

        Called at every injection, so it must find a prepared base as it left it.
        """

    def layer_preparation(self, model: nn.Module) -> LayerPreparation | None:
        """Return :meth:`prepare` as a change that goes layer by layer, or None where it is not one.

        A loader asks for it before it reads the weights of ``model``, which are on the meta device, and changes each layer as
        its weights arrive. :meth:`prepare` is called with the result and must take it as it is.
        """
        return None

    def loaded_over(self, model: nn.Module) -> Method:
        """Return the method as which a saved adapter goes into ``model``, before :meth:`prepare`: this one, or another that fits it."""
        return self

    def expand(self, model: nn.Module, targets: Sequence[Target], family: ModelFamily) -> Sequence[Target]:
        """Return all places the method adapts, given the resolved ``targets``; a subclass with a global view adds some."""
        return targets

    def connect(self, model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        """Let fresh ``adapters``, by module path, share what they hold together; the model does not hold them yet."""

    def initialize(
        self, model: nn.Module, adapters: Mapping[str, Adapter], batches: Iterable[Any], loss: Callable[[Any], Tensor]
    ) -> None:
        """Give fresh ``adapters``, by module path, initial values from data. Called once, where ``data_driven`` is true.

        Args:
            model: the adapted model, on its device, with the adapters active, in eval mode.
            adapters: the adapters of this method.
            batches: training batches, on the device of the model; take as many as are needed.
            loss: runs the model on a batch and returns the loss of it.
        """

    def after_optimizer_step(
        self, adapters: Mapping[str, Adapter], optimizer: torch.optim.Optimizer, step: int, total_steps: int
    ) -> None:
        """Act on ``adapters``, by module path, after an optimizer step, while the gradients are still there.

        Args:
            adapters: the adapters of this method under one name, which is active.
            optimizer: the optimizer, whose state of a parameter may be edited.
            step: how many optimizer steps came before.
            total_steps: how many there will be in all; 0 where nobody knows.
        """

    def patterns(self) -> Mapping[str, Mapping[str, Any]]:
        """Return ``{field: {target pattern: value}}`` for the fields that may differ from place to place."""
        return {}

    def at(self, **overrides: Any) -> Self:
        """Return the method as it is at one place, after its patterns gave ``overrides``."""
        return dataclasses.replace(self, **overrides) if overrides else self  # type: ignore[type-var]

    def to_hf_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        """Return the fields of HF PEFT's ``adapter_config.json`` beyond ``peft_type`` and ``target_modules``.

        ``adapters`` maps module paths to the adapters that are saved. ``target_modules`` is left out where this says None.
        """
        raise NotImplementedError(f"{type(self).__name__} declares peft_type and must implement to_hf_config")

    @classmethod
    def reads_hf_config(cls, config: Mapping[str, Any]) -> bool:
        """Tell whether this method, rather than the one it inherits ``peft_type`` from, reads HF PEFT's ``config``.

        Of all registered methods that say so the most derived one reads. A class that does not define this itself is not
        asked, and the ancestor reads what is left.
        """
        return True

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the method that acts as HF PEFT does under ``config``.

        Raises:
            AdapterConfigError: the configuration uses something this method does not have.
        """
        raise NotImplementedError(f"{cls.__name__} declares peft_type and must implement from_hf_config")

    def file_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what ``adapter_model.safetensors`` holds for ``tensors``, which are named ``<module path>.<tensor>``.

        HF PEFT puts a prefix before every name, and so does this, where HF PEFT knows the method. A method whose file holds
        something else (one tensor for all places) overrides this and :meth:`placed_tensors`.
        """
        prefix = self.hf_prefix if self.peft_type else ""
        return {prefix + name: tensor for name, tensor in tensors.items()}

    def placed_tensors(self, model: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a file, as :meth:`file_tensors` made it, by ``<module path>.<tensor>``.

        ``model`` is the model that the adapter will go into, without it.

        Raises:
            AdapterMismatchError: a name is not of this method.
        """
        prefix = self.hf_prefix if self.peft_type else ""
        for name in stored:
            if not name.startswith(prefix):
                raise AdapterMismatchError(f"the file has the key {name!r}, which does not start with {prefix!r}")
        return {name.removeprefix(prefix): tensor for name, tensor in stored.items()}


class Quantizer(Named, ABC):
    """A way to store the weights of a frozen linear layer in few bits. A frozen dataclass, like :class:`Method`."""

    rounds_inputs: ClassVar[bool] = False
    """Layers round their inputs too, so that a difference in the last bit of one becomes a step in the output."""
    fsdp_ready: ClassVar[bool] = False
    """Layers read their packed weight as a parameter in forward, and keep no other reference to it, so that FSDP2 shards it."""

    @abstractmethod
    def quantize(self, linear: nn.Linear) -> nn.Module:
        """Return a module that acts as ``linear`` with quantised weights. ``linear`` is left as it is."""

    @abstractmethod
    def dequantized(self, module: nn.Module) -> Tensor:
        """Return the weight (out_features, in_features) that ``module``, made by :meth:`quantize`, stands for."""

    @classmethod
    def packs(cls, module: nn.Module) -> bool:
        """Tell whether ``module`` is packed in this way, with whatever settings, so that :meth:`dequantized` reads it.

        Methods that need the weight itself (DoRA) work only over layers that a registered quantizer knows by this.
        """
        return False

    @classmethod
    def settings_of(cls, module: nn.Module) -> Self | None:
        """Return the quantizer, with its settings, that makes layers such as ``module``, or None where these cannot be read from it.

        A merge into a quantised layer asks for it, to quantise the merged weight again in the same way.
        """
        return None if dataclasses.fields(cls) else cls()  # type: ignore[arg-type]


class EvalTask(Named, ABC):
    """A measurement of a model. A frozen dataclass, like :class:`Method`."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Measure ``model`` as it is now and return the figures by name. The model is left as it was."""

    def compared_by(self) -> tuple[str, bool]:
        """Return the name of the figure by which two models are compared, and whether more of it is better."""
        return "loss", False


class Exporter(Named, ABC):
    """A format in which a trained model leaves the library. A frozen dataclass, like :class:`Method`."""

    merges: ClassVar[bool] = False
    """The active adapters are merged into what is written, so that they must be of methods that merge."""
    atomic: ClassVar[bool] = False
    """The folder is written wholly or not at all, so nobody needs to have it written elsewhere and moved."""

    @abstractmethod
    def export(self, model: nn.Module, path: Path) -> None:
        """Write ``model`` to the folder ``path``. The model is left as it was."""
