"""QLoRA: the contract over each quantizer, what ``prepare`` does to a base, and what its files are."""

import copy
import json
import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft import (
    FP4,
    NF4,
    CausalLMLoader,
    Int8,
    LightningPEFTWarning,
    LoRA,
    Method,
    PEFTModule,
    QLoRA,
    adapter_layers,
    get_registry,
    inject,
    load_adapter,
    merge_adapters,
    save_adapter,
    unload_adapters,
    unmerge_adapters,
)
from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.errors import (
    ConfigError,
    InjectionError,
    MergeError,
    PluginConflictError,
    TargetError,
    UnknownNameError,
)
from lightning_peft.hookspecs import hookimpl
from lightning_peft.quantized_layers import dequantized_path
from lightning_peft.registry import Registry
from lightning_peft.testing import MethodConformance, tiny_llama, token_batch
from lightning_peft.testing.subject import base_tensors, differing, distance

# torch.compile makes an instance of bitsandbytes' autograd function to trace it, and then warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:<class 'torch.autograd.function.Function'>:DeprecationWarning")

EXACT = QLoRA(rank=4, compute_dtype="float32")


class TestQLoRA(MethodConformance):
    method = QLoRA(compute_dtype="float32")


class TestOverInt8WithSkippedLayers(MethodConformance):
    method = QLoRA(rank=4, quantization="int8", skip=["down", "re:.*layers.0.self_attn.q_proj"], rslora=True)


class TestOverFP4(MethodConformance):
    method = QLoRA(quantization="fp4", block_size=64, double_quantization=False, compute_dtype="float32", dropout=0.1)


def packed(model):
    """Paths of the quantised layers."""
    linear = {path: unwrapped(held) for path, held in base_modules(model) if isinstance(unwrapped(held), nn.Linear)}
    return {path for path, module in linear.items() if not module.weight.is_floating_point()}


def logits(model):
    with torch.no_grad():
        return model.eval()(**token_batch()).logits


def train(model, steps=3, seed=0):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for step in range(steps):
        batch = token_batch(seed + step)
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# -- preparing the base ------------------------------------------------------------------------------------------------


def test_every_linear_layer_but_the_head_is_quantised():
    model = tiny_llama()
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    EXACT.prepare(model)
    assert packed(model) == linear - {"lm_head"}
    assert len(packed(model)) == 14
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.embed_tokens) is nn.Embedding


@pytest.mark.parametrize(
    ("method", "quantizer"),
    [
        (QLoRA(), NF4()),
        (
            QLoRA(quantization="fp4", block_size=128, double_quantization=False),
            FP4(block_size=128, double_quantization=False),
        ),
        (QLoRA(quantization="int8", threshold=6), Int8(threshold=6)),
    ],
)
def test_the_settings_are_those_of_the_quantizer(method, quantizer):
    assert method.quantizer == quantizer


def test_skipped_targets_keep_their_precision_and_a_typo_among_them_is_refused():
    model = tiny_llama()
    QLoRA(skip=["down", "*.layers.0.self_attn.q_proj"]).prepare(model)
    kept = {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"}
    assert not packed(model) & kept
    assert len(packed(model)) == 11
    with pytest.raises(TargetError, match="target 'dwn' matches no module of LlamaForCausalLM; did you mean 'down'"):
        QLoRA(skip=["dwn"]).prepare(tiny_llama())


def test_layers_off_the_block_size_stay_and_are_named():
    model = tiny_llama(intermediate_size=100)
    with pytest.warns(
        LightningPEFTWarning,
        match=r"QLoRA leaves 2 of 14 linear layers unquantised: model.layers.0.mlp.down_proj, "
        r"model.layers.1.mlp.down_proj. The first: NF4 needs in_features to be a multiple of block_size=64, got a layer of 100",
    ):
        EXACT.prepare(model)
    assert len(packed(model)) == 12
    QLoRA(skip="down").prepare(tiny_llama(intermediate_size=100))  # said so, it is no news


def test_a_base_without_a_layer_to_quantise_is_refused():
    with pytest.raises(
        InjectionError, match="QLoRA found no layer to quantise among 1 linear layers, such as '0': NF4 needs"
    ):
        EXACT.prepare(nn.Sequential(nn.Linear(10, 10)))


def test_a_subclass_of_linear_and_a_layer_without_weights_are_left_alone():
    class Gated(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(64, 64), Gated(64, 64), nn.Linear(64, 64, device="meta"))
    with pytest.warns(
        LightningPEFTWarning, match="leaves 2 of 3 linear layers unquantised: 1, 2. The first: a Gated is not a plain"
    ):
        EXACT.prepare(model)
    assert type(model[1]) is Gated
    with pytest.raises(InjectionError, match="NF4 needs the weights, got a layer on the meta device"):
        NF4().quantize(nn.Linear(64, 64, device="meta"))


def test_a_module_that_stands_at_two_places_is_quantised_once():
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, nn.Sequential(shared), nn.Linear(64, 64))
    EXACT.prepare(model)
    assert model[0] is model[1][0]
    assert model[0].weight.dtype == torch.uint8


