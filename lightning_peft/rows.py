"""An adapter of its own for each row of a batch, in inference and in training.

::

    with adapter_rows(model, ["a", None, "b", "a"]):       row 0  a        row 2  b
        model(input_ids)                                   row 1  base     row 3  a

At each place the rows fall into groups that run together. Rows of low-rank adapters of whatever rank, and rows without an adapter,
are one group: the base runs once, and the updates are two batched products. All other rows run once for each adapter that is there.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from lightning_peft.activation import alone
from lightning_peft.adapter_layer import AdapterLayer, adapter_layers, adapters_named
from lightning_peft.errors import ConfigError, InjectionError, MergeError
from lightning_peft.injection import Injection, adapted_roots, records
from lightning_peft.row_batches import AdapterRows, call_by_rows, entries_per_row, on_rows
from lightning_peft.saved_modules import acts_alone

Row: TypeAlias = str | Sequence[str] | None
"""What acts on a row: an adapter, several that act one around the other, the first innermost, or none."""


@contextlib.contextmanager
def adapter_rows(model: nn.Module, names: Sequence[Row]) -> Iterator[nn.Module]:
    """Let each row of a batch have the adapter named for it, for the time of a ``with`` block, whichever are active outside.

    The first dimension of the batch is that of ``names``, or a multiple of it: then each name is that of as many consecutive rows, as
    beams are. Blocks nest; inside the inner one its names count. With gradient checkpointing backward must be inside too.

    Args:
        model: the adapted model.
        names: for each row the name of an adapter, None for the base alone, or a sequence of names.

    Raises:
        AdapterNotFoundError: the model has no adapter of one of the names.
        ConfigError: ``names`` is empty or holds something else.
        MergeError: an adapter is merged into the base, which all rows share.
        InjectionError: the method of an adapter is not ``row_routable``, or the first dimension does not count the rows.

    Example:
        >>> import torch
        >>> from lightning_peft import LoRA, inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> _ = inject(model, LoRA(rank=1), name="a"), inject(model, LoRA(rank=2), "1", name="b")
        >>> with adapter_rows(model, ["a", None, "b"]):
        ...     model(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """
    layers = adapter_layers(model)
    rows = _checked(model, names, layers)
    plan = RowPlan(rows, {id(layer): path for path, layer in layers.items()})
    outer = {path: layer._rows for path, layer in layers.items()}
    for layer in layers.values():
        layer.route(plan)
    try:
        yield model
    finally:
        plan.held.clear()
        for path, layer in layers.items():
            layer.route(_left if outer[path] is None and plan.trained else outer[path])


def set_row_adapters(model: nn.Module, names: str | Sequence[str]) -> None:
    """Let the adapters ``names`` be trained on rows of their own: they require gradients, whether active or not.

    Call it before the optimizer is made. Adapters that were not injected as trainable stay frozen. An empty list takes it back.

    Raises:
        AdapterNotFoundError: the model has no adapter of one of the names.
        InjectionError: the method of one is not ``row_routable``.
    """
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    layers = adapter_layers(model)
    _check_names(model, names, layers)
    for layer in layers.values():
        layer.train_in_rows(names)


class RowPlan:
    """Which adapters act on which row, and what is made of their parameters meanwhile.

    Args:
        rows: the adapters of each row, innermost first.
        paths: id of an adapter layer to its path.
    """

    def __init__(self, rows: tuple[tuple[str, ...], ...], paths: dict[int, str]) -> None:
        self.rows, self.paths = rows, paths
        self.held: dict[Any, Any] = {}
        self.trained = False
        # The rows of the batch that modules are run on at the moment.
        self.numbers = tuple(range(len(rows)))

    def run(self, layer: AdapterLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what ``layer`` returns for a batch of these rows."""
        if not layer._enabled:
            return layer.base_layer(*args, **kwargs)
        if layer.training:
            self.trained = True
        place = self.paths.get(id(layer), type(layer.base_layer).__name__)
        per_row = entries_per_row(len(self.rows), place, args, kwargs)
        groups = self._groups(layer, grouped=per_row > 0)
        if len(groups) == 1:
            return groups[0][1](*args, **kwargs)
        return call_by_rows(groups, per_row, place, self._narrowed, args, kwargs)

    def _groups(self, layer: AdapterLayer, *, grouped: bool) -> list[tuple[list[int], Callable[..., Any]]]:
        """Return groups of rows and what runs on each at a place; ``grouped`` is false where all rows share the input."""
        key = (id(layer), self.rows, grouped)
        if key in self.held:
            found: list[tuple[list[int], Callable[..., Any]]] = self.held[key]
            return found
        bare: list[int] = []
        own: dict[tuple[str, ...], list[int]] = {}
        together: dict[Callable[..., Any], list[int]] = {}
        for row, names in enumerate(self.rows):
            here = [layer._adapter(name) for name in names if name in layer.adapters]
            shared = here[0].grouped_rows() if grouped and len(here) == 1 else None
            if shared is not None:
                together.setdefault(shared, []).append(row)
            elif here:
                own.setdefault(names, []).append(
                    row
                )  # by all names, so that rows fall into the same groups at other places
            else:
                bare.append(row)
        groups: list[tuple[list[int], Callable[..., Any]]] = []
        for function, rows in together.items():
            rows = sorted(rows + bare)
            bare = []
            groups.append((rows, _Together(function, layer, [self.rows[row] for row in rows])))
        groups += [(rows, _nested(layer, names)) for names, rows in own.items()]
        if bare:
            groups.append((bare, layer.base_layer))
        self.held[key] = groups
        return groups

    @contextlib.contextmanager
    def _narrowed(self, rows: Sequence[int]) -> Iterator[None]:
        """Let places inside a module that is run on some rows only know of these alone."""
        before = self.rows, self.numbers
        self.rows = tuple(before[0][row] for row in rows)
        self.numbers = tuple(before[1][row] for row in rows)
        try:
            with on_rows(self.numbers):
                yield
        finally:
            self.rows, self.numbers = before


class _Together:
    """Rows whose adapters run in one call of a function that :meth:`Adapter.grouped_rows` returned."""

    def __init__(self, function: Callable[..., Any], layer: AdapterLayer, names: Sequence[tuple[str, ...]]) -> None:
        here = [next((name for name in names if name in layer.adapters), None) for names in names]
        distinct = list(dict.fromkeys(name for name in here if name is not None))
        index = tuple(-1 if name is None else distinct.index(name) for name in here)
        self.function, self.base = function, layer.base_layer
        self.rows = AdapterRows(tuple(layer._adapter(name) for name in distinct), index)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.base, self.rows, *args, **kwargs)


