"""What is done with finished adapters as folders: combine, compare, look at singular values, cut the rank, convert to LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from json import dumps as to_json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse.typing import PositiveInt

from lightning_peft.cli.model_verbs import Dtype, _base_of, _load, _load_base
from lightning_peft.errors import ConfigError

if TYPE_CHECKING:
    from lightning_peft.adapter_tools.report import LowRankReport


def combine(
    adapters: list[str],
    weights: list[float],
    output: str,
    method: str = "svd",
    rank: PositiveInt | None = None,
    density: float = 0.5,
    majority_sign: str = "total",
    seed: int = 0,
    check_base: bool = True,
) -> None:
    """Make one LoRA folder of several, with weights; no model is loaded.

    Args:
        adapters: LoRA folders, ours or HF PEFT's.
        weights: one weight for each folder; a negative one takes a task away.
        output: folder to write; new or empty.
        method: svd, cat, linear, ties, dare_linear, dare_ties, magnitude_prune, or one of the last four with _svd.
        rank: rank of the result of svd and its relatives; the largest of the adapters if not given.
        density: share of elements that pruning keeps.
        majority_sign: what elects signs in ties: total or frequency.
        seed: of the random pruning of dare.
        check_base: whether to refuse folders that were trained on different bases.

    Raises:
        ConfigError: the output is not empty, or an argument is out of its range.
        AdapterFileError: a folder cannot be read, or two belong to different bases.
    """
    from lightning_peft.adapter_tools.combining import combine_folders

    _check_new(output)
    report = combine_folders(
        adapters,
        output,
        weights=weights,
        method=method,  # type: ignore[arg-type]  # an unknown word is refused there
        rank=rank,
        density=density,
        majority_sign=majority_sign,  # type: ignore[arg-type]
        seed=seed,
        check_base=check_base,
    )
    _print_report(output, report)


def diff(a: str, b: str) -> None:
    """Compare the updates of two LoRA folders, weight by weight.

    Args:
        a: LoRA folder, ours or HF PEFT's.
        b: another one, of any rank.

    Raises:
        AdapterFileError: a folder cannot be read, or the two are for weights of different shapes.
        ConfigError: a folder is not one of low-rank updates alone.
    """
    from lightning_peft.adapter_tools.comparing import diff_adapters, total_difference

    found = diff_adapters(a, b)
    rows = [["weight", "norm A", "norm B", "norm A-B", "cosine", "output angles", "input angles"]]
    for label, one in {**found, "all": total_difference(found)}.items():
        numbers = [_number(value) for value in (one.norm_a, one.norm_b, one.difference, one.cosine)]
        angles = [
            f"{math.degrees(held[0]):.0f}-{math.degrees(held[-1]):.0f} deg" if len(held) else "-"
            for held in (one.output_angles, one.input_angles)
        ]
        rows.append([label, *numbers, *angles])
    _print_table(rows)


def inspect(
    adapter: str,
    weights: bool = False,
    base: str | None = None,
    against: str | None = None,
    json: bool = False,
    dtype: Dtype = "auto",
) -> None:
    """Show the singular values of what an adapter adds to each weight, and what they do to the weights of the base.

    Args:
        adapter: adapter folder, ours or HF PEFT's; without --weights one of low-rank updates.
        weights: load the base and decompose its weights too: intruder dimensions, amplification, relative norm.
        base: local folder or hub id of the base; what the adapter names if not given.
        against: another LoRA folder, of another rank or seed: how much the first directions of both share.
        json: print JSON, with every singular value.
        dtype: precision in which the base is loaded; auto is its own.

    Raises:
        AdapterFileError: a folder cannot be read.
        ConfigError: the folder is not one of low-rank updates alone, or two options do not go together.
        MergeError: the method of the adapter cannot be merged.
    """
    from lightning_peft.adapter_tools.comparing import spectrum
    from lightning_peft.adapter_tools.spectra import subspace_similarity
    from lightning_peft.composition import saved_adapters

    if against is not None and (weights or base is not None):
        raise ConfigError("--against compares two folders; leave out --weights and --base")
    if against is not None:
        _print_similarity(subspace_similarity(adapter, against), json)
        return
    columns = ["norm", "effective_rank", "stable_rank"]
    if weights or base is not None:
        columns = [
            "relative_norm",
            *columns[1:],
            "intruders",
            "amplification",
            "base_effective_rank",
            "tuned_effective_rank",
        ]
        found = _analyses(adapter, base or _base_of(adapter), dtype)
    else:
        folders = saved_adapters(adapter, inactive=True)
        found = {
            f"{name}/{label}" if len(folders) > 1 else label: one
            for name, folder in folders.items()
            for label, one in spectrum(folder).items()
        }
    _print_analyses(found, columns, json)


def _print_analyses(found: Mapping[str, Any], columns: list[str], json: bool) -> None:
    if json:
        fields = {
            label: {
                "values": one.values.tolist(),
                "rank": one.rank,
                **{column: getattr(one, column) for column in columns},
            }
            for label, one in found.items()
        }
        print(to_json(fields, indent=1))
        return
    rows = [["weight", "rank", *(column.replace("_", " ") for column in columns), "largest singular values"]]
    for label, one in found.items():
        values = " ".join(_number(float(value)) for value in one.values[:6]) + (" ..." if len(one.values) > 6 else "")
        rows.append(
            [label, f"{one.rank} of {len(one.values)}", *(_number(float(getattr(one, c))) for c in columns), values]
        )
    _print_table(rows)


def _analyses(adapter: str, base: str, dtype: Dtype) -> dict[str, Any]:
    """Return the analysis of every weight, with the names of the adapters before where there are several."""
    from lightning_peft.adapter_layer import adapter_names
    from lightning_peft.adapter_tools.spectra import analyze_weights

    model = _load_base(base, dtype)
    _load(model, adapter)
    each = {name: analyze_weights(model, name) for name in adapter_names(model)}
    return {
        f"{name}/{label}" if len(each) > 1 else label: one
        for name, found in each.items()
        for label, one in found.items()
    }


def _print_similarity(found: Mapping[str, Any], json: bool) -> None:
    if json:
        print(to_json({label: grid.tolist() for label, grid in found.items()}, indent=1))
        return
    depths = [1, 2, 4, 8, 16, 32, 64]
    most = max(min(grid.shape) for grid in found.values())
    kept = [depth for depth in depths if depth < most] + [most]
    rows = [["weight", *(f"first {depth}" for depth in kept)]]
    for label, grid in found.items():
        places = [min(depth, size) - 1 for depth in kept for size in grid.shape]
        cells = [_number(float(grid[i, j])) for i, j in zip(places[::2], places[1::2], strict=True)]
        rows.append([label, *cells])
    _print_table(rows)


def prune(adapter: str, output: str, rank: PositiveInt | None = None, energy: float | None = None) -> None:
    """Write a LoRA folder in smaller rank: the best approximation of each update.

    Args:
        adapter: LoRA folder, ours or HF PEFT's.
        output: folder to write; new or empty.
        rank: rank to keep.
        energy: instead of a rank, the share of the sum of squared singular values that each update keeps.

    Raises:
        ConfigError: the output is not empty, or not one of rank and energy is given.
        AdapterFileError: the folder cannot be read.
    """
    from lightning_peft.adapter_tools.pruning import prune_folder

    _check_new(output)
    _print_report(output, prune_folder(adapter, output, rank=rank, energy=energy))


def convert_to_lora(
    output: str,
    adapter: str | None = None,
    tuned: str | None = None,
    base: str | None = None,
    rank: PositiveInt | None = None,
    energy: float | None = None,
    dtype: Dtype = "auto",
    check_base: bool = True,
    drop_rest: bool = False,
) -> None:
    """Turn an adapter of another method, or a model that was trained in full, into a LoRA folder.

    Args:
        output: folder to write; new or empty.
        adapter: adapter folder of any mergeable method.
        tuned: instead of an adapter, a model folder or hub id: what was made of the base by training it.
        base: local folder or hub id of the base; what the adapter was trained on if not given.
        rank: rank of the LoRA.
        energy: instead of a rank, the share of the sum of squared singular values that each weight keeps.
        dtype: precision of the weights; auto is that of the base.
        check_base: whether to refuse a base other than the one the adapter was trained on.
        drop_rest: leave out parameters that a LoRA has no update for, such as those of norms.

    Raises:
        ConfigError: the output is not empty, not one of adapter and tuned is given, or a LoRA cannot hold the change.
        AdapterFileError: the adapter cannot be read or does not fit the base.
        MergeError: the method of the adapter cannot be merged.
    """
    from lightning_peft.adapter_tools import conversion
    from lightning_peft.arithmetic.thin_products import check_rank_or_energy
    from lightning_peft.state import save_adapter

    if (adapter is None) == (tuned is None) or (tuned is not None and base is None):
        raise ConfigError("to-lora needs --adapter FOLDER, or --tuned FOLDER_OR_ID with --base FOLDER_OR_ID")
    check_rank_or_energy(rank, energy)
    _check_new(output)
    model = _load_base(base or _base_of(str(adapter)), dtype)
    if tuned is not None:
        changed = _load_base(tuned, dtype)
        report = conversion.extract_lora(
            model, changed, rank=rank, energy=energy, name="converted", drop_rest=drop_rest
        )
    else:
        _load(model, str(adapter), check_base)
        report = conversion.to_lora(model, rank=rank, energy=energy, new_name="converted", drop_rest=drop_rest)
    save_adapter(model, output, name="converted")
    _print_report(output, report)


def _check_new(output: str) -> None:
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {output!r} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"--output {output!r} is not empty; name another folder")


def _print_report(output: str, report: LowRankReport) -> None:
    rows = [["weight", "rank", "relative error"]]
    for label, rank in report.ranks.items():
        rows.append([label, str(rank), f"{report.errors[label]:.2e}" if label in report.errors else "-"])
    _print_table(rows)
    for name in report.left_out:
        print(f"left out: {name}")
    whole = f", relative error {report.error:.2e}" if report.errors else ""
    print(f"{output}: {len(report.ranks)} weights{whole}")


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
