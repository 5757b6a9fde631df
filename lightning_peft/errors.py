"""Every error and warning this library raises, in one tree.

::

    LightningPEFTError
    ├── ConfigError              (ValueError)    a hyperparameter or argument out of its range
    │   └── BadRowError                          a row of data that is malformed, empty or too long
    ├── TargetError              (ValueError)    a target that matches nothing, or something the method cannot adapt
    ├── InjectionError           (RuntimeError)  a name taken twice, a module that cannot be wrapped
    ├── AdapterNotFoundError     (LookupError)   no adapter of that name; a model without adapters
    ├── MergeError               (RuntimeError)  a merge that would be wrong: tied, packed, non-finite, done already
    ├── ExportError              (RuntimeError)  a format that cannot hold the model, or held another one when it was read again
    ├── AdapterFileError         (ValueError)    an adapter folder that cannot be read as one
    │   ├── AdapterConfigError                   its configuration: unknown method, field, value
    │   └── AdapterMismatchError                 its tensors: missing, extra, mis-shaped, non-finite
    │       └── BaseMismatchError                made for another base model
    ├── CheckpointMismatchError  (RuntimeError)  a .ckpt whose adapters are not those of the module
    └── PluginError              (RuntimeError)
        ├── PluginLoadError                      a third-party plugin that failed, asked for what it provides
        ├── PluginConflictError                  a name registered twice
        └── UnknownNameError     (LookupError)   a method, quantizer, family, task, exporter or router nobody registered

    LightningPEFTWarning         (UserWarning)   something works, but not as its user may think
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LightningPEFTError(Exception):
    """Base of every error raised on purpose by this library."""

    def __str__(self) -> str:
        # LookupError subclasses would otherwise print their message as a quoted repr.
        return str(self.args[0]) if self.args else ""


class ConfigError(LightningPEFTError, ValueError):
    """A hyperparameter or an argument is out of its range."""


class BadRowError(ConfigError):
    """A row of data is malformed, empty or too long.

    Args:
        kind: in one word, ``malformed``, ``empty`` or ``truncated``.
        where: the file and the line.
        reason: what is wrong, and what to do.
    """

    def __init__(self, kind: str, where: str, reason: str) -> None:
        super().__init__(f"{where} {reason}")
        self.kind, self.where, self.reason = kind, where, reason

    def __reduce__(self) -> tuple[type[BadRowError], tuple[str, str, str]]:
        return type(self), (self.kind, self.where, self.reason)  # so that a process that loads batches can hand it over


class TargetError(LightningPEFTError, ValueError):
    """A target matches nothing, or matches a module that the method cannot adapt."""


class InjectionError(LightningPEFTError, RuntimeError):
    """An adapter cannot be put into the model."""


class AdapterNotFoundError(LightningPEFTError, LookupError):
    """The model holds no adapter, or none of the name asked for."""


class MergeError(LightningPEFTError, RuntimeError):
    """A merge or unmerge would give wrong weights and is refused."""


class ExportError(LightningPEFTError, RuntimeError):
    """A format cannot represent the model, or what was written computes something else."""


class AdapterFileError(LightningPEFTError, ValueError):
    """An adapter folder cannot be read."""


class AdapterConfigError(AdapterFileError):
    """The configuration in an adapter folder is not one we can honour exactly."""


class AdapterMismatchError(AdapterFileError):
    """The tensors of an adapter folder are not those the model needs."""


class BaseMismatchError(AdapterMismatchError):
    """The adapter was made for another base model."""


class CheckpointMismatchError(LightningPEFTError, RuntimeError):
    """The adapters of a ``.ckpt`` are not the adapters of the module that resumes from it."""


class PluginError(LightningPEFTError, RuntimeError):
    """Something is wrong with a plugin."""


class PluginLoadError(PluginError):
    """A third-party plugin failed, and what it provides was asked for."""


class PluginConflictError(PluginError):
    """Two plugins register the same name."""


class UnknownNameError(PluginError, LookupError):
    """No plugin registered the name asked for."""


class LightningPEFTWarning(UserWarning):
    """Something works, but perhaps not as its user thinks."""


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the candidates nearest to ``word``, or an empty string.

    Example:
        >>> did_you_mean("q_prj", ["q_proj", "k_proj", "lm_head"])
        "; did you mean 'q_proj' or 'k_proj'?"
        >>> did_you_mean("zzz", ["q_proj"])
        ''
    """

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, name, word).ratio()

    near = difflib.get_close_matches(word, sorted(set(candidates)), n=2, cutoff=0.6)
    near = [name for name in near if likeness(name) >= 0.75 * likeness(near[0])]  # not beside one that is far nearer
    return f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
