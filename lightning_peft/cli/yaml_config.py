"""How the configuration files of ``lightning-peft`` are read: YAML, stricter and with variables.

* A key that stands twice in one mapping is refused; plain YAML takes the last one without a word.
* Anchors and aliases are refused: a few lines of them can stand for gigabytes.
* ``${oc.env:NAME}`` is the environment variable ``NAME``, ``${oc.env:NAME,value}`` has a default, and ``${model.base.path}``
  is another value of the same file (OmegaConf's syntax).
* A registry name stands for its class: ``method: lora`` is ``method: LoRA``.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from lightning_peft.registry import get_registry

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


def method_class_path(name: str) -> str:
    """Return the path of the method class registered as ``name``; any other word comes back as it is."""
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
    """Replace registry names by class paths where a method stands: in the model of any verb."""
    places = [config, *(value for value in config.values() if isinstance(value, dict))]
    for section in places + [place["model"] for place in places if isinstance(place.get("model"), dict)]:
        method = section.get("method")
        if isinstance(method, str):
            section["method"] = method_class_path(method)
        elif isinstance(method, dict) and isinstance(method.get("class_path"), str):
            method["class_path"] = method_class_path(method["class_path"])
    return config
