import copy
import os
import re

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import (
    AdapterCheckpoint,
    LoRA,
    PEFTMixin,
    PEFTModule,
    adapter_layers,
    adapter_state_dict,
    inject,
    load_adapter,
)
from lightning_peft.callbacks.checkpoint import adapter_folder
from lightning_peft.callbacks.durable_io import DurableCheckpointIO
from lightning_peft.errors import AdapterFileError, AdapterNotFoundError
from lightning_peft.weight_files import read_saved

ROWS = torch.randint(3, 61, (8, 8), generator=torch.Generator().manual_seed(5))
METHOD = LoRA(rank=2)


@pytest.fixture(scope="session")
def base(llama_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(llama_dir)


@pytest.fixture
def fit(base, make_trainer):
    def run(callback, *, epochs=1):
        module = PEFTModule(
            copy.deepcopy(base), METHOD, ["query", "value"], optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)
        )
        trainer = make_trainer(callback.dirpath, max_epochs=epochs, callbacks=[callback], log_every_n_steps=4)
        trainer.fit(module, DataLoader(ROWS, batch_size=2), DataLoader(ROWS[:2], batch_size=2))
        return module, trainer

    return run


def state_in(checkpoint):
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def assert_holds_adapters_only(checkpoint, base):
    keys = set(state_in(checkpoint))
    assert keys == {
        f"model.model.layers.{layer}.self_attn.{place}.adapters.default.{tensor}"
        for layer in (0, 1)
        for place in ("q_proj", "v_proj")
        for tensor in ("lora_A", "lora_B")
    }
    adapters = sum(tensor.numel() for tensor in state_in(checkpoint).values())
    assert adapters < 0.05 * sum(parameter.numel() for parameter in base.parameters())


def assert_folder_equals(checkpoint, base):
    """The folder beside a checkpoint loads into a fresh base and holds what the checkpoint holds."""
    model = copy.deepcopy(base)
    load_adapter(model, adapter_folder(checkpoint))
    loaded = {f"model.{key}": value for key, value in model.state_dict().items() if ".adapters." in key}
    stored = dict(state_in(checkpoint))
    torch.testing.assert_close(loaded, stored, rtol=0, atol=0)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_each_checkpoint_holds_adapters_only_and_has_the_same_adapter_beside_it(fit, base, tmp_path):
    fit(AdapterCheckpoint(tmp_path, save_top_k=-1), epochs=2)
    assert names(tmp_path) == [
        "epoch=0-step=4.adapter",
        "epoch=0-step=4.ckpt",
        "epoch=1-step=8.adapter",
        "epoch=1-step=8.ckpt",
    ]
    for checkpoint in tmp_path.glob("*.ckpt"):
        assert_holds_adapters_only(checkpoint, base)
        assert_folder_equals(checkpoint, base)
    one, other = (state_in(checkpoint) for checkpoint in tmp_path.glob("*.ckpt"))
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_a_checkpoint_is_far_smaller_than_the_base(make_trainer, tmp_path):
    wide = nn.Sequential(nn.Linear(1024, 512), nn.Linear(512, 2))  # 2.1 MB
    module = PEFTModule(wide, LoRA(rank=1), ["0"], loss=nn.CrossEntropyLoss())
    data = DataLoader(list(zip(torch.randn(2, 1024), torch.arange(2), strict=True)), batch_size=2)
    trainer = make_trainer(tmp_path, max_epochs=1, callbacks=[AdapterCheckpoint(tmp_path)])
    trainer.fit(module, data)
    assert (tmp_path / "epoch=0-step=1.ckpt").stat().st_size < 100_000


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_plain_model_checkpoint_holds_adapters_only(weights_only, fit, base, tmp_path):
    fit(ModelCheckpoint(tmp_path, save_weights_only=weights_only))
    assert names(tmp_path) == ["epoch=0-step=4.ckpt"]
    assert_holds_adapters_only(tmp_path / "epoch=0-step=4.ckpt", base)


def test_save_checkpoint_with_weights_only_holds_adapters_only(fit, base, tmp_path):
    _, trainer = fit(ModelCheckpoint(tmp_path, save_top_k=0))
    trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert_holds_adapters_only(tmp_path / "x.ckpt", base)
    assert "optimizer_states" not in torch.load(tmp_path / "x.ckpt", weights_only=True)


