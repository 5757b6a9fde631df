"""Parsers that refuse a command line in one plain line: ``error: ...``, with the nearest name there is."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from typing_extensions import override

from lightning_peft.cli.explain import explain


class PlainErrors:
    """Mixin before jsonargparse's parser: no usage block, a message in the user's words, exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit; parsers inside others, which do not exit, raise as usual."""
        parser: Any = self
        if not parser.exit_on_error:
            super().error(message, ex)  # type: ignore[misc]
        parser = _of_the_verb(getattr(ex, "subcommand_parser", None) or parser)
        sys.stderr.write(f"error: {explain(message, option_names(parser))}\n")
        sys.stderr.write(f"See {parser.prog.replace(' [options]', '')} --help\n")
        sys.exit(2)


class PlainParser(PlainErrors, ArgumentParser):
    """The parser of the verbs that are functions."""

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)


def option_names(parser: Any) -> list[str]:
    """Return the options of ``parser``, as they are written."""
    names = {name for action in parser._actions for name in action.option_strings if name.startswith("--")}
    return sorted(name for name in names if not name.endswith(("+", ".help")))


def _of_the_verb(parser: Any) -> Any:
    """Return the parser of the verb that is on the command line, if ``parser`` is the one above it."""
    verbs = next((action.choices for action in parser._actions if isinstance(action.choices, dict)), {})
    verb = next((word for word in getattr(parser, "args", ()) if word in verbs), None)
    return verbs[verb] if verb else parser
