"""The LightningModule around an adapted model: load, adapt, train, measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.activation import set_active_adapters
from lightning_peft.adapter_formats import AdapterFormat
from lightning_peft.adapter_layer import adapter_names
from lightning_peft.adapter_training import ADAPTER_COLUMN
from lightning_peft.batch_parts import field_of, rows_of, target_of, wanted_of
from lightning_peft.calibration import initialize_from_data, training_batches
from lightning_peft.callbacks.resources import ResourceMonitor
from lightning_peft.composition import Adaptation, holds_several, inject_all, load_adapters, named
from lightning_peft.errors import ConfigError
from lightning_peft.fingerprint import check_kind
from lightning_peft.fused_blocks import fuse_blocks
from lightning_peft.interfaces import Method
from lightning_peft.loaders import ModelLoader, loaded, training_also
from lightning_peft.losses_in_chunks import ChunkedLoss, chunked_loss, with_settings
from lightning_peft.measuring import Measuring
from lightning_peft.mixin import PEFTMixin
from lightning_peft.optimization import (
    parameter_groups,
    refuse_paged_on_cpu,
    scale_learning_rates,
    warn_of_lost_ratios,
)
from lightning_peft.rows import set_row_adapters
from lightning_peft.saved_modules import new_modules
from lightning_peft.state import load_adapter
from lightning_peft.targets import Targets
from lightning_peft.tasks.task import Task
from lightning_peft.token_weighting import TokenWeighting

Loss: TypeAlias = Callable[[Any, Any], Tensor]


class PEFTModule(Measuring, TokenWeighting, PEFTMixin, LightningModule):
    """Adapts a pretrained model and trains the adapter. Checkpoints hold the adapter, never the base.

    Nothing is loaded before the Trainer calls ``configure_model``. A batch may be

    * a **dict**: handed to the model as keyword arguments, as transformers' models expect, but for the column ``adapter``, which
      names the adapter of each row (None or ``""`` for the base alone);
    * a **tuple** ``(*inputs, target)``: the inputs are handed over, the target goes to ``loss``;
    * a **tensor** of token ids: input and labels of a causal language model.

    Args:
        base: the model to adapt, or a loader for it.
        method: the adaptation method; or a list of methods and :class:`Adaptation`, which are all active at once, the first
            innermost, each under a name of its own.
        targets: what to adapt: roles, globs, ``re:`` expressions or :class:`Targets`; the method's default if None.
        modules_to_save: modules to train in full beside the method, such as a head that is new, in the same adapter.
        adapter: an adapter folder to start from; its method and places are used and ``method`` must be left out. Of a folder that
            was saved for several adapters all are trained, under their names, and those are active that were.
        adapter_format: format of the adapter where other software wrote it, such as ``LoralibFile(alpha=16)``; found if None.
        name: name of the adapter in the model, where there is one method.
        optimizer: makes the optimizer from the parameter groups. Matrices decay; vectors such as biases do not.
        lr_scheduler: makes the learning-rate scheduler from the optimizer.
        by_rows: train several adapters at once, each on the rows that name it in the column ``adapter``; none is active on others.
        lr_interval: whether the scheduler advances every ``step`` or every ``epoch``.
        loss: called as ``loss(outputs, target)`` with what the model returned and the last element of a tuple batch, the
            ``labels`` of a dict batch, or a tensor batch itself. If None, the model must return its own loss.
        fingerprint: how checkpoints recognise the base: by ``sampled`` weights, or by a hash of them all too (``complete``), for which
            every save and load reads every weight.
        check_base: whether to refuse a checkpoint or an adapter folder of another base.
        task: what is measured in validation and test, such as ``ClassificationTask(num_labels=2, metrics=["accuracy", "f1"])``. If None, the
            loss, and perplexity and the share of right tokens where there are tokens.
        loss_weighting: whether each batch or each predicted token counts the same in a step of the optimizer, over accumulated batches and
            over processes.
        chunked_loss: whether the model computes its own loss without the logits of the whole batch.
        fused_blocks: whether norms and MLPs keep less for backward, with the same numbers; see :func:`~lightning_peft.fuse_blocks`.

    Raises:
        ConfigError: neither or both of ``method`` and ``adapter`` are given.

    Example:
        >>> from lightning_peft import LoRA
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> module = PEFTModule(net, LoRA(rank=2), loss=torch.nn.functional.cross_entropy)
        >>> module.configure_model()
        >>> sorted({key.split(".")[-1] for key in module.state_dict()})
        ['lora_A', 'lora_B']
    """

    model: nn.Module | None

    def __init__(
        self,
        base: ModelLoader | nn.Module,
        method: Method | list[Adaptation | Method] | None = None,
        targets: str | list[str] | Targets | None = None,
        *,
        modules_to_save: str | list[str] | None = None,
        adapter: str | None = None,
        adapter_format: AdapterFormat | str | None = None,
        name: str = "default",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: str = "step",
        loss: Loss | None = None,
        fingerprint: Literal["sampled", "complete"] = "sampled",
        check_base: bool = True,
        by_rows: bool = False,
        loss_weighting: Literal["batches", "tokens"] = "batches",
        task: Task | None = None,
        chunked_loss: bool | ChunkedLoss = False,
        fused_blocks: bool = False,
    ) -> None:
        super().__init__()
        check_kind(fingerprint)
        if (method is None) == (adapter is None):
            raise ConfigError(
                f"give either a method or an adapter folder to start from, got method={method!r} and adapter={adapter!r}"
            )
        if adapter is not None and (targets is not None or modules_to_save is not None):
            raise ConfigError(
                f"an adapter folder brings its own places; leave out targets={targets!r} and modules_to_save={modules_to_save!r}"
            )
        if adapter is None and adapter_format is not None:
            raise ConfigError(
                f"adapter_format={adapter_format!r} is for an adapter to start from; give adapter= as well"
            )
        if adapter is not None and name != "default" and holds_several(adapter):
            raise ConfigError(
                f"{adapter!r} was saved with names for its adapters, which they keep; leave out name={name!r}, or give the folder of one of them"
            )
        if lr_interval not in ("step", "epoch"):
            raise ConfigError(f"lr_interval must be 'step' or 'epoch', got {lr_interval!r}")
        if loss_weighting not in ("batches", "tokens") or (loss_weighting == "tokens" and loss is not None):
            raise ConfigError(
                f"loss_weighting must be 'batches', or 'tokens' with the model's own loss, got {loss_weighting!r} and loss={loss!r}"
            )
        if not isinstance(base, (nn.Module, ModelLoader)):
            raise ConfigError(f"base must be a model or a ModelLoader such as CausalLMLoader(path=...), got {base!r}")
        self.adapter_name = name
        self.adaptations = _adaptations(method, targets, modules_to_save, name)
        self._save_plain_hyperparameters(adapter)
        self.model = None
        # Not an attribute of the usual kind, which would register a model a second time.
        self.__dict__["_base"] = base
        self.method, self.targets, self.adapter, self.adapter_format = method, targets, adapter, adapter_format
        self.optimizer, self.lr_scheduler, self.lr_interval = optimizer, lr_scheduler, lr_interval
        self.loss, self.base_fingerprint, self.check_base, self.by_rows = loss, fingerprint, check_base, by_rows
        self.loss_weighting, self.chunked_loss = loss_weighting, with_settings(chunked_loss, loss, task)
        if task is not None and not isinstance(task, Task):
            raise ConfigError(f"task must be a Task such as CausalLMTask(), got {task!r}")
        self.task, self.metrics, self.fused_blocks = task, nn.ModuleDict(), fused_blocks

    def _save_plain_hyperparameters(self, adapter: str | None) -> None:
        from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters

        if _given_hyperparameters.get() is not None:  # the parsed configuration, plain values: made by LightningCLI
            self.save_hyperparameters()
            return
        # Objects in a checkpoint could not be loaded again with weights_only=True.
        plain = {str(one.name): _plain(one) for one in self.adaptations}
        one = plain[self.adapter_name] if list(plain) == [self.adapter_name] else plain
        self.save_hyperparameters({"peft": one or {"adapter": adapter, "targets": repr(None)}})

    # -- the model -------------------------------------------------------------------------------------------------

    @override
    def configure_model(self) -> None:
        """Load the base and adapt it, once."""
        if self.model is not None:
            return
        base = self.__dict__["_base"]
        if self.adapter is not None:
            model: nn.Module = loaded(base, self._strategy(), [])
            if holds_several(self.adapter):
                load_adapters(model, self.adapter, trainable=True, check_base=self.check_base)
            else:
                load_adapter(
                    model,
                    self.adapter,
                    name=self.adapter_name,
                    trainable=True,
                    check_base=self.check_base,
                    format=self.adapter_format,
                )
        else:
            methods = [self._loading_method(), *(one.method for one in self.adaptations)]
            model = loaded(base, self._strategy(), methods)
            self._train_what_is_new(model)
            self._inject(model)
        if self.by_rows:
            set_active_adapters(model, [])
            set_row_adapters(model, adapter_names(model))
        # What from_pretrained returns is in eval mode and Lightning would keep it there: no dropout.
        self.model = fuse_blocks(model).train() if self.fused_blocks else model.train()
        self._initialize_from_data()

    def _strategy(self) -> object:
        return self._trainer and self._trainer.strategy

    def _train_what_is_new(self, model: nn.Module) -> None:
        """Have a head trained that the checkpoint of the base has no weights for, and say so."""
        new = new_modules(model)
        adaptations = training_also(model, self.adaptations, new, by_rows=self.by_rows) if self.adaptations else []
        if adaptations != self.adaptations:
            rank_zero_info(
                f"{type(model).__name__} has modules that its checkpoint has no weights for; they are trained in full and saved with the "
                f"adapter: {', '.join(new)}"
            )
            self.adaptations = adaptations

    def _inject(self, model: nn.Module) -> None:
        inject_all(model, self.adaptations, by_rows=self.by_rows)

    def _loading_method(self) -> Method:
        """Return the method that the base is loaded for: of several, one that prepares layers while they are read.

        Where a method needs layers as they are, nothing is prepared before it is known which.
        """
        methods = [one.method for one in self.adaptations]
        if plain := next((method for method in methods if not method.quantized_base), None):
            return plain
        return next((m for m in methods if type(m).layer_preparation is not Method.layer_preparation), methods[0])

    def _initialize_from_data(self) -> None:
        """Hand the methods that take initial values from data the training batches of a fit that begins."""
        trainer = self._trainer
        names = [str(one.name) for one in self.adaptations if one.method.data_driven]
        if self.model is None or not names or trainer is None:
            return
        if trainer.state.fn != "fit" or trainer.ckpt_path:  # a checkpoint brings the values
            return
        self.model.to(trainer.strategy.root_device)
        for name in names:
            self._initialize_one(name, trainer)

    def _initialize_one(self, name: str, trainer: Trainer) -> None:
        assert self.model is not None
        with training_batches(trainer) as batches:
            moved = (move_data_to_device(batch, trainer.strategy.root_device) for batch in batches)
            initialize_from_data(self.model, moved, lambda b: self.compute_loss(self.predict_outputs(b), b), name=name)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the adapted model."""
        if self.model is None:
            raise ConfigError(
                "the model is loaded in configure_model, which the Trainer calls; call it yourself before forward"
            )
        return self.model(*args, **kwargs)

    def predict_outputs(self, batch: Any) -> Any:
        """Call the model on a batch of any of the three kinds; a dict batch may name an ``adapter`` for each row.

        With ``chunked_loss``, the outputs of a batch with labels have a loss and no logits.
        """
        if self.chunked_loss is None or self.model is None:
            return self._with_logits(batch)
        with chunked_loss(self.model, self.chunked_loss):
            return self._with_logits(batch)

    def _with_logits(self, batch: Any) -> Any:
        with self.batch_rows(batch) as batch:
            return self._outputs(batch)

    def _outputs(self, batch: Any) -> Any:
        batch = batch if self.task is None else self.task.inputs(batch)
        if isinstance(batch, Mapping):
            own_loss = self.loss is not None
            return self(**{key: value for key, value in batch.items() if not (own_loss and key == "labels")})
        if isinstance(batch, (tuple, list)):
            return self(*(batch[:-1] if len(batch) > 1 else batch))
        if self.loss is None:
            return self(input_ids=batch, labels=batch)
        return self(batch)

    def compute_loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the loss of a batch: the one given, or the model's own."""
        if self.loss is not None:
            return self.loss(outputs, target_of(batch))
        loss = field_of(outputs, "loss")
        if not isinstance(loss, Tensor):
            raise ConfigError(
                f"{type(self.model).__name__} returned {type(outputs).__name__} without a loss; put 'labels' into the batch, or give "
                "PEFTModule(loss=...)"
            )
        return loss

    # -- steps -----------------------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch and log it as ``train_loss``.

        Raises:
            ConfigError: with ``by_rows``, no row of the batch names an adapter, so that there is nothing to train.
        """
        outputs = self.predict_outputs(batch)
        loss = self.compute_loss(outputs, batch)
        if self.loss_weighting == "tokens":
            loss = self.weigh(loss, wanted_of(self.model, outputs, batch))
        if self.by_rows and torch.is_grad_enabled() and not loss.requires_grad:
            found = f"the keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise ConfigError(
                f"by_rows=True trains adapters on the rows that name them in the column {ADAPTER_COLUMN!r}, and batch {batch_idx} names none: it has "
                f"{found}; name an adapter for one of its rows at least"
            )
        self.log("train_loss", loss, prog_bar=True, batch_size=rows_of(batch))
        return loss

    @override
    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return the logits of a batch, or whatever the model returns where there are none."""
        outputs = self._with_logits(batch)
        logits = field_of(outputs, "logits")
        return outputs if logits is None else logits

    # -- optimisation ----------------------------------------------------------------------------------------------

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer over the trained parameters only; biases and other vectors are not decayed."""
        optimizer = self.optimizer(parameter_groups(self))
        refuse_paged_on_cpu(optimizer)
        scale_learning_rates(optimizer)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        warn_of_lost_ratios(optimizer, scheduler)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self.lr_interval}
        if isinstance(scheduler, ReduceLROnPlateau):  # advances with a measurement, so once an epoch
            config |= {"interval": "epoch", "monitor": scheduler.monitor}
        return {"optimizer": optimizer, "lr_scheduler": config}  # type: ignore[return-value]

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Add a :class:`ResourceMonitor` (tokens a second, peak memory), unless the Trainer has one."""
        present: Iterable[Callback] = getattr(self.trainer, "callbacks", [])
        return [] if any(isinstance(callback, ResourceMonitor) for callback in present) else [ResourceMonitor()]


def _adaptations(
    method: Method | Sequence[Adaptation | Method] | None, targets: Any, modules_to_save: Any, name: str
) -> list[Adaptation]:
    if method is None:
        return []
    if isinstance(method, (list, tuple)):
        if targets is not None or modules_to_save is not None or name != "default":
            raise ConfigError(
                "each method of a list has its own targets, modules_to_save and name: write Adaptation(method, targets, ...) in the list, got "
                f"targets={targets!r}, modules_to_save={modules_to_save!r}, name={name!r} beside it"
            )
        return named(method)
    if not isinstance(method, Method):
        raise ConfigError(f"method must be a Method such as LoRA(rank=8), or a list of them, got {method!r}")
    return [Adaptation(method, targets, name, modules_to_save)]


def _plain(one: Adaptation) -> dict[str, Any]:
    """Return plain values for a checkpoint."""
    saved = {"modules_to_save": repr(one.modules_to_save)} if one.modules_to_save else {}
    return {"method": one.method.name, **one.method.to_config(), "targets": repr(one.targets), **saved}
