"""Continuations that a model generates, as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError
from lightning_peft.evaluation.live_models import device_of, longest_input, room_for
from lightning_peft.evaluation.log_likelihood import encode, prefix_token


def continuations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_length: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[str]:
    """Return what ``model`` writes after each prompt, in their order, without the prompt.

    Args:
        model: a model of transformers, or anything with its ``generate``.
        tokenizer: its tokenizer.
        prompts: texts; an empty one is the token of beginning, or else of end. Of one that is too long the beginning is left out.
        max_new_tokens: most tokens that are written.
        stop: texts that end a continuation; they and what follows are cut off.
        batch_size: prompts in a batch.
        temperature: 0 takes the likeliest token each time.
        top_p: sample among the likeliest tokens of so much probability.
        max_length: tokens that the model takes; what it says itself if None.
        options: further arguments of ``generate``.

    Raises:
        ConfigError: the model cannot generate, or there is no room for a prompt.
    """
    if not hasattr(model, "generate"):
        raise ConfigError(f"text is generated with the method generate, which {type(model).__name__} does not have")
    room = (max_length or longest_input(model, tokenizer)) - max_new_tokens
    if room < 1:
        raise ConfigError(
            f"max_new_tokens={max_new_tokens} leaves no room for a prompt: the model takes {room + max_new_tokens}"
        )
    encoded = [(encode(tokenizer, prompt) or [prefix_token(tokenizer)])[-room:] for prompt in prompts]
    order = sorted(range(len(encoded)), key=lambda index: (-len(encoded[index]), encoded[index]))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling: dict[str, Any] = {"temperature": None, "top_p": None, "top_k": None, "do_sample": False}
    if temperature:
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0, "do_sample": True}
    texts = [""] * len(encoded)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids, mask = _padded([encoded[index] for index in chosen], padding or 0, device_of(model))
        with room_for(model, ids):
            made = model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                pad_token_id=padding,
                stopping_criteria=_stopping(tokenizer, stop, ids.shape[1]),
                **{**sampling, **(options or {})},
            )
        for index, tokens in zip(chosen, made[:, ids.shape[1] :].tolist(), strict=True):
            texts[index] = _cut(tokenizer.decode(tokens, skip_special_tokens=True), stop)
    return texts


def _padded(rows: Sequence[list[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows padded on the left, and their mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*[padding] * (longest - len(row)), *row] for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _cut(text: str, stop: Sequence[str]) -> str:
    for word in stop:
        text = text.split(word)[0] if word else text
    return text


def _stopping(tokenizer: Any, stop: Sequence[str], begin: int) -> Any:
    """Return criteria that end a row when a word of ``stop`` is in what was written since ``begin``."""
    from transformers import StoppingCriteriaList

    words = [word for word in stop if word]

    def ended(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        texts = tokenizer.batch_decode(ids[:, begin:], skip_special_tokens=True)
        return torch.tensor([any(word in text for word in words) for text in texts], device=ids.device)

    criteria: list[Callable[..., Tensor]] = [ended] if words else []
    return StoppingCriteriaList(criteria)