@pytest.mark.parametrize("save_last", [True, "link"])
def test_the_best_checkpoints_keep_their_adapters_and_the_others_lose_them(save_last, fit, base, tmp_path):
    callback = AdapterCheckpoint(
        tmp_path, "{step}", monitor="val_loss", mode="max", save_top_k=2, save_last=save_last
    )  # the worst two: training improves, so that the first ones stay
    fit(callback, epochs=4)
    kept = sorted(callback.best_k_models)
    assert [path.rsplit("/", 1)[-1] for path in kept] == ["step=4.ckpt", "step=8.ckpt"]
    expected = ["step=4.adapter", "step=4.ckpt", "step=8.adapter", "step=8.ckpt"]
    assert names(tmp_path) == ["last.adapter", "last.ckpt", *expected]
    for checkpoint in tmp_path.glob("*.ckpt"):
        assert_holds_adapters_only(checkpoint, base)
        assert_folder_equals(checkpoint, base)
    assert (tmp_path / "last.ckpt").is_symlink() == (tmp_path / "last.adapter").is_symlink() == (save_last == "link")


def test_the_adapter_of_a_removed_checkpoint_goes_with_it(fit, tmp_path):
    fit(AdapterCheckpoint(tmp_path, "{step}", monitor="val_loss", save_top_k=2, save_last="link"), epochs=4)
    assert names(tmp_path) == [
        "last.adapter",
        "last.ckpt",
        "step=12.adapter",
        "step=12.ckpt",
        "step=16.adapter",
        "step=16.ckpt",
    ]
    assert (tmp_path / "last.adapter").resolve().name == "step=16.adapter"


def test_hf_peft_loads_the_folder(fit, base, tmp_path):
    peft = pytest.importorskip("peft")
    module, _ = fit(AdapterCheckpoint(tmp_path))
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "epoch=0-step=4.adapter").eval()
    torch.testing.assert_close(model(ROWS).logits, module.eval()(input_ids=ROWS).logits)
    assert not torch.allclose(model(ROWS).logits, base.eval()(ROWS).logits)


def test_a_diverged_adapter_is_not_saved_over_a_good_one(fit, tmp_path):
    callback = AdapterCheckpoint(tmp_path, "x", enable_version_counter=False)
    module, trainer = fit(callback)
    before = (tmp_path / "x.adapter" / "adapter_model.safetensors").read_bytes()
    nn.init.constant_(next(iter(adapter_layers(module.model).values())).adapters["default"].lora_B, float("nan"))
    with pytest.raises(AdapterFileError, match="has non-finite values; it is not saved"):
        callback._save_checkpoint(trainer, str(tmp_path / "x.ckpt"))
    assert (tmp_path / "x.adapter" / "adapter_model.safetensors").read_bytes() == before
    assert names(tmp_path) == ["x.adapter", "x.ckpt"]


