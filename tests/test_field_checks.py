"""Fields that are true or false take nothing else, in every method and quantizer."""

import dataclasses

import pytest

from lightning_peft.errors import ConfigError
from lightning_peft.registry import get_registry

SWITCHES = [
    pytest.param(kind, field.name, id=f"{kind.__name__}-{field.name}")
    for kinds in (get_registry().methods, get_registry().quantizers)
    for kind in kinds.values()
    for field in dataclasses.fields(kind)
    if isinstance(field.default, bool)
]


@pytest.mark.parametrize("value", ["yes", "false", 1, None])
@pytest.mark.parametrize(("kind", "name"), SWITCHES)
def test_a_switch_takes_true_or_false_only(kind, name, value):
    with pytest.raises(ConfigError, match=rf"^{kind.__name__} {name} must be true or false, got {value!r}$"):
        kind(**{name: value})


def test_there_are_switches_in_many_methods():
    names = {param.values[1] for param in SWITCHES}
    assert {"rslora", "add_missing", "double_quantization", "reparametrize", "head", "factorized"} <= names