def test_each_weight_is_freed_before_the_next_one_is_packed(monkeypatch):
    model = tiny_llama()
    weights = [weakref.ref(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    alive = []
    quantize = NF4.quantize

    def counted(self, linear):
        alive.append(sum(weight() is not None for weight in weights))
        return quantize(self, linear)

    monkeypatch.setattr(NF4, "quantize", counted)
    EXACT.prepare(model)
    assert alive == list(range(14, 0, -1))
    assert all(weight() is None for weight in weights)


@pytest.mark.parametrize("kind", [NF4, FP4, Int8])
def test_the_original_is_not_copied_while_it_is_packed(kind):
    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            own = isinstance(result, torch.Tensor) and not result.is_meta
            if own and result.untyped_storage().data_ptr() != layer.weight.data_ptr():
                self.found = max(self.found, result.untyped_storage().nbytes())
            return result

    layer = nn.Linear(256, 256)
    with Largest() as mode:
        kind().quantize(layer)
    # Int8 passes through float16, of half the size; the four bits are packed from the weight itself.
    assert 0 < mode.found <= layer.weight.nbytes / 2


def test_adapters_that_are_there_already_are_not_touched_and_a_merged_one_is_refused():
    model = tiny_llama()
    inject(model, LoRA(rank=2), name="first")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if ".adapters.first." in n}
    merge_adapters(model, "first")
    with pytest.raises(MergeError, match="cannot go in while .first. is merged into the base"):
        inject(model, EXACT, name="second")
    unmerge_adapters(model)
    inject(model, EXACT, name="second")
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len(packed(model)) == 14
    assert torch.isfinite(logits(model)).all()


def test_the_base_is_the_same_after_training_and_evaluation_and_so_are_gradients():
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    inject(model, QLoRA(rank=4))
    before = base_tensors(model)
    losses = [train(model, steps=1)[0] for _ in range(8)]
    assert losses[-1] < losses[0]

    def gradients():
        model.train().zero_grad()
        model(**token_batch(), labels=token_batch()["input_ids"]).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    first = gradients()
    for _ in range(2):
        logits(model)
    assert all((a - b).abs().max() <= 1e-6 for a, b in zip(first, gradients(), strict=True))
    assert len(first) == 28
    assert not differing(before, base_tensors(model))


# -- a base of transformers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    return path


def quantised_by_transformers(folder, **options):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    config = BitsAndBytesConfig(**(options or {**four, "bnb_4bit_use_double_quant": True}))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


def test_a_base_that_transformers_quantised_is_taken_as_it_is(folder):
    model, own = quantised_by_transformers(folder), tiny_llama()
    before = base_tensors(model)
    EXACT.prepare(model)
    assert not differing(before, base_tensors(model))
    EXACT.prepare(own)
    assert not differing(before, base_tensors(own))  # bit for bit what transformers makes
    layers = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert {dequantized_path(layer) for layer in layers} == {None}
    inject(model, EXACT)
    logits(model)
    assert train(model, 2)


def test_another_quantization_than_the_one_asked_for_is_told(folder):
    model = quantised_by_transformers(folder, load_in_8bit=True)
    with pytest.warns(
        LightningPEFTWarning, match="QLoRA with quantization='nf4' was asked for, but the base is quantised as int8"
    ):
        EXACT.prepare(model)
    QLoRA(quantization="int8").prepare(model)


def test_a_base_that_cannot_be_trained_over_is_refused_or_told(folder):
    model = tiny_llama()
    EXACT.prepare(model)
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    state.packing_format_for_cpu = True
    with pytest.raises(
        InjectionError, match="'model.layers.0.mlp.up_proj' was quantised by bitsandbytes and repacked for inference"
    ):
        inject(model, EXACT)
    state.packing_format_for_cpu = False
    state.shape = torch.Size([64, 96])
    with pytest.warns(LightningPEFTWarning, match=r"reads back wrong weights .*: model.layers.0.mlp.up_proj \(1\)"):
        EXACT.prepare(model)


def test_other_methods_train_over_such_a_base_too_after_a_forward_in_eval_mode(folder):
    model = quantised_by_transformers(folder)
    inject(model, LoRA(rank=2, init="gaussian"))
    before = base_tensors(model)
    logits(model.eval())
    assert not differing(before, base_tensors(model))
    batch = token_batch()
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if name.endswith("lora_B"))
    other = quantised_by_transformers(folder)
    other.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(InjectionError, match="'model.layers.0.mlp.up_proj' was quantised by bitsandbytes and repacked"):
        inject(other, LoRA(rank=2))
    narrow = quantised_by_transformers(folder)
    narrow.model.layers[0].mlp.up_proj.weight.quant_state.shape = torch.Size([64, 96])
    with pytest.warns(LightningPEFTWarning, match=r"reads back wrong weights .*: model.layers.0.mlp.up_proj \(1\)"):
        inject(narrow, LoRA(rank=2))