class TwoModels(PEFTMixin, LightningModule):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
        inject(self.left, METHOD, ["0"])
        inject(self.right, METHOD, ["0"], name="a")
        inject(self.right, METHOD, ["0"])

    def training_step(self, batch, batch_idx):
        return (self.right(self.left(batch)) - batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_several_models_and_adapters_get_a_folder_each(make_trainer, tmp_path):
    module = TwoModels()
    callback = AdapterCheckpoint(tmp_path, "x")
    make_trainer(tmp_path, max_epochs=1, callbacks=[callback]).fit(module, DataLoader(torch.randn(4, 4), batch_size=2))
    folder = tmp_path / "x.adapter"
    for inner, model, name in (
        ("left", module.left, "default"),
        ("right", module.right, "default"),
        ("right/a", module.right, "a"),
    ):
        fresh = nn.Sequential(nn.Linear(4, 4))
        load_adapter(fresh, folder / inner, check_base=False)
        torch.testing.assert_close(adapter_state_dict(fresh), adapter_state_dict(model, name), rtol=0, atol=0)


class Bare(LightningModule):
    training_step, configure_optimizers = TwoModels.training_step, TwoModels.configure_optimizers

    def __init__(self):
        super().__init__()
        self.left = self.right = nn.Linear(4, 4)


def test_a_module_without_the_mixin_is_refused(make_trainer, tmp_path):
    message = "needs a PEFTModule, or a LightningModule with PEFTMixin before it in its bases; Bare has neither"
    with pytest.raises(AdapterNotFoundError, match=re.escape(message)):
        make_trainer(tmp_path, max_epochs=1, callbacks=[AdapterCheckpoint(tmp_path)]).fit(
            Bare(), DataLoader(torch.randn(4, 4))
        )


def test_the_folder_stands_beside_its_checkpoint():
    assert str(adapter_folder("runs/val_loss=0.25.ckpt")) == "runs/val_loss=0.25.adapter"


def test_a_checkpoint_is_read_by_hf_peft_and_transformers_and_has_a_page_with_the_metrics(fit, base, tmp_path):
    import peft

    module, trainer = fit(AdapterCheckpoint(tmp_path, save_top_k=-1))
    folder = tmp_path / "epoch=0-step=4.adapter"
    other = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    third = copy.deepcopy(base)
    third.load_adapter(str(folder))
    with torch.no_grad():
        expected = module.model.eval()(ROWS).logits
        for model in (other, third):
            assert ((model.eval()(ROWS).logits - expected).abs().max() / expected.abs().max()) <= 1e-5
    page = (folder / "README.md").read_text()
    assert "| optimizer steps | 4 |" in page
    assert re.search(rf"\| val_loss \| {trainer.callback_metrics['val_loss'].item():.6g} \|", page)
    assert str(tmp_path) not in page


def test_a_page_that_was_edited_outlives_the_next_checkpoint_of_that_name(fit, tmp_path):
    callback = AdapterCheckpoint(tmp_path, filename="same", enable_version_counter=False)
    _, trainer = fit(callback)
    page = tmp_path / "same.adapter" / "README.md"
    page.write_text("# mine\n")
    callback._save_checkpoint(trainer, str(tmp_path / "same.ckpt"))
    assert page.read_text() == "# mine\n"
    page.unlink()
    callback._save_checkpoint(trainer, str(tmp_path / "same.ckpt"))
    assert "lora adapter for" in page.read_text()


def bytes_needed(checkpoint):
    """The bytes of the adapters and of the states of their optimizer."""
    content = torch.load(checkpoint, weights_only=True)
    states = [value for state in content["optimizer_states"][0]["state"].values() for value in state.values()]
    return sum(tensor.nbytes for tensor in [*content["state_dict"].values(), *states])


def assert_little_else(checkpoint):
    needed, size = bytes_needed(checkpoint), checkpoint.stat().st_size
    assert needed < size <= 1.05 * needed, f"{size} bytes for {needed}: {size / needed:.4f}"


def test_a_checkpoint_is_little_more_than_adapters_and_optimizer(make_trainer, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=61,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    module = PEFTModule(LlamaForCausalLM(config), LoRA(rank=16), "all_linear")
    callback = AdapterCheckpoint(tmp_path, filename="x")
    make_trainer(tmp_path, max_steps=1, callbacks=[callback]).fit(module, DataLoader(ROWS, batch_size=2))
    assert_little_else(tmp_path / "x.ckpt")


def test_a_checkpoint_of_a_real_run_is_little_more_than_adapters_and_optimizer(data_dir, make_trainer, tmp_path):
    from lightning_peft import CausalLMLoader
    from lightning_peft.data import TextDataModule

    model = str(data_dir / "models" / "babyllama105")
    data = TextDataModule(
        model, str(data_dir / "lm" / "tinyshakespeare.txt"), block_size=32, batch_size=2, max_train_tokens=512
    )
    callback = AdapterCheckpoint(tmp_path, filename="x")
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[callback], limit_val_batches=0)
    trainer.fit(PEFTModule(CausalLMLoader(path=model), LoRA(rank=16), "all_linear"), data)
    assert_little_else(tmp_path / "x.ckpt")


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    io = DurableCheckpointIO()
    io.save_checkpoint({"epoch": 1}, tmp_path / "runs" / "x.ckpt")

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(PermissionError):
        io.save_checkpoint({"epoch": 2}, tmp_path / "runs" / "x.ckpt")
    assert names(tmp_path / "runs") == ["x.ckpt"]
    assert io.load_checkpoint(tmp_path / "runs" / "x.ckpt", weights_only=True) == {"epoch": 1}


@pytest.mark.parametrize("length", [0, 100, 5000])
def test_a_checkpoint_that_is_cut_short_is_named(length, tmp_path):
    file = tmp_path / "x.ckpt"
    io = DurableCheckpointIO()
    io.save_checkpoint({"tensor": torch.zeros(9000)}, file)
    os.truncate(file, length)
    with pytest.raises(
        AdapterFileError, match=r"x.ckpt' cannot be read as a checkpoint; it may be cut short or damaged"
    ):
        io.load_checkpoint(file, weights_only=True)
    with pytest.raises(AdapterFileError, match=r"x.ckpt' cannot be read as a file of tensors"):
        read_saved(file)
    with pytest.raises(AdapterFileError, match="is a folder, and a run resumes from a .ckpt file"):
        io.load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"y.ckpt"):
        io.load_checkpoint(tmp_path / "y.ckpt")


def test_a_checkpoint_io_of_the_user_stays(make_trainer, tmp_path):
    class Mine(TorchCheckpointIO):
        pass

    for given, kind in ((Mine(), Mine), (None, DurableCheckpointIO)):
        callback = AdapterCheckpoint(tmp_path / kind.__name__)
        trainer = make_trainer(tmp_path, max_steps=1, callbacks=[callback], plugins=[given] if given else None)
        trainer.fit(TwoModels(), DataLoader(torch.randn(4, 4), batch_size=2))
        assert type(trainer.strategy.checkpoint_io) is kind
