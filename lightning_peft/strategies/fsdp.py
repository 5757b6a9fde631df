"""FSDP2 for adapted models: the strategy ``peft_fsdp``."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from lightning.fabric.strategies.model_parallel import _FSDPNoSync
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from torch.optim import Optimizer
from typing_extensions import override

from lightning_peft.errors import CheckpointMismatchError, ConfigError
from lightning_peft.half_precision import keeping_adapters
from lightning_peft.sharded_folders import read_folder
from lightning_peft.sharded_tensors import gathered, load_into, sharded_optimizer_state
from lightning_peft.strategies.adapted import AdaptedStrategy
from lightning_peft.strategies.agreement import check_agreement, share_values
from lightning_peft.strategies.launching import ForkedLauncher
from lightning_peft.strategies.loading import read_weights, refuse_unmade
from lightning_peft.strategies.refusals import refuse_callbacks, refuse_meta, refuse_optimizers
from lightning_peft.strategies.sharding import along, bring_scales, checkpoint_activations, refuse_unshardable, shard
from lightning_peft.strategies.tensor_parallel import check_batch, mesh_of, share_random_state, split

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class PEFTFSDPStrategy(AdaptedStrategy, ModelParallelStrategy):
    """Shards an adapted model over all processes with FSDP2 (``fully_shard``), blocks of its family as units.

    Works for any LightningModule whose models are built in ``configure_model``; one that shards itself there is left as it is. By
    default a checkpoint is one file with the adapter tensors and their optimizer state, which any other strategy resumes from, and
    the other way round. FSDP1 is not offered: it keeps whole gradients of frozen weights, refuses clipping by norm, and saves the base.

    Args:
        units: what is gathered and freed as one: globs on module paths, ``re:`` expressions or class names; the blocks of the
            model's family if None.
        replicate: over how many groups of processes the model is replicated, each sharding it within (HSDP); 1 for none.
        tensor_parallel: over how many processes, side by side, each split layer of attention and feed-forward is split, with its adapters;
            they train on one batch. 1 for none. For models whose transformers configuration has a ``base_model_tp_plan``.
        reshard_after_forward: free the gathered weights of a unit after its forward and gather them again for backward.
        gather_dtype: dtype in which weights are gathered and computed with; that of each parameter if None. With ``bf16-mixed`` and None
            results are those of DDP bit for bit; ``bf16`` halves what is sent for a base in float32, and rounds norms too.
        reduce_dtype: dtype in which gradients are summed over processes; that of the gradients if None.
        prefetch: how many units ahead are gathered while one runs; 0 leaves it to FSDP2, which asks for the next one as the host gets there.
        cpu_offload: keep weights and optimizer in the memory of the host. Needs an accelerator.
        activation_checkpointing: keep the inputs of units only, and run their forward again in backward.
        read_weights: leave the values of a base that a loader reads from local safetensors files unread until it is sharded, and then have
            each process read its own part: no process holds the whole base. Not where a method quantises the base or needs a forward of it
            before; then, and if False, each process loads it whole and keeps its part.
        save_distributed_checkpoint: let each process write its part into a folder, in place of one file.
        start_method: how processes start: ``popen`` runs the script once for each, ``fork`` and ``spawn`` serve notebooks and tests.
        process_group_backend: as for ``torch.distributed``.
        timeout: after which time a process that waits for another gives up.

    References:
        Zhao et al., "PyTorch FSDP", arXiv:2304.11277; ``torch.distributed.fsdp.fully_shard``.
    """

    strategy_name = "peft_fsdp"

    def __init__(
        self,
        units: Sequence[str] | None = None,
        *,
        replicate: int = 1,
        tensor_parallel: int = 1,
        reshard_after_forward: bool = True,
        gather_dtype: Literal["bf16", "fp16", "fp32"] | None = None,
        reduce_dtype: Literal["bf16", "fp16", "fp32"] | None = None,
        prefetch: int = 0,
        cpu_offload: bool = False,
        activation_checkpointing: bool = False,
        read_weights: bool = True,
        save_distributed_checkpoint: bool = False,
        start_method: Literal["popen", "fork", "spawn", "forkserver"] = "popen",
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        for name, value in (("gather_dtype", gather_dtype), ("reduce_dtype", reduce_dtype)):
            if value is not None and value not in _DTYPES:
                raise ConfigError(f"{name} must be one of {', '.join(_DTYPES)} or None, got {value!r}")
        if isinstance(units, str) or replicate < 1 or tensor_parallel < 1 or prefetch < 0:
            raise ConfigError(
                f"units must be a list, replicate and tensor_parallel at least 1 and prefetch no less than 0, got units={units!r}, "
                f"replicate={replicate}, tensor_parallel={tensor_parallel}, prefetch={prefetch}"
            )
        self.tensor_parallel = tensor_parallel
        self.units, self.replicate = None if units is None else list(units), replicate
        self.reshard_after_forward, self.cpu_offload = reshard_after_forward, cpu_offload
        self.prefetch = prefetch
        self.gather_dtype, self.reduce_dtype = gather_dtype, reduce_dtype
        self.activation_checkpointing, self._start_method = activation_checkpointing, start_method
        self.reads_weights = read_weights
        self.sharded_units: list[str] = []
        self.split_layers: list[str] = []
        self._batch_checked = False

    # -- processes -------------------------------------------------------------------------------------------------

    @override
    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        if self._start_method == "popen":
            super()._configure_launcher()
        elif not self.cluster_environment.creates_processes_externally:
            self._launcher = ForkedLauncher(self, start_method=self._start_method)

    @override
    def setup_environment(self) -> None:
        if getattr(self.precision_plugin, "scaler", None) is not None:
            raise ConfigError(
                f"precision={self.precision_plugin.precision!r} scales the loss by what each process finds in its shards; use 'bf16-mixed'"
            )
        self.precision_plugin = keeping_adapters(self.precision_plugin)  # before configure_model, which it may act on
        self._setup_distributed()  # and not the two-dimensional mesh of the parent
        groups = self.replicate * self.tensor_parallel
        if self.world_size % groups:
            among = f" times tensor_parallel={self.tensor_parallel}" if self.tensor_parallel > 1 else ""
            raise ConfigError(f"replicate={self.replicate}{among} does not divide the {self.world_size} processes")
        mesh = mesh_of(self.root_device.type, self.replicate, self.world_size // groups, self.tensor_parallel)
        flat = mesh["replicate", "shard"]._flatten("data_parallel")
        for group in (*mesh.get_all_groups(), flat.get_group()):
            if self._timeout is not None:
                _set_pg_timeout(self._timeout, group)  # new groups wait as long as torch does by default
        self._device_mesh = mesh
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = mesh

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        # Processes that split a model, which stand side by side, get the same batches.
        each = self.tensor_parallel
        return {"num_replicas": self.world_size // each, "rank": self.global_rank // each}

    # -- sharding --------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer) -> None:
        module = self.lightning_module
        assert module is not None
        if self.cpu_offload and self.root_device.type == "cpu":
            raise ConfigError("cpu_offload=True was asked for, but the run is on the CPU already; leave it out")
        refuse_callbacks(trainer)
        check_agreement(self, module)
        refuse_meta(module)
        refuse_unmade(module)
        share_values(self, module)
        refuse_unshardable(module, self._casts())
        self.precision_plugin.convert_module(module)
        bring_scales(module, self.root_device)
        if self.tensor_parallel > 1:
            share_random_state(self.device_mesh["tensor_parallel"])
            self.split_layers += split(module, self.device_mesh["tensor_parallel"])
            self._batch_checked = False
        if self.activation_checkpointing:
            checkpoint_activations(module, self.units)
        self.sharded_units += shard(module, self.units, self.fully_shard_arguments(), prefetch=self.prefetch)
        read_weights(module, torch.device("cpu") if self.cpu_offload else self.root_device)
        refuse_meta(module)
        super().setup(trainer)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        refuse_optimizers(self.optimizers)

    def _casts(self) -> list[torch.dtype]:
        """Return the dtypes that parameters of the run are cast to."""
        plugin = self.precision_plugin
        gather = [] if self.gather_dtype is None else [_DTYPES[self.gather_dtype]]
        return [*gather, *([plugin._desired_input_dtype] if isinstance(plugin, HalfPrecision) else [])]

    def fully_shard_arguments(self) -> dict[str, Any]:
        """Return what every unit is sharded with, from the settings and the precision of the Trainer."""
        mesh: DeviceMesh = self.device_mesh
        arguments: dict[str, Any] = {
            "mesh": mesh["replicate", "shard"] if self.replicate > 1 else mesh["shard"],
            "reshard_after_forward": self.reshard_after_forward,
            "shard_placement_fn": along(mesh["shard"].size()),
            "offload_policy": CPUOffloadPolicy() if self.cpu_offload else OffloadPolicy(),
        }
        gather = None if self.gather_dtype is None else _DTYPES[self.gather_dtype]
        reduce = None if self.reduce_dtype is None else _DTYPES[self.reduce_dtype]
        if gather is not None and reduce is None:
            reduce = torch.float32
        if gather is not None or reduce is not None:
            arguments["mp_policy"] = MixedPrecisionPolicy(param_dtype=gather, reduce_dtype=reduce)
        return arguments

    @contextlib.contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        module: Any = self.lightning_module
        with super().block_backward_sync(), _FSDPNoSync(module, enabled=True):
            yield

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.tensor_parallel > 1 and not self._batch_checked:
            check_batch(self.device_mesh["tensor_parallel"], args[0])
            self._batch_checked = True
        return super().training_step(*args, **kwargs)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return True

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return what the module's ``state_dict`` holds: its parts here for a folder, whole and on rank 0 alone for a file."""
        module = self.lightning_module
        assert module is not None
        if self._save_distributed_checkpoint:
            return super().lightning_module_state_dict()
        state: dict[str, Any] = gathered(dict(module.state_dict()), keep=self.global_rank == 0)
        return state if self.global_rank == 0 else {}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer: by names for a folder, by position and whole for a file."""
        if self._save_distributed_checkpoint:
            return super().optimizer_state(optimizer)
        bare: Optimizer = getattr(optimizer, "optimizer", optimizer)
        state: dict[str, Any] = gathered(bare.state_dict(), keep=self.global_rank == 0)
        return state

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Return the whole checkpoint in a file or a folder; what it holds is taken over afterwards, as on one device."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            return read_folder(path)
        try:
            checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        except UnpicklingError as error:
            raise CheckpointMismatchError(
                f"{str(path)!r} holds more than plain values and tensors, and Lightning does not tell strategies that shard of weights_only=False; if you "
                f"trust the file, name what it holds with torch.serialization.add_safe_globals([...]) in every process ({error})"
            ) from error
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        module = self.lightning_module
        assert module is not None
        load_into(module, checkpoint["state_dict"])

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(sharded_optimizer_state(state, optimizer))
