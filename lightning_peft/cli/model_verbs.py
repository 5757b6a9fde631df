"""What is done with a trained adapter: merge it into its base, or let it speak."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat, PositiveInt

from lightning_peft.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def merge(
    adapter: str,
    output: str,
    base: str | None = None,
    dtype: Dtype = "auto",
    check_base: bool = True,
    overwrite: bool = False,
    exporter: str = "merged_transformers",
    options: dict[str, Any] | None = None,
    quantized: Literal["original", "dequantize"] = "original",
    out_of_core: bool = False,
    max_shard_size: str | None = None,
) -> None:
    """Merge an adapter into its base and write a plain transformers folder, or the folder of another exporter.

    Args:
        adapter: adapter folder, ours or HF PEFT's.
        output: folder to write; new or empty.
        base: local folder or hub id of the base; what the adapter was trained on if not given.
        dtype: precision of the weights; auto is that of the base.
        check_base: whether to refuse a base other than the one the adapter was trained on.
        overwrite: replace the model that stands in the output folder.
        exporter: registry name of the exporter that writes, such as mixtral for a mixture of experts.
        options: fields of the exporter, as a mapping.
        quantized: where an adapter was trained over a quantised base, what it is merged into: the original weights, or what those it was
            trained over stand for.
        out_of_core: merge tensor by tensor from file to file, without loading the model. The base must be a local folder.
        max_shard_size: size at which the weights are cut into files, such as 5GB; that of the base's files if out_of_core, else 5GB.

    Raises:
        ConfigError: the output is not empty, or no base can be loaded.
        AdapterFileError: the adapter cannot be read or does not fit the base.
        MergeError: its method cannot be merged.
        ExportError: the format cannot hold the model.
        UnknownNameError: there is no such exporter.
    """
    from lightning_peft.registry import get_registry

    settings = _exporter_fields(exporter, dict(options or {}), quantized, None if out_of_core else max_shard_size)
    writer = get_registry().get("exporter", exporter).from_config(settings)
    folder = Path(output)
    base = base or _base_of(adapter)
    _check_output(folder, overwrite, [adapter, base])
    if out_of_core:
        if exporter != "merged_transformers" or options or quantized == "dequantize":
            raise ConfigError(
                "--out_of_core writes a plain transformers folder, without --exporter, --options or --quantized"
            )
        _merge_files(base, adapter, folder, dtype, check_base, overwrite, max_shard_size)
        return
    model = _load_base(base, dtype)
    if quantized == "dequantize":
        _quantize_as_trained(model, adapter)
    _load(model, adapter, check_base)
    with _replaced(folder, written_in_place=writer.atomic) as written:
        writer.export(model, written)
        if getattr(writer, "tokenizer", True):
            _copy_tokenizer(base, written)
    _print_size(folder)


def _exporter_fields(
    exporter: str, fields: dict[str, Any], quantized: str, max_shard_size: str | None
) -> dict[str, Any]:
    """Return the fields of the exporter: those given, and those that have an argument of their own."""
    own = {"max_shard_size": max_shard_size} if max_shard_size is not None else {}
    own |= {"quantized": quantized} if quantized == "dequantize" else {}
    if own and exporter != "merged_transformers":
        raise ConfigError(
            f"--quantized and --max_shard_size are for the exporter merged_transformers, not {exporter!r}"
        )
    return fields | own


def _print_size(folder: Path) -> None:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder} ({size / 1e6:,.1f} MB)" if size >= 1e6 else f"{folder} ({size / 1e3:,.1f} kB)")


def convert(
    adapter: str,
    output: str,
    base: str,
    format: str | None = None,
    options: dict[str, Any] | None = None,
    dtype: Dtype = "auto",
) -> None:
    """Read an adapter of other software over its base and write it as an adapter folder.

    Args:
        adapter: file or folder of HF PEFT, transformers, loralib, LitGPT, torchtune, llama.cpp or another registered format.
        output: folder to write; new or empty.
        base: local folder or hub id of the base.
        format: registry name of the format; found from what is there if not given.
        options: fields of the format that the file does not hold, as a mapping; they need a format.
        dtype: precision of the weights of the base; auto is its own.

    Raises:
        ConfigError: the output is not empty, or no base can be loaded.
        AdapterFileError: the adapter cannot be read or does not fit the base.
        UnknownNameError: there is no such format.
    """
    from lightning_peft.registry import get_registry
    from lightning_peft.state import load_adapter, save_adapter

    if options and format is None:
        raise ConfigError(
            f"--options {options!r} are fields of a format; name it with --format, such as --format loralib"
        )
    reader = get_registry().get("adapter format", format).from_config(options or {}) if format else None
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--output {output!r} is not a new or empty folder; name another")
    model = _load_base(base, dtype)
    injection = load_adapter(model, adapter, format=reader)
    save_adapter(model, folder)
    print(f"{folder}: {injection.method.name} at {len(injection.targets)} places")


def generate(
    prompt: str,
    adapter: str | None = None,
    base: str | None = None,
    max_new_tokens: PositiveInt = 64,
    temperature: NonNegativeFloat = 0.0,
    seed: int | None = None,
    dtype: Dtype = "auto",
) -> None:
    """Continue a text with a model, adapted or not.

    Args:
        prompt: the text to continue.
        adapter: adapter folder, ours or HF PEFT's; the base alone if not given.
        base: local folder or hub id of the base; what the adapter was trained on if not given.
        max_new_tokens: length of the continuation.
        temperature: 0 takes the likeliest token each time; higher values sample.
        seed: makes sampling repeatable.
        dtype: precision of the weights; auto is that of the base.

    Raises:
        ConfigError: no base can be loaded, or the prompt has no tokens.
        AdapterFileError: the adapter cannot be read or does not fit the base.
    """
    if base is None and adapter is None:
        raise ConfigError("generate needs a model: give --adapter FOLDER, --base FOLDER_OR_ID, or both")
    import torch

    base = base or _base_of(str(adapter))
    _base_class(base)
    tokenizer = _tokenizer(base)
    if tokenizer is None:
        raise ConfigError(f"the base {base!r} has no tokenizer, and text needs one")
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise ConfigError(f"the prompt {prompt!r} has no tokens")
    model = _load_base(base, dtype)
    if adapter is not None:
        _load(model, adapter)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    if seed is not None:
        torch.manual_seed(seed)
    sampling = {"temperature": temperature} if temperature else {"temperature": None, "top_p": None, "top_k": None}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = model.generate(
        **inputs.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        pad_token_id=padding,
        **sampling,
    )
    print(tokenizer.decode(ids[0], skip_special_tokens=True))


def _merge_files(
    base: str, adapter: str, folder: Path, dtype: str, check_base: bool, overwrite: bool, max_shard_size: str | None
) -> None:
    """Merge from file to file."""
    import torch

    from lightning_peft.out_of_core import merge_folder

    if not Path(base).is_dir():
        raise ConfigError(
            f"--out_of_core reads the files of a local folder, and the base {base!r} is none; give --base FOLDER"
        )
    cast = None if dtype == "auto" else getattr(torch, dtype)
    merge_folder(
        base, adapter, folder, dtype=cast, check_base=check_base, overwrite=overwrite, max_shard_size=max_shard_size
    )
    _print_size(folder)


def _quantize_as_trained(model: Any, adapter: str) -> None:
    """Quantise the base as the method of the adapter did before training."""
    from lightning_peft.adapter_files import read_adapter
    from lightning_peft.composition import first_adapter

    method = read_adapter(first_adapter(adapter)).method
    if not method.merges_quantized:
        raise ConfigError(
            f"--quantized dequantize was asked for, but {method.name!r} was not trained over a base that it quantised"
        )
    method.prepare(model)


def _load(model: Any, adapter: str, check_base: bool = True) -> None:
    """Load an adapter folder, or one of several adapters."""
    from lightning_peft.composition import holds_several, load_adapters
    from lightning_peft.state import load_adapter

    load = load_adapters if holds_several(adapter) else load_adapter
    load(model, adapter, check_base=check_base)


def _base_of(adapter: str) -> str:
    from lightning_peft.adapter_files import read_adapter
    from lightning_peft.composition import first_adapter

    name = read_adapter(first_adapter(adapter)).base_name_or_path
    if name is None:
        raise ConfigError(f"{adapter!r} does not say which base it was trained on; give --base FOLDER_OR_ID")
    return name


def _load_base(path: str, dtype: str) -> Any:
    return _base_class(path).from_pretrained(path, dtype=dtype)


def _base_class(path: str) -> Any:
    """Return the class of transformers that the configuration of a model folder or hub id names."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no base model could be loaded from {path!r}; give another with --base FOLDER_OR_ID: {error}"
        ) from error
    kind = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    return kind if known else transformers.AutoModelForCausalLM


