"""An adapter of its own for each row of a batch, in inference and in training.

::

    with adapter_rows(model, ["a", None, "b", "a"]):       row 0  a        row 2  b
        model(input_ids)                                   row 1  base     row 3  a

At each place the rows fall into groups that run together. Rows of low-rank adapters of whatever rank, and rows without an adapter,
are one group, in which the base runs once. All other rows run once for each adapter that is there; where an adapter hands something on
to others of its name, it is the module around the place that runs once for each.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from lightning_peft.activation import alone, met_alone
from lightning_peft.adapter_layer import AdapterLayer, adapter_layers, adapters_named, base_modules, unwrapped
from lightning_peft.errors import ConfigError, InjectionError, MergeError
from lightning_peft.injection import Injection, injections, past_adapters
from lightning_peft.offloading import fetch_offloaded, reach_offloaded
from lightning_peft.row_batches import AdapterRows, call_by_rows, entries_per_row, on_rows

Row: TypeAlias = str | Sequence[str] | None
"""What acts on a row: an adapter, several that act one around the other, the first innermost, or none."""
_Group: TypeAlias = tuple[list[int], Callable[..., Any]]
"""Rows, and what runs on them."""
_Shape: TypeAlias = tuple[list[int], tuple[str, ...], Callable[..., Any] | None, tuple[int, ...]]
"""Rows, the adapters they name, the function that runs all of them in one go, and of each row which of them it has."""


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
    reach_offloaded(model, dict.fromkeys(name for row in rows for name in row))
    plan = RowPlan(rows, {id(layer): path for path, layer in layers.items()})
    outer = {path: layer._rows for path, layer in layers.items()}
    plan.prepare(layers.values())
    for layer in layers.values():
        layer.route(plan)
    try:
        with _around(model, plan, layers):
            yield model
    finally:
        plan.forget()
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
    fetch_offloaded(model, names)
    for layer in layers.values():
        layer.train_in_rows(names)


class RowPlan:
    """Which adapters act on which row, and what is made of their parameters meanwhile.

    Args:
        rows: the adapters of each row, innermost first.
        paths: id of an adapter layer to its path.
    """

    def __init__(self, rows: tuple[tuple[str, ...], ...], paths: dict[int, str]) -> None:
        self.paths = paths
        self.trained = False
        self._selections: dict[tuple[tuple[str, ...], ...], _Selection] = {}
        # The rows of the batch that modules are run on at the moment, and what is known of them.
        self.numbers = tuple(range(len(rows)))
        self.rows, self.selection = rows, self._selected(rows)

    def run(self, layer: AdapterLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what ``layer`` returns for a batch of these rows."""
        if not layer._enabled:
            return layer.base_layer(*args, **kwargs)
        if layer.training:
            self.trained = True
        key = id(layer)
        place = self.paths.get(key) or type(layer.base_layer).__name__
        per_row = entries_per_row(len(self.rows), place, args, kwargs)
        grouped = per_row > 0  # not where all rows share the input
        found = self.selection.places[grouped]
        groups = found.get(key)
        if groups is None:
            groups = found[key] = self.selection.groups(layer, grouped=grouped)
        if len(groups) == 1:
            return groups[0][1](*args, **kwargs)
        return call_by_rows(groups, per_row, place, self._narrowed, args, kwargs)

    def prepare(self, layers: Iterable[AdapterLayer]) -> None:
        """Find the groups of all places: faster one after the other than in between much else."""
        self.selection.places[True].update({id(layer): self.selection.groups(layer, grouped=True) for layer in layers})

    def forget(self) -> None:
        """Let go of all that was made of parameters."""
        self._selections.clear()
        self.selection = _Selection(self.rows)

    def run_around(self, handing: frozenset[str], call: Callable[..., Any], place: str, args: Any, kwargs: Any) -> Any:
        """Return what ``call`` returns for a batch of these rows; the adapters ``handing`` hand on inside it, each to itself."""
        rows_of: dict[tuple[str, ...], list[int]] = {}
        for row, names in enumerate(self.rows):
            rows_of.setdefault(tuple(name for name in names if name in handing), []).append(row)
        if len(rows_of) == 1:
            return call(*args, **kwargs)
        per_row = entries_per_row(len(self.rows), place, args, kwargs)
        groups = [(rows, call) for rows in rows_of.values()]
        return call_by_rows(groups, per_row, place, self._narrowed, args, kwargs, ragged=True)

    def _selected(self, rows: tuple[tuple[str, ...], ...]) -> _Selection:
        if rows not in self._selections:
            self._selections[rows] = _Selection(rows)
        return self._selections[rows]

    @contextlib.contextmanager
    def _narrowed(self, rows: Sequence[int]) -> Iterator[None]:
        """Let places inside a module that is run on some rows only know of these alone."""
        before = self.rows, self.numbers, self.selection
        self.rows = tuple(before[0][row] for row in rows)
        self.numbers = tuple(before[1][row] for row in rows)
        self.selection = self._selected(self.rows)
        try:
            with on_rows(self.numbers):
                yield
        finally:
            self.rows, self.numbers, self.selection = before