def _nested(layer: AdapterLayer, names: Sequence[str]) -> Callable[..., Any]:
    """Return the base of ``layer`` with the adapters of ``names`` around it."""
    call: Callable[..., Any] = layer.base_layer
    for name in names:
        if name in layer.adapters:
            call = functools.partial(layer._adapter(name), call)
    return call


class _Left:
    """Stands where rows were chosen during a forward that is recomputed in backward, until the next one."""

    def run(self, layer: AdapterLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the active adapters; refuse to do so where the forward of before is meant."""
        if torch._C._current_graph_task_id() != -1:  # inside backward
            raise InjectionError(
                "gradient checkpointing runs a forward again whose rows had adapters of their own, but the block of adapter_rows was left; "
                "call backward inside it"
            )
        layer.route(None)
        return layer(*args, **kwargs)


_left = _Left()


# -- checks ------------------------------------------------------------------------------------------------------------


def _checked(model: nn.Module, names: Sequence[Row], layers: Mapping[str, AdapterLayer]) -> tuple[tuple[str, ...], ...]:
    """Return the adapters of each row, after all that can be seen beforehand was."""
    rows: list[tuple[str, ...]] = []
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ConfigError(f"adapter_rows needs a sequence with a name or None for each row of the batch, got {names!r}")
    for row in names:
        several = (
            ()
            if row is None
            else (row,)
            if isinstance(row, str)
            else tuple(row)
            if isinstance(row, Sequence)
            else (row,)
        )
        if not all(isinstance(name, str) for name in several):
            raise ConfigError(
                f"a row has the name of an adapter, a list of names or None, got {row!r} among {len(names)} rows"
            )
        rows.append(tuple(dict.fromkeys(several)))
    _check_names(model, list(dict.fromkeys(name for row in rows for name in row)), layers)
    for several in dict.fromkeys(row for row in rows if len(row) > 1):
        _check_together(model, several)
    return tuple(rows)


def _check_names(model: nn.Module, names: Sequence[str], layers: Mapping[str, AdapterLayer]) -> None:
    present = {name for layer in layers.values() for name in layer.adapters}
    merged = sorted({name for layer in layers.values() for name in layer.merged})
    if merged:
        raise MergeError(
            f"rows were to have adapters of their own, but {merged[0]!r} is merged into the base, which all rows share; call "
            "unmerge_adapters(model) first"
        )
    held = _injections(model)
    for name in names:
        if name not in present:
            adapters_named(model, name)  # raises, saying what there is
        if name in held and not held[name].method.row_routable:
            raise InjectionError(
                f"adapter {name!r} was asked for in rows, but its method {held[name].method.name!r} does not act on each row on its own "
                "(row_routable = False); make it the active adapter of a batch of its own"
            )
    for path, layer in layers.items():
        here = [name for name in names if name in layer.adapters]
        if here and re.search(r"(^|\.)experts\.\d+(\.|$)", path):
            raise InjectionError(
                f"adapter {here[0]!r} is at {path!r}, an expert that is given tokens of the whole batch in an order of its own, so rows "
                "cannot be told apart there; adapt other places, or run a batch for each adapter"
            )
    if names:
        _refuse_batch_second(model)


def _refuse_batch_second(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if module.__dict__.get("batch_first") is False:
            raise InjectionError(
                f"{path!r}, a {type(module).__name__} with batch_first=False, has the rows of the batch in its second dimension; adapters by rows "
                "need them in the first"
            )


def _check_together(model: nn.Module, names: tuple[str, ...]) -> None:
    held = _injections(model)
    for path, layer in adapter_layers(model).items():
        here = [name for name in names if name in layer.adapters]
        for name in here if len(here) > 1 else []:
            if acts_alone(layer.adapters[name], held[name].method if name in held else None):
                raise InjectionError(
                    f"{here} are to act on one row at {path!r}, but {alone(model, name, path)}; name one of them"
                )


def _injections(model: nn.Module) -> dict[str, Injection]:
    return {name: injection for root in adapted_roots(model) for name, injection in records(root).items()}
