"""What a population accepts and refuses, other models and batches, and its command line."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import (
    Adaptation,
    BitFit,
    FullFineTuning,
    LoftQ,
    LoRA,
    Member,
    MemberGrid,
    NormTuning,
    PEFTModule,
    PopulationCheckpoint,
    PopulationModule,
    QLoRA,
)
from lightning_peft.errors import ConfigError
from lightning_peft.population.member_batches import repeated
from lightning_peft.population.optimizers import PopulationOptimizer
from lightning_peft.testing.subject import distance
from lightning_peft.testing.toys import tiny_gpt2, tiny_llama, token_batch


def two(**options: Any) -> list[Member]:
    return [Member(LoRA(rank=2), None, "a", seed=1, **options), Member(LoRA(rank=3), None, "b", seed=2, lr=1e-2)]


# -- who may be a member -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "at least one member"),
        (LoRA(), "members must be a list"),
        ([Member(LoRA(), name="a"), Member(LoRA(), name="a")], "'a' is given to 2"),
        ([LoRA(), FullFineTuning()], "'full' does not act on each row"),
        ([LoRA(), LoftQ()], "packed weights that belong to its adapter alone"),
        ([LoRA(), QLoRA()], "alone each would train over another"),
        ([QLoRA(quantization="nf4"), QLoRA(quantization="fp4")], "alone each would train over another"),
        ([QLoRA(quantization="int8")], "does not act on each row"),
        (["lora"], "got 'lora'"),
    ],
)
def test_what_cannot_be_a_population(members, message):
    with pytest.raises(ConfigError, match=message):
        PopulationModule(tiny_llama(), members)


def test_members_over_one_quantised_base_may_differ_in_rank():
    module = PopulationModule(tiny_llama(), [QLoRA(rank=2), QLoRA(rank=4)])
    assert list(module.members) == ["qlora", "qlora_2"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("lr", "1e-3"),
        ("lr", float("inf")),
        ("lr_interval", "batch"),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", "one"),
        ("patience", 0),
        ("patience", 1.5),
        ("min_delta", -1.0),
        ("min_delta", "0"),
        ("gradient_clip_val", 0.0),
        ("gradient_clip_val", "norm"),
    ],
)
def test_a_member_checks_its_fields(field, value):
    with pytest.raises(ConfigError, match=f"{field} must .*{value}"):
        Member(LoRA(), **{field: value})


def test_plain_methods_and_adaptations_are_members():
    module = PopulationModule(tiny_llama(), [LoRA(rank=2), Adaptation(LoRA(rank=4), ["query"], "x")])
    assert [(name, one.targets) for name, one in module.members.items()] == [("lora", None), ("x", ["query"])]


# -- the grid ----------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_with_a_name_of_what_differs():
    grid = MemberGrid(
        [LoRA(alpha=4.0), QLoRA(alpha=4.0)],
        fields={"rank": [2, 8]},
        targets=[["query", "value"], "all_linear"],
        lr=[1e-3, 2.5e-4],
        patience=3,
    )
    members = grid.members()
    assert len(members) == len({one.name for one in members}) == 16
    assert members[0].name == "lora-rank2-query_value-lr1e-3"
    assert members[-1].name == "qlora-rank8-all_linear-lr25e-5"
    assert members[-1].method == QLoRA(rank=8, alpha=4.0)
    assert {one.patience for one in members} == {3}
    assert [one.name for one in MemberGrid(LoRA(), seed=[0, 1]).members()] == ["lora-seed0", "lora-seed1"]
    assert list(PopulationModule(tiny_llama(), MemberGrid(LoRA(), seed=[0, 1])).members) == ["lora-seed0", "lora-seed1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": {"rnk": [1]}}, "'rnk', which LoRA does not have"),
        ({"fields": {"rank": 4}}, "rank must be a list"),
        ({"fields": {"rank": [0]}}, "rank"),
    ],
)
def test_a_grid_checks_what_is_tried(options, message):
    with pytest.raises(ConfigError, match=message):
        MemberGrid(LoRA(), **options).members()


# -- runs that are refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "trainer", "message"),
    [
        (lambda: two(patience=2), {"limit_val_batches": 0}, "go by validation"),
        (
            lambda: two(optimizer=lambda p: torch.optim.LBFGS([one for group in p for one in group["params"]])),
            {},
            "LBFGS",
        ),
    ],
)
def test_a_fit_that_is_refused(module, trainer, message, make_trainer, make_loaders, tmp_path):
    with pytest.raises(ConfigError, match=message):
        make_trainer(tmp_path, max_steps=1, **trainer).fit(PopulationModule(tiny_llama(), module()), *make_loaders())


@pytest.mark.parametrize(
    ("trainer", "message"), [({"precision": "16-mixed"}, "hold up the others"), ({"world_size": 2}, "one process")]
)
def test_what_members_would_share_is_refused(trainer, message):
    module = PopulationModule(tiny_llama(), two())
    module._trainer = SimpleNamespace(**{"precision": "32-true", "world_size": 1, **trainer})
    with pytest.raises(ConfigError, match=message):
        module.setup("fit")


def test_batches_that_cannot_be_repeated_are_refused():
    with pytest.raises(ConfigError, match="column 'adapter'"):
        repeated({**token_batch(), "adapter": ["a", "b", "a"]}, 2)
    with pytest.raises(ConfigError, match="got str"):
        repeated("text", 2)


def test_a_batch_is_repeated_by_its_rows():
    batch = {
        "input_ids": torch.arange(6).view(2, 3),
        "positions": torch.arange(3),
        "scale": torch.tensor(1.0),
        "ids": ["x", "y"],
    }
    found = repeated(batch, 2)
    assert found["input_ids"].tolist() == [[0, 1, 2], [3, 4, 5]] * 2
    assert found["positions"] is batch["positions"]
    assert found["scale"] is batch["scale"]


def test_the_checkpoint_callback_needs_a_population(make_trainer, make_loaders, tmp_path):
    with pytest.raises(ConfigError, match="needs a PopulationModule, got PEFTModule"):
        make_trainer(tmp_path, max_steps=1, callbacks=[PopulationCheckpoint()]).fit(
            PEFTModule(tiny_llama(), LoRA()), *make_loaders()
        )


def gpt2() -> nn.Module:
    return tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


# -- other models ------------------------------------------------------------------------------------------------------


def grads_of(module: Any, batch: Any, precision: Any = None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, and gradients by name, of one step of a population without a Trainer."""
    losses, _ = module.member_losses(batch, list(module.members))
    names = module.__dict__["_row_names"]
    with module._rows(names):
        torch.stack(list(losses.values())).sum().backward()
    return losses, {key: p.grad for key, p in module.named_parameters() if p.grad is not None}


