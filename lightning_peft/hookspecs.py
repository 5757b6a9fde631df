"""Every way to extend ``lightning_peft``: start reading here.

A plugin is a module (or object) that implements some of these hooks with :data:`hookimpl` and is named in the
entry-point group ``lightning_peft`` of its package. The methods, quantizers, families, tasks, exporters and routers that
ship with the library are plugins too and use nothing else.

::

    from lightning_peft import hookimpl

    @hookimpl
    def register_methods():
        return [MyMethod]

Plugins register *nouns*. The *verbs in time* (on fit start, on train batch end, ...) are Lightning's callbacks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from torch import nn

    from lightning_peft.adapter_formats import AdapterFormat
    from lightning_peft.families import ModelFamily
    from lightning_peft.interfaces import EvalTask, Exporter, Method, Quantizer
    from lightning_peft.routers import Router

PROJECT = "lightning_peft"
"""The pluggy project name and the entry-point group of third-party plugins."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function as the implementation of one of the hooks below."""


@hookspec
def register_methods() -> Iterable[type[Method]]:  # type: ignore[empty-body]
    """Return the adaptation methods of this plugin, as classes."""


@hookspec
def register_quantizers() -> Iterable[type[Quantizer]]:  # type: ignore[empty-body]
    """Return the quantizers of this plugin, as classes."""


@hookspec
def register_model_families() -> Iterable[ModelFamily]:  # type: ignore[empty-body]
    """Return the model families of this plugin, as instances."""


@hookspec
def register_eval_tasks() -> Iterable[type[EvalTask]]:  # type: ignore[empty-body]
    """Return the evaluation tasks of this plugin, as classes."""


@hookspec
def register_exporters() -> Iterable[type[Exporter]]:  # type: ignore[empty-body]
    """Return the exporters of this plugin, as classes."""


@hookspec
def register_routers() -> Iterable[type[Router]]:  # type: ignore[empty-body]
    """Return the routers of this plugin, as classes: which token of a mixture goes to which expert."""


@hookspec
def register_adapter_formats() -> Iterable[type[AdapterFormat]]:  # type: ignore[empty-body]
    """Return the formats of adapters of other software that this plugin reads, as classes."""


@hookspec(firstresult=True)
def resolve_model_family(model: nn.Module, families: dict[str, ModelFamily]) -> ModelFamily | None:
    """Return the family of ``model``, or None to leave the answer to the next plugin."""
