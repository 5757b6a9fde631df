"""LightningCLI for adapters: every installed method is a name on the command line, and nothing overrides that line."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from typing_extensions import override

# Imported for their classes: the parser finds a class by its short name once its module is loaded.
from lightning_peft import callbacks, data, loaders  # noqa: F401
from lightning_peft.cli.arguments import PlainErrors
from lightning_peft.cli.yaml_config import NAMED_PARTS, class_path_of, has_members, install, load, with_class_path
from lightning_peft.errors import LightningPEFTError
from lightning_peft.module import PEFTModule
from lightning_peft.population import PopulationModule
from lightning_peft.registry import get_registry


class PEFTArgumentParser(PlainErrors, LightningArgumentParser):
    """Lightning's parser with plain errors and our way to read configuration files."""

    @override
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("parser_mode", install())
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)


class PEFTCLI(LightningCLI):
    """Lightning's command line around :class:`~lightning_peft.PEFTModule` and any LightningDataModule.

    Plugins load before the parser is built, so their methods are names on the command line. What differs from
    LightningCLI: the optimizer is an argument of the model (``--model.optimizer AdamW``), the hyperparameters inside a
    ``--ckpt_path`` never override the command line, the seed is 0 unless it is given, a saved configuration may be
    overwritten by the next run, and files are read as :mod:`lightning_peft.cli.yaml_config` describes.

    Args:
        model_class: a LightningModule of your own, or a function that returns one; if None, :class:`PEFTModule`, or
            :class:`~lightning_peft.PopulationModule` where the model is given ``members``.
        datamodule_class: a data module to use instead of letting the user name any.
        parser_kwargs: further arguments of the parsers.
        args: the command line; ``sys.argv[1:]`` if None.
        run: whether to run the verb; otherwise only make the objects.
        **kwargs: further arguments of LightningCLI.

    Raises:
        LightningPEFTError: something given is refused by the class it was given to.
    """

    def __init__(
        self,
        model_class: type[LightningModule] | Callable[..., LightningModule] | None = None,
        datamodule_class: type[LightningDataModule] | Callable[..., LightningDataModule] | None = None,
        *,
        parser_kwargs: dict[str, Any] | None = None,
        args: ArgsType = None,
        run: bool = True,
        **kwargs: Any,
    ) -> None:
        get_registry()
        words = sys.argv[1:] if args is None else args if isinstance(args, list) else []
        # The help of dataclass fields stands below them. Reading it takes seconds, so only when it is shown.
        set_parsing_settings(docstring_parse_attribute_docstrings=any(_asks_for_help(word) for word in words))
        kwargs.setdefault("parser_class", PEFTArgumentParser)
        kwargs.setdefault("auto_configure_optimizers", False)
        kwargs.setdefault("save_config_kwargs", {"overwrite": True})
        kwargs.setdefault("seed_everything_default", 0)
        kwargs.setdefault("subclass_mode_data", datamodule_class is None)
        if datamodule_class is None and model_class is None:
            datamodule_class = LightningDataModule  # named, it is required
        with warnings.catch_warnings():
            # Lightning still calls what jsonargparse and torch have renamed; its users can do nothing about it.
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"lightning\.pytorch\.cli$")
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            model_class = model_class or (PopulationModule if has_members(args or words) else PEFTModule)
            super().__init__(model_class, datamodule_class, parser_kwargs=parser_kwargs, args=args, run=run, **kwargs)

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line, with registry names of methods (``lora``) as their classes."""
        if isinstance(args, (dict, Namespace)):
            self.config = parser.parse_object(args)
        else:
            self.config = parser.parse_args(_with_class_paths(sys.argv[1:] if args is None else args))
        section = self.config.get(str(self.config.get("subcommand")), self.config)
        for group in ("trainer", "model"):
            if not isinstance(section[group], Namespace):
                parser.error(f"{group!r} must hold options, got {section[group]!r}")

    @override
    def _parse_ckpt_path(self) -> None:
        """Leave the hyperparameters inside a checkpoint alone: they would override the command line silently."""

    @override
    def instantiate_classes(self) -> None:
        """Make the objects; what a class refuses is raised as that class said it."""
        try:
            super().instantiate_classes()
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, LightningPEFTError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise cause from None


def _asks_for_help(word: str) -> bool:
    option = word.partition("=")[0]
    return option in ("-h", "--help") or (option.startswith("--") and option.endswith(".help"))


def _with_class_paths(args: Sequence[str]) -> list[str]:
    """Replace the names of methods, optimizers and schedulers in a command line."""
    result: list[str] = []
    for word in args:
        option, equals, value = word.partition("=")
        if equals and option in _NAMED_OPTIONS:
            word = f"{option}={_with_class_path(_NAMED_OPTIONS[option], value)}"
        elif result and result[-1] in _NAMED_OPTIONS:
            word = _with_class_path(_NAMED_OPTIONS[result[-1]], word)
        result.append(word)
    return result


def _with_class_path(part: str, word: str) -> str:
    if part == "method" and word.lstrip().startswith("["):  # a list of methods
        try:
            return json.dumps(with_class_path(part, load(word)))
        except (yaml.YAMLError, TypeError):
            return word  # the parser says what is wrong with it
    return class_path_of(part, word)


_NAMED_OPTIONS = {f"--model.{part}{ending}": part for part in NAMED_PARTS for ending in ("", ".help")}