def compare_step(base: Any, members: list[Member], batch: Any, **options: Any) -> None:
    """One step of a population against one of each member alone."""
    module = PopulationModule(base(), members, **options)
    module.configure_model()
    losses, together = grads_of(module, batch)
    for member in members:
        model = base()
        torch.manual_seed(member.seed)
        alone = PEFTModule(model, member.method, member.targets, name=member.name, **options)
        alone.configure_model()
        loss = alone.compute_loss(alone.predict_outputs(batch), batch)
        loss.backward()
        assert float(losses[member.name].detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
        wanted = {key: p.grad for key, p in alone.named_parameters() if p.grad is not None}
        assert wanted
        for key, value in wanted.items():
            assert distance(together[key], value) <= 2e-5, key


def test_a_gpt2_with_fused_projections_and_tied_embeddings():
    batch = token_batch(rows=3)
    members = [Member(LoRA(rank=2), ["query", "value"], "a", seed=1), Member(BitFit(), None, "b", seed=2)]
    compare_step(gpt2, members, {**batch, "labels": batch["input_ids"]})


def test_tied_modules_to_save_are_trained_as_alone():
    batch = token_batch(rows=3)
    batch = {**batch, "labels": batch["input_ids"]}
    member = Member(LoRA(rank=2), ["query"], "a", modules_to_save=["wte"], seed=1)
    module = PopulationModule(gpt2(), [member, Member(LoRA(rank=2), ["query"], "b", seed=1)])
    module.configure_model()
    _, together = grads_of(module, batch)
    torch.manual_seed(1)
    alone = PEFTModule(gpt2(), member.method, ["query"], name="a", modules_to_save=["wte"])
    alone.configure_model()
    alone.compute_loss(alone.predict_outputs(batch), batch).backward()
    for key, parameter in alone.named_parameters():
        if parameter.grad is not None:
            assert distance(together[key], parameter.grad) <= 2e-5, key


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
    }
    return BertForSequenceClassification(
        BertConfig(**sizes, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )


def test_a_classifier_that_computes_its_loss_itself():
    members = [Member(LoRA(rank=2), ["value"], "a", seed=1), Member(NormTuning(), None, "b", seed=2)]
    compare_step(bert, members, {**token_batch(rows=4), "labels": torch.tensor([0, 2, 1, 1])})


def test_a_t5_that_computes_its_loss_itself():
    def t5() -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        torch.manual_seed(0)
        sizes = {
            "d_model": 32,
            "d_ff": 64,
            "d_kv": 8,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 128,
            "dropout_rate": 0.0,
        }
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, use_cache=False))

    labels = token_batch(seed=1, rows=4, length=6)["input_ids"]
    labels[0, 3:] = -100
    members = [Member(LoRA(rank=2), ["query"], "a", seed=1), Member(LoRA(rank=4), ["value"], "b", seed=2)]
    compare_step(t5, members, {**token_batch(rows=4), "labels": labels})


