"""A causal language model whose weights stay in the files of its folder.

transformers builds the model as it does for every load: its names, precision, tied weights and the buffers that no file holds. In place
of the tensors it is handed tensors without values, of the shapes in the headers of the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError
from lightning_peft.out_of_core.checkpoints import INDEX, SINGLE, Checkpoint, open_checkpoint, parameter_names
from lightning_peft.out_of_core.tensor_files import DTYPES
from lightning_peft.unread_weights import Unread, mark_unread


def unread_model(path: str, **options: Any) -> nn.Module | None:
    """Return the causal language model of a folder, with its parameters on the meta device and notes of what they are in its files.

    Args:
        path: the folder.
        options: of ``from_pretrained``.

    Returns:
        The model; None where it cannot be read tensor by tensor: ``path`` is no local folder of safetensors files, or transformers makes
        a parameter of several tensors.

    Raises:
        ConfigError: the files lack a weight, or hold it in another shape.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() or not any((folder / name).is_file() for name in (INDEX, SINGLE)):
        return None
    checkpoint = open_checkpoint(folder)
    if any(entry.dtype not in DTYPES for entry in checkpoint.entries.values()):
        return None
    model = _without_values(checkpoint, options)
    names = parameter_names(model, checkpoint)
    for name, parameter in model.named_parameters():
        if not parameter.is_meta or name in names.converted or not names.keys[id(parameter)]:
            return None
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            entry = checkpoint.entries[names.keys[id(parameter)][0]]
            mark_unread(module, name, Unread(entry, parameter.dtype))
            parameter.requires_grad_(parameter.is_floating_point())
    return model if _read_buffers(model, checkpoint) else None


def _without_values(checkpoint: Checkpoint, options: dict[str, Any]) -> Any:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(checkpoint.folder)
        with torch.device("meta"):
            kind = type(transformers.AutoModelForCausalLM.from_config(config))
        state = {
            name: torch.empty(entry.shape, dtype=DTYPES[entry.dtype], device="meta").as_subclass(_NoValues)
            for name, entry in checkpoint.entries.items()
        }
        told = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
        model, report = kind.from_pretrained(None, config=config, state_dict=state, **told, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no causal language model could be loaded from {str(checkpoint.folder)!r}: {error}"
        ) from error
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise ConfigError(
            f"the files of {str(checkpoint.folder)!r} hold {name!r} in the shape {list(found)}, but by its configuration it has {list(wanted)}"
        )
    if report["missing_keys"]:
        lost = sorted(report["missing_keys"])
        raise ConfigError(
            f"the files of {str(checkpoint.folder)!r} lack {len(lost)} weights of the model, such as {lost[0]!r}, which would get random "
            "values; complete the folder"
        )
    model.config.name_or_path = model.name_or_path = str(checkpoint.folder)
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(checkpoint.folder)
    return model


class _NoValues(Tensor):
    """A tensor on the meta device that stays there, whatever device it is sent to."""

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return it in another dtype."""
        given = [kwargs.get("dtype"), *(one for one in args if isinstance(one, torch.dtype))]
        dtype = next((one for one in given if one is not None), self.dtype)
        return torch.empty(self.shape, dtype=dtype, device="meta")


def _read_buffers(model: nn.Module, checkpoint: Checkpoint) -> bool:
    """Give the buffers that the files hold their values; False where one is not to be found."""
    for path, module in model.named_modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is None or not buffer.is_meta:
                continue
            entry = checkpoint.entries.get(f"{path}.{name}" if path else name)
            if entry is None:
                return False
            module._buffers[name] = entry.read().to(buffer.dtype)
    return True
