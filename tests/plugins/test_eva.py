"""EVA keeps the contract, its directions are those of an exact decomposition and of HF PEFT, and its ranks survive every way of saving."""

import json
from itertools import islice

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.eva import initialize_lora_eva_weights
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import (
    EVA,
    CausalLMLoader,
    LightningPEFTWarning,
    LoRA,
    PEFTModule,
    Targets,
    TextDataModule,
    adapter_layers,
    adapter_state_dict,
    initialize_from_data,
    inject,
    load_adapter,
    save_adapter,
)
from lightning_peft.errors import CheckpointMismatchError, ConfigError
from lightning_peft.plugins.eva import PrincipalComponents
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama, token_batch
from lightning_peft.testing.subject import base_tensors, differing, distance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")


class TestEVA(MethodConformance):
    method = EVA(rank=4)


class TestOnSlicesOfGPT2(MethodConformance):
    method = EVA(rank=4, rho=3.0, rslora=True, whiten=True, bias="lora_only", rank_pattern={"up": 2})
    targets = Targets(include=["query", "value", "up"])

    def model(self):
        return tiny_gpt2()


class TestAfterData(MethodConformance):
    """The whole contract once more, with values and ranks from data in every adapter."""

    method = EVA(rank=4, adjust_scaling_factors=False)

    def inject(self, model, name="default"):
        injection = super().inject(model, name)
        if not next(model.parameters()).is_meta:
            initialize_from_data(model, batches(), name=name)
        return injection


TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
LINEAR = [*TARGETS, "o_proj", "gate_proj"]


def batches(n=6, rows=6):
    found = [token_batch(seed, rows=rows, length=16) for seed in range(n)]
    for batch in found:
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :5] = -100
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, 12:] = 0
    return found


def started(method=None, make=tiny_llama, targets=TARGETS, data=None):
    model = make()
    inject(model, method or EVA(rank=4), targets)
    initialize_from_data(model, batches() if data is None else data)
    return model


def places(model, name="default"):
    return {path: layer.adapters[name] for path, layer in adapter_layers(model).items()}


def ranks(model):
    return {path: adapter.rank for path, adapter in places(model).items()}


@torch.no_grad()
def logits(model):
    return model.eval()(**token_batch(5)).logits


def train(model, steps=4):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        batch = token_batch(step)
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()


def inputs_of(model, path, data, keep):
    """What a module reads at positions that ``keep`` chooses, (tokens, in), in float64."""
    held = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: held.append(args[0]))
    with torch.no_grad():
        for batch in data:
            model(**batch)
    hook.remove()
    return torch.cat([x[keep(batch)] for x, batch in zip(held, data, strict=True)]).double()


def counted(batch):
    return (batch["labels"] != -100) & (batch["attention_mask"] != 0)


# -- directions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whiten", [False, True])
def test_a_starts_at_the_principal_directions_of_the_inputs_that_count(whiten):
    data = batches()
    model = started(EVA(rank=4, rho=1.0, tau=1.0, whiten=whiten))
    for path in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        x = inputs_of(tiny_llama(), path, data, counted)
        _, values, vectors = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        A = places(model)[path].lora_A.double()
        lengths = A.norm(dim=1)
        wanted = 1 / values[:4].sqrt() if whiten else torch.ones(4, dtype=torch.float64)
        assert torch.allclose(lengths, wanted, rtol=1e-4)
        assert torch.allclose((A / lengths[:, None] * vectors[:4]).sum(1).abs(), torch.ones(4).double(), atol=1e-4)
        assert not places(model)[path].lora_B.any()


def test_which_tokens_count_is_a_field():
    data, path = batches(), "model.layers.0.self_attn.v_proj"
    model = started(EVA(rank=4, rho=1.0, tau=1.0, label_mask=False))
    x = inputs_of(tiny_llama(), path, data, lambda batch: batch["attention_mask"] != 0)
    vectors = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:4]
    assert torch.allclose(
        places(model)[path].lora_A.double() @ vectors.t() @ vectors, places(model)[path].lora_A.double(), atol=1e-4
    )
    other = places(started(EVA(rank=4, rho=1.0, tau=1.0)))[path].lora_A
    assert not torch.allclose(other.abs(), places(model)[path].lora_A.abs(), atol=1e-2)