class Odd(nn.Module):
    """A model with a loss of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, input_ids: Any, labels: Any) -> Any:
        logits = self.linear(input_ids)
        return {"logits": logits, "loss": logits.square().mean() + 1.0}


def test_a_loss_whose_parts_are_not_known_is_refused():
    module = PopulationModule(Odd(), [LoRA(rank=1), LoRA(rank=2)])
    module.configure_model()
    batch = {"input_ids": torch.randn(2, 4), "labels": torch.tensor([0, 1])}
    with pytest.raises(ConfigError, match="parts for each member are not known"):
        module.member_losses(batch, list(module.members))


def test_a_model_that_adds_to_its_loss_is_refused():
    """The loss of routers is one of all rows: whose part is what nobody knows."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    config = MixtralConfig(vocab_size=128, num_local_experts=2, output_router_logits=True, use_cache=False, **sizes)
    batch = token_batch(rows=2)
    for members in ([Member(LoRA(rank=2), ["query"])], [LoRA(rank=2), LoRA(rank=4)]):
        module = PopulationModule(MixtralForCausalLM(config), members)
        module.configure_model()
        for mode in (torch.enable_grad, torch.inference_mode):
            with mode(), pytest.raises(ConfigError, match="parts for each member are not known"):
                module.member_losses({**batch, "labels": batch["input_ids"]}, list(module.members))


