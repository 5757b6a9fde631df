"""From the parser's complaint to a sentence: what was written, what there is, what was probably meant.

jsonargparse describes a refused value by everything it tried. :func:`explain` keeps what the user can act on. A message
of a shape it does not know is returned as it is.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence

from lightning_peft.errors import did_you_mean

_VERB = r"(?:fit|validate|test|predict|merge|convert|generate|combine|diff|inspect|prune|to-lora|fingerprint|methods|plugins)"
_MANY = 100
"""More names than this are not listed in a message."""


def explain(message: str, options: Sequence[str] = ()) -> str:
    r"""Return ``message`` of the parser in plain words.

    Args:
        message: what jsonargparse says.
        options: the options there are, such as ``--model.method``.

    Example:
        >>> explain("unrecognized arguments: --model.mthod LoRA", ["--model.method", "--model.base"])
        "unknown option '--model.mthod'; did you mean '--model.method'?"
        >>> explain('Parser key "trainer.max_steps":\n  Expected a <class \'int\'>. Got value: abc')
        "--trainer.max_steps: expected int, got 'abc'"
    """
    message = _without_lists(message)
    return (
        _unknown_option(message, options)
        or _unknown_verb(message)
        or _unknown_parameter(message)
        or _unknown_key(message, options)
        or _class_not_named(message)
        or _unknown_class(message)
        or _missing(message)
        or _wrong_value(message)
        or message.strip().removeprefix("Problems parsing config: ")
    )


# -- one question each -------------------------------------------------------------------------------------------------


def _unknown_option(message: str, options: Sequence[str]) -> str | None:
    found = re.match(r"unrecognized arguments: (.*)", message, re.DOTALL)
    if not found:
        return None
    words = found[1].split()
    word = next((re.split(r"\+?=", word)[0] for word in words if word.startswith("-")), None)
    if word is None:
        return f"unexpected argument {words[0]!r}"
    return f"unknown option {word!r}{_hint(word, options)}"


def _unknown_verb(message: str) -> str | None:
    found = re.match(r"argument \w+: invalid choice: '([^']*)' \(choose from (.*)\)", message)
    if found:
        verbs = re.findall(r"[\w-]+", found[2])
        return f"unknown command {found[1]!r}{_hint(found[1], verbs) or '.'} Commands: {', '.join(verbs)}"
    found = re.search(r"to be one of {(.*)}, but it was not provided", message)
    return f"a command must be given, such as {found[1].split(',')[0]}" if found else None


def _unknown_parameter(message: str) -> str | None:
    """Explain an argument that a class does not have, by the class that comes nearest."""
    answers = []
    for found in re.finditer(r"Option '([^']+)' is not accepted", message):
        before, after = message[: found.start()], message[found.end() :]
        paths = re.findall(_CLASS_PATH, before)[-1:] or re.findall(_CLASS_PATH, after)[:1]
        if paths:
            names = _parameters(paths[0])
            text = f"{_at(before)}{paths[0].rpartition('.')[2]} has no option {found[1]!r}"
            answers.append((text, _hint(found[1], names), names))
    if not answers:
        return None
    text, hint, names = min(answers, key=lambda answer: not answer[1])
    return f"{text}{hint or '.'} It has: {', '.join(names) or 'none'}"


def _unknown_key(message: str, options: Sequence[str]) -> str | None:
    found = re.search(r"(?:(Subcommand|Group) '([^']+)' does not accept option|Option) '([^']+)'", message)
    if not found:
        return None
    key = f"{found[2]}.{found[3]}" if found[1] == "Group" else found[3]
    return f"unknown key {key!r}{_hint(key, [option.removeprefix('--') for option in options])}"


def _class_not_named(message: str) -> str | None:
    if not re.search(r"Expected an instantiatable class, but \S+ is abstract|Not a valid subclass of", message):
        return None
    where = _at(message).rstrip(": ")
    names = _class_names(where)
    entry = re.search(r"Expected a dot import path string: (\S+)", message)
    if entry and "Got value: [" in message:  # a list, in which this entry is wrong
        hint = _hint(entry[1], [*_registry_names(where), *names])
        return f"{where}: unknown class {entry[1]!r} in the list{hint or '.'}{_known(names)}"
    return f"{where}: name a class, {where} NAME or class_path and init_args in a file.{_known(names)}"


def _unknown_class(message: str) -> str | None:
    found = re.search(r"Expected a dot import path string: (\S+)", message)
    if not found:
        return None
    help_of = re.match(r"--(\S+)\.help", message)
    where = f"--{help_of[1]}: " if help_of else _at(message)
    names = _class_names(where.rstrip(": "))
    if not names and re.search("Expected a <class '(?!NoneType)", message):  # not necessarily a class was meant
        return None
    known = _known(names) or " Write the whole path: package.module.name"
    kind = "class" if names else "name"
    hint = _hint(found[1], [*_registry_names(where.rstrip(": ")), *names])
    return f"{where}unknown {kind} {found[1]!r}{hint or '.'}{known}"


def _missing(message: str) -> str | None:
    found = re.search(r"the following arguments are required: (.*)", message)
    if not found:
        return None
    prefix = _at(message).rstrip(": ").removeprefix("--")
    keys = [".".join(filter(None, (prefix, re.sub(rf"^{_VERB}\.", "", key)))) for key in found[1].split(", ")]
    return f"{', '.join(f'--{key}' for key in keys)} must be given"


def _wrong_value(message: str) -> str | None:
    """Explain a value of the wrong type, by all that would have been right."""
    where = _at(message)
    if not where:
        return None
    leaves = list(dict.fromkeys(_leaves(message)))
    wanted = [re.sub(r"^Expected an? ", "", leaf) for leaf in leaves if leaf.startswith("Expected a")]
    if len(wanted) < len(leaves):
        return where + "; ".join(leaf for leaf in leaves if not leaf.startswith("Expected a"))
    if not wanted:
        return None
    value = next((value for found in re.finditer(_VALUE, message) for value in found.groups() if value), "")
    choices = [choice for text in wanted if "Literal" in text for choice in re.findall(r"'([^']*)'", text)]
    return f"{where}expected {' or '.join(map(_type_name, wanted))}, got {value!r}{_hint(value, choices)}"


# -- reading the message -----------------------------------------------------------------------------------------------

_LIST_OF_METHODS = re.compile(
    r"^( *)- Does not validate.*\n\1  Subtypes: \[<class 'lightning_peft\.composition\.Adaptation'>.*\n(?:\1  .*\n)*",
    re.MULTILINE,
)
_CLASS_PATH = r"class_path[= ]'([^']+)'"
_CALLABLE = r"(?:Type \S.* expects a function or a callable class: )?"
_VALUE = re.compile(
    r"NestedArg\(key='[^']*', val='?(.*?)'?\)$|Given value: (?!NestedArg)(.*?)(?=\. Got value|$)|Got value: (?!Namespace)(.*)|"
    r"Not of type \w+: (?:invalid .* '(.*)'$|(\S+) does not conform)",
    re.MULTILINE,
)
_NOISE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Given value|Expected a path but|Expected a <class 'NoneType'>|"
    r"Import path \S+ does not correspond|Problem with given class_path|Expected a dot import path"
)


def _without_lists(message: str) -> str:
    """Leave out why a single method is no list of methods."""
    is_list = re.search(r"^ *Given value type: <class 'list'>\s*$", message, re.MULTILINE)
    return message if is_list else _LIST_OF_METHODS.sub("", message)


def _at(message: str) -> str:
    """Return ``--model.method.rank: `` from the nested keys of a message, an empty string where there is none."""
    keys: list[str] = []
    deepest = -1
    for found in re.finditer(rf'^([ -]*){_CALLABLE}Parser key "([^"]+)"', message, re.MULTILINE):
        if len(found[1]) > deepest:
            deepest = len(found[1])
            keys.append(re.sub(rf"^{_VERB}\.", "", found[2]))
    return f"--{'.'.join(keys)}: " if keys else ""


def _leaves(message: str) -> Iterator[str]:
    """Yield what was expected or is wrong, without the frames around it."""
    for line in message.splitlines():
        text = re.sub(_CALLABLE, "", line.strip().removeprefix("- "))
        text = re.sub(r'^Parser key "[^"]+"(?: element \d+)?:', "", text).strip()
        text = re.sub(r"\.? Got value: .*", "", text)
        limit = re.match(r"Not of type (\w+): .* does not conform to restriction v(\S+)", text)
        if limit:
            text = f"Expected a number {limit[2]}"
        text = re.sub(r"^Not of type (\w+):.*", r"Expected a \1", text)
        if text and not _NOISE.match(text):
            yield text


def _type_name(text: str) -> str:
    text = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text)
    text = re.sub(r"(?:typing\.)?Literal\[(.*)\]", r"one of \1", text)
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(\w+)", r"\1", text)


# -- what there is -----------------------------------------------------------------------------------------------------


def _hint(word: str, names: Iterable[str]) -> str:
    """Return ``; did you mean ...?``, blind to upper and lower case, and among the keys of the same group if it can."""
    written = {name.lower(): name for name in names}
    group, dot, last = word.lower().rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in written if name.startswith(group + dot)} if dot else {}
    near = [beside[name] for name in _near(last, beside)] or _near(word.lower(), written)
    return f"; did you mean {' or '.join(repr(written[name]) for name in near)}?" if near else ""


def _near(word: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    return [word] if word in names else re.findall(r"'([^']+)'", did_you_mean(word, names))


def _known(names: Sequence[str]) -> str:
    return f" Known: {', '.join(names)}" if 0 < len(names) <= _MANY else ""


def _parameters(class_path: str) -> list[str]:
    """Return the names of the parameters of a class that the parser has imported already."""
    module, _, name = class_path.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), name)
        parameters = list(inspect.signature(made).parameters)
    except (ImportError, AttributeError, ValueError, TypeError):
        return []
    return [name for name in parameters if name not in ("params", "optimizer", "args", "kwargs")]


def _class_names(key: str) -> list[str]:
    """Return the short names of the classes for the value of a key such as ``--model.method``."""
    from lightning.pytorch import Callback, LightningDataModule
    from lightning.pytorch.loggers import Logger
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from lightning_peft.interfaces import Method, Quantizer
    from lightning_peft.loaders import ModelLoader

    roots: dict[str, type] = {
        "method": Method,
        "quantizer": Quantizer,
        "base": ModelLoader,
        "data": LightningDataModule,
        "callbacks": Callback,
        "logger": Logger,
        "optimizer": Optimizer,
        "lr_scheduler": LRScheduler,
    }
    root = roots.get(key.removeprefix("--").rpartition(".")[2])
    return sorted({found.__name__ for found in _concrete(root)}) if root else []


def _registry_names(key: str) -> list[str]:
    """Return the registry names that stand for classes in the value of a key."""
    from lightning_peft.registry import get_registry  # it imports torch, which help can do without

    return sorted(get_registry().methods) if key.rpartition(".")[2] == "method" else []


def _concrete(root: type) -> Iterator[type]:
    subclasses: list[type] = root.__subclasses__()
    for found in subclasses:
        if not inspect.isabstract(found) and not found.__name__.startswith("_"):
            yield found
        yield from _concrete(found)
