"""MoEUpcycling: where it starts, its gradients, its routers, padding, and what it refuses."""

import copy
import json

import pytest
import torch

from lightning_peft import CausalLMLoader, MoEUpcycling, adapter_layers, inject, load_adapter, save_adapter
from lightning_peft.errors import ConfigError
from lightning_peft.moe.balance import load_balancing_loss, loss_scale, z_loss
from lightning_peft.moe.mixture import MixtureOfExperts
from lightning_peft.testing import tiny_gpt2, tiny_llama, token_batch

MLP = "model.layers.0.mlp"
SCALED = {"combine": "softmax", "weight_scale": "auto"}


def upcycled(model, **fields):
    torch.manual_seed(1)
    inject(model, MoEUpcycling(**fields))
    return model


def mixture(model, path=MLP):
    found = adapter_layers(model)[path].adapters["default"]
    assert isinstance(found, MixtureOfExperts)
    return found


def apart(a, b):
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def logits(model, **options):
    return model(**token_batch(), **options).logits


def exact(top_k):
    return {"top_k": top_k, "combine": "straight_through" if top_k == 1 else "renorm"}


# -- where it starts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [4, 8, 32])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_weights_that_sum_to_one_start_at_the_dense_logits(make, top_k, experts):
    base = logits(make())
    assert apart(logits(upcycled(make(), experts=experts, **exact(top_k))), base) <= 2e-6


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_one_block_starts_at_the_dense_block(top_k):
    layer = adapter_layers(upcycled(tiny_llama(), **exact(top_k)))[MLP]
    x = torch.randn(2, 40, 64)
    with torch.no_grad():
        assert float((layer(x) - layer.base_layer(x)).abs().max()) <= 1e-6


