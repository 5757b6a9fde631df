"""Loading with transformers while a method changes the base: a layer is replaced as soon as its weights are read.

transformers builds the model without memory, reads the shards tensor by tensor and lets a quantizer of its own look at each
tensor before it goes in. Here such a quantizer stands for any method with a
:class:`~lightning_peft.layer_preparation.LayerPreparation`::

    shards ── read one tensor ── rename, convert ── cast ──┬── of a layer to replace: complete? ── replacement ──┬── model
              (transformers)     (transformers)            └── of anything else ─────────────────────────────────┘

Names, conversions, tied weights, buffers, missing and unexpected keys are transformers' own. A layer that cannot be
told complete while the shards are read (tied to another, at two places, absent from the checkpoint) is replaced at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin
from typing_extensions import override

from lightning_peft.interfaces import Method
from lightning_peft.layer_preparation import LayerPreparation, prepare_layers

NAME = "lightning_peft"
"""Under which transformers knows this way of loading."""


def load_layerwise(load: Callable[..., nn.Module], method: Method) -> nn.Module:
    """Return the model that ``load`` gives, with the layer preparation of ``method`` done.

    Args:
        load: calls ``from_pretrained`` with the keyword arguments that it is given.
        method: whose :meth:`~lightning_peft.interfaces.Method.layer_preparation` is asked of the model before its weights are read.
    """
    AUTO_QUANTIZER_MAPPING.setdefault(NAME, Reader)
    loading = Loading(method)
    try:
        model = load(quantization_config=loading)
    except Exception:
        if loading.failure is not None:  # transformers reports it once for each layer
            raise loading.failure from None
        raise
    if loading.preparation is not None:
        prepare_layers(model, loading.preparation, loading.preparation.paths - loading.done)
        loading.preparation.finish()
    return model


class Loading(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is not typed
    """One load: what is to be replaced, and what was. It passes through transformers as a quantization configuration.

    Args:
        method: the method that is asked for a layer preparation.
    """

    def __init__(self, method: Method) -> None:
        super().__init__(quant_method=NAME)
        self.method = method
        self.preparation: LayerPreparation | None = None
        self.waiting: set[str] = set()
        self.done: set[str] = set()
        self.failure: Exception | None = None

    def __deepcopy__(self, memo: Any) -> Loading:
        # transformers copies its arguments and configurations; the load is one.
        return self

    @override
    def to_dict(self) -> dict[str, Any]:
        """Return what may be logged or written."""
        return {"quant_method": NAME}

    def begin(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        """Ask the method what it does to ``model``, which has no weights yet and gets them in ``dtype``."""
        self.preparation = self.method.layer_preparation(model)
        if self.preparation is None:
            return
        links: Any = getattr(model, "all_tied_weights_keys", None) or {}
        tied = {key.rpartition(".")[0] for pair in links.items() for key in pair}
        places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
        for path in self.preparation.paths - tied:
            layer = model.get_submodule(path)
            own = list(layer.parameters(recurse=False))
            # What transformers casts to another precision than the rest, it only casts if it is not quantised.
            plain = not layer._modules and not layer._buffers and all(tensor.dtype == dtype for tensor in own)
            if own and plain and places[id(layer)] == 1:
                self.waiting.add(path)

    def arrived(self, model: nn.Module, name: str, value: Tensor) -> bool:
        """Take a tensor that was read, and replace its layer if that is now complete; False where it is not for us."""
        path, _, own = name.rpartition(".")
        if path not in self.waiting or self.preparation is None:
            return False
        layer = model.get_submodule(path)
        if getattr(layer, own).shape != value.shape:  # for transformers to report
            self.waiting.discard(path)
            return False
        parameter = nn.Parameter(value, requires_grad=value.is_floating_point())
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # else transformers gives it random values
        setattr(layer, own, parameter)
        if not any(tensor.is_meta for tensor in layer.parameters()):
            made = self.preparation.replacement(path, layer)
            for module in made.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]
            for tensor in made.parameters():
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]
            model.set_submodule(path, made)
            self.waiting.discard(path)
            self.done.add(path)
        return True


class Arrival(ConversionOps):  # type: ignore[misc]  # transformers is not typed
    """Where transformers would quantise a tensor that it has read.

    Args:
        loading: the load.
    """

    def __init__(self, loading: Loading) -> None:
        self.loading = loading

    @override
    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, Any], *, model: Any, missing_keys: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the tensors that transformers shall put into the model itself."""
        rest = {}
        for name in list(input_dict):
            held = input_dict.pop(name)
            value = held[0] if isinstance(held, list) else held
            del held
            try:
                taken = self.loading.arrived(model, name, value)
            except Exception as error:
                self.loading.failure = self.loading.failure or error
                raise
            if not taken:
                rest[name] = value
            elif missing_keys is not None:
                missing_keys.discard(name)
            del value
        return rest


class Reader(HfQuantizer):  # type: ignore[misc]  # transformers is not typed
    """How transformers is told which tensors to hand over. The model keeps no trace of it."""

    @override
    def preprocess_model(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        """Called with the model on the meta device."""
        self.quantization_config.begin(model, dtype)

    @override
    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Tell whether a tensor is one of a layer to replace."""
        return param_name.rpartition(".")[0] in self.quantization_config.waiting

    @override
    def get_quantize_ops(self) -> Arrival:
        """Return what such a tensor is handed to."""
        return Arrival(self.quantization_config)

    @override
    def postprocess_model(self, model: Any, **kwargs: Any) -> None:
        """Leave the model as if it had been loaded without a quantizer."""
        del model.hf_quantizer
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "quantization_config", None) is self.quantization_config:
                del config.quantization_config

    @property
    @override
    def is_trainable(self) -> bool:
        """Asked by transformers' own Trainer."""
        return True

    @override
    def is_serializable(self) -> bool:
        """Asked before a model with a quantizer is saved."""
        return False