def test_hf_peft_gives_the_same_outputs_over_the_same_quantised_base(folder, tmp_path):
    peft = pytest.importorskip("peft")
    model = quantised_by_transformers(folder)
    inject(model, EXACT)
    train(model)
    save_adapter(model, tmp_path)
    base = quantised_by_transformers(folder)
    assert not differing(base_tensors(base), base_tensors(model))
    EXACT.prepare(base)  # in eval mode bitsandbytes would repack the weights, and multiply in bfloat16
    plain = logits(base)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    assert type(theirs.base_model.model.model.layers[0].self_attn.q_proj).__module__ == "peft.tuners.lora.bnb"
    assert distance(logits(model), logits(theirs)) <= 1e-5
    assert distance(logits(model), plain) > 1e-2  # the adapter does something


# -- files and merging -------------------------------------------------------------------------------------------------


def test_a_saved_adapter_is_lora_over_a_full_precision_base_and_merges_there(tmp_path):
    model = tiny_llama()
    inject(model, EXACT)
    train(model)
    with pytest.raises(
        MergeError,
        match="adapter 'default' is a 'qlora' adapter, and its base is quantised.*load its folder over the base in 16",
    ):
        merge_adapters(model)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert json.loads((tmp_path / "lightning_peft.json").read_text())["method"]["name"] == "qlora"

    full = tiny_llama()
    before = base_tensors(full)
    assert load_adapter(full, tmp_path).method == LoRA(rank=4)
    assert not differing(before, base_tensors(full))
    adapted = logits(full)
    # The same base but for the rounding of its weights to four bits.
    assert distance(adapted, logits(model)) < 0.5
    merge_adapters(full)
    assert distance(logits(full), adapted) <= 1e-5
    plain = unload_adapters(full)
    assert not adapter_layers(plain)
    assert distance(logits(plain), adapted) <= 1e-5

    again = tiny_llama()
    EXACT.prepare(again)
    assert load_adapter(again, tmp_path).method == EXACT
    assert torch.equal(logits(again), logits(model))