def _tokenizer(path: str) -> Any:
    """Return the tokenizer of a model folder or hub id, or None where it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError):
        return None


def _copy_tokenizer(base: str, folder: Path) -> None:
    tokenizer = _tokenizer(base)
    if tokenizer is None:
        print(f"{base!r} has no tokenizer to copy")
    else:
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _replaced(folder: Path, written_in_place: bool) -> Iterator[Path]:
    """Give the folder to write instead of ``folder``: one beside it that takes its place afterwards, or its own empty place.

    If writing fails, what stood there stands there still.
    """
    place = folder.absolute()
    beside = place.with_name(f".{place.name}.partial-{os.getpid()}")
    if written_in_place and place.exists():
        place.rename(beside)  # what stood there, until the new one is whole
    try:
        yield place if written_in_place else beside
        if not written_in_place:
            if place.exists():
                shutil.rmtree(place)
            beside.rename(place)
    except BaseException:
        if written_in_place:
            shutil.rmtree(place, ignore_errors=True)
            if beside.exists():
                beside.rename(place)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _check_output(folder: Path, overwrite: bool, inputs: list[str]) -> None:
    """Refuse an output that holds anything which must not be lost."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {str(folder)!r} is a file; name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ConfigError(
            f"--output {str(folder)!r} is not empty; name another folder, or add --overwrite to replace it"
        )
    for source in inputs:
        if folder.resolve() in (Path(source).resolve(), *Path(source).resolve().parents):
            raise ConfigError(f"--output {str(folder)!r} holds {source!r}, which is being merged; name another folder")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"--output {str(folder)!r} is not the folder of a model and is not replaced; name another folder"
        )
