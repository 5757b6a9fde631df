import copy
import math

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.cli import ReduceLROnPlateau
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM

from lightning_peft import (
    Adaptation,
    BitFit,
    CausalLMLoader,
    LoRA,
    ModelLoader,
    PEFTModule,
    Targets,
    active_adapters,
    adapter_layers,
    adapter_names,
    inject,
    inject_all,
    save_adapter,
    save_adapters,
    set_active_adapters,
)
from lightning_peft.errors import ConfigError
from lightning_peft.optimization import parameter_groups

ROWS = torch.randint(3, 61, (8, 8), generator=torch.Generator().manual_seed(5))
X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 3
METHOD = LoRA(rank=2)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def classifier(**options):
    return PEFTModule(net(), METHOD, ["0"], **{"loss": nn.CrossEntropyLoss(), **options})


def labelled(batch_size=4):
    return DataLoader(TensorDataset(X, Y), batch_size=batch_size)


def as_dicts(rows, labels=None):
    """Language-model rows as dict samples."""
    labels = rows if labels is None else labels
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


@pytest.fixture(scope="module")
def pretrained(llama_dir):
    return AutoModelForCausalLM.from_pretrained(llama_dir)


@pytest.fixture
def language(pretrained):
    def make(method=METHOD, **options):
        return PEFTModule(copy.deepcopy(pretrained), method, ["query", "value"], **options)

    return make


# -- construction ------------------------------------------------------------------------------------------------------


class Counting(ModelLoader):
    loads = 0

    def load(self):
        self.loads += 1
        return net()


def test_nothing_is_loaded_before_configure_model_and_then_once(make_trainer, tmp_path):
    loader = Counting()
    module = PEFTModule(loader, METHOD, ["0"], loss=nn.CrossEntropyLoss())
    assert loader.loads == 0
    assert module.model is None
    assert not list(module.parameters())
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, labelled(), labelled())
    adapted = module.model
    trainer.validate(module, labelled(), verbose=False)
    trainer.test(module, labelled(), verbose=False)
    outputs = trainer.predict(module, labelled())
    assert loader.loads == 1
    assert module.model is adapted
    assert adapter_names(adapted) == ["default"]
    torch.testing.assert_close(torch.cat(outputs), module(X))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "give either a method or an adapter folder to start from, got method=None and adapter=None"),
        ({"method": METHOD, "adapter": "x"}, r"give either a method .* got method=LoRA\(.*\) and adapter='x'"),
        ({"adapter": "x", "targets": ["0"]}, r"brings its own places; leave out targets=\['0'\]"),
        ({"method": METHOD, "lr_interval": "batch"}, "lr_interval must be 'step' or 'epoch', got 'batch'"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        PEFTModule(net(), **options)


def test_a_base_that_is_neither_model_nor_loader_is_refused():
    with pytest.raises(
        ConfigError, match=r"base must be a model or a ModelLoader such as CausalLMLoader\(path=...\), got 'gpt2'"
    ):
        PEFTModule("gpt2", METHOD)


def test_forward_before_configure_model_says_what_to_do():
    with pytest.raises(ConfigError, match="call it yourself before forward"):
        classifier()(X)


def test_an_adapter_folder_is_trained_further(make_trainer, tmp_path):
    model = net()
    inject(model, LoRA(rank=3), ["2"])
    nn.init.ones_(model[2].adapters["default"].lora_B)
    save_adapter(model, tmp_path / "a")
    module = PEFTModule(net(), adapter=str(tmp_path / "a"), name="more", loss=F.cross_entropy)
    module.configure_model()
    torch.testing.assert_close(module(X), model(X))
    make_trainer(tmp_path, max_epochs=1).fit(module, labelled())
    layer = adapter_layers(module.model)["2"]
    assert list(layer.adapters) == ["more"]
    assert not torch.equal(layer.adapters["more"].lora_B, model[2].adapters["default"].lora_B)
    assert not torch.equal(layer.adapters["more"].lora_A, model[2].adapters["default"].lora_A)


def test_a_folder_of_several_adapters_is_trained_further(make_trainer, tmp_path):
    model = net()
    inject_all(
        model,
        [Adaptation(LoRA(rank=3), ["0"], "a"), Adaptation(LoRA(rank=2), ["2"], "b"), Adaptation(BitFit(), ["2"], "c")],
    )
    nn.init.ones_(model[0].adapters["a"].lora_B)
    set_active_adapters(model, ["c", "a"])
    save_adapters(model, tmp_path / "all")
    module = PEFTModule(net(), adapter=str(tmp_path / "all"), loss=F.cross_entropy)
    module.configure_model()
    torch.testing.assert_close(module(X), model(X))
    assert set(active_adapters(module.model)) == {"c", "a"}
    layers = adapter_layers(module.model)
    assert {path: list(layer.adapters) for path, layer in layers.items()} == {"0": ["a"], "2": ["b", "c"]}
    assert all(
        p.requires_grad for path, name in (("0", "a"), ("2", "c")) for p in layers[path].adapters[name].parameters()
    )
    make_trainer(tmp_path, max_epochs=1).fit(module, labelled())
    assert not torch.equal(layers["0"].adapters["a"].lora_A, model[0].adapters["a"].lora_A)
    assert torch.equal(layers["2"].adapters["b"].lora_A, model[2].adapters["b"].lora_A)


def test_a_folder_of_several_adapters_takes_no_name(tmp_path):
    model = net()
    inject_all(model, [Adaptation(LoRA(rank=3), ["0"], "a"), Adaptation(LoRA(rank=2), ["2"], "b")])
    save_adapters(model, tmp_path)
    with pytest.raises(ConfigError, match="leave out name='mine'"):
        PEFTModule(net(), adapter=str(tmp_path), name="mine", loss=F.cross_entropy)


def test_hyperparameters_are_plain_values(make_trainer, tmp_path):
    module = classifier(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1))
    assert module.hparams["peft"] == {"method": "lora", **METHOD.to_config(), "targets": "['0']"}
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, labelled())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]
    assert stored["peft"]["rank"] == 2