@pytest.mark.parametrize("width", [40, 700])
def test_batch_by_batch_is_as_good_as_all_at_once(width):
    generator = torch.Generator().manual_seed(3)
    scales = 0.97 ** torch.arange(width)
    mix = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    rows = torch.randn(2400, width, generator=generator) * scales @ mix + torch.randn(width, generator=generator)
    found = PrincipalComponents(8)
    for part in rows.split([900, 1, 299, 1200]):
        found.update(part)
    centred = (rows - rows.mean(0)).double()
    exact = torch.linalg.svd(centred, full_matrices=False)[2][:8].float()
    # All cosines of the angles between both subspaces are one.
    assert torch.linalg.svdvals(found.directions(8, whiten=False) @ exact.t()).min() > 0.999
    assert found.total == pytest.approx(float(centred.square().sum()), rel=1e-4)
    assert torch.allclose(found.mean, rows.mean(0), atol=1e-4)
    best = (centred @ exact.t().double()).square().sum() / centred.square().sum()
    assert float(found.explained()[:8].sum()) == pytest.approx(float(best), rel=1e-3)

    halves = [PrincipalComponents(8), PrincipalComponents(8)]  # as in two processes
    joined = PrincipalComponents(8)
    for half, part in zip(halves, rows.split([1000, 1400]), strict=True):
        half.update(part)
        joined.join(*half.state())
    assert torch.linalg.svdvals(joined.directions(8, whiten=False) @ exact.t()).min() > 0.999
    assert joined.total == pytest.approx(found.total, rel=1e-4)


def test_it_stops_when_the_directions_stay():
    def taken(**options):
        seen = []

        def watched():
            for batch in batches(8) * 4:
                seen.append(batch)
                yield batch

        started(EVA(rank=2, **options), data=watched())
        return len(seen)

    assert taken(tau=1.0, batches=5) == 5
    assert taken(tau=1.0) == 32
    assert taken(tau=0.0) == 3  # two to compare, and one that is not used any more
    assert 3 < taken(tau=0.9) < 32


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [1.0, 2.0, 3.0])
def test_ranks_follow_the_explained_variance_under_the_same_budget(rho):
    model = started(EVA(rank=4, rho=rho, tau=1.0))
    found = ranks(model)
    assert sum(found.values()) == 4 * len(found)
    assert max(found.values()) <= 4 * rho
    assert (set(found.values()) == {4}) == (rho == 1.0)
    explained = {}
    for path in found:
        x = inputs_of(tiny_llama(), path, batches(), counted)
        values = torch.linalg.svdvals(x - x.mean(0)).square()
        explained[path] = values / values.sum()
    # No direction that was left out explains more than one that was taken, beyond the first of each place.
    taken = min(float(explained[path][rank - 1]) for path, rank in found.items() if rank > 1)
    left = max((float(explained[path][rank]) for path, rank in found.items() if rank < 4 * rho), default=0.0)
    assert left <= taken * (1 + 1e-4)


@pytest.mark.parametrize(("rslora", "adjust", "wanted"), [
    (False, True, lambda rank: 16 / 4), (False, False, lambda rank: 16 / rank),
    (True, True, lambda rank: 16 * (rank / 4) / rank**0.5), (True, False, lambda rank: 16 / rank**0.5),
])  # fmt: skip
def test_the_scale_follows_the_rank_as_asked(rslora, adjust, wanted):
    model = started(EVA(rank=4, rslora=rslora, adjust_scaling_factors=adjust))
    assert len(set(ranks(model).values())) > 1
    for adapter in places(model).values():
        assert adapter.scaling == pytest.approx(wanted(adapter.rank))


def test_a_place_without_inputs_stays_lora():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.used(x)

    model = Two()
    inject(model, EVA(rank=2), ["used", "idle"])
    before = adapter_state_dict(model)["idle.lora_A.weight"].clone()
    with pytest.warns(LightningPEFTWarning, match="no inputs that vary at 1 of 2 places, such as 'idle'"):
        initialize_from_data(model, [torch.randn(9, 6)], lambda batch: model(batch).sum())
    assert torch.equal(adapter_state_dict(model)["idle.lora_A.weight"], before)
    assert ranks(model) == {"used": 2, "idle": 2}


# -- HF PEFT -----------------------------------------------------------------------------------------------------------


def peers(make, data, targets, method):
    """HF PEFT's low-rank layers by place, after its own initialisation, and ours."""
    fields = {name: getattr(method, name) for name in ("rho", "tau", "whiten", "adjust_scaling_factors")}
    config = LoraConfig(
        task_type="CAUSAL_LM", r=method.rank, lora_alpha=method.alpha, use_rslora=method.rslora, target_modules=targets,
        init_lora_weights="eva", eva_config=EvaConfig(**fields),
    )  # fmt: skip
    peer = get_peft_model(make(), config)
    initialize_lora_eva_weights(peer, dataloader=data, show_progress_bar=False)
    theirs = {path.removeprefix("base_model.model."): m for path, m in peer.named_modules() if hasattr(m, "lora_A")}
    return theirs, places(started(method, make, targets, data * 40))