class _Selection:
    """How rows fall into groups at the places they come to.

    Args:
        rows: the adapters of each row, innermost first.
    """

    def __init__(self, rows: tuple[tuple[str, ...], ...]) -> None:
        self.rows_of: dict[tuple[str, ...], list[int]] = {}
        for row, names in enumerate(rows):
            self.rows_of.setdefault(names, []).append(row)
        self.names = tuple(dict.fromkeys(name for names in self.rows_of for name in names))
        # Groups of places where rows share the input and where they do not, by the id of the place.
        self.places: tuple[dict[int, list[_Group]], dict[int, list[_Group]]] = ({}, {})
        self._shapes: dict[Any, list[_Shape]] = {}

    def groups(self, layer: AdapterLayer, *, grouped: bool) -> list[_Group]:
        """Return groups of rows and what runs on each at a place; ``grouped`` is false where all rows share the input."""
        here, base = _adapters(layer), layer.base_layer
        found = [here.get(name) for name in self.names]
        shared = tuple([adapter.grouped_rows() if grouped and adapter is not None else None for adapter in found])
        key = (shared, tuple([adapter is None for adapter in found]))
        if key not in self._shapes:  # places are much alike
            self._shapes[key] = self._shaped(dict(zip(self.names, shared, strict=True)), here)
        groups: list[_Group] = []
        for rows, names, function, index in self._shapes[key]:
            if function is not None:
                chosen = AdapterRows(tuple([here[name] for name in names]), index)
                groups.append((rows, functools.partial(function, base, chosen)))
            else:
                groups.append((rows, _nested(layer, names) if names else base))
        return groups

    def _shaped(self, shared: Mapping[str, Callable[..., Any] | None], here: Mapping[str, Any]) -> list[_Shape]:
        """Return the groups of places with the adapters ``here``, of which those of one function in ``shared`` run together."""
        bare: list[int] = []
        own: list[_Shape] = []
        together: dict[Callable[..., Any], dict[str, list[int]]] = {}
        for names, rows in self.rows_of.items():
            found = [name for name in names if name in here]
            function = shared[found[0]] if len(found) == 1 else None
            if function is not None:
                together.setdefault(function, {}).setdefault(found[0], []).extend(rows)
            elif found:
                own.append(
                    (rows, names, None, ())
                )  # by all names, so that rows fall into the same groups at other places
            else:
                bare += rows
        shapes: list[_Shape] = []
        for function, of_adapter in together.items():
            place = dict.fromkeys(bare, -1)
            for number, rows in enumerate(of_adapter.values()):
                place.update(dict.fromkeys(rows, number))
            rows, bare = sorted(place), []
            shapes.append((rows, tuple(of_adapter), function, tuple([place[row] for row in rows])))
        shapes += own
        if bare:
            shapes.append((sorted(bare), (), None, ()))
        return shapes


def _nested(layer: AdapterLayer, names: Sequence[str]) -> Callable[..., Any]:
    """Return the base of ``layer`` with the adapters of ``names`` around it."""
    call: Callable[..., Any] = layer.base_layer
    for name in names:
        if name in layer.adapters:
            call = functools.partial(layer._adapter(name), call)
    return call


class _Around:
    """Stands for the forward of a module in which adapters hand something on, for the time of a block.

    Args:
        call: the forward.
        plan: which adapters act on which row.
        handing: names of the adapters.
        place: path of the module.
    """

    def __init__(self, call: Callable[..., Any], plan: RowPlan, handing: frozenset[str], place: str) -> None:
        functools.update_wrapper(self, call)  # transformers asks for the names of arguments
        self.call, self.plan, self.handing, self.place = call, plan, handing, place

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.plan.run_around(self.handing, self.call, self.place, args, kwargs)


