"""A model that is in memory, adapters and all, as lm-evaluation-harness sees models. Importing this needs the extra ``eval``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn
from typing_extensions import override

from lightning_peft.evaluation.generating import continuations
from lightning_peft.evaluation.live_models import device_of, longest_input
from lightning_peft.evaluation.log_likelihood import encode, prefix_token, score


class LiveLM(TemplateLM):  # type: ignore[misc]
    """The harness's view of a causal language model as it stands: nothing is loaded, copied, moved or put into another mode.

    Every process that makes one runs all requests itself.

    Args:
        model: a causal language model of transformers, adapted or not.
        tokenizer: its tokenizer.
        batch_size: requests in a batch.
        max_length: tokens that the model takes; what it says itself if None.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, batch_size: int = 8, max_length: int | None = None) -> None:
        super().__init__()
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.max_length = max_length or longest_input(model, tokenizer)
        self._device = device_of(model)

    @property
    @override
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    @override
    def prefix_token_id(self) -> int:
        return prefix_token(self.tokenizer)

    @property
    @override
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    @override
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            return encode(self.tokenizer, string)
        found: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return found

    @override
    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    @override
    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        scored = score(self.model, pairs, batch_size=self.batch_size, max_length=self.max_length)
        return [(one.total, one.greedy) for one in scored]

    @override
    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            scored = score(self.model, pairs, batch_size=self.batch_size, max_length=self.max_length)
            totals.append(sum(one.total for one in scored))
        return totals

    @override
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        texts: list[str] = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for indices in groups.values():
            settings = dict(requests[indices[0]].args[1])
            until = settings.pop("until", None) or []
            length = next((settings.pop(key) for key in _LENGTHS if key in settings), _MOST_TOKENS)
            temperature = float(settings.pop("temperature", 0.0) or 0.0)
            sampled = settings.pop("do_sample", temperature > 0)
            made = continuations(
                self.model,
                self.tokenizer,
                [requests[index].args[0] for index in indices],
                max_new_tokens=length,
                stop=[until] if isinstance(until, str) else until,
                batch_size=self.batch_size,
                temperature=(temperature or 1.0) if sampled else 0.0,
                top_p=settings.pop("top_p", 1.0),
                max_length=self.max_length,
                options=settings,
            )
            for index, text in zip(indices, made, strict=True):
                texts[index] = text
        return texts

    @override
    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the tokenizer's chat template writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )


_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names under which the harness gives the length of what is generated."""
_MOST_TOKENS = 256
"""That length where a task says none."""