def test_lora_reads_hf_pefts_files_and_two_readers_of_one_type_are_refused():
    assert get_registry().method_for_peft_type("LORA") is LoRA
    assert QLoRA.peft_type == "LORA"

    @dataclass(frozen=True, kw_only=True)
    class Rival(Method):
        name: ClassVar[str] = "rival"
        peft_type: ClassVar[str | None] = "LORA"
        supports = adapter = None

    @dataclass(frozen=True, kw_only=True)
    class Heir(LoRA):
        name: ClassVar[str] = "heir"
        peft_type: ClassVar[str | None] = "LORA"

    def plugin(kind):
        def register_methods():
            return [kind]

        return SimpleNamespace(__name__=kind.name, register_methods=hookimpl(register_methods))

    registry = Registry(entry_points=False)
    with pytest.raises(
        PluginConflictError, match="rival: 'lora' and 'rival' would both read HF PEFT's type 'LORA'; let one inherit"
    ):
        registry.register(plugin(Rival))
    registry.register(plugin(Heir))
    assert registry.method_for_peft_type("LORA") is LoRA


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quantization": "nf5"}, UnknownNameError, "unknown quantizer 'nf5'; did you mean 'nf4'"),
        ({"quantization": "int8", "block_size": 64}, ConfigError, "QLoRA block_size=64 was given, but the quantizer 'int8' has no such setting; leave it out. It has: threshold"),
        ({"threshold": 6.0}, ConfigError, "QLoRA threshold=6.0 was given, but the quantizer 'nf4' has no such setting"),
        ({"block_size": 48}, ConfigError, "NF4 block_size must be a power of two from 64 to 4096, got 48"),
        ({"rank": 0}, ConfigError, "LoRA rank must be a positive integer, got 0"),
        ({"skip": ["re:("]}, ConfigError, "is not a regular expression"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        QLoRA(**options)


# -- a real model, and the optimizers of bitsandbytes -------------------------------------------------------------------


def test_a_real_model_learns_over_four_bits(data_dir):
    model = CausalLMLoader(path=str(data_dir / "models" / "stories260k")).load()
    with pytest.warns(
        LightningPEFTWarning, match=r"leaves 5 of 35 linear layers unquantised: .*down_proj.* got a layer of 172"
    ):
        inject(model, EXACT)
    assert len(packed(model)) == 30
    before = base_tensors(model)
    text = (data_dir / "lm" / "tinyshakespeare.txt").read_bytes()[:2048]
    ids = torch.tensor(list(text)).remainder(model.config.vocab_size).view(4, 512)[:, :128]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not differing(before, base_tensors(model))


@pytest.mark.parametrize("name", ["PagedAdamW", "PagedAdamW8bit"])
def test_a_paged_optimizer_is_refused_on_a_cpu(name, tmp_path, make_trainer):
    import bitsandbytes

    kind = getattr(bitsandbytes.optim, name)
    module = PEFTModule(tiny_llama(), QLoRA(rank=4), optimizer=lambda params: kind(params, lr=1e-2))
    with pytest.raises(ConfigError, match=rf"{name} pages its state .* on the CPU; take bitsandbytes.optim.AdamW"):
        make_trainer(tmp_path, max_steps=1).fit(module, [token_batch(0)])


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Lightning, of the second folder here
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW32bit"])
def test_bitsandbytes_optimizers_train_and_resume_exactly(name, tmp_path, make_trainer):
    import bitsandbytes

    from lightning_peft import AdapterCheckpoint, adapter_state_dict
    from lightning_peft.data.resumable import ResumableDataLoader, ResumableSampler

    kind = getattr(bitsandbytes.optim, name)
    assert issubclass(kind, torch.optim.Optimizer)
    batches = [{**token_batch(seed), "labels": token_batch(seed)["input_ids"]} for seed in range(4)]

    def fit(root, steps, ckpt_path=None):
        torch.manual_seed(0)
        loader = ResumableDataLoader(
            batches, batch_size=1, sampler=ResumableSampler(batches), collate_fn=lambda items: items[0]
        )
        # Tensors of fewer than 4096 elements stay in 32 bit: rank 64 has larger ones.
        module = PEFTModule(
            tiny_llama(), QLoRA(rank=64, compute_dtype="float32"), optimizer=lambda params: kind(params, lr=1e-2)
        )
        saving = AdapterCheckpoint(dirpath=root, save_last=True, every_n_train_steps=2, save_top_k=0)
        trainer = make_trainer(root, max_steps=steps, callbacks=[saving])
        trainer.fit(module, loader, ckpt_path=ckpt_path)
        kinds = {
            value.dtype
            for state in trainer.optimizers[0].state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        }
        assert (torch.uint8 in kinds) == ("8bit" in name)
        return copy.deepcopy(adapter_state_dict(module.model))

    whole = fit(tmp_path / "whole", 4)
    fit(tmp_path / "part", 2)
    rest = fit(tmp_path / "rest", 4, str(tmp_path / "part" / "last.ckpt"))
    assert not differing(whole, rest)


def test_a_bitsandbytes_optimizer_is_named_by_its_class_path_on_the_command_line(folder):
    from lightning_peft import PEFTCLI

    arguments = [
        "--model.base=CausalLMLoader", f"--model.base.path={folder}", "--model.method=qlora", "--model.method.quantization=fp4",
        "--model.optimizer=bitsandbytes.optim.PagedAdamW8bit", "--model.optimizer.lr=0.001",
        "--data=TextDataModule", f"--data.tokenizer={folder}", "--data.train=x.txt",
        "--trainer.accelerator=cpu", "--trainer.logger=false",
    ]  # fmt: skip
    model = PEFTCLI(args=arguments, run=False).model
    assert model.method == QLoRA(quantization="fp4")
    optimizer = model.optimizer([nn.Parameter(torch.zeros(2))])
    assert type(optimizer).__name__ == "PagedAdamW8bit"
    assert optimizer.param_groups[0]["lr"] == 0.001
