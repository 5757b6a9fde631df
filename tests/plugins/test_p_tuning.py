"""P-tuning: the network is that of HF PEFT, is folded into what is saved, and goes on when training resumes."""

import json

import pytest
import torch
from peft import PeftModel, PromptEncoderConfig, get_peft_model

from lightning_peft import (
    AdapterCheckpoint,
    CausalLMLoader,
    PEFTModule,
    PTuning,
    adapter_layers,
    adapter_state_dict,
    inject,
    load_adapter,
    save_adapter,
    trainable_summary,
)
from lightning_peft.errors import AdapterConfigError, ConfigError
from lightning_peft.testing import tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")

TOKENS = 5
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}
METHODS = {
    "mlp": PTuning(num_virtual_tokens=TOKENS, hidden_size=24),
    "lstm": PTuning(num_virtual_tokens=TOKENS, encoder="lstm", hidden_size=24, num_layers=3, dropout=0.5),
}
BOTH = pytest.mark.parametrize("encoder", METHODS)
SIDES = pytest.mark.parametrize("padding", ["none", "left", "right"])


def batch(padding="none"):
    ids = torch.randint(2, 128, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding == "left":
        mask[1, :2], mask[2, :4] = 0, 0
    elif padding == "right":
        mask[1, -2:], mask[2, -4:] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def peer(method, kind="llama"):
    """Return HF PEFT's model with the network of ``method``."""
    fields = {"encoder_reparameterization_type": method.encoder.upper(), "encoder_hidden_size": method.hidden_size}
    fields |= {"encoder_num_layers": method.num_layers, "encoder_dropout": method.dropout}
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS, **fields)
    return get_peft_model(MODELS[kind](), config).eval()


def adapter_of(model):
    (layer,) = adapter_layers(model).values()
    return layer.adapters["default"]


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


@BOTH
def test_the_tensors_of_hf_peft_give_the_prompts_of_hf_peft(encoder):
    theirs, model = peer(METHODS[encoder]), tiny_llama()
    inject(model, METHODS[encoder])
    state = theirs.prompt_encoder.default.state_dict()
    adapter_of(model).load_state_dict(state)
    (ours,) = adapter_state_dict(model).values()
    assert relative(ours, theirs.get_prompt_embedding_to_save("default")) <= 1e-5
    assert relative(logits(model, batch("left")), logits(theirs, batch("left"))[:, TOKENS:]) <= 1e-5
    assert trainable_summary(model).trainable == sum(tensor.numel() for tensor in state.values())


@BOTH
def test_first_values_are_spread_as_in_hf_peft(encoder):
    model, theirs = tiny_llama(), peer(METHODS[encoder]).prompt_encoder.default.state_dict()
    inject(model, METHODS[encoder])
    for name, tensor in adapter_of(model).state_dict().items():
        assert tensor.std() == pytest.approx(theirs[name].std(), rel=0.5), name
        assert len(tensor.unique()) > 0.99 * tensor.numel()


@SIDES
@BOTH
@pytest.mark.parametrize("kind", MODELS)
def test_hf_peft_loads_what_is_saved_and_gives_the_same_logits(kind, encoder, padding, tmp_path):
    model = MODELS[kind]()
    inject(model, METHODS[encoder])
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(MODELS[kind](), tmp_path).eval()
    assert relative(logits(theirs, batch(padding))[:, TOKENS:], logits(model, batch(padding))) <= 1e-5
    assert relative(logits(MODELS[kind](), batch(padding)), logits(model, batch(padding))) > 1e-3


@SIDES
@BOTH
@pytest.mark.parametrize("kind", MODELS)
def test_what_hf_peft_writes_loads_here(kind, encoder, padding, tmp_path):
    theirs = peer(METHODS[encoder], kind)
    theirs.save_pretrained(tmp_path)
    model = MODELS[kind]()
    assert load_adapter(model, tmp_path).method == METHODS[encoder]
    assert relative(logits(model, batch(padding)), logits(theirs, batch(padding))[:, TOKENS:]) <= 1e-5


