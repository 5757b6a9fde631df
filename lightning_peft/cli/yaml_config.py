"""How the configuration files of ``lightning-peft`` are read: YAML, stricter and with variables.

* A key that stands twice in one mapping is refused; plain YAML takes the last one without a word.
* Anchors and aliases are refused: a few lines of them can stand for gigabytes.
* ``${oc.env:NAME}`` is the environment variable ``NAME``, ``${oc.env:NAME,value}`` has a default, and ``${model.base.path}``
  is another value of the same file (OmegaConf's syntax).
* A registry name stands for its class: ``method: lora`` is ``method: LoRA``, also in a list of methods. ``optimizer: AdamW`` is
  torch's.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from lightning_peft.registry import get_registry

TORCH_HOMES = {"optimizer": "torch.optim", "lr_scheduler": "torch.optim.lr_scheduler"}
"""Part of the model to the module whose classes are meant by short names there."""
NAMED_PARTS = ("method", *TORCH_HOMES)
"""Parts of the model whose class may be given by a name of ours."""
MODE = "lightning_peft"
"""The parser mode of jsonargparse under which :func:`load` is known."""


def install() -> str:
    """Make :func:`load` known to jsonargparse and return its mode."""
    set_loader(MODE, load, exceptions=(yaml.YAMLError,))
    return MODE


def load(text: str, path: Any = "") -> Any:
    """Return the value of a YAML text.

    Args:
        text: the text.
        path: the file it comes from, for messages.

    Raises:
        yaml.YAMLError: it is not YAML, has a key twice or an alias, or names a variable that is not set.

    Example:
        >>> load("{lr: 1e-3, targets: [query]}")
        {'lr': 0.001, 'targets': ['query']}
    """
    loader = yaml.SafeLoader(text)
    loader.name = str(path) or "the command line"
    _check(loader.get_single_node())
    value = get_loader("yaml")(text)
    if "${" in text and isinstance(value, (dict, list)):
        value = _with_variables(value, loader.name)
    return _with_class_paths(value) if isinstance(value, dict) else value


def class_path_of(part: str, name: str) -> str:
    """Return the class path that ``name`` stands for in a part of the model; any other word comes back as it is.

    For a ``method`` that is the class registered under the name. For an ``optimizer`` or ``lr_scheduler`` it is torch's class, where
    torch has one: other libraries have classes of the same names.

    Example:
        >>> class_path_of("optimizer", "AdamW"), class_path_of("optimizer", "mine.AdamW")
        ('torch.optim.AdamW', 'mine.AdamW')
    """
    if part in TORCH_HOMES:
        module = importlib.import_module(TORCH_HOMES[part])
        return f"{TORCH_HOMES[part]}.{name}" if isinstance(getattr(module, name, None), type) else name
    method = get_registry().methods.get(name)
    if method is None:
        return name
    package = method.__module__.partition(".")[0]
    short = getattr(sys.modules.get(package), method.__name__, None) is method
    return f"{package if short else method.__module__}.{method.__name__}"


def _check(node: yaml.Node | None, seen: set[int] | None = None) -> None:
    seen = set() if seen is None else seen
    if node is None or isinstance(node, yaml.ScalarNode):
        return
    if id(node) in seen:
        raise yaml.MarkedYAMLError(
            problem="an alias (*name) is not allowed here; write ${other.key} to use a value again",
            problem_mark=node.start_mark,
        )
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if key.value in keys and isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            keys.add(str(key.value))
            _check(value, seen)
    else:
        for item in node.value:
            _check(item, seen)


def _with_variables(value: Any, source: str) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.create(value), resolve=True)
    except OmegaConfBaseException as error:
        reason = re.sub(r'^\w+ raised while resolving interpolation: "?(.*?)"?$', r"\1", str(error).partition("\n")[0])
        raise yaml.YAMLError(f"in {source}: {reason}") from error


def _with_class_paths(config: dict[str, Any]) -> dict[str, Any]:
    """Replace names by class paths where a method, optimizer or scheduler stands: in the model of any verb."""
    places = [config, *(value for value in config.values() if isinstance(value, dict))]
    for section in places + [place["model"] for place in places if isinstance(place.get("model"), dict)]:
        for part in NAMED_PARTS:
            value = section.get(part)
            if value is not None:
                section[part] = with_class_path(part, value)
        members = section.get("members")
        for member in members if isinstance(members, list) else [members]:
            for part in NAMED_PARTS if isinstance(member, dict) else ():
                for place in (member, member.get("init_args")):
                    if isinstance(place, dict) and place.get(part) is not None:
                        place[part] = with_class_path(part, place[part])
    return config


def has_members(args: Any) -> bool:
    """Tell whether a command line, a list of words or a configuration, gives the model the members of a population.

    Example:
        >>> has_members(["fit", "--model.members", "[]"]), has_members({"model": {"method": "mine"}})
        (True, False)
    """
    if isinstance(args, Mapping):
        sections = [args, *(value for value in args.values() if isinstance(value, Mapping))]
        models = [section.get("model") for section in sections]
        return any(isinstance(model, Mapping) and "members" in model for model in models)
    words = list(args) if isinstance(args, (list, tuple)) else []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option == "--model.members" or option.startswith(("--model.members.", "--model.members+")):
            return True
        file = Path(value if equals else following)
        if option in ("-c", "--config") and file.is_file():
            try:
                found = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError):
                continue  # the parser says what is wrong with it
            if has_members(found if isinstance(found, dict) else {}):
                return True
    return False


def with_class_path(part: str, value: Any) -> Any:
    """Replace names by class paths in one value: a name, a mapping with ``class_path``, or a list of methods and adaptations."""
    if isinstance(value, str):
        return class_path_of(part, value)
    if isinstance(value, list) and part == "method":
        return [with_class_path(part, item) for item in value]
    if isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            value["class_path"] = class_path_of(part, value["class_path"])
        for place in (value, value.get("init_args")):  # an adaptation: a method with its targets
            if part == "method" and isinstance(place, dict) and "method" in place:
                place["method"] = with_class_path(part, place["method"])
    return value
