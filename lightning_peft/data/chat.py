"""Which characters of a conversation the assistant wrote, and which tokens those are.

A chat template says it itself where it marks them (``{% generation %}``). Any other is asked turn by turn::

    messages[:i], with the prompt for an answer    <user> Hi <assistant>
    messages[:i + 1]                               <user> Hi <assistant> Hello </s>
                                                                         └───┬────┘
                                                                   turn i, to be learned

The texts of all turns must begin the text of the whole conversation. A template for which they do not (it moves a system message,
drops the thoughts of earlier turns, ...) is refused: no mask of it could be told to be right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_peft.batch_parts import IGNORED
from lightning_peft.errors import BadRowError, ConfigError
from lightning_peft.source_rows.reading import Row

Spans = list[tuple[int, int]]
"""Characters from the first to before the second."""

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


def token_labels(encoded: Mapping[str, Any], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Return the labels of tokens: a token is predicted if any of its characters lies in a span.

    Args:
        encoded: ``input_ids`` and ``offset_mapping`` of a fast tokenizer.
        spans: characters to predict, in order.

    Example:
        >>> token_labels({"input_ids": [7, 8, 9], "offset_mapping": [(0, 2), (2, 5), (5, 6)]}, [(3, 5)])
        [-100, 8, -100]
    """
    labels, place = [], 0
    for one, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        while place < len(spans) and spans[place][1] <= start:
            place += 1
        inside = place < len(spans) and start < end and spans[place][0] < end
        labels.append(one if inside else IGNORED)
    return labels


def check_fast(tokenizer: Any) -> None:
    """Refuse a tokenizer that does not know which characters a token stands for.

    Raises:
        ConfigError: it does not.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"{type(tokenizer).__name__} does not tell which characters a token stands for, by which answers are found; "
            "use the fast tokenizer of the model (a folder with tokenizer.json)"
        )


def checked_messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """Return the messages of a row.

    Raises:
        BadRowError: they are no messages, or the assistant writes none or nothing.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise BadRowError("empty" if messages == [] else "malformed", where, f"has no list of messages: {messages!r}")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRowError("malformed", where, f"has a message without a role: {message!r}")
        if message.get("content") is None and not message.get("tool_calls"):
            raise BadRowError("malformed", where, f"has a message without content: {message!r}")
    messages = [{**message, "content": _text_of(message, where)} for message in messages]
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers or not all(message.get("tool_calls") or str(message["content"]).strip() for message in answers):
        raise BadRowError("empty", where, "has no answer of the assistant, or an empty one")
    # Data sets of the hub have all fields in all messages, and None where one has none; templates ask whether a field is there.
    return [
        {name: value for name, value in message.items() if value is not None or name == "content"}
        for message in messages
    ]


def _text_of(message: Mapping[str, Any], where: str) -> Any:
    """Return the content of a message; that in parts, ``[{"type": "text", "text": "Hi"}]``, as one text."""
    content = message.get("content")
    if not isinstance(content, (list, tuple)):
        if content is None or isinstance(content, str) or message["role"] not in ("system", "user", "assistant"):
            return content
        raise BadRowError("malformed", where, f"has a {type(content).__name__} as the content of a message, not text")
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise BadRowError("malformed", where, f"has a message with a part that is no text: {part!r}")
    return "".join(part["text"] for part in content)


def tools_of(row: Row) -> list[Any]:
    """Return the tools that a row says the assistant has, which may be written as JSON; none if it does not.

    Raises:
        BadRowError: they are no list.
    """
    tools = row.values.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    except ValueError as error:
        raise BadRowError("malformed", row.where, f"has 'tools' that are not JSON: {error}") from error
    if tools and not isinstance(tools, list):
        raise BadRowError("malformed", row.where, f"has a {type(tools).__name__} as 'tools', not a list")
    return tools or []


def conversation_labels(
    tokenizer: Any, messages: list[dict[str, Any]], where: str, tools: Sequence[Any] = ()
) -> tuple[list[int], list[int]]:
    """Return the tokens of a conversation and their labels: those of the assistant's turns are predicted.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        messages: as ``apply_chat_template`` takes them.
        where: the place of the row, for messages.
        tools: what the template says the assistant may call.

    Raises:
        ConfigError: there is no chat template, or it does not tell turns apart.
        BadRowError: the template refuses the conversation, or an answer has no tokens.
    """
    check_fast(tokenizer)
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ConfigError(
            "the tokenizer has no chat template; give chat_template=, a file with that of the model, or a model that was tuned for chat"
        )
    if _MARKS.search(template):
        return _marked(tokenizer, messages, where, tools)
    spans = assistant_spans(tokenizer, messages, where, tools)
    text = _rendered(tokenizer, messages, where, tools)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels = token_labels(encoded, spans)
    for start, end in spans:
        if not any(s < end and start < e for s, e in encoded["offset_mapping"]):
            raise BadRowError("empty", where, f"has an answer without tokens: {text[start:end]!r}")
    return list(encoded["input_ids"]), labels


def _marked(
    tokenizer: Any, messages: list[dict[str, Any]], where: str, tools: Sequence[Any]
) -> tuple[list[int], list[int]]:
    try:
        encoded = tokenizer.apply_chat_template(
            messages, tools=list(tools) or None, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except _template_errors() as error:
        raise BadRowError("malformed", where, f"is refused by the chat template: {error}") from error
    ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    if not any(mask):
        raise BadRowError("empty", where, "has no token that the chat template marks as an answer")
    return ids, [one if kept else IGNORED for one, kept in zip(ids, mask, strict=True)]


def assistant_spans(tokenizer: Any, messages: list[dict[str, Any]], where: str, tools: Sequence[Any] = ()) -> Spans:
    """Return where in the text of a conversation the turns of the assistant stand, without the prompts for them.

    Raises:
        ConfigError: the text of some turns does not begin that of the whole conversation.
    """
    whole = _rendered(tokenizer, messages, where, tools)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if number == 0:
            raise BadRowError(
                "malformed", where, "begins with an answer, so that it cannot be told where its text starts"
            )
        before = _rendered(tokenizer, messages[:number], where, tools, prompt=True)
        after = _rendered(tokenizer, messages[: number + 1], where, tools)
        if not whole.startswith(after) or not after.startswith(before):
            raise ConfigError(
                f"{where}: the chat template writes turn {number + 1} in another way where the conversation ends there, so it cannot be told "
                "which tokens are answers; mark them in the template with {% generation %} ... {% endgeneration %}, and give it as "
                "chat_template="
            )
        spans.append((len(before), len(after)))
    return spans


def _rendered(
    tokenizer: Any, messages: list[dict[str, Any]], where: str, tools: Sequence[Any], prompt: bool = False
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt
        )
    except _template_errors() as error:
        raise BadRowError("malformed", where, f"is refused by the chat template: {error}") from error
    return str(text)


def _template_errors() -> tuple[type[Exception], ...]:
    import jinja2

    return (jinja2.exceptions.TemplateError, TypeError)
