"""The method as an object: its name, its fields, and their way through JSON, YAML and the command line."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import pickle
import textwrap
from collections.abc import Iterator
from typing import Any

import jsonargparse

from lightning_peft.errors import AdapterConfigError
from lightning_peft.interfaces import Method
from lightning_peft.registry import get_registry
from lightning_peft.testing.subject import Subject, refused


class DefinitionTests(Subject):
    """Tests of the dataclass itself."""

    def test_name_is_free_and_a_lower_case_identifier(self) -> None:
        """Files name the method by it."""
        kind, name = type(self.method), self.method.name
        assert isinstance(name, str), f"{kind.__name__}.name must be a string, found {name!r}"
        assert name.isidentifier(), f"{kind.__name__}.name must be an identifier, found {name!r}"
        assert name == name.lower(), f"{kind.__name__}.name must be lower case, found {name!r}"
        other = get_registry().methods.get(name, kind)
        assert other is kind, f"the name {name!r} is taken by {other.__module__}.{other.__qualname__}; choose another"

    def test_is_a_frozen_keyword_only_dataclass(self) -> None:
        """A method that could change would no longer be what its files say."""
        kind = type(self.method)
        assert "__dataclass_fields__" in vars(kind), (
            f"decorate {kind.__name__} with @dataclass(frozen=True, kw_only=True)"
        )
        assert kind.__dataclass_params__.frozen, f"{kind.__name__} can be changed; decorate it with frozen=True"  # type: ignore[attr-defined]
        positional = [field.name for field in dataclasses.fields(kind) if field.init and not field.kw_only]  # type: ignore[arg-type]
        assert not positional, f"fields {positional} of {kind.__name__} are positional; decorate it with kw_only=True"

    def test_can_be_pickled(self) -> None:
        """Methods travel to the processes of a distributed run."""
        again = pickle.loads(pickle.dumps(self.method))
        assert again == self.method, f"{self.method!r} came back from pickle as {again!r}"

    def test_every_field_is_documented(self) -> None:
        """The docstring under a field becomes its help on the command line."""
        bare = [name for kind in type(self.method).__mro__ if _is_own(kind) for name in _undocumented(kind)]
        assert not bare, f"fields {bare} have no docstring below them; write one, it is the help of the command line"

    def test_fields_survive_json(self) -> None:
        """``to_config`` and ``from_config`` are how the method stands in files."""
        config = self.method.to_config()
        again = type(self.method).from_config(json.loads(json.dumps(config, allow_nan=False)))
        assert again == self.method, (
            f"{self.method!r} came back from JSON as {again!r}; convert fields in __post_init__"
        )

    def test_an_unknown_field_is_refused(self) -> None:
        """A file of a newer version must not be read with a setting left out."""
        config = {**self.method.to_config(), "no_such_field": 1}
        with refused(AdapterConfigError, "from_config accepted a field that the method does not have"):
            type(self.method).from_config(config)

    def test_fields_survive_yaml(self) -> None:
        """What ``--print_config`` writes gives the same method again."""
        parser = _parser()
        written = parser.dump(parser.parse_object({"method": self._class_path()}))
        again = _made(parser, parser.parse_string(written))
        assert again == self.method, f"{self.method!r} came back from YAML as {again!r}; check the types of the fields"

    def test_fields_survive_the_command_line(self) -> None:
        """Every field can be given as an argument."""
        described = self._class_path()
        arguments = [f"--method={described['class_path']}"]
        for key, value in described["init_args"].items():
            arguments.append(f"--method.{key}={value if isinstance(value, str) else json.dumps(value)}")
        parser = _parser()
        again = _made(parser, parser.parse_args(arguments))
        assert again == self.method, f"{self.method!r} came back from {arguments} as {again!r}; check the field types"

    def _class_path(self) -> dict[str, Any]:
        kind = type(self.method)
        return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": self.method.to_config()}


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--method", type=Method)
    return parser


def _made(parser: jsonargparse.ArgumentParser, config: jsonargparse.Namespace) -> Any:
    instantiate = (
        getattr(parser, "instantiate", None) or parser.instantiate_classes
    )  # the name before jsonargparse 4.49
    return instantiate(config).method


def _is_own(kind: type) -> bool:
    return issubclass(kind, Method) and kind is not Method and "__dataclass_fields__" in vars(kind)


def _undocumented(kind: type) -> Iterator[str]:
    """Yield the fields that ``kind`` itself declares without a docstring below."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(definition, ast.ClassDef)
    fields = {field.name for field in dataclasses.fields(kind)}
    for statement, below in zip(definition.body, [*definition.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and bool(below.value.value)
        if statement.target.id in fields and not documented:
            yield statement.target.id
