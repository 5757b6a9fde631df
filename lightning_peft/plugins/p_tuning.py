"""P-tuning: embeddings in front of the input that a small network makes while training.

Liu et al., "GPT Understands, Too", 2021 (arXiv:2103.10385)::

    P = MLP(E)              encoder = mlp:  three linear layers with ReLU between them
    P = MLP(LSTM(E))        encoder = lstm: both directions, then two linear layers; as in the paper
    h_1 ... h_L = backbone([P; x_1 ... x_L])[n:]

E is (num_virtual_tokens, hidden) and trained with the network. An adapter folder holds P; a ``.ckpt`` holds E and the network.
How the virtual tokens get into a model is in :mod:`lightning_peft.arithmetic.prompts`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.arithmetic.prompts import PromptAdapter, PromptMethod
from lightning_peft.errors import AdapterConfigError, ConfigError
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method

_ENCODERS = ("mlp", "lstm")
_NUM_LAYERS = 2


class TwoWayLSTM(nn.Module):
    """An LSTM in both directions with the parameters of ``nn.LSTM``, which ``torch.compile`` does not take into its graph.

    Args:
        inputs: width of the input.
        hidden: width of the output of one direction.
        num_layers: layers.
        dropout: between layers while training.
    """

    def __init__(self, inputs: int, hidden: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.hidden, self.num_layers, self.dropout = hidden, num_layers, dropout
        for layer in range(num_layers):
            for way in ("", "_reverse"):
                width = 2 * hidden if layer else inputs
                shapes = {"weight_ih": (4 * hidden, width), "weight_hh": (4 * hidden, hidden)}
                for name, shape in {**shapes, "bias_ih": (4 * hidden,), "bias_hh": (4 * hidden,)}.items():
                    self.register_parameter(
                        f"{name}_l{layer}{way}", nn.Parameter(torch.empty(shape, dtype=torch.float32))
                    )

    def reset_parameters(self) -> None:
        """Give the values ``nn.LSTM`` starts with."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(self.hidden**-0.5), self.hidden**-0.5)

    @override
    def forward(self, values: Tensor) -> Tensor:
        """Run over ``values`` (length, inputs) and return (length, 2 * hidden)."""
        start = values.new_zeros(2 * self.num_layers, 1, self.hidden)
        options = (True, self.num_layers, self.dropout, self.training, True, False)  # biases ... both ways, batch first
        result, _, _ = torch.lstm(values[:, None], (start, start), list(self.parameters()), *options)
        return result[:, 0]


