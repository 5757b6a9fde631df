"""Each member of a population goes the way of its run alone, with the same seed and the same batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import ReduceLROnPlateau

from lightning_peft import (
    EVA,
    AdaLoRA,
    Bottleneck,
    CausalLMLoader,
    DoRA,
    LoRA,
    LoRAMixture,
    LoRAPlus,
    Member,
    NormTuning,
    PEFTModule,
    PopulationModule,
    PrefixTuning,
    PromptTuning,
    TextDataModule,
    VeRA,
)
from lightning_peft.testing.subject import distance
from lightning_peft.testing.toys import tiny_llama


def adamw(params: Any) -> Any:
    return torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1)


def sgd(params: Any) -> Any:
    return torch.optim.SGD(params, lr=0.3, momentum=0.9)


def cosine(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=24)


def steps_down(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)


def plateau(optimizer: Any) -> Any:
    return ReduceLROnPlateau(optimizer, monitor="val_loss", patience=0, threshold=1.0)


MIXED = [
    Member(LoRA(rank=2), ["query", "value"], "two", lr=1e-2, seed=1, optimizer=adamw, lr_scheduler=cosine),
    Member(LoRA(rank=8, rslora=True), "all_linear", "eight", seed=2, optimizer=adamw, gradient_clip_val=0.05),
    Member(
        Bottleneck(reduction_factor=8.0),
        None,
        "bottleneck",
        lr=1e-2,
        seed=3,
        optimizer=sgd,
        lr_scheduler=steps_down,
        lr_interval="epoch",
    ),
    Member(
        NormTuning(),
        None,
        "norms",
        lr=1e-2,
        seed=4,
        lr_scheduler=plateau,
        modules_to_save=["*.layers.1.self_attn.q_proj"],
    ),
    Member(LoRAPlus(rank=4), ["gate", "up"], "plus", seed=5, optimizer=sgd, lr=3e-3),
]
OTHERS = [
    Member(DoRA(rank=2), ["query"], "dora", seed=1),
    Member(
        AdaLoRA(init_rank=4, target_rank=2, initial_steps=1, final_steps=2, interval=2),
        ["query", "value"],
        "adalora",
        seed=2,
    ),
    Member(PrefixTuning(num_virtual_tokens=3), None, "prefix", seed=3, lr=1e-2),
    Member(VeRA(rank=8), ["query", "value"], "vera", seed=4, lr=1e-2),
    Member(EVA(rank=2, batches=2), ["query", "value"], "eva", seed=5),
    Member(LoRAMixture(experts=2, rank=2), ["up"], "mixture", seed=6),
    Member(PromptTuning(num_virtual_tokens=4), None, "prompt", seed=7, lr=1e-2),
    Member(LoRA(rank=3), ["query"], "unseeded"),
]


def population(members: list[Member], **options: Any) -> PopulationModule:
    return PopulationModule(tiny_llama(), members, **{"optimizer": adamw, **options})


def assert_same(
    module: PopulationModule, alone: PEFTModule, name: str, adapter_tensors: Any, tolerance: float = 2e-5
) -> None:
    found, wanted = adapter_tensors(module, name), adapter_tensors(alone, name)
    assert found.keys() == wanted.keys()
    assert wanted
    for key, value in wanted.items():
        assert distance(found[key], value) <= tolerance, key


def compare(members, solo, make_trainer, make_loaders, adapter_tensors, tmp_path, tolerance=2e-5, **trainer):
    torch.manual_seed(9)
    together = population(members)
    make_trainer(tmp_path / "together", **trainer).fit(together, *make_loaders())
    for member in members:
        torch.manual_seed(9)
        alone = solo(member, module_options={"optimizer": adamw}, **trainer)
        start = PEFTModule(
            tiny_llama(), member.method, member.targets, modules_to_save=member.modules_to_save, name=member.name
        )
        torch.manual_seed(9 if member.seed is None else member.seed)
        start.configure_model()
        moved = [
            distance(value, adapter_tensors(start, member.name)[key])
            if key in adapter_tensors(start, member.name)
            else 1.0
            for key, value in adapter_tensors(alone, member.name).items()
        ]
        assert max(moved) > 1e-3  # it has gone somewhere
        assert_same(together, alone, member.name, adapter_tensors, tolerance)
        found, places = together.trainer.callback_metrics, alone.trainer.callback_metrics
        for metric in ("train_loss", "val_loss", "val_perplexity", "val_token_accuracy"):
            assert float(found[f"{metric}/{member.name}"]) == pytest.approx(float(places[metric]), rel=1e-4), metric


def test_24_steps_of_five_members_are_those_of_five_runs(solo, make_trainer, make_loaders, adapter_tensors, tmp_path):
    compare(MIXED, solo, make_trainer, make_loaders, adapter_tensors, tmp_path, max_epochs=3)


def test_in_double_precision_they_are_the_same_to_the_last_digits(
    solo, make_trainer, make_loaders, adapter_tensors, tmp_path
):
    options = {"max_epochs": 3, "precision": "64-true", "gradient_clip_val": 0.3}
    compare(MIXED, solo, make_trainer, make_loaders, adapter_tensors, tmp_path, tolerance=1e-11, **options)


def test_with_clipping_and_accumulation(solo, make_trainer, make_loaders, adapter_tensors, tmp_path):
    options = {"max_epochs": 5, "gradient_clip_val": 0.3, "accumulate_grad_batches": 2}
    compare(MIXED[:4], solo, make_trainer, make_loaders, adapter_tensors, tmp_path, **options)


def test_methods_of_other_kinds(solo, make_trainer, make_loaders, adapter_tensors, tmp_path):
    compare(OTHERS, solo, make_trainer, make_loaders, adapter_tensors, tmp_path, max_epochs=1)


def test_a_real_model_learns_as_alone_from_shuffled_text(data_dir, make_trainer, adapter_tensors, tmp_path):
    folder = str(data_dir / "models" / "stories260k")
    members = [
        Member(LoRA(rank=8), "all_linear", "all", lr=1e-2, seed=1),
        Member(NormTuning(), None, "norms", optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), seed=2),
    ]

    def data() -> TextDataModule:
        text = {"train": str(data_dir / "e2e" / "train.jsonl"), "val": {"e2e": str(data_dir / "e2e" / "valid.jsonl")}}
        sizes = {"block_size": 128, "batch_size": 4, "max_train_tokens": 16384, "max_val_tokens": 1024}
        return TextDataModule(
            tokenizer=folder, template={"train": "{mr} => {ref}", "e2e": "{mr} => {ref}"}, **text, **sizes
        )

    def fit(module: PEFTModule) -> list[float]:
        values = []

        class Note(Callback):
            def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
                found = trainer.callback_metrics
                values.extend(
                    float(found[key]) for key in ("val_loss/all", "val_loss/norms", "val_loss") if key in found
                )

        options = {"max_steps": 8, "val_check_interval": 4, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0}
        make_trainer(tmp_path, callbacks=[Note()], enable_checkpointing=False, **options).fit(module, datamodule=data())
        return values

    torch.manual_seed(9)
    together = PopulationModule(CausalLMLoader(path=folder), members, optimizer=adamw)
    found = fit(together)
    assert found[3] < found[0] < 4.0  # it learns
    for number, member in enumerate(members):
        torch.manual_seed(9)
        alone = _Seeded(CausalLMLoader(path=folder), member)
        assert fit(alone) == pytest.approx(found[number::3], rel=1e-5)
        assert_same(
            together, alone, member.name, adapter_tensors, tolerance=2e-3
        )  # AdamW magnifies rounding where gradients are near zero


class _Seeded(PEFTModule):
    """A member alone, whose initial values have its seed, over batches in the order of the population's."""

    def __init__(self, base: CausalLMLoader, member: Member) -> None:
        make = member.optimizer or (lambda groups: adamw([{**group, "lr": member.lr} for group in groups]))
        super().__init__(base, member.method, member.targets, name=member.name, optimizer=make)
        self.seed = member.seed

    def _inject(self, model: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            super()._inject(model)
