"""Norms and MLPs that keep less for backward give the same numbers, wherever they serve, and step aside where they do not."""

import copy
import functools
import pickle

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import (
    LoRA,
    PEFTModule,
    adapter_state_dict,
    compute_paths,
    fuse_blocks,
    inject,
    merge_adapters,
    unfuse_blocks,
)
from lightning_peft.arithmetic.dropped_parts import drawn_mask
from lightning_peft.testing.toys import tiny_gpt2, tiny_llama

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
IDS = torch.randint(1, 128, (3, 12), generator=torch.Generator().manual_seed(1))


def made(kind, **fields):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")(
        **{**SIZES, "use_cache": False, **fields}
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config)


MODELS = {
    "Llama": tiny_llama,
    "Llama, biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True),
    "Mistral": lambda: made("Mistral"),
    "Qwen2": lambda: made("Qwen2"),
    "Qwen3": lambda: made("Qwen3"),
    "Gemma": lambda: made("Gemma"),
    "Gemma2": lambda: made("Gemma2", attn_implementation="eager"),
    "Gemma3": lambda: made("Gemma3"),
    "Phi3": lambda: made("Phi3"),
    "GPTNeoX": lambda: made("GPTNeoX", hidden_dropout=0.0, attention_dropout=0.0),
    "GPT2": lambda: tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
}


def adapted(model=None, method=None, targets="all_linear", dtype=torch.float32, name="default"):
    model = (tiny_llama() if model is None else model).to(dtype)
    torch.manual_seed(3)
    inject(model, method or LoRA(rank=4), targets, name=name)
    for path, parameter in model.named_parameters():
        if "lora_B" in path and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.05)
    return model.train()


def trained(model):
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def run(model, **options):
    torch.manual_seed(5)
    loss = model(input_ids=IDS, labels=IDS).loss
    return loss, dict(zip(trained(model), torch.autograd.grad(loss, list(trained(model).values())), strict=True))


def assert_same(model, tolerance=2e-6):
    """The model gives the same loss, bit for bit, and the same gradients with fused blocks as without."""
    wanted, gradients = run(model)
    fuse_blocks(model)
    found, others = run(model)
    assert torch.equal(wanted, found)
    for name, one in gradients.items():
        assert float((others[name] - one).norm()) <= tolerance * max(float(one.norm()), 1e-6), name


def paths(model, kind):
    return {row.place: (row.path, row.why) for row in compute_paths(model).rows if row.kind == kind}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_loss_and_gradients(name):
    model = adapted(MODELS[name]())
    assert_same(model)
    assert {path for path, _ in (paths(model, "norm") | paths(model, "mlp")).values()} == {"fused"}
    assert {path for path, _ in paths(model, "linear").values()} == {"lean"}


@pytest.mark.parametrize("targets", [["query"], ["down"], ["output", "gate"], ["up", "value", "head"]], ids=str)
def test_any_subset_of_the_layers(targets):
    assert_same(adapted(targets=targets))


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_dropout_draws_what_it_draws_without(name):
    assert_same(adapted(MODELS[name](), LoRA(rank=4, dropout=0.3)))