class EncodedPrompts(PromptAdapter):
    """Virtual tokens that a network makes; once loaded from a folder, they stand for themselves.

    Args:
        module: the backbone.
        num_virtual_tokens: how many.
        encoder: ``mlp`` or ``lstm``.
        hidden_size: width of the network; None for that of the embeddings.
        num_layers: layers of the LSTM.
        dropout: between the layers of the LSTM.
    """

    def __init__(
        self,
        module: nn.Module,
        num_virtual_tokens: int,
        *,
        encoder: str = "mlp",
        hidden_size: int | None = None,
        num_layers: int = _NUM_LAYERS,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(module, num_virtual_tokens)
        width = self.features
        self.hidden_size = hidden = hidden_size or width
        with torch.device("meta"):  # no initial values are drawn here
            self.embedding = nn.Embedding(num_virtual_tokens, width, dtype=torch.float32)
            if encoder == "lstm":
                self.lstm_head: nn.Module | None = TwoWayLSTM(width, hidden, num_layers, dropout)
                sizes = [2 * hidden, 2 * hidden, width]
            else:
                self.lstm_head = None
                sizes = [width, hidden, hidden, width]
            layers: list[nn.Module] = []
            for inputs, outputs in itertools.pairwise(sizes):
                layers += [nn.Linear(inputs, outputs, dtype=torch.float32), nn.ReLU()]
            self.mlp_head = nn.Sequential(*layers[:-1])
        self.to_empty(device=self.device)

    @override
    def reset_parameters(self, base_layer: nn.Module) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.Linear, TwoWayLSTM)):
                module.reset_parameters()

    @override
    def prompts(self) -> Tensor:
        if "prompt_embeddings" in self._parameters:
            return self.prompt_embeddings
        with torch.autocast(self.embedding.weight.device.type, enabled=False):  # as precise as what a file holds
            values = self.embedding.weight if self.lstm_head is None else self.lstm_head(self.embedding.weight)
            return self.mlp_head(values)  # type: ignore[no-any-return]  # (num_virtual_tokens, hidden)

    # -- files hold the prompts, whatever they come from ---------------------------------------------------------------

    @override
    @torch.no_grad()  # where gradients are wanted, torch may run an LSTM in another way, whose results differ in the last bits
    def disk_tensors(self) -> dict[str, Tensor]:
        training = self.training
        self.eval()  # what is saved comes without dropout
        try:
            return {"prompt_embeddings": self.prompts()}
        finally:
            self.train(training)

    @override
    def fit_to(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Give up the network where what was saved is prompts."""
        if "prompt_embeddings" in shapes and "prompt_embeddings" not in self._parameters:
            prompts = torch.zeros_like(self.embedding.weight, requires_grad=False)
            trained = self.embedding.weight.requires_grad
            for name in list(self._modules):
                delattr(self, name)
            self.prompt_embeddings = nn.Parameter(prompts, requires_grad=trained)


@dataclass(frozen=True, kw_only=True)
class PTuning(PromptMethod):
    """Embeddings in front of the input, made by a trained network.

    Example:
        >>> from lightning_peft import adapter_state_dict, inject
        >>> from lightning_peft.testing import tiny_llama
        >>> model = tiny_llama()
        >>> _ = inject(model, PTuning(num_virtual_tokens=5, hidden_size=16))
        >>> {name: tuple(tensor.shape) for name, tensor in adapter_state_dict(model).items()}
        {'model.prompt_embeddings': (5, 64)}
    """

    name: ClassVar[str] = "p_tuning"
    peft_type: ClassVar[str | None] = "P_TUNING"
    hf_prefix: ClassVar[str] = "base_model."

    encoder: Literal["mlp", "lstm"] = "mlp"
    """The network: three linear layers, or an LSTM of both directions with two linear layers."""
    hidden_size: int | None = None
    """Width of the network; that of the embeddings if not given."""
    num_layers: int = _NUM_LAYERS
    """Layers of the LSTM; the ``mlp`` has always the same."""
    dropout: float = 0.0
    """Dropout between the layers of the LSTM while training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in _ENCODERS:
            raise ConfigError(f"PTuning encoder must be one of {', '.join(_ENCODERS)}, got {self.encoder!r}")
        for name in ("hidden_size", "num_layers"):
            value = getattr(self, name)
            if name == "hidden_size" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"PTuning {name} must be a positive integer, got {value!r}")
        number = isinstance(self.dropout, (int, float)) and not isinstance(self.dropout, bool)
        if not number or not 0 <= self.dropout < 1:
            raise ConfigError(f"PTuning dropout must be at least 0 and below 1, got {self.dropout!r}")
        if self.encoder == "mlp" and (self.num_layers != _NUM_LAYERS or self.dropout):
            raise ConfigError(
                f"PTuning num_layers and dropout are for encoder='lstm', got num_layers={self.num_layers!r} and "
                f"dropout={self.dropout!r} with encoder='mlp'"
            )
        if self.dropout and self.num_layers == 1:
            raise ConfigError(
                f"PTuning dropout acts between layers of the LSTM, got dropout={self.dropout!r} and num_layers=1"
            )

    @override
    def prompt_adapter(self, module: nn.Module) -> PromptAdapter:
        return EncodedPrompts(
            module,
            self.num_virtual_tokens,
            encoder=self.encoder,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            dropout=self.dropout,
        )

    @override
    def to_hf_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        common = super().to_hf_config(adapters)
        return {
            **common,
            "encoder_reparameterization_type": self.encoder.upper(),
            "encoder_hidden_size": self.hidden_size or common["token_dim"],
            "encoder_num_layers": self.num_layers,
            "encoder_dropout": self.dropout,
        }

    @classmethod
    @override
    def from_hf_config(cls, config: Mapping[str, Any]) -> PTuning:
        kind, width, depth, dropout = (
            f"encoder_{word}" for word in ("reparameterization_type", "hidden_size", "num_layers", "dropout")
        )
        encoder = config.get(kind) or "MLP"
        if encoder not in ("MLP", "LSTM"):
            raise AdapterConfigError(f"{kind} is {encoder!r}, but PTuning knows MLP and LSTM")
        fields: dict[str, Any] = {"encoder": encoder.lower(), "hidden_size": config.get(width)}
        if encoder == "LSTM":
            # HF PEFT lets torch ignore a dropout that has no place to act.
            layers = config.get(depth, _NUM_LAYERS)
            fields |= {"num_layers": layers, "dropout": 0.0 if layers == 1 else config.get(dropout, 0.0)}
        return cls.from_hf_fields(config, (kind, width, depth, dropout), fields)


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register p-tuning."""
    return [PTuning]