@pytest.mark.parametrize("top_k", [1, 2])
def test_one_block_in_bfloat16_starts_at_the_dense_block_but_for_rounding(top_k):
    layer = adapter_layers(upcycled(tiny_llama().bfloat16(), **exact(top_k)))[MLP]
    x = torch.randn(2, 40, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        y, dense = layer(x), layer.base_layer(x)
    # Products of fewer rows may add up in another order, which moves a rare result to the next bfloat16.
    assert float((y != dense).float().mean()) <= 1e-3
    assert torch.allclose(y.float(), dense.float(), rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("router", ["topk", "sigmoid"])
def test_parts_of_a_copy_are_chosen_together_and_give_the_dense_output(router):
    base = logits(tiny_llama())
    model = upcycled(tiny_llama(), experts=4, top_k=8, granularity=4, router=router)
    assert mixture(model).gate_up_proj.shape == (16, 64, 64)
    assert apart(logits(model), base) <= 2e-6
    chosen = mixture(model).assign(torch.randn(20, 64), None, None).experts.view(20, 2, 4) // 4
    assert all(len(set(copies.tolist())) == 1 for token in chosen for copies in token)
    assert apart(logits(upcycled(tiny_llama(), experts=4, top_k=8, granularity=4, weight_scale="none")), base) > 1e-2


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize(
    "fields",
    [SCALED, {**SCALED, "router": "sigmoid", "top_k": 4}, {**SCALED, "experts": 4, "granularity": 2, "top_k": 4}],
)
def test_weight_scaling_starts_near_the_dense_logits(make, fields):
    base = logits(make())
    scaled = apart(logits(upcycled(make(), router_std=1e-3, **fields)), base)
    assert scaled < 0.01
    spread = apart(logits(upcycled(make(), router_std=1e-3, **{**fields, "weight_scale": "spread"})), base)
    bare = apart(logits(upcycled(make(), router_std=1e-3, **{**fields, "weight_scale": "none"})), base)
    assert scaled < spread < 0.7 * bare


def test_a_plain_relu_mlp_is_scaled_exactly():
    """relu(s u) s d = s² relu(u) d, and with an undecided router every weight is 1 / E."""
    base = logits(tiny_gpt2(activation_function="relu"))
    model = upcycled(tiny_gpt2(activation_function="relu"), router_std=0.0, combine="softmax", weight_scale="spread")
    assert apart(logits(model), base) <= 2e-6
    model = upcycled(tiny_gpt2(activation_function="relu"), router_std=0.0, **{**SCALED, "weight_scale": 4.0})
    assert apart(logits(model), base) <= 2e-6


def test_noise_makes_experts_differ_by_what_it_says():
    dense = tiny_llama().model.layers[0].mlp.down_proj.weight
    experts = mixture(upcycled(tiny_llama(), expert_noise=0.01)).down_proj
    noise = (experts - dense).detach()
    assert noise.std().item() == pytest.approx(0.01 * dense.std().item(), rel=0.05)
    assert not torch.equal(noise[0], noise[1])


def test_reinit_draws_whole_neurons_anew():
    mlp = tiny_llama().model.layers[0].mlp
    found = mixture(upcycled(tiny_llama(), experts=4, reinit=0.25))
    changed = []
    for gate_up, down in zip(found.gate_up_proj.detach(), found.down_proj.detach(), strict=True):
        gate, up = gate_up.chunk(2)
        rows = [
            (gate != mlp.gate_proj.weight).any(1),
            (up != mlp.up_proj.weight).any(1),
            (down != mlp.down_proj.weight).any(0),
        ]
        assert torch.equal(rows[0], rows[1])
        assert torch.equal(rows[0], rows[2])
        assert rows[0].sum() == 32
        changed.append(rows[0])
        assert down[:, rows[0]].std().item() == pytest.approx(mlp.down_proj.weight.std().item(), rel=0.1)
    assert not torch.equal(changed[0], changed[1])


# -- gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 2), (8, 4), (32, 2)])
def test_gradients_of_experts_sum_to_the_dense_gradient(experts, top_k):
    dense = tiny_llama()
    loss = dense(**token_batch(), labels=token_batch()["input_ids"]).loss
    # With straight-through weights the routers behind an MLP have a part in its gradient, so it is the last one that is compared.
    place = "model.layers.1.mlp" if top_k == 1 else MLP
    wanted = torch.autograd.grad(
        loss, [dense.get_parameter(f"{place}.{part}.weight") for part in ("gate_proj", "up_proj", "down_proj")]
    )
    model = upcycled(tiny_llama(), experts=experts, **exact(top_k))
    model(**token_batch(), labels=token_batch()["input_ids"]).loss.backward()
    found = mixture(model, place)
    parts = [*found.gate_up_proj.grad.sum(0).chunk(2), found.down_proj.grad.sum(0)]
    assert max(apart(a, b) for a, b in zip(parts, wanted, strict=True)) <= 5e-6
    size = max(float(gradient.abs().max()) for gradient in wanted)
    router = float(found.router.grad.abs().max())
    # Identical experts whose weights sum to one leave the router nothing to learn from the loss, but for the straight-through gradient.
    assert router > 1e-3 * size if top_k == 1 else router <= 1e-6 * size


def test_an_expert_without_tokens_gets_zeros():
    model = upcycled(tiny_llama(), experts=32)
    model(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    idle = ~mixture(model).down_proj.grad.flatten(1).any(1)
    assert idle.sum() >= 28


def test_the_losses_join_any_loss():
    """The gradient is that of the loss plus the auxiliary losses of each layer, times the scale of the loss."""
    fields = {"experts": 4, "expert_noise": 0.1, "balance_coef": 0.3, "z_coef": 0.2}
    gradients = []
    for scale in (1.0, 64.0):
        model = upcycled(tiny_llama(), **fields).train()
        with loss_scale(scale):
            (model(**token_batch()).logits.square().mean() * scale).backward()
        gradients.append(mixture(model).router.grad / scale)
    model = upcycled(tiny_llama(), **{**fields, "balance_coef": 0.0, "z_coef": 0.0}).train()
    seen = []
    for layer in adapter_layers(model).values():
        if isinstance(found := layer.adapters["default"], MixtureOfExperts):
            found.assign = lambda *args, bound=found.assign: seen.append(bound(*args)) or seen[-1]
    loss = model(**token_batch()).logits.square().mean()
    assert len(seen) == 2
    (loss + sum(0.3 * load_balancing_loss(one) + 0.2 * z_loss(one) for one in seen)).backward()
    wanted = mixture(model).router.grad
    assert apart(gradients[0], wanted) <= 1e-6
    assert apart(gradients[1], wanted) <= 1e-6


# -- expert choice -------------------------------------------------------------------------------------------------------


def choosing(**fields):
    return {"router": "expert_choice", "allow_noncausal": True, **fields}


def test_experts_choose_their_share_and_weights_sum_to_one():
    found = mixture(upcycled(tiny_llama(), **choosing(experts=8, capacity=2.0)))
    assignment = found.assign(torch.randn(64, 64), None, (4, 16))
    assert assignment.expert_counts().tolist() == [16] * 8  # C n / E
    sums = torch.zeros(64).index_add(0, assignment.tokens, assignment.weights.detach())
    covered = assignment.token_counts() > 0
    assert 0 < int((~covered).sum()) < 32
    assert torch.allclose(sums, covered.float())


@pytest.mark.parametrize(
    "fields", [{"experts": 4, "capacity": 4.0}, {"experts": 32, "capacity": 1.0, "uncovered": "dense"}]
)
@pytest.mark.parametrize("group", ["batch", "sequence", 7])
def test_experts_that_choose_cover_the_dense_model_where_they_must(group, fields):
    base = logits(tiny_llama())
    assert apart(logits(upcycled(tiny_llama(), **choosing(group=group, **fields))), base) <= 2e-6


def test_uncovered_tokens_have_the_residual_alone():
    model = upcycled(tiny_llama(), **choosing(experts=8, capacity=0.5))
    layer, x = adapter_layers(model)[MLP], torch.randn(1, 64, 64)
    with torch.no_grad():
        idle = mixture(model).assign(x[0], None, None).token_counts() == 0
        assert idle.any()
        assert torch.equal(layer(x)[0].abs().sum(-1) == 0, idle)


# -- stories260k ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(data_dir):
    """The loss of stories260k on some stories, dense or upcycled: ``loss(**fields)``."""
    from transformers import AutoTokenizer

    folder = str(data_dir / "models" / "stories260k")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with (data_dir / "lm" / "tinystories_valid.jsonl").open() as file:
        texts = [json.loads(next(file))["text"] for _ in range(16)]
    ids = torch.tensor(
        [([tokenizer.bos_token_id] + tokenizer(text, add_special_tokens=False)["input_ids"])[:128] for text in texts]
    )

    @torch.no_grad()
    def loss(**fields):
        model = CausalLMLoader(path=folder).load().eval()
        model = upcycled(model, **fields) if fields else model
        return float(model(input_ids=ids, labels=ids).loss)

    return loss


def test_a_trained_model_starts_at_its_loss(stories):
    dense = stories()
    assert 0.5 < dense < 2.5
    assert abs(stories(experts=8, top_k=2) - dense) <= 1e-6
    scaled = stories(experts=8, top_k=2, **SCALED)
    bare = stories(experts=8, top_k=2, combine="softmax", weight_scale="none")
    assert abs(scaled - dense) <= 0.06
    assert bare - dense >= 5 * abs(scaled - dense)


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"experts": 8, "capacity": 2.0}, 0.06),
        ({"experts": 32, "capacity": 4.0}, 0.06),
        ({"experts": 32, "capacity": 2.0}, 0.25),  # an eighth of the tokens has no expert in three of five layers
        ({"experts": 32, "capacity": 2.0, "uncovered": "dense"}, 1e-6),
    ],
)
def test_experts_that_choose_in_the_last_half_start_close(stories, fields, most):
    assert abs(stories(**choosing(layers="last_half", **fields)) - stories()) <= most


