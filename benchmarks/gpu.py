"""Training of Llama shapes on a GPU: peak memory, tokens a second, use of the GPU's arithmetic, and what checkpoints take.

::

    python benchmarks/gpu.py                                          # 1B and 8B, bfloat16 and NF4, on the GPU
    python benchmarks/gpu.py --shape 8b --base nf4 --rows 4 --checkpointing
    python benchmarks/gpu.py --device cpu --shape tiny                # the same code, for trying it

Weights are random and made on the device, so nothing is downloaded. The table is printed and written as JSON, with versions and the
name of the device. Without a GPU nothing is measured, and the exit status is 0. *MFU* is the arithmetic that a step needs, by the
peak of the device for dense bfloat16: two operations a weight and token forward, two backward, as a frozen weight has no gradient, six
for an adapter's, and causal attention. What activation checkpointing repeats is not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import LoRA, PEFTModule, QLoRA, load_adapter, save_adapter

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "tie_word_embeddings": True},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}  # fmt: skip
"""Those of Llama 3, and one to try the program with."""
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Part of a device's name to its peak for dense bfloat16, in operations a second, as its maker gives it."""
BASES = ("bf16", "nf4")


class Clock(Callback):
    """Takes the time of each step, the work of the device included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        wait(module.device)
        self.begin = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        wait(module.device)
        self.seconds.append(time.perf_counter() - self.begin)


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, call: Any) -> float:
    """Return the seconds that a call takes."""
    wait(device)
    begin = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - begin


def llama(shape: str, device: torch.device, checkpointing: bool) -> nn.Module:
    """Return a Llama with random weights in bfloat16, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False, **SHAPES[shape]}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**settings, use_cache=False))
    finally:
        torch.set_default_dtype(before)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def operations(model: nn.Module, tokens: int, sequence: int) -> float:
    """Return the operations that forward and backward of ``tokens`` tokens need in rows of ``sequence``."""
    looked_up = {id(model.get_input_embeddings().weight)} - {id(model.get_output_embeddings().weight)}
    a_token = 0.0
    for parameter in model.parameters():
        if parameter.dim() > 1 and id(parameter) not in looked_up:
            packed = getattr(parameter, "quant_state", None)
            elements = parameter.numel() if packed is None else packed.shape.numel()
            a_token += (6 if parameter.requires_grad else 4) * elements
    config = model.config
    attention = (
        3 * 2 * config.num_hidden_layers * config.hidden_size * sequence
    )  # scores and values, half of them masked
    return tokens * (a_token + attention)


def peak_of(device: torch.device, given: float | None) -> float | None:
    """Return the operations a second that the device can do at best, where that is known."""
    if given is not None or device.type != "cuda":
        return given
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in PEAKS.items() if part in name), None)


def memory(device: torch.device) -> float:
    """Return the most bytes that were in use: of the device, or of the process on the CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def rows_of(options: argparse.Namespace, vocabulary: int) -> DataLoader[Any]:
    """Return as many batches of random tokens as there are steps."""
    generator = torch.Generator().manual_seed(0)
    size = (options.rows * options.steps, options.sequence)
    tokens: Tensor = torch.randint(0, vocabulary, size, generator=generator)
    return DataLoader([{"input_ids": row, "labels": row} for row in tokens], batch_size=options.rows)


def measure(shape: str, base: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train one combination for some steps, save and load, and return what it took."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seed_everything(0, verbose=False)
    model, clock = llama(shape, device, options.checkpointing), Clock()
    settings: dict[str, Any] = {"rank": options.rank, "alpha": 2.0 * options.rank}
    method = QLoRA(**settings, compute_dtype="bfloat16") if base == "nf4" else LoRA(**settings)
    module = PEFTModule(model, method, targets="all_linear", optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4))
    fields: dict[str, Any] = {
        "accelerator": "gpu" if device.type == "cuda" else "cpu",
        "devices": [device.index or 0] if device.type == "cuda" else 1,
        "precision": "bf16-mixed",
        "max_steps": options.steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer, data = Trainer(**fields, callbacks=[clock]), rows_of(options, model.config.vocab_size)
    trainer.fit(module, data)
    most = memory(device)
    module.to(device)
    seconds = statistics.median(clock.seconds[options.warm_up :])
    tokens = options.rows * options.sequence
    peak, work = peak_of(device, options.peak), operations(module.model, tokens, options.sequence)
    found = {
        "shape": shape,
        "base": base,
        "trained": sum(p.numel() for p in module.model.parameters() if p.requires_grad),
        "peak_memory_bytes": most,
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": None if peak is None else work / seconds / peak,
        "loss": float(trainer.callback_metrics["train_loss"]),
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, adapter = Path(folder) / "run.ckpt", Path(folder) / "adapter"
        found["checkpoint_save_seconds"] = timed(device, lambda: trainer.save_checkpoint(checkpoint))
        found["checkpoint_bytes"] = checkpoint.stat().st_size
        found["adapter_save_seconds"] = timed(device, lambda: save_adapter(module.model, adapter))
        found["adapter_load_seconds"] = timed(device, lambda: load_adapter(module.model, adapter, name="again"))
    return found


COLUMNS: dict[str, tuple[str, float, str]] = {
    "peak_memory_bytes": ("peak memory, GB", 1e-9, ".2f"),
    "step_seconds": ("step, ms", 1e3, ",.1f"),
    "tokens_per_second": ("tokens/s", 1, ",.0f"),
    "mfu": ("MFU, %", 100, ".1f"),
    "checkpoint_bytes": ("`.ckpt`, MB", 1e-6, ".1f"),
    "checkpoint_save_seconds": ("save `.ckpt`, s", 1, ".3f"),
    "adapter_save_seconds": ("save adapter, s", 1, ".3f"),
    "adapter_load_seconds": ("load adapter, s", 1, ".3f"),
}


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return what was found as a table."""
    lines = [
        "| shape | base | " + " | ".join(head for head, _, _ in COLUMNS.values()) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for one in found:
        cells = [
            "" if one[key] is None else format(one[key] * scale, form) for key, (_, scale, form) in COLUMNS.items()
        ]
        lines.append(f"| {one['shape']} | {one['base']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what was asked for; 0 also where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", nargs="+", choices=list(SHAPES), default=["1b", "8b"])
    parser.add_argument("--base", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1, help="of a batch")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5, help="first steps that do not count")
    parser.add_argument("--checkpointing", action="store_true", help="keep the inputs of layers only")
    parser.add_argument(
        "--peak", type=float, help="operations a second of the device, where the program does not know them"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/gpu.json"))
    options = parser.parse_args(arguments)
    if not 0 <= options.warm_up < options.steps:
        parser.error(f"--warm-up must leave some of the {options.steps} steps, got {options.warm_up}")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU is here, so nothing was measured; --device cpu --shape tiny tries the program")
        return 0
    found = []
    for shape in options.shape:
        for base in options.base:
            found.append(measure(shape, base, options, device))
            print(found[-1], flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    about = {"device": name, "torch": torch.__version__, "options": settings, "results": found}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(about, indent=1) + "\n")
    print(f"\n{name}, torch {torch.__version__}\n\n{table(found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
