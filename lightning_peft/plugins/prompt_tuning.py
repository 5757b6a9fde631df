"""Prompt tuning: trained embeddings in front of those of the input, and nothing else.

Lester, Al-Rfou, Constant, "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021 (arXiv:2104.08691); the "PreEmbed" that
the paper of LoRA compares with::

    h_1 ... h_L = backbone([P; x_1 ... x_L])[n:]        P: (num_virtual_tokens, hidden), trained

How the virtual tokens get into a model is in :mod:`lightning_peft.arithmetic.prompts`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_peft.arithmetic.prompts import PromptAdapter, PromptMethod
from lightning_peft.backbones import input_embedding
from lightning_peft.errors import AdapterConfigError, ConfigError
from lightning_peft.hookspecs import hookimpl
from lightning_peft.interfaces import Adapter, Method

_INITS = {"vocabulary": "SAMPLE_VOCAB", "random": "RANDOM", "text": "TEXT"}
_COMMON = 5000
"""The first tokens of a vocabulary, which are its most frequent ones where a tokenizer was learned from text."""


class PromptEmbeddings(PromptAdapter):
    """Virtual tokens that are trained as they are.

    Args:
        module: the backbone.
        num_virtual_tokens: how many.
        init: where the first values come from.
        text: what they say, for ``init="text"``.
        tokenizer: folder or hub id of the tokenizer of ``text``; None for that of the model.
    """

    def __init__(
        self,
        module: nn.Module,
        num_virtual_tokens: int,
        *,
        init: str = "vocabulary",
        text: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(module, num_virtual_tokens)
        self.init, self.text, self.tokenizer = init, text, tokenizer
        shape = (num_virtual_tokens, self.features)
        self.prompt_embeddings = nn.Parameter(torch.empty(shape, device=self.device, dtype=torch.float32))

    @override
    def prompts(self) -> Tensor:
        return self.prompt_embeddings

    @override
    @torch.no_grad()
    def reset_parameters(self, base_layer: nn.Module) -> None:
        embedding = input_embedding(base_layer)
        device, common = embedding.weight.device, min(_COMMON, embedding.num_embeddings)
        if self.init == "text":
            ids = torch.tensor(self._tokens(base_layer), device=device)
        elif self.init == "vocabulary":
            ids = torch.randint(common, (self.num_virtual_tokens,), device=device)
        else:
            rows = embedding(torch.arange(common, device=device)).float()
            random = torch.randn_like(self.prompt_embeddings)
            self.prompt_embeddings.copy_(rows.mean(dim=0) + random * rows.std(dim=0))
            return
        self.prompt_embeddings.copy_(embedding(ids))

    def _tokens(self, base_layer: nn.Module) -> list[int]:
        """Return the tokens of the text, repeated or cut to as many as there are virtual tokens."""
        from transformers import AutoTokenizer

        name = self.tokenizer or getattr(base_layer.config, "_name_or_path", "")
        try:
            ids = list(AutoTokenizer.from_pretrained(name)(self.text)["input_ids"]) if name else []
        except (OSError, ValueError) as error:
            raise ConfigError(f"PromptTuning text needs a tokenizer, but {name!r} cannot be loaded: {error}") from error
        if not ids:
            found = f"tokenizer {name!r} makes none" if name else "the model does not say which tokenizer it has"
            raise ConfigError(f"PromptTuning text={self.text!r} must give tokens, but {found}; set tokenizer=")
        return (ids * self.num_virtual_tokens)[: self.num_virtual_tokens]


@dataclass(frozen=True, kw_only=True)
class PromptTuning(PromptMethod):
    """Trained embeddings in front of the input.

    Example:
        >>> from lightning_peft import inject, trainable_summary
        >>> from lightning_peft.testing import tiny_llama
        >>> model = tiny_llama()
        >>> inject(model, PromptTuning(num_virtual_tokens=5)).paths
        ['model']
        >>> trainable_summary(model).trainable == 5 * 64
        True
    """

    name: ClassVar[str] = "prompt_tuning"
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    hf_prefix: ClassVar[str] = "base_model."
    _from_file: ClassVar[bool] = False  # values come from a file, so that no tokenizer is asked for the first ones

    init: Literal["vocabulary", "random", "text"] = "vocabulary"
    """First values: embeddings of frequent tokens drawn at random, random ones of their mean and deviation, or those of ``text``."""
    text: str | None = None
    """What the virtual tokens say at first, repeated or cut to their number; for ``init: text``."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer for ``text``; that of the model if not given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init not in _INITS:
            raise ConfigError(f"PromptTuning init must be one of {', '.join(_INITS)}, got {self.init!r}")
        for name in ("text", "tokenizer"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ConfigError(f"PromptTuning {name} must be a string that is not empty, got {value!r}")
            if value is not None and self.init != "text":
                raise ConfigError(f"PromptTuning {name}={value!r} is for init='text', got init={self.init!r}")
        if self.init == "text" and self.text is None:
            raise ConfigError("PromptTuning init='text' needs text, got text=None")

    @override
    def prompt_adapter(self, module: nn.Module) -> PromptAdapter:
        return PromptEmbeddings(
            module,
            self.num_virtual_tokens,
            init="vocabulary" if self._from_file else self.init,
            text=self.text,
            tokenizer=self.tokenizer,
        )

    @override
    def loaded_over(self, model: nn.Module) -> Method:
        return self.filled()

    def filled(self) -> PromptTuning:
        """Return this method for adapters that get their values from a file."""
        loaded = copy.copy(self)
        object.__setattr__(loaded, "_from_file", True)
        return loaded

    @override
    def to_hf_config(self, adapters: Mapping[str, Adapter]) -> dict[str, Any]:
        # HF PEFT wants to know a tokenizer for a text, so without one the file does not mention the text.
        named = self.init == "text" and self.tokenizer is not None
        words = {"prompt_tuning_init_text": self.text, "tokenizer_name_or_path": self.tokenizer} if named else {}
        init = "SAMPLE_VOCAB" if self.init == "text" and not named else _INITS[self.init]
        return {**super().to_hf_config(adapters), "prompt_tuning_init": init, **words}

    @classmethod
    @override
    def from_hf_config(cls, config: Mapping[str, Any]) -> PromptTuning:
        words = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
        found = config.get("prompt_tuning_init") or "RANDOM"
        init = next((name for name, theirs in _INITS.items() if theirs == found), None)
        if init is None:
            raise AdapterConfigError(
                f"prompt_tuning_init is {found!r}, but PromptTuning knows {', '.join(_INITS.values())}"
            )
        fields: dict[str, Any] = {"init": init}
        if init == "text":
            fields |= {"text": config.get(words[1]), "tokenizer": config.get(words[2])}
        return cls.from_hf_fields(config, words, fields).filled()


@hookimpl
def register_methods() -> list[type[Method]]:
    """Register prompt tuning."""
    return [PromptTuning]