def test_hyperparameters_of_the_command_line_are_plain_values_too(llama_dir, make_trainer, tmp_path):
    from lightning_peft import PEFTCLI

    words = ["--model.base", "CausalLMLoader", "--model.base.path", llama_dir, "--model.method", "LoRA"]
    words += [
        "--model.method.rank",
        "2",
        "--model.targets",
        '["query"]',
        "--model.optimizer",
        "torch.optim.AdamW",
        "--trainer.logger",
        "false",
    ]
    module = PEFTCLI(PEFTModule, LightningDataModule, run=False, args=words).model
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, DataLoader(ROWS, batch_size=4))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"]
    assert stored["method"]["init_args"]["rank"] == 2
    loaded = PEFTModule.load_from_checkpoint(tmp_path / "x.ckpt")
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)


# -- modes -------------------------------------------------------------------------------------------------------------


class Modes(Callback):
    """Notes after each training batch which modules of the model are in eval mode."""

    def __init__(self):
        self.in_eval, self.validations = [], 0

    def on_validation_end(self, trainer, pl_module):
        self.validations += 1

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.in_eval.append([name for name, module in pl_module.model.named_modules() if not module.training])


def test_a_pretrained_model_trains_with_dropout_in_base_and_adapters_throughout(pretrained, make_trainer, tmp_path):
    assert not pretrained.training
    module = PEFTModule(copy.deepcopy(pretrained), LoRA(rank=2, dropout=0.5), ["query"])
    modes = Modes()
    trainer = make_trainer(tmp_path, max_epochs=2, val_check_interval=2, callbacks=[modes], enable_checkpointing=False)
    trainer.fit(module, DataLoader(ROWS, batch_size=2), DataLoader(ROWS, batch_size=4))
    assert modes.in_eval == [[]] * 8
    assert modes.validations == 5  # the sanity check, and two in an epoch
    assert not torch.equal(module(ROWS).logits, module(ROWS).logits)  # attention's dropout
    layer = next(iter(adapter_layers(module.model).values()))
    hidden = torch.randn(2, 3, 32)
    assert not torch.equal(layer(hidden), layer(hidden))  # the adapter's


class Convolutional(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2, affine=False), nn.Flatten()
        )


def test_the_statistics_of_frozen_batch_normalisation_do_not_move(make_trainer, tmp_path):
    module = PEFTModule(Convolutional(), METHOD, ["0", "2"], loss=nn.CrossEntropyLoss())
    module.configure_model()
    statistics = {key: value.clone() for key, value in module.full_state_dict().items() if "running" in key}
    assert len(statistics) == 4
    adapters = {key: value.clone() for key, value in module.state_dict().items()}
    data = DataLoader(TensorDataset(torch.randn(8, 3, 6, 6) + 3, Y), batch_size=4)
    make_trainer(tmp_path, max_epochs=2).fit(module, data, data)
    after = module.full_state_dict()
    assert all(torch.equal(after[key], value) for key, value in statistics.items())
    assert all(not torch.equal(after[key], value) for key, value in adapters.items())