@contextlib.contextmanager
def _around(model: nn.Module, plan: RowPlan, layers: Mapping[str, AdapterLayer]) -> Iterator[None]:
    """Let the modules around places whose adapters hand on run once for each of them."""
    used = {name for names in plan.rows for name in names}
    handing: dict[str, set[str]] = {}
    for path, layer in layers.items():
        here = _adapters(layer)
        for name in used:
            if name in here and here[name].hands_on:
                handing.setdefault(path.rpartition(".")[0], set()).add(name)
    modules = {path: unwrapped(module) for path, module in base_modules(model)} if handing else {}
    before = {path: modules[path].__dict__.get("forward") for path in handing}
    try:
        for path, names in handing.items():
            call = before[path] or modules[path].forward
            while isinstance(call, _Around):  # of a block around this one, whose names do not count
                call = call.call
            modules[path].__dict__["forward"] = _Around(call, plan, frozenset(names), path)
        yield
    finally:
        for path, own in before.items():
            if own is None:
                modules[path].__dict__.pop("forward", None)
            else:
                modules[path].__dict__["forward"] = own


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


def refuse_in_rows(model: nn.Module, name: str | None, what: str) -> None:
    """Refuse a change inside a block of :func:`adapter_rows`, to one of whose rows the adapter ``name`` belongs; None stands for any block.

    Raises:
        InjectionError: the model is in such a block.
    """
    for layer in adapter_layers(model).values():
        if isinstance(layer._rows, RowPlan) and (name is None or any(name in row for row in layer._rows.rows)):
            raise InjectionError(
                f"{what} inside a block of adapter_rows, whose rows would have other adapters than those named; leave the block first"
            )


# -- checks ------------------------------------------------------------------------------------------------------------


def _checked(model: nn.Module, names: Sequence[Row], layers: Mapping[str, AdapterLayer]) -> tuple[tuple[str, ...], ...]:
    """Return the adapters of each row, after all that can be seen beforehand was."""
    rows: list[tuple[str, ...]] = []
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise ConfigError(f"adapter_rows needs a sequence with a name or None for each row of the batch, got {names!r}")
    for row in names:
        listed = isinstance(row, Sequence) and not isinstance(row, str)
        several: Sequence[str] = [] if row is None else row if listed else [row]  # type: ignore[list-item]
        if not all(isinstance(name, str) for name in several):
            raise ConfigError(
                f"a row has the name of an adapter, a list of names or None, got {row!r} among {len(names)} rows"
            )
        rows.append(tuple(dict.fromkeys(several)))
    held = _check_names(model, list(dict.fromkeys(name for row in rows for name in row)), layers)
    for several in dict.fromkeys(row for row in rows if len(row) > 1):
        _check_together(layers, several, held, model)
    return tuple(rows)


def _check_names(model: nn.Module, names: Sequence[str], layers: Mapping[str, AdapterLayer]) -> dict[str, Injection]:
    """Refuse what cannot act on rows; return what was injected, by name."""
    merged = {name for layer in layers.values() for name in layer._merged}
    if merged:
        raise MergeError(
            f"rows were to have adapters of their own, but {min(merged)!r} is merged into the base, which all rows share; call "
            "unmerge_adapters(model) first"
        )
    inside = past_adapters(model)
    held = injections(inside)
    missing = list(names)
    for layer in layers.values():
        here = _adapters(layer)
        missing = [name for name in missing if name not in here]
    for name in missing:
        adapters_named(model, name)  # raises, saying what there is
    for name in names:
        if name in held and not held[name].method.row_routable:
            raise InjectionError(
                f"adapter {name!r} was asked for in rows, but its method {held[name].method.name!r} does not act on each row on its own "
                "(row_routable = False); make it the active adapter of a batch of its own"
            )
    for path, layer in layers.items():
        if "experts." in path and re.search(r"(^|\.)experts\.\d+(\.|$)", path):
            lost = [name for name in names if name in _adapters(layer)]
            if lost:
                raise InjectionError(
                    f"adapter {lost[0]!r} is at {path!r}, an expert that is given tokens of the whole batch in an order of its own, so rows "
                    "cannot be told apart there; adapt other places, or run a batch for each adapter"
                )
    if names and any(module.__dict__.get("batch_first") is False for module in inside):
        _refuse_batch_second(model)
    return held


def _refuse_batch_second(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if module.__dict__.get("batch_first") is False:
            raise InjectionError(
                f"{path!r}, a {type(module).__name__} with batch_first=False, has the rows of the batch in its second dimension; adapters by rows "
                "need them in the first"
            )


def _check_together(
    layers: Mapping[str, AdapterLayer], names: tuple[str, ...], held: Mapping[str, Injection], model: nn.Module
) -> None:
    for path, layer in layers.items():
        if (met := met_alone(layer, names, held)) is not None:
            raise InjectionError(
                f"{met.all} are to act on one row at {path!r}, but {alone(model, met.one, path)}; name one of them"
            )


def _adapters(layer: AdapterLayer) -> dict[str, Any]:
    """Return the adapters of a place by name, as they are held: looked up often, so past ``nn.Module``."""
    return layer._modules["adapters"]._modules  # type: ignore[union-attr]
