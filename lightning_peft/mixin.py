"""Adapter-only checkpoints for any LightningModule, strict both ways.

Of all places where a checkpoint could be filtered, only a ``state_dict`` override on the LightningModule together with
``strict_loading = False`` is exact on one device, DDP and FSDP2 and for weights-only saves. That setting alone would also
hide missing and foreign keys, so names and shapes are stored beside the tensors and compared before anything loads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import Self

from lightning_peft.adapter_layer import adapter_layers, base_modules, unwrapped
from lightning_peft.adapter_training import AdapterTraining
from lightning_peft.allocator_hint import allocator_hint
from lightning_peft.checkpoint_manifest import MANIFEST, check_manifest, make_manifest, take_scales, take_schedule
from lightning_peft.checkpoint_size import with_shared_names, with_shared_scalars
from lightning_peft.errors import CheckpointMismatchError, ConfigError, LightningPEFTWarning, MergeError
from lightning_peft.half_precision import FrozenHalfPrecision, keeping_adapters
from lightning_peft.injection import adapted_roots
from lightning_peft.interfaces import Adapter
from lightning_peft.optimizer_settings import PARAMETERS, SameOptimizers
from lightning_peft.resuming import ExactResume

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as _Host
else:
    _Host = object


class PEFTMixin(AdapterTraining, ExactResume, SameOptimizers, _Host):
    """Makes checkpoints of a LightningModule hold adapters only, and resume exactly or not at all.

    Put it before ``LightningModule``, and call :func:`~lightning_peft.inject` in ``configure_model``::

        class MyModule(PEFTMixin, LightningModule):
            def configure_model(self):
                if self.model is None:
                    self.model = load_my_model()
                    inject(self.model, LoRA(rank=8), ["query", "value"])

    Left out of ``state_dict`` is the frozen base of every model that :func:`inject` was called on. What else the module
    holds is saved as always: a head of its own, and parameters of the base that were unfrozen after :func:`inject`.
    A hook of this class that you override must call ``super()``.

    ``base_fingerprint = "complete"`` on the class or the module has checkpoints and adapter folders hold a hash of every weight of the
    base, besides samples, and has them compared when a checkpoint is loaded.

    A run resumes bit for bit, with dropout: see :class:`~lightning_peft.resuming.ExactResume`. With other settings of optimizers
    or schedulers, which Lightning would overwrite, it is refused.
    """

    base_fingerprint: str = "sampled"
    """How the base is recognised: by ``sampled`` weights, or by the ``complete`` ones too."""
    check_base: bool = True
    """Whether a checkpoint of another base is refused."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = [base.__name__ for base in cls.__mro__]
        if "LightningModule" in order and order.index("LightningModule") < order.index("PEFTMixin"):
            raise TypeError(
                f"class {cls.__name__} names LightningModule before PEFTMixin, so the mixin would have no effect and checkpoints would hold "
                f"the base; write class {cls.__name__}(PEFTMixin, LightningModule)"
            )

    @property
    def strict_loading(self) -> bool:
        """Always False: the base is not in the checkpoint. :meth:`on_load_checkpoint` compares everything else."""
        return False

    @strict_loading.setter
    def strict_loading(self, strict_loading: bool) -> None:
        if strict_loading:
            raise CheckpointMismatchError(
                "strict_loading=True was asked for, but an adapter checkpoint does not hold the base; leave it False: "
                "adapters are compared strictly in on_load_checkpoint"
            )

    # -- where it runs ---------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Have ``bf16-true`` leave the adapters in float32, before the model is made.

        Raises:
            ConfigError: the strategy is FSDP1.
        """
        super().setup(stage)
        strategy: Any = getattr(self.trainer, "strategy", None)
        if isinstance(strategy, FSDPStrategy):
            raise ConfigError(
                f"{type(self).__name__} was given {type(strategy).__name__}, which is FSDP1: it keeps whole gradients of the frozen base, saves the "
                "base into every checkpoint and refuses clipping by norm. Use strategy='peft_fsdp', which is FSDP2"
            )
        if isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
            strategy.precision_plugin = keeping_adapters(strategy.precision_plugin)

    # -- mode ------------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Set the mode; frozen batch normalisation stays in eval mode, as its statistics belong to the base."""
        super().train(mode)
        self._keep_statistics()
        return self

    def on_fit_start(self) -> None:
        """Refuse to train where all that would be trained is merged.

        Raises:
            MergeError: so it is.
        """
        merged = _merged(self)
        kept_still = {id(parameter) for _, adapter in merged for parameter in adapter.parameters()}
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if merged and all(id(parameter) in kept_still for parameter in trained):
            raise MergeError(
                f"adapter {merged[0][0]!r} is merged into the base and would not be trained, and nothing else would; call "
                "unmerge_adapters(model) before fit"
            )
        super().on_fit_start()

    def on_train_start(self) -> None:
        """Put frozen batch normalisation into eval mode, whoever put the model into train mode."""
        super().on_train_start()
        self._keep_statistics()
        if hint := allocator_hint(self.device):
            rank_zero_info(hint)
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, HalfPrecision) and not isinstance(plugin, FrozenHalfPrecision) and adapted_roots(self):
            warnings.warn(
                f"precision={self.trainer.precision!r} rounds the adapters to 16 bits too, and small updates of them are lost; call super().setup() "
                f"where {type(self).__name__} overrides it, or use {self.trainer.precision.replace('true', 'mixed')!r} over a base loaded in 16 bits",
                LightningPEFTWarning,
                stacklevel=2,
            )
        elif isinstance(plugin, HalfPrecision) and plugin.precision == "16-true":
            warnings.warn(
                "precision='16-true' scales no loss, and gradients too small for float16 become zero; use 'bf16-true'",
                LightningPEFTWarning,
                stacklevel=2,
            )

    def _keep_statistics(self) -> None:
        for root in adapted_roots(self):
            for _, module in base_modules(root):
                frozen = not any(parameter.requires_grad for parameter in module.parameters(recurse=False))
                if isinstance(module, nn.modules.batchnorm._NormBase) and frozen:
                    module.training = False

    # -- state -----------------------------------------------------------------------------------------------------

    def state_dict(  # type: ignore[override]
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Return the state without the frozen base of adapted models."""
        if args or destination is not None:  # a nested call, of a module around this one
            nested: dict[str, Any] = super().state_dict(
                *args, destination=destination, prefix=prefix, keep_vars=keep_vars
            )
            return nested
        state: dict[str, Any] = super().state_dict(prefix=prefix, keep_vars=True)
        is_base = self._base_filter(prefix)
        for key in list(state):
            if is_base(key, state[key]):
                del state[key]
            elif not keep_vars and isinstance(state[key], Tensor):
                state[key] = state[key].detach()
        return state

    def full_state_dict(self) -> dict[str, Any]:
        """Return the whole state, the frozen base included."""
        full: dict[str, Any] = super().state_dict()
        return full

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what :meth:`state_dict` or :meth:`full_state_dict` returned.

        Raises:
            CheckpointMismatchError: with ``strict``, if a key of :meth:`state_dict` is missing or one is unknown.
        """
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        own = self.state_dict().keys()
        missing = [key for key in found.missing_keys if key in own]
        if strict and (missing or found.unexpected_keys):
            raise CheckpointMismatchError(
                f"the state_dict does not fit this {type(self).__name__}. Missing: {missing[:5]} ({len(missing)}); "
                f"not expected: {found.unexpected_keys[:5]} ({len(found.unexpected_keys)})"
            )
        return type(found)(missing, found.unexpected_keys)

    def _base_filter(self, prefix: str) -> Callable[[str, Any], bool]:
        """Return a test for the entries of a state dict that belong to the frozen base of an adapted model."""
        roots = adapted_roots(self)
        frozen = {id(tensor) for root in roots for tensor in _frozen_tensors(root)}
        known = {id(tensor) for tensor in [*self.parameters(), *self.buffers()]}
        base = {id(unwrapped(module)) for root in roots for _, module in base_modules(root)}
        owners = {  # state dicts leave out the name that activation checkpointing adds
            prefix + path.replace("_checkpoint_wrapped_module.", ""): module for path, module in self.named_modules()
        }

        def is_base(key: str, value: Any) -> bool:
            if id(value) in known:
                return id(value) in frozen
            # Neither a parameter nor a buffer: what a module adds itself, such as the scales of a quantised weight.
            owner = key
            while "." in owner:
                owner = owner.rpartition(".")[0]
                if owner in owners:
                    return id(owners[owner]) in base
            return False

        return is_base

    # -- checkpoint ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what :meth:`on_load_checkpoint` compares."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[MANIFEST] = make_manifest(self, self.state_dict(), full=self.base_fingerprint == "complete")
        names = {name: name for name in checkpoint.get("state_dict", ())}
        for key in (MANIFEST, PARAMETERS):
            if key in checkpoint:
                checkpoint[key] = with_shared_names(checkpoint[key], names)
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [
                with_shared_scalars(state) if "state" in state else state for state in checkpoint["optimizer_states"]
            ]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the adapters and the base with those of the checkpoint.

        Raises:
            CheckpointMismatchError: they are not the same; the message lists both sides.
            MergeError: an adapter is merged here, so that the base would go on acting with the values it had.
        """
        for name, _ in _merged(self):
            raise MergeError(
                f"adapter {name!r} is merged into the base, which would keep the values it has now, whatever the checkpoint holds; call "
                "unmerge_adapters(model) first, or load the checkpoint into a new module"
            )
        self._fit_to(checkpoint)
        take_schedule(checkpoint, self)
        check_manifest(checkpoint, self, self.state_dict(), check_base=self.check_base)
        take_scales(checkpoint, self)
        super().on_load_checkpoint(checkpoint)

    def _fit_to(self, checkpoint: Mapping[str, Any]) -> None:
        """Let adapters whose shapes were decided by data or training take those of the checkpoint."""
        manifest = checkpoint.get(MANIFEST)
        shapes = manifest.get("tensors") if isinstance(manifest, dict) else None
        if not isinstance(shapes, dict):
            return  # the comparison says so
        paths = {id(module): path for path, module in self.named_modules()}
        for root in adapted_roots(self):
            for layer in adapter_layers(root).values():
                for adapter in layer.adapters.values():
                    assert isinstance(adapter, Adapter)
                    prefix = f"{paths[id(adapter)].replace('_checkpoint_wrapped_module.', '')}."
                    adapter.fit_to({key[len(prefix) :]: v for key, v in shapes.items() if key.startswith(prefix)})


def _merged(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the adapters in ``module`` that are merged, with their names."""
    layers = [layer for root in adapted_roots(module) for layer in adapter_layers(root).values()]
    return [(name, layer.adapters[name]) for layer in layers for name in layer.merged]


def _frozen_tensors(root: nn.Module) -> list[Tensor]:
    """Return the frozen parameters of the base of an adapted model, and the buffers of modules that are not trained."""
    found: list[Tensor] = []
    for _, module in base_modules(root):
        parameters = list(unwrapped(module).parameters(recurse=False))
        found += [parameter for parameter in parameters if not parameter.requires_grad]
        if not any(parameter.requires_grad for parameter in parameters):
            found += unwrapped(module).buffers(recurse=False)
    return found