BATCHES = [torch.randint(1, 128, (3, 32), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def gradients_of_batches(model, autocast=False):
    found = []
    for ids in BATCHES:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        found.extend(torch.autograd.grad(loss, list(trained(model).values())))
    return found


def error(found, exact):
    return sum(float((one - other).norm() ** 2) for one, other in zip(found, exact, strict=True)) ** 0.5


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_the_error_in_16_bits_is_no_larger(autocast):
    """Over several batches, against float64, where the norms of transformers compute in float32 too."""
    exact = gradients_of_batches(adapted(dtype=torch.float64))
    errors = []
    for fused in (False, True):
        model = adapted(dtype=torch.float32 if autocast else torch.bfloat16)
        reference = adapted(dtype=torch.float64)
        for name, one in trained(model).items():
            one.data = trained(reference)[name].data.float()
        errors.append(error(gradients_of_batches(fuse_blocks(model) if fused else model, autocast), exact))
    assert 0 < errors[1] <= 1.02 * errors[0]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_as_little_and_gives_the_same(reentrant):
    model = adapted()
    _, wanted = run(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    sizes = []
    for fused in (False, True):
        model, kept = fuse_blocks(model) if fused else model, {}
        torch.manual_seed(5)
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(remember, kept), lambda one: one):
            loss = model(input_ids=IDS, labels=IDS).loss
        model.zero_grad()
        loss.backward()
        for name, one in trained(model).items():
            assert float((one.grad - wanted[name]).norm()) <= 2e-6 * float(wanted[name].norm())
        sizes.append(sum(one.untyped_storage().nbytes() for one in kept.values()))
    assert sizes[1] <= sizes[0]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("fused", [False, True])
def test_reentrant_checkpointing_drops_the_same_elements_twice(fused):
    """Its first forward is without gradients, and its second is what is differentiated."""
    model = adapted(method=LoRA(rank=4, dropout=0.3))
    model = fuse_blocks(model) if fused else model
    wanted = run(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    torch.manual_seed(5)
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert torch.equal(loss, wanted[0])
    for name, one in trained(model).items():
        assert float((one.grad - wanted[1][name]).norm()) <= 2e-6 * float(wanted[1][name].norm())


@pytest.mark.parametrize("forward_too", [False, True])
@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_backward_inside_a_block_of_autocast(name, forward_too):
    model = fuse_blocks(adapted(MODELS[name]()))
    with torch.autocast("cpu", torch.bfloat16, enabled=forward_too):
        loss = model(input_ids=IDS, labels=IDS).loss
    wanted = torch.autograd.grad(loss, list(trained(model).values()), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss.backward()
    for one, other in zip(trained(model).values(), wanted, strict=True):
        assert float((one.grad - other).norm()) <= 0.05 * float(other.norm())


def test_an_mlp_with_a_dropout_whose_place_is_not_known_is_left_alone():
    model = adapted(tiny_llama())
    mlp = model.model.layers[0].mlp
    mlp.drop = nn.Dropout(0.5)
    fuse_blocks(model)
    assert "forward" not in vars(mlp)
    assert paths(model, "mlp")["model.layers.0.mlp"] == (
        "plain",
        "it has a dropout 'drop', and only one called 'dropout' has a known place",
    )


def test_dropout_draws_its_mask_beside_its_input_whatever_the_default_device_is():
    with torch.device("meta"):
        assert drawn_mask((3, 4), 0.5, torch.device("cpu"))[0].device.type == "cpu"


def remember(kept, one):
    kept[one.data_ptr()] = one
    return one


def test_checkpointing_a_part_of_a_block():
    """The output of the norm goes into a checkpoint, and into what is outside of it."""
    model = adapted()
    _, wanted = run(model)
    fuse_blocks(model)
    for layer in model.model.layers:
        inner = layer.self_attn.q_proj
        inner.forward = lambda x, run=inner.forward: checkpoint(run, x, use_reentrant=False)
    _, found = run(model)
    assert all(torch.allclose(found[name], one, rtol=1e-4, atol=1e-7) for name, one in wanted.items())


def test_accumulation_a_kept_graph_and_a_part_of_the_gradients():
    model = fuse_blocks(adapted())
    _, wanted = run(model)
    loss, _ = model(input_ids=IDS, labels=IDS).loss, None
    parameters = trained(model)
    some = list(parameters)[::3]
    partly = torch.autograd.grad(loss, [parameters[name] for name in some], retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for name, one in parameters.items():
        assert torch.allclose(one.grad, 2 * wanted[name], rtol=1e-4, atol=1e-7)
    for name, one in zip(some, partly, strict=True):
        assert torch.allclose(one, wanted[name], rtol=1e-4, atol=1e-7)


def test_differentiating_twice():
    def twice(model):
        parameters = list(trained(model).values())
        first = torch.autograd.grad(model(input_ids=IDS, labels=IDS).loss, parameters, create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in first), parameters)

    for model in (adapted(MODELS["Llama"]()), adapted(MODELS["GPT2"](), LoRA(rank=4))):
        model.set_attn_implementation("eager")
        wanted = twice(model)
        for one, other in zip(wanted, twice(fuse_blocks(model)), strict=True):
            assert float((one - other).norm()) <= 1e-4 * float(one.norm())


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of decompositions
def test_functions_of_torch_func_and_forward_mode_take_the_plain_path():
    model = fuse_blocks(adapted())
    model.set_attn_implementation("eager")
    _, wanted = run(model)
    parameters = {name: one.detach() for name, one in trained(model).items()}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, kwargs={"input_ids": IDS, "labels": IDS}).loss

    found = torch.func.grad(loss)(parameters)
    assert all(torch.allclose(found[name], one, rtol=1e-4, atol=1e-7) for name, one in wanted.items())
    one = next(iter(parameters))
    tangents = {
        name: torch.ones_like(value) if name == one else torch.zeros_like(value) for name, value in parameters.items()
    }
    _, slope = torch.func.jvp(loss, (parameters,), (tangents,))
    assert torch.allclose(slope, wanted[one].sum(), rtol=1e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile asks for it
def test_a_compiled_model_is_one_graph_and_takes_the_plain_path():
    model = adapted(targets=["query", "down"])
    wanted, gradients = run(model)
    fuse_blocks(model)
    layer = model.model.layers[1]
    layer.compile(backend="aot_eager", fullgraph=True)
    assert {why.split(":")[0] for path, why in _of(paths(model, "linear"), "layers.1")} == {"compiled"}
    found, others = run(model)
    assert torch.allclose(found, wanted)
    assert all(torch.allclose(others[name], one, rtol=1e-3, atol=1e-6) for name, one in gradients.items())


def _of(found, part):
    return [row for place, row in found.items() if part in place]


# -- life --------------------------------------------------------------------------------------------------------------


def test_names_state_copies_and_undoing():
    model = adapted()
    names, state = list(model.state_dict()), adapter_state_dict(model)
    fuse_blocks(model)
    assert list(model.state_dict()) == names
    assert adapter_state_dict(model).keys() == state.keys()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        mlp = other.model.layers[0].mlp
        assert mlp.forward.module is mlp
        assert torch.equal(run(other)[0], run(model)[0])
    unfuse_blocks(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_without_gradients_the_forward_is_that_of_the_class():
    model = fuse_blocks(adapted()).eval()
    calls = []
    norm = model.model.layers[0].input_layernorm
    norm.forward.fused = lambda x: calls.append(x)  # would break forward, were it called
    with torch.no_grad():
        model(input_ids=IDS)
    assert not calls


def test_merging_and_a_module_of_lightning(tmp_path):
    torch.manual_seed(0)
    losses = {}
    for fused in (False, True):
        L.seed_everything(1, verbose=False)
        module = PEFTModule(tiny_llama(), LoRA(rank=2), "all_linear", fused_blocks=fused)
        trainer = L.Trainer(
            max_steps=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accumulate_grad_batches=2,
        )
        rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(2, 1)]
        trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=1))
        losses[fused] = module.model(input_ids=IDS, labels=IDS).loss
        assert {path for path, _ in paths(module.model, "mlp").values()} == {"fused" if fused else "plain"}
    assert torch.allclose(losses[True], losses[False], rtol=1e-5)
    merge_adapters(module.model)
    assert torch.allclose(module.model(input_ids=IDS, labels=IDS).loss, losses[True], rtol=1e-5)