def angles(adapter, peer):
    """Cosines of the angles between the spaces that both start in, as far as both go."""
    A, other = (nn.functional.normalize(x) for x in (adapter.lora_A, peer.lora_A["default"].weight))
    rows = min(len(A), len(other))
    return torch.linalg.svdvals(A[:rows] @ other[:rows].t())


@pytest.mark.parametrize("options", [{}, {"rho": 3.0, "adjust_scaling_factors": False}, {"rslora": True}])
def test_on_a_real_model_directions_ranks_and_scales_are_those_of_hf_peft(options, data_dir):
    from transformers import AutoTokenizer

    folder = str(data_dir / "models" / "stories260k")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with (data_dir / "e2e" / "train.jsonl").open() as file:
        texts = [f"{row['mr']} => {row['ref']}" for row in map(json.loads, islice(file, 128))]
    rows = torch.tensor([ids[:40] for text in texts if len(ids := tokenizer(text)["input_ids"]) >= 40])
    data = [{"input_ids": part, "labels": part} for part in rows.split(16)]
    theirs, ours = peers(CausalLMLoader(path=folder).load, data, LINEAR, EVA(rank=4, alpha=12, **options))
    assert ours.keys() == theirs.keys()
    wanted = {path: peer.r["default"] for path, peer in theirs.items()}
    # Places that read the same tensor explain the same: which of them gets the last direction is chance. HF PEFT's shares are also a
    # little small, since it keeps few directions. So one direction of the budget may stand elsewhere, of those that moved at all.
    assert sum(adapter.rank for adapter in ours.values()) == sum(wanted.values())
    assert sum(max(0, adapter.rank - wanted[path]) for path, adapter in ours.items()) <= 1
    assert sum(max(0, 4 - rank) for rank in wanted.values()) >= 5
    for path, adapter in ours.items():
        if adapter.rank == wanted[path]:
            assert adapter.scaling == pytest.approx(theirs[path].scaling["default"])
        # HF PEFT keeps no more directions than it may need, so the last ones are less exact there.
        assert angles(adapter, theirs[path])[:-1].min() > 0.98, path


def test_where_hf_peft_drops_a_place_here_it_keeps_one_direction():
    (batch,) = batches(1, rows=16)
    theirs, ours = peers(tiny_llama, [batch], LINEAR, EVA(rank=4, alpha=12))
    dropped = ours.keys() - theirs.keys()
    assert dropped
    assert {ours[path].rank for path in dropped} == {1}
    assert sum(a.rank for a in ours.values()) == sum(m.r["default"] for m in theirs.values()) == 4 * len(ours)
    assert sum(abs(ours[path].rank - peer.r["default"]) for path, peer in theirs.items()) == len(dropped)
    assert all(angles(ours[path], peer).min() > 0.98 for path, peer in theirs.items())


def test_whitened_directions_are_as_long_as_hf_pefts():
    # HF PEFT 0.21.2 whitens the directions that places share once for each of them, so there are no such places here.
    theirs, ours = peers(tiny_llama, batches(1, rows=16), ["v_proj", "down_proj"], EVA(rank=4, rho=1.0, whiten=True))
    for path, peer in theirs.items():
        ratios = ours[path].lora_A.norm(dim=1) / peer.lora_A["default"].weight.norm(dim=1)
        assert torch.allclose(ratios / ratios.mean(), torch.ones(4), rtol=3e-2)
        # How often either takes this one batch, before the directions stay, may differ: singular values grow with its root.
        assert 0.7 < ratios.mean() < 1.4


@pytest.mark.parametrize(("make", "targets"), [(tiny_llama, TARGETS), (tiny_gpt2, ["query", "value", "up"])])
def test_hf_peft_loads_the_folder_as_lora_with_a_rank_pattern(make, targets, tmp_path):
    model = started(EVA(rank=4, adjust_scaling_factors=False), make, targets)
    train(model)
    save_adapter(model, tmp_path)
    peer = PeftModel.from_pretrained(make(), tmp_path)
    assert peer.peft_config["default"].rank_pattern
    assert peer.peft_config["default"].init_lora_weights is True
    assert distance(logits(peer), logits(model)) <= 1e-5
    assert distance(logits(make()), logits(model)) > 1e-2
    (tmp_path / "lightning_peft.json").unlink()
    again = make()
    assert isinstance(load_adapter(again, tmp_path).method, LoRA)
    assert distance(logits(again), logits(model)) <= 1e-6


