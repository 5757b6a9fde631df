"""What all plugin nouns share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import Self

from lightning_peft.errors import AdapterConfigError, did_you_mean


class Named:
    """What all plugin nouns share: a ``name``, and dataclass fields as plain values."""

    name: ClassVar[str]
    """The registry name, written to files: lower case, words joined by underscores."""

    def to_config(self) -> dict[str, Any]:
        """Return the dataclass fields as plain values, ready for JSON."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build from the result of :meth:`to_config`.

        Raises:
            AdapterConfigError: ``config`` names a field that this class does not have.
        """
        known = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
        for key in config:
            if key not in known:
                raise AdapterConfigError(
                    f"{cls.name!r} has no field {key!r}{did_you_mean(key, known)} It has: {', '.join(known)}. "
                    "The file may come from a newer version of the plugin."
                )
        return cls(**config)


def _plain(value: Any) -> Any:
    """Turn tuples, mappings and paths into what JSON holds."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
