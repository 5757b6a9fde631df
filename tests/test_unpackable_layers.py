"""Layers that the code of a model needs unpacked stay so, declared by the model or not."""

import copy
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_peft import CausalLMLoader, LightningPEFTWarning, LoftQ, QLoRA, inject
from lightning_peft.quantized_layers import packed_layers, unpacked_weight
from lightning_peft.testing import tiny_llama
from lightning_peft.unpackable_layers import unpackable_layers

# bitsandbytes compiles a function when a layer is first packed.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")

METHOD = QLoRA(rank=4, compute_dtype="float32")
T5 = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
RELATIVES = {
    "T5": transformers.T5ForConditionalGeneration,
    "MT5": transformers.MT5ForConditionalGeneration,
    "UMT5": transformers.UMT5ForConditionalGeneration,
    "LongT5": transformers.LongT5ForConditionalGeneration,
    "SwitchTransformers": transformers.SwitchTransformersForConditionalGeneration,
}


def relative(kind="T5", **more):
    torch.manual_seed(0)
    model_class = RELATIVES[kind]
    return model_class(model_class.config_class(**T5, decoder_start_token_id=0, **more)).eval()


def batch(seed=0):
    ids = torch.randint(1, 64, (2, 6), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def logits(model):
    return model.eval()(**batch()).logits


@pytest.mark.parametrize(
    ("kind", "feed_forward"),
    [
        *((kind, "relu") for kind in RELATIVES),
        *((kind, "gated-gelu") for kind in ("T5", "MT5", "UMT5")),  # that of LongT5 has no cast, Switch has none
    ],
)
def test_relatives_of_t5_act_and_train_over_a_quantised_base(kind, feed_forward):
    model = relative(kind, feed_forward_proj=feed_forward)
    dense = copy.deepcopy(model)
    with pytest.warns(LightningPEFTWarning, match=r"QLoRA leaves \d+ of \d+ linear layers unquantised: .*\.wo"):
        inject(model, METHOD)
    held = packed_layers(model)
    assert held
    assert not any(path.endswith(".wo") for path in held)
    assert any(path.endswith((".wi", ".wi_0")) for path in held)
    for path, module in held.items():  # the reference: the same values in plain linear layers
        dense.get_submodule(path).weight.data = unpacked_weight(module)
    expected = logits(dense)
    assert float((logits(model) - expected).abs().max() / expected.abs().max()) < 1e-4
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.train()(**batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_warning_says_why_and_skip_silences_it():
    message = "T5ForConditionalGeneration declares that 'encoder.block.0.layer.1.DenseReluDense.wo' keeps its precision"
    with pytest.warns(LightningPEFTWarning, match=re.escape(message)):
        METHOD.prepare(relative())
    model = relative()
    QLoRA(skip="wo").prepare(model)
    assert packed_layers(model)
    with pytest.warns(LightningPEFTWarning, match="LoftQ leaves 4 of"):
        inject(relative(), LoftQ(rank=4))


def test_a_cast_that_no_model_declares_is_found_in_the_code():
    paths = ["encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0.layer.1.DenseReluDense.wo"]
    assert unpackable_layers(relative("LongT5"), paths) == {
        paths[1]: f"LongT5DenseActDense casts what it hands to {paths[1]!r} to the dtype of its weight"
    }


class Casting(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        x = self.one(x.to(dtype=self.one.weight.dtype))
        return self.three(self.two(x)).to(torch.float32)


class Careful(Casting):
    def forward(self, x):
        return self.one(x if self.one.weight.dtype == torch.uint8 else x.to(self.one.weight.dtype))


def test_code_that_leaves_packed_weights_out_may_be_packed():
    assert list(unpackable_layers(nn.Sequential(Casting()), ["0.one", "0.two", "0.three"])) == ["0.one"]
    assert unpackable_layers(Careful(), ["one", "two", "three"]) == {}
    assert unpackable_layers(tiny_llama(), [path for path, _ in tiny_llama().named_modules() if path]) == {}


@pytest.mark.parametrize("where", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_declared_words_are_whole_parts_of_paths(where):
    model = nn.ModuleDict({"inner": tiny_llama()})
    setattr(model["inner"], where, {"o_proj", "layers.0.mlp", "lm", "up_proj.weight"})
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    kept = {path.removeprefix("inner.model.layers.") for path in unpackable_layers(model, paths)}
    mlp = {f"0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert kept == mlp | {"1.mlp.up_proj", "0.self_attn.o_proj", "1.self_attn.o_proj"}


def test_a_base_quantised_while_it_is_read_keeps_them_too(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules", ["down_proj"])
    with pytest.warns(LightningPEFTWarning, match="QLoRA leaves 2 of 14 linear layers unquantised: .*down_proj"):
        model = CausalLMLoader(path=str(tmp_path)).load_for(METHOD)
    assert len(packed_layers(model)) == 12
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    for layer, other in zip(model.model.layers, reference.model.layers, strict=True):
        assert torch.equal(layer.mlp.down_proj.weight, other.mlp.down_proj.weight)