# -- batches and losses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dict", "tensor"])
def test_a_language_model_trains_on_dicts_and_on_tensors_alike(kind, language, make_trainer, tmp_path):
    module = language()
    data = DataLoader(as_dicts(ROWS) if kind == "dict" else ROWS, batch_size=8)
    trainer = make_trainer(tmp_path, max_epochs=1, limit_val_batches=1)
    trainer.validate(module, data, verbose=False)
    reference = F.cross_entropy(module.eval()(ROWS).logits[:, :-1].flatten(0, 1), ROWS[:, 1:].flatten())
    torch.testing.assert_close(trainer.callback_metrics["val_loss"], reference)
    trainer.fit(module.train(), data)
    assert 3 < trainer.callback_metrics["train_loss"] < 6


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), lambda outputs, target: F.cross_entropy(outputs, target)])
def test_a_classifier_trains_on_tuples_with_a_loss_of_its_own(loss, make_trainer, tmp_path):
    module = classifier(loss=loss)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.validate(module, labelled(batch_size=3), verbose=False)
    torch.testing.assert_close(trainer.callback_metrics["val_loss"], F.cross_entropy(net()(X), Y))
    assert set(trainer.callback_metrics) == {"val_loss"}
    trainer.fit(module, labelled())
    assert "train_loss" in trainer.callback_metrics


def test_a_loss_of_its_own_gets_the_labels_of_a_dict_and_the_whole_of_a_tensor(pretrained):
    seen = []

    def loss(outputs, target):
        seen.append((type(outputs).__name__, target))
        return outputs.logits.sum() if hasattr(outputs, "logits") else outputs.sum()

    module = PEFTModule(copy.deepcopy(pretrained), METHOD, ["query"], loss=loss)
    module.configure_model()
    batch = {"input_ids": ROWS, "labels": Y}
    assert module.compute_loss(module.predict_outputs(batch), batch).shape == ()
    assert module.compute_loss(module.predict_outputs(ROWS), ROWS).shape == ()
    assert [name for name, _ in seen] == ["CausalLMOutputWithPast"] * 2
    assert seen[0][1] is Y
    assert seen[1][1] is ROWS


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, left, right):
        return self.linear(left) - self.linear(right)


def test_all_but_the_last_of_a_tuple_are_inputs(make_trainer, tmp_path):
    module = PEFTModule(TwoInputs(), METHOD, ["linear"], loss=F.cross_entropy)
    data = DataLoader(TensorDataset(X, 2 * X, Y), batch_size=8)
    outputs = make_trainer(tmp_path).predict(module, data)
    torch.testing.assert_close(outputs[0], module(X, 2 * X))