def test_any_net_with_a_loss_and_tuple_batches(make_trainer, tmp_path):
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(24, 8, generator=generator), torch.randint(0, 3, (24,), generator=generator))
    options = {"loss": nn.functional.cross_entropy, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
    members = [
        Member(LoRA(rank=2), None, "a", seed=1),
        Member(LoRA(rank=4), ["0"], "b", seed=2, lr=0.3),
        Member(BitFit(), None, "c", seed=3),
    ]
    module = PopulationModule(net(), members, **options)
    trainer = make_trainer(tmp_path, max_epochs=4)
    trainer.fit(module, DataLoader(data, batch_size=4), DataLoader(data, batch_size=5))
    for member in members:
        torch.manual_seed(member.seed)
        base = net()
        torch.manual_seed(member.seed)
        alone = PEFTModule(
            base,
            member.method,
            member.targets,
            name=member.name,
            loss=options["loss"],
            optimizer=lambda p, lr=member.lr: torch.optim.SGD(p, lr=lr or 0.1),
        )
        make_trainer(tmp_path, max_epochs=4).fit(alone, DataLoader(data, batch_size=4), DataLoader(data, batch_size=5))
        wanted = {key: value for key, value in alone.state_dict().items() if f".{member.name}." in key}
        assert wanted
        assert all(distance(module.state_dict()[key], value) <= 1e-5 for key, value in wanted.items())
        assert float(trainer.callback_metrics[f"val_loss/{member.name}"]) == pytest.approx(
            float(alone.trainer.callback_metrics["val_loss"]), rel=1e-5
        )

    predicted = trainer.predict(module, DataLoader(data, batch_size=5))[0]
    assert {name: tuple(value.shape) for name, value in predicted.items()} == dict.fromkeys("abc", (5, 3))
    assert not torch.equal(predicted["a"], predicted["b"])
    tested = trainer.test(module, DataLoader(data, batch_size=5), verbose=False)[0]
    assert {"test_loss/a", "test_loss/b", "test_loss/c", "test_loss"} <= tested.keys()


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_gradient_checkpointing_and_mixed_precision(precision, make_trainer, make_loaders, adapter_tensors, tmp_path):
    def run(checkpointing: bool) -> PopulationModule:
        model = tiny_llama()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        module = PopulationModule(model, two(), optimizer=lambda p: torch.optim.SGD(p, lr=0.3))
        make_trainer(tmp_path, max_steps=4, precision=precision).fit(module, *make_loaders())
        return module

    plain, saving = run(False), run(True)
    for key, value in adapter_tensors(plain).items():
        assert distance(adapter_tensors(saving)[key], value) <= 1e-5, key


def test_mixed_precision_goes_the_way_of_the_runs_alone(solo, make_trainer, make_loaders, adapter_tensors, tmp_path):
    options = {"max_steps": 6, "precision": "bf16-mixed", "gradient_clip_val": 0.5}
    settings = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.3)}
    module = PopulationModule(tiny_llama(), two(), **settings)
    make_trainer(tmp_path, **options).fit(module, *make_loaders())
    for member in two():
        alone = solo(member, module_options=settings, **options)
        found, wanted = adapter_tensors(module, member.name), adapter_tensors(alone, member.name)
        assert max(distance(found[key], value) for key, value in wanted.items()) <= 3e-2


# -- the optimizer -----------------------------------------------------------------------------------------------------


def test_the_optimizer_of_all_gives_back_each_state():
    def make() -> tuple[PopulationOptimizer, list[nn.Parameter]]:
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(3)) for _ in range(4)]
        of = {
            "a": torch.optim.AdamW(
                [{"params": parameters[:1]}, {"params": parameters[1:2], "weight_decay": 0.0}], lr=0.1
            ),
            "b": torch.optim.SGD(parameters[2:], lr=0.1, momentum=0.9),
        }
        return PopulationOptimizer(of), parameters

    def step(optimizer: PopulationOptimizer, parameters: list[nn.Parameter]) -> None:
        optimizer.zero_grad()
        sum((p**2).sum() for p in parameters).backward()
        optimizer.step()

    first, parameters = make()
    step(first, parameters)
    step(first, parameters)
    assert len(first.state) == 4
    assert first.state[parameters[2]]["momentum_buffer"] is not None
    second, others = make()
    with torch.no_grad():
        for mine, other in zip(parameters, others, strict=True):
            other.copy_(mine)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    first.living = second.living = {"b"}
    before = parameters[0].clone()
    step(first, parameters)
    step(second, others)
    assert all(torch.equal(mine, other) for mine, other in zip(parameters, others, strict=True))
    assert torch.equal(parameters[0], before)
    second.param_groups[2]["lr"] = 0.5
    assert second.of["b"].param_groups[0]["lr"] == 0.5