@BOTH
def test_dropout_acts_in_training_and_not_on_what_is_saved(encoder):
    model = tiny_llama()
    inject(model, METHODS[encoder])
    (saved,) = adapter_state_dict(model).values()
    model.train()
    adapter = adapter_of(model)
    assert torch.equal(adapter_state_dict(model)["model.prompt_embeddings"], saved)
    assert all(module.training for module in adapter.modules())
    differs = not torch.allclose(adapter.prompts(), saved, atol=1e-6)
    assert differs == (encoder == "lstm")


@BOTH
def test_what_a_folder_holds_is_trained_without_the_network(encoder, tmp_path):
    model = tiny_llama()
    inject(model, METHODS[encoder])
    save_adapter(model, tmp_path / "one")
    again = tiny_llama()
    load_adapter(again, tmp_path / "one", trainable=True)
    assert trainable_summary(again).trainable == TOKENS * 64
    again(**batch(), labels=batch()["input_ids"]).loss.backward()
    torch.optim.SGD(adapter_of(again).parameters(), lr=1.0).step()
    assert not torch.equal(adapter_of(again).prompt_embeddings, adapter_state_dict(model)["model.prompt_embeddings"])
    third = tiny_llama()
    load_adapter(third, save_adapter(again, tmp_path / "two"))
    assert torch.equal(logits(third, batch()), logits(again, batch()))


@BOTH
@pytest.mark.filterwarnings(
    "ignore:The dirpath has changed", "ignore:You're resuming from a checkpoint that ended before"
)
def test_resuming_goes_on_with_the_network(encoder, llama_dir, make_trainer, tmp_path):
    def run(folder, steps, ckpt_path=None):
        torch.manual_seed(0)
        module = PEFTModule(
            base=CausalLMLoader(path=llama_dir),
            method=METHODS[encoder],
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        )
        callbacks = [AdapterCheckpoint(dirpath=folder, save_last=True, every_n_train_steps=2, save_top_k=0)]
        rows = [{"input_ids": row[None], "labels": row[None]} for row in torch.arange(24).view(2, 12)]
        loader = torch.utils.data.DataLoader(rows, batch_size=None)
        make_trainer(folder, max_steps=steps, callbacks=callbacks).fit(module, loader, ckpt_path=ckpt_path)
        return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "half", 2)
    resumed = run(tmp_path / "rest", 4, tmp_path / "half" / "last.ckpt")
    assert resumed.keys() == whole.keys()
    assert len(whole) > 1
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_the_configuration_of_hf_peft_is_written_whole(tmp_path):
    model = tiny_llama()
    inject(model, PTuning(encoder="lstm", num_layers=1))
    save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 64, "encoder_num_layers": 1}
    wanted |= {
        "num_virtual_tokens": 20,
        "token_dim": 64,
        "num_layers": 2,
        "num_attention_heads": 4,
        "encoder_dropout": 0.0,
    }
    assert wanted.items() <= written.items()
    assert "target_modules" not in written


def test_a_configuration_that_cannot_be_honoured_is_refused(tmp_path):
    peer(METHODS["mlp"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    for change, message in (
        ({"encoder_reparameterization_type": "GRU"}, "is 'GRU', but PTuning knows MLP and LSTM"),
        ({"encoder_hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
    ):
        file.write_text(json.dumps({**written, **change}))
        with pytest.raises(AdapterConfigError, match=message):
            load_adapter(tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_virtual_tokens": -1}, "num_virtual_tokens must be a positive integer, got -1"),
        ({"encoder": "gru"}, "encoder must be one of mlp, lstm, got 'gru'"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, got 0"),
        ({"encoder": "lstm", "num_layers": 0}, "num_layers must be a positive integer, got 0"),
        ({"encoder": "lstm", "dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": 0.1}, "num_layers and dropout are for encoder='lstm', got num_layers=2 and dropout=0.1"),
        ({"num_layers": 3}, "num_layers and dropout are for encoder='lstm', got num_layers=3"),
        ({"encoder": "lstm", "num_layers": 1, "dropout": 0.1}, "dropout acts between layers .* num_layers=1"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ConfigError, match=f"PTuning {message}"):
        PTuning(**fields)


@BOTH
def test_the_loss_of_a_real_model_falls(encoder, trained_on_e2e):
    losses = trained_on_e2e(METHODS[encoder], lr=1e-2)
    assert losses[-1] < losses[0] - 0.2, losses