class LabelsInsideDict(nn.Module):
    """A model that returns a plain dict, as some do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, inputs, labels):
        logits = self.linear(inputs)
        return {"loss": F.binary_cross_entropy_with_logits(logits, labels), "logits": logits}


def test_a_model_that_returns_a_dict_with_labels_of_several_classes_is_measured(make_trainer, tmp_path):
    labels = F.one_hot(Y).float()  # two dimensions, as token labels have
    data = DataLoader([{"inputs": x, "labels": y} for x, y in zip(X, labels, strict=True)], batch_size=3)
    module = PEFTModule(model := LabelsInsideDict(), METHOD, ["linear"])
    trainer = make_trainer(tmp_path)
    trainer.validate(module, data, verbose=False)
    assert set(trainer.callback_metrics) == {"val_loss"}
    torch.testing.assert_close(trainer.callback_metrics["val_loss"], model(X, labels)["loss"])
    assert trainer.predict(module, data)[0].shape == (3, 3)


def test_without_a_loss_the_error_says_what_to_do(make_trainer, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"Sequential returned Tensor without a loss; put 'labels' into the batch, or give PEFTModule\(loss=",
    ):
        make_trainer(tmp_path, max_epochs=1).fit(classifier(loss=None), labelled())


# -- metrics -----------------------------------------------------------------------------------------------------------


def by_hand(model, rows, labels):
    """Loss, perplexity and accuracy over all tokens that count."""
    with torch.no_grad():
        logits = model.eval()(rows).logits[:, :-1].flatten(0, 1)
    wanted = labels[:, 1:].flatten()
    loss = F.cross_entropy(logits, wanted, ignore_index=-100)
    counted = wanted != -100
    return loss, math.exp(loss), (logits.argmax(-1) == wanted)[counted].float().mean()


def test_metrics_are_means_over_tokens_of_unequal_batches(language, make_trainer, tmp_path):
    labels = ROWS.clone()
    for row in range(8):
        labels[row, :row] = -100  # the last row keeps one token
    labels[0] = -100  # nothing in a whole batch
    module = language()
    trainer = make_trainer(tmp_path)
    data = as_dicts(ROWS, labels)
    loader = DataLoader([data[:1], data[1:4], data[4:]], batch_size=None, collate_fn=torch.utils.data.default_collate)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.mul_(2)  # so that the model is right about some tokens, and wrong about the others
    reference = by_hand(module.model, ROWS, labels)
    for run, stage in ((trainer.validate, "val"), (trainer.test, "test")):
        run(module, loader, verbose=False)
        found = [trainer.callback_metrics[f"{stage}_{name}"] for name in ("loss", "perplexity", "token_accuracy")]
        assert [float(value) for value in found] == pytest.approx([float(value) for value in reference], rel=1e-5)


class TwoSets(LightningDataModule):
    val_names = ("wiki", "code")

    def val_dataloader(self):
        return [DataLoader(ROWS[:6], batch_size=2), DataLoader(ROWS[6:], batch_size=2)]


def test_each_validation_set_is_logged_by_name_and_the_first_as_val_loss(language, make_trainer, tmp_path):
    module, trainer = language(), make_trainer(tmp_path)
    trainer.validate(module, TwoSets(), verbose=False)
    names = {f"val_{metric}" for metric in ("loss", "perplexity", "token_accuracy")}
    logged = trainer.callback_metrics
    assert set(logged) == names | {f"{name}/{part}" for name in names for part in ("wiki", "code")}
    for part, rows in (("wiki", ROWS[:6]), ("code", ROWS[6:])):
        torch.testing.assert_close(logged[f"val_loss/{part}"], by_hand(module.model, rows, rows)[0])
    assert logged["val_loss"] == logged["val_loss/wiki"] != logged["val_loss/code"]


def test_validation_sets_without_names_are_numbered(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.validate(classifier(), [labelled(), labelled()], verbose=False)
    assert set(trainer.callback_metrics) == {"val_loss", "val_loss/0", "val_loss/1"}


def test_predict_returns_logits(language, make_trainer, tmp_path):
    module = language()
    outputs = make_trainer(tmp_path).predict(module, DataLoader(ROWS, batch_size=8))
    torch.testing.assert_close(outputs[0], module.eval()(ROWS).logits)


# -- optimisation ------------------------------------------------------------------------------------------------------


def test_matrices_decay_and_vectors_do_not():
    model = net()
    inject(model, LoRA(rank=2, bias="lora_only"), ["0"])
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices, vectors = parameter_groups(model)
    assert {id(p) for p in matrices["params"]} == {id(p) for n, p in trained.items() if "lora_" in n}
    assert vectors["weight_decay"] == 0.0
    assert [p.dim() for p in vectors["params"]] == [1]
    optimizer = torch.optim.AdamW([matrices, vectors], weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_a_model_that_trains_nothing_is_refused():
    with pytest.raises(ConfigError, match="no parameter is trained; is the adapter active and trainable"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False))


def test_the_optimizer_given_holds_the_adapters_only(make_trainer, tmp_path):
    module = classifier(optimizer=lambda params: torch.optim.SGD(params, lr=0.5, momentum=0.9))
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, labelled())
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.SGD
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for layer in adapter_layers(module.model).values() for p in layer.adapters.parameters()}


def decaying(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def one_cycle(optimizer):
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)


@pytest.mark.parametrize(
    ("scheduler", "interval", "advances"), [(decaying, "step", 4), (decaying, "epoch", 2), (one_cycle, "step", 4)]
)
def test_the_scheduler_advances_each_step_or_each_epoch(scheduler, interval, advances, make_trainer, tmp_path):
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(classifier(lr_scheduler=scheduler, lr_interval=interval), labelled())
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == advances


def test_a_plateau_scheduler_advances_with_what_it_monitors(make_trainer, tmp_path):
    module = classifier(
        optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
        lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, monitor="val_loss", patience=0),
    )
    trainer = make_trainer(tmp_path, max_epochs=3)
    trainer.fit(module, labelled(), labelled())
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 3


def test_mixed_precision_keeps_adapters_in_float32(llama_dir, make_trainer, tmp_path):
    base = CausalLMLoader(path=llama_dir, dtype="bfloat16")
    module = PEFTModule(base, METHOD, Targets(include=("query",)))
    trainer = make_trainer(tmp_path, max_epochs=1, precision="bf16-mixed")
    module.configure_model()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    trainer.fit(module, DataLoader(ROWS, batch_size=4), DataLoader(ROWS, batch_size=4))
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}
    assert all(not torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert math.isfinite(trainer.callback_metrics["val_loss"])


@pytest.mark.parametrize(
    ("name", "encoder_decoder", "shifted"),
    [
        ("LlamaForCausalLM", False, True),
        ("BertForTokenClassification", False, False),
        ("BertForMaskedLM", False, False),
        ("T5ForConditionalGeneration", True, False),
    ],
)
def test_labels_are_shifted_for_models_that_predict_the_next_token_only(name, encoder_decoder, shifted):
    import types

    from lightning_peft.batch_parts import predicts_the_next_token

    model = type(name, (torch.nn.Module,), {})()
    model.config = types.SimpleNamespace(is_encoder_decoder=encoder_decoder)
    assert predicts_the_next_token(model) is shifted
