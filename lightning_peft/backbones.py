"""The backbone of a model of transformers: what turns tokens into hidden states, without a head."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.errors import TargetError

_ARGUMENTS = {"input_ids", "inputs_embeds", "attention_mask"}
# A head; encoder and decoder in one call; recurrent states, which do not tell whether they are empty; other inputs than embeddings.
_REFUSED = {"labels", "decoder_input_ids", "cache_params", "state", "mems"}
_REFUSED |= {"pixel_values", "input_features", "per_layer_inputs"}
NEEDED = (
    "virtual tokens go in front of one backbone of transformers (a decoder, an encoder, or an encoder beside its decoder, that takes "
    "inputs_embeds and a cache of keys and values) inside a model with a head, and {model} is no such model; put a bare backbone "
    "inside another module"
)
"""What a model must have, for messages; ``{model}`` stands for its class."""


def is_backbone(module: nn.Module) -> bool:
    """Tell whether ``module`` is a model of transformers that turns tokens into hidden states, and not one that leaves it to another."""
    inner = [unwrapped(child) for name, child in module.named_children() if name in ("encoder", "decoder")]
    return _takes_embeddings(module) and not any(_takes_embeddings(child) for child in inner)


def _takes_embeddings(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    if config is None or not callable(getattr(module, "get_input_embeddings", None)):
        return False
    try:
        embedding = module.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return False
    names = set(inspect.signature(module.forward).parameters)
    # T5 has one class for both, which says what it is.
    pair = "encoder_hidden_states" in names and getattr(config, "is_encoder_decoder", False)
    beside_an_encoder = getattr(module, "is_decoder", pair)
    known = names >= _ARGUMENTS and not names & _REFUSED
    return known and not beside_an_encoder and hasattr(embedding, "embedding_dim")


def backbone_path(model: nn.Module) -> str:
    """Return where the backbone of ``model`` is.

    Raises:
        TargetError: there is none, or more than one.
    """
    kind = type(model).__name__
    found = [path for path, module in base_modules(model) if path and is_backbone(unwrapped(module))]
    if len(found) != 1:
        many = f"{len(found)} backbones ({found})" if found else "no backbones"
        raise TargetError(f"{kind} has {many}; {NEEDED.format(model=kind)}")
    return found[0]


def input_embedding(module: nn.Module) -> Any:
    """Return the embedding of tokens of a backbone, without adapters."""
    return unwrapped(module.get_input_embeddings())  # type: ignore[operator]
