"""The ``lightning-peft`` program: which verb runs, and what its user sees when it is refused.

Nothing heavy is imported before a verb needs it, so that ``lightning-peft --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

from lightning_peft import __version__
from lightning_peft.cli.adapter_verbs import combine, convert_to_lora, diff, inspect, prune
from lightning_peft.cli.arguments import PlainParser
from lightning_peft.cli.base_verbs import fingerprint
from lightning_peft.cli.checkpoint_verbs import consolidate
from lightning_peft.cli.data_verbs import preview
from lightning_peft.cli.eval_verbs import evaluate
from lightning_peft.cli.listings import methods, plugins
from lightning_peft.cli.model_verbs import convert, generate, merge
from lightning_peft.errors import LightningPEFTError

PROGRAM = "lightning-peft"

LIGHTNING_VERBS = {
    "fit": "Train an adapter.",
    "validate": "Measure a model on its validation data.",
    "test": "Measure a model on its test data.",
    "predict": "Run a model on its prediction data.",
}
"""Verbs of Lightning's command line, with their help."""

OWN_VERBS: dict[str, Callable[..., None]] = {
    "merge": merge,
    "convert": convert,
    "generate": generate,
    "eval": evaluate,
    "combine": combine,
    "diff": diff,
    "inspect": inspect,
    "prune": prune,
    "to-lora": convert_to_lora,
    "fingerprint": fingerprint,
    "consolidate": consolidate,
    "preview": preview,
    "methods": methods,
    "plugins": plugins,
}
"""Verbs that are a function of this package: its signature and docstring are their command line and help."""

FLAGS = {
    "merge": {
        "overwrite": "Replace the model that stands in the output folder.",
        "out_of_core": "Merge tensor by tensor from file to file; the model is never in memory. The base must be a local folder.",
    },
    "to-lora": {"drop_rest": "Leave out parameters that a LoRA has no update for, such as those of norms."},
    "inspect": {
        "weights": "Load the base and decompose its weights too: intruder dimensions, amplification, relative norm.",
        "json": "Print JSON, with every singular value.",
    },
    "fingerprint": {"complete": "Hash every weight of the base too."},
    "consolidate": {"adapter": "Write an adapter folder to share instead of a .ckpt to resume from."},
    "methods": {"markdown": "Print the table as Markdown, as it stands in the documentation."},
}
"""Arguments of a verb that are given without a value, with their help."""

WORDS: dict[str, dict[str, dict[str, Any]]] = {
    "combine": {
        "adapters": {"nargs": "+", "help": "LoRA folders, ours or HF PEFT's."},
        "--weights": {
            "nargs": "+",
            "type": float,
            "required": True,
            "help": "One weight for each folder; a negative one takes a task away.",
        },
    },
    "eval": {
        "tasks": {
            "nargs": "+",
            "help": "Names of tasks of lm-evaluation-harness, and YAML files that map labels to registered tasks.",
        }
    },
    "diff": {"a": {"help": "LoRA folder, ours or HF PEFT's."}, "b": {"help": "Another one, of any rank."}},
    "inspect": {"adapter": {"help": "Adapter folder, ours or HF PEFT's."}},
    "prune": {"adapter": {"help": "LoRA folder, ours or HF PEFT's."}},
    "consolidate": {
        "folder": {"help": "Checkpoint folder of a sharded run."},
        "output": {"help": "The .ckpt file to write, or with --adapter the folder."},
    },
}
"""Arguments of a verb that are given as words without their name, or as several words."""

REFUSALS = ("MisconfigurationException", "SafetensorError")
"""Errors of other libraries that tell their user what is wrong, by name, so that none of these is imported for it."""


def main(args: list[str] | None = None) -> int | None:
    """Run the program.

    Args:
        args: the command line without the name of the program; ``sys.argv[1:]`` if None.

    Returns:
        The exit code: 2 where the command line or a configuration is refused, with ``error: ...`` on stderr.
    """
    argv = sys.argv[1:] if args is None else args
    try:
        if argv and (argv[0] in LIGHTNING_VERBS or argv[0].partition("=")[0] in ("-c", "--config")):
            from lightning_peft.cli.peft_cli import PEFTCLI

            PEFTCLI(args=argv, parser_kwargs={"prog": PROGRAM})
        else:
            parsed = _parser().parse_args(argv)
            arguments: dict[str, Any] = parsed[parsed.verb].as_dict()
            OWN_VERBS[parsed.verb](**arguments)
    except LightningPEFTError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except Exception as error:
        if not isinstance(error, (OSError, UnicodeError)) and type(error).__name__ not in REFUSALS:
            raise
        sys.stderr.write(f"error: {type(error).__name__}: {error}\n")
        return 2
    except SystemExit as stop:  # --help, --version, a refused command line
        if isinstance(stop.code, str):
            raise
        return stop.code
    return 0


def _parser() -> PlainParser:
    parser = PlainParser(
        prog=PROGRAM,
        description="Parameter-efficient fine-tuning for PyTorch Lightning.",
        version=f"{__version__} (lightning {metadata.version('lightning')}, torch {metadata.version('torch')})",
    )
    verbs = parser.add_subcommands(dest="verb", required=True)
    for verb, text in LIGHTNING_VERBS.items():
        verbs.add_subcommand(verb, PlainParser(), help=text)
    for verb, function in OWN_VERBS.items():
        text = (function.__doc__ or "").partition("\n")[0]
        own = PlainParser(description=text)
        flags = FLAGS.get(verb, {})
        words = WORDS.get(verb, {})
        for word, settings in words.items():
            own.add_argument(word, **settings)
        own.add_function_arguments(function, as_group=False, skip={*flags, *(word.lstrip("-") for word in words)})
        for flag, meaning in flags.items():
            own.add_argument(f"--{flag}", action="store_true", help=meaning)
        verbs.add_subcommand(verb, own, help=text)
    return parser