def test_what_hf_peft_trained_with_eva_loads_as_lora(tmp_path):
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(tau=0.9)
    )
    peer = get_peft_model(tiny_llama(), config)
    initialize_lora_eva_weights(peer, dataloader=batches(8, rows=16), show_progress_bar=False)
    train(peer)
    peer.save_pretrained(tmp_path)
    model = tiny_llama()
    assert load_adapter(model, tmp_path).method.name == "lora"
    assert distance(logits(model), logits(peer)) <= 1e-5


# -- saving and training -----------------------------------------------------------------------------------------------


def test_a_folder_brings_its_ranks_back_and_goes_on(tmp_path):
    model = started()
    train(model)
    save_adapter(model, tmp_path)
    again = tiny_llama()
    load_adapter(again, tmp_path, trainable=True)
    assert ranks(again) == ranks(model)
    assert len(set(ranks(again).values())) > 1
    assert not differing(adapter_state_dict(model), adapter_state_dict(again))
    assert torch.equal(logits(again), logits(model))
    train(model)
    train(again)
    assert torch.equal(logits(again), logits(model))


def test_the_base_is_not_touched_and_the_output_stays():
    base = tiny_llama()
    model = started(EVA(rank=4, bias="all"))
    assert not differing(base_tensors(base), base_tensors(model))
    assert torch.equal(logits(model), logits(base))


def test_in_a_trainer_it_takes_batches_by_itself_and_resumes_exactly(llama_dir, make_trainer, tmp_path):
    text = tmp_path / "a.txt"
    generator = torch.Generator().manual_seed(1)
    text.write_text("".join("abcdefgh. xyz"[int(i)] for i in torch.randint(13, (3000,), generator=generator)))

    def fit(folder, steps, ckpt=None):
        torch.manual_seed(6)
        module = PEFTModule(CausalLMLoader(path=llama_dir), EVA(rank=4, dropout=0.1), TARGETS)
        data = TextDataModule(tokenizer=llama_dir, train=str(text), block_size=32, batch_size=8, val=str(text))
        trainer = make_trainer(tmp_path / folder, max_steps=steps, limit_val_batches=0)
        trainer.fit(module, data, ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / folder / "a.ckpt")
        return module.model

    whole = fit("whole", 4)
    assert len(set(ranks(whole).values())) > 1
    fit("part", 2)
    resumed = fit("rest", 4, ckpt=str(tmp_path / "part" / "a.ckpt"))
    assert ranks(resumed) == ranks(whole)
    assert not differing(adapter_state_dict(whole), adapter_state_dict(resumed))

    # A checkpoint of other ranks than this method may give is refused.
    small = PEFTModule(CausalLMLoader(path=llama_dir), EVA(rank=2, dropout=0.1), TARGETS)
    with pytest.raises(CheckpointMismatchError, match="rank was 4 and is 2"):
        make_trainer(tmp_path, max_steps=5, limit_val_batches=0).fit(
            small,
            TextDataModule(tokenizer=llama_dir, train=str(text), block_size=32, batch_size=8, val=str(text)),
            ckpt_path=str(tmp_path / "part" / "a.ckpt"),
        )


def test_without_training_it_is_lora(make_trainer, tmp_path):
    module = PEFTModule(nn.Sequential(nn.Linear(4, 4)), EVA(rank=1), ["0"], loss=lambda y, t: y.square().mean())
    rows = [(torch.randn(4), torch.zeros(4)) for _ in range(4)]
    make_trainer(tmp_path).validate(module, DataLoader(rows, batch_size=2), verbose=False)
    assert ranks(module.model) == {"0": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.5}, "EVA rho must be 1 or more, got 0.5"),
        ({"rho": float("inf")}, "EVA rho must be a finite number, got inf"),
        ({"tau": 1.5}, r"EVA tau must lie in \[0, 1\], got 1.5"),
        ({"batches": 0}, "EVA batches must be a positive integer, got 0"),
        ({"rank": 0}, "LoRA rank must be a positive integer, got 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        EVA(**options)


def test_the_loss_of_a_real_model_falls(trained_on_e2e):
    losses = trained_on_e2e(EVA(rank=4))
    assert losses[-1] < losses[0] - 0.2, losses