@pytest.fixture(scope="module")
def learner(data_dir):
    """The loss of a Llama of four layers that has read stories byte by byte for 300 steps: ``loss(**fields)``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def read(name, rows):
        with (data_dir / "lm" / name).open(encoding="utf-8") as file:
            text = "\n".join(json.loads(line)["text"] for line in file).encode()
        return torch.tensor(list(text[: rows * 128])).view(rows, 128)

    generator, rows, held_out = (
        torch.Generator().manual_seed(0),
        read("tinystories_train.jsonl", 2400),
        read("tinystories_valid.jsonl", 16),
    )
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=128, **sizes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for batch in rows[torch.randperm(len(rows), generator=generator)].split(8):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()

    @torch.no_grad()
    def loss(**fields):
        tried = copy.deepcopy(model).eval()
        tried = upcycled(tried, **fields) if fields else tried
        return float(tried(input_ids=held_out, labels=held_out).loss)

    return loss


def test_a_small_model_starts_close_with_many_experts_that_choose(learner):
    dense = learner()
    assert learner(combine="softmax", weight_scale="none") - dense > 0.2  # its MLPs matter
    assert abs(learner(**SCALED) - dense) <= 0.06
    assert abs(learner(**choosing(experts=32, capacity=2.0, layers="last_half")) - dense) <= 0.06


def test_it_learns(trained_on_e2e):
    losses = trained_on_e2e(MoEUpcycling(experts=4), lr=3e-3)
    assert losses[-1] < 0.8 * losses[0]


# -- files and fields ----------------------------------------------------------------------------------------------------


def test_a_copy_of_the_model_has_activations_of_its_own():
    model = upcycled(tiny_llama(), experts=2)
    twin = copy.deepcopy(model)
    mine, its = mixture(model), mixture(twin)
    assert its._activation[0] is adapter_layers(twin)[MLP].base_layer.act_fn
    assert its._activation[0] is not mine._activation[0]


def test_a_folder_brings_back_mlps_in_parts(tmp_path):
    from tests.plugins.test_moe_surgery import logits as of
    from tests.plugins.test_moe_surgery import make

    model, again = upcycled(make("bert"), experts=2, expert_noise=0.3), make("bert")
    load_adapter(again, save_adapter(model, tmp_path))
    assert torch.equal(of(again), of(model))
    assert apart(of(model), of(make("bert"))) > 1e-3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 9}, "top_k=9 asks for more than the 8 experts there are"),
        ({"top_k": 1}, "top_k=1 with combine='renorm' gives every token the weight one"),
        ({"experts": 1}, "experts must be an integer of at least 2, got 1"),
        ({"experts": True}, "experts must be an integer of at least 2, got True"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"router": 3}, "MoEUpcycling router must be the name of a registered router, got 3"),
        ({"router_fields": ["k"]}, "MoEUpcycling router_fields must map fields of the router to values, got ['k']"),
        ({"combine": "sum"}, "combine must be one of renorm, softmax, straight_through, got 'sum'"),
        ({"weight_scale": "much"}, "weight_scale must be one of auto, spread, none, got 'much'"),
        ({"weight_scale": 0.0}, "weight_scale must be 'auto', 'spread', 'none' or a positive number, got 0.0"),
        ({"router": "expert_choice", "capacity": 9.0}, "capacity=9.0 asks for more than the 8 experts there are"),
        (
            {"router": "expert_choice", "group": 0},
            "group must be 'batch', 'sequence' or a positive number of tokens, got 0",
        ),
        ({"router": "expert_choice", "combine": "straight_through"}, "combine must be 'renorm' or 'softmax'"),
        ({"uncovered": "none"}, "uncovered must be one of residual, dense, got 'none'"),
        ({"layers": "first_half"}, "layers must be one of all, last_half, every_other, got 'first_half'"),
        ({"layers": [0]}, "layers must be one of all, last_half, every_other, got [0]"),
        ({"reinit": 1.5}, "reinit is a share and cannot exceed 1, got 1.5"),
        ({"jitter": -0.1}, "jitter must be a finite number of at least 0, got -0.1"),
        ({"balance_coef": float("nan")}, "balance_coef must be a finite number of at least 0, got nan"),
        ({"granularity": 2, "top_k": 3}, "top_k must be a multiple of it"),
        ({"granularity": 2, "router_std": 0.0}, "needs router_std > 0"),
        ({"granularity": 2, "router": "noisy_topk"}, "needs a router that chooses all parts of a copy together"),
        ({"train": "router"}, "train must be one of experts, all, got 'router'"),
        ({"implementation": "loop"}, "implementation must be one of auto, unbind, grouped_mm, got 'loop'"),
        ({"dtype": "float16"}, "dtype must be one of float32, base, got 'float16'"),
        ({"allow_noncausal": "yes"}, "allow_noncausal must be true or false, got 'yes'"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ConfigError) as caught:
        MoEUpcycling(**fields)
    assert message in str(caught.value)


def test_what_is_declared_follows_from_the_fields():
    assert MoEUpcycling().row_routable
    assert not MoEUpcycling(router="expert_choice").row_routable
    assert MoEUpcycling(router="expert_choice", group="sequence").row_routable
    assert not MoEUpcycling().identity_at_init
