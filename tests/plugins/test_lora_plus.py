"""LoRA+ keeps the contract, and its optimizer is HF PEFT's LoRA+ optimizer: the same groups, the same training."""

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from lightning_peft import (
    LoRA,
    LoRAPlus,
    PEFTMixin,
    PEFTModule,
    adapter_state_dict,
    inject,
    load_adapter,
    parameter_groups,
    save_adapter,
    scale_learning_rates,
)
from lightning_peft.callbacks import AdapterCheckpoint
from lightning_peft.cli import PEFTCLI
from lightning_peft.errors import ConfigError, LightningPEFTWarning
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama, token_batch

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")


class TestLoRAPlus(MethodConformance):
    method = LoRAPlus(rank=4, lr_ratio=8.0)


class TestOnGPT2(MethodConformance):
    method = LoRAPlus(rank=4, bias="lora_only", embedding_lr_ratio=0.5)

    def model(self):
        return tiny_gpt2()


def optimizer_over(model, kind=torch.optim.AdamW, lr=1e-3, **options):
    optimizer = kind(parameter_groups(model), lr=lr, **options)
    scale_learning_rates(optimizer)
    return optimizer


def rates(optimizer):
    """Learning rate and weight decay of every parameter of an optimizer, by its id."""
    return {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}


@torch.no_grad()
def logits(model):
    return model(**token_batch()).logits


def pair(model, method, config, targets):
    """Return two models with the same LoRA tensors in float64: ours and HF PEFT's."""
    ours, theirs = model().double(), get_peft_model(model().double(), config)
    inject(ours, method, targets)
    generator = torch.Generator().manual_seed(2)
    for path, tensors in places(theirs).items():
        adapter = ours.get_submodule(path).adapters["default"]
        for tensor in tensors.values():
            tensor.data = 0.05 * torch.randn(tensor.shape, generator=generator).double()
        adapter.import_state({key: tensors[key] for key in adapter.export_state()})
    return ours.eval(), theirs.eval()  # without dropout


def places(theirs):
    """Return HF PEFT's trained tensors by place and by name in a file."""
    found = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            path, _, tensor = name.removeprefix("base_model.model.").partition(".lora_")
            if not tensor:  # the trained bias of the layer
                path, tensor = path.removesuffix(".base_layer.bias"), "base_layer.bias"
            else:
                tensor = "lora_" + tensor.replace(".default", "")
            found.setdefault(path, {})[tensor] = parameter
    return found


CASES = {
    "linear": (tiny_llama, ["q_proj", "v_proj", "down_proj"], {}),
    "Conv1D with biases": (tiny_gpt2, ["c_attn", "c_fc"], {"bias": "lora_only"}),
    "embedding": (tiny_llama, ["embed_tokens", "k_proj"], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_optimizer_is_that_of_hf_peft(case):
    model, targets, options = CASES[case]
    lr, ratio, embedding = 3e-3, 16.0, 3e-4
    method = LoRAPlus(rank=3, alpha=6, lr_ratio=ratio, embedding_lr_ratio=embedding / lr, **options)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, fan_in_fan_out="gpt2" in model.__name__, **options)
    ours, theirs = pair(model, method, config, targets)
    mine = optimizer_over(ours, lr=lr, weight_decay=0.1)
    peer = create_loraplus_optimizer(
        theirs,
        torch.optim.AdamW,
        lr=lr,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=0.1,
        loraplus_lr_embedding=embedding,
    )
    wanted, found = rates(peer), rates(mine)
    checked = 0
    for path, tensors in places(theirs).items():
        adapter = ours.get_submodule(path).adapters["default"]
        for key, parameter in tensors.items():
            here = {"base_layer.bias": "bias"}.get(key, key.removesuffix(".weight"))
            assert found[id(adapter.get_parameter(here))] == pytest.approx(wanted[id(parameter)]), (path, key)
            checked += 1
    assert checked == len(found) == sum(len(group["params"]) for group in peer.param_groups)
    before = logits(theirs)
    for step in range(4):
        batch = token_batch(step)["input_ids"]
        for net, optimizer in ((ours, mine), (theirs, peer)):
            optimizer.zero_grad()
            net(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5 * logits(theirs).abs().max()
    assert (logits(theirs) - before).abs().max() > 1e-2 * before.abs().max()


def test_files_are_those_of_lora(tmp_path):
    model = tiny_llama()
    inject(model, LoRAPlus(rank=2, lr_ratio=3.0), "query")
    save_adapter(model, tmp_path)
    assert load_adapter(tiny_llama(), tmp_path).method == LoRAPlus(rank=2, lr_ratio=3.0)
    (tmp_path / "lightning_peft.json").unlink()
    assert load_adapter(tiny_llama(), tmp_path).method == LoRA(rank=2)


@pytest.mark.parametrize(
    ("module", "targets"),
    [
        (nn.Sequential(nn.Conv2d(2, 3, 3)), "0"),
        (nn.Sequential(nn.MultiheadAttention(8, 2)), "0"),
        (nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "0"),
    ],
    ids=["convolution", "attention", "linear"],
)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adafactor])
def test_every_b_of_every_kind_of_layer_learns_faster(module, targets, kind):
    model = copy.deepcopy(module)
    inject(model, LoRAPlus(rank=2, lr_ratio=4.0), targets)
    optimizer = optimizer_over(model, kind, lr=0.5)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rate[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert len(found) in (2, 4)
    assert {name: 2.0 if name.endswith("B") else 0.5 for name in found} == found


def test_biases_of_the_whole_model_learn_as_fast_as_b():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    inject(model, LoRAPlus(rank=2, lr_ratio=4.0, bias="all"), "0")
    groups = optimizer_over(model, lr=0.5, weight_decay=0.1).param_groups
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (0.5, 0.1, 1),  # A
        (2.0, 0.1, 1),  # B
        (2.0, 0.0, 2),  # the biases
    ]


class Own(PEFTMixin, LightningModule):
    """A LightningModule that makes its optimizer itself."""

    def __init__(self):
        super().__init__()
        self.model = None

    def configure_model(self):
        if self.model is None:
            self.model = nn.Sequential(nn.Linear(4, 4))
            inject(self.model, LoRAPlus(rank=2, lr_ratio=4.0), "0")

    def training_step(self, batch):
        return self.model(batch).square().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(parameter_groups(self), lr=0.1)
        scale_learning_rates(optimizer)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_it_works_in_a_lightning_module_of_ones_own(make_trainer, tmp_path):
    module = Own()
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(4, 4), batch_size=2))
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx([0.025, 0.1])


def fit(make_trainer, folder, steps, ckpt=None):
    torch.manual_seed(0)
    module = PEFTModule(
        nn.Sequential(nn.Linear(4, 3)),
        LoRAPlus(rank=2, lr_ratio=4.0),
        "0",
        loss=lambda outputs, target: outputs.square().mean(),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.1),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6),
    )
    rows = [(torch.full((4,), float(i)), torch.zeros(3)) for i in range(4)]
    saving = AdapterCheckpoint(dirpath=folder, save_last=True, every_n_train_steps=2)
    trainer = make_trainer(folder, max_steps=steps, callbacks=[saving])
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=2), ckpt_path=ckpt)
    return trainer, adapter_state_dict(module.model)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # Lightning, of the second folder here
def test_a_resumed_run_keeps_the_ratio_and_does_not_apply_it_twice(make_trainer, tmp_path):
    fit(make_trainer, tmp_path / "part", 2)
    trainer, resumed = fit(make_trainer, tmp_path / "rest", 4, str(tmp_path / "part" / "last.ckpt"))
    other, whole = fit(make_trainer, tmp_path / "whole", 4)
    slow, fast = (group["lr"] for group in trainer.optimizers[0].param_groups)
    assert fast == pytest.approx(4 * slow)
    # Cosine annealing from 0.1 over six steps, after four of them.
    assert slow == pytest.approx(0.1 * 0.25)
    assert [group["lr"] for group in other.optimizers[0].param_groups] == [slow, fast]
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_scheduler_that_sets_one_rate_for_all_groups_is_warned_of():
    def module(max_lr):
        made = PEFTModule(
            nn.Sequential(nn.Linear(4, 3)),
            LoRAPlus(rank=2, lr_ratio=4.0),
            "0",
            lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr, total_steps=9),
        )
        made.configure_model()
        return made

    with pytest.warns(LightningPEFTWarning, match=r"OneCycleLR gives the 2 groups .* not in the ratios \[1.0, 4.0\]"):
        module(0.1).configure_optimizers()
    module([0.1, 0.4]).configure_optimizers()  # a warning would be an error


def test_an_optimizer_without_a_learning_rate_is_refused():
    model = nn.Sequential(nn.Linear(4, 3))
    inject(model, LoRAPlus(rank=2), "0")
    optimizer = torch.optim.AdamW(parameter_groups(model))
    for group in optimizer.param_groups:
        group["lr"] = None
    with pytest.raises(ConfigError, match="asks for 16 times the learning rate, but AdamW has none to multiply"):
        scale_learning_rates(optimizer)


@pytest.mark.parametrize("name", ["lr_ratio", "embedding_lr_ratio"])
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), True, "2"])
def test_a_ratio_that_is_no_positive_number_is_refused(name, value):
    with pytest.raises(ConfigError, match=f"LoRAPlus {name} must be a positive number, got {value!r}"):
        LoRAPlus(**{name: value})


def test_from_yaml_the_groups_have_their_rates(tmp_path, llama_dir):
    (tmp_path / "run.yaml").write_text(
        f"""
model:
  base: {{class_path: CausalLMLoader, init_args: {{path: {llama_dir}}}}}
  method: {{class_path: LoRAPlus, init_args: {{rank: 2, lr_ratio: 5.0}}}}
  optimizer: {{class_path: torch.optim.SGD, init_args: {{lr: 0.1}}}}
data: {{class_path: TextDataModule, init_args: {{tokenizer: {llama_dir}, train: x.txt}}}}
trainer: {{accelerator: cpu, logger: false}}
"""
    )
    module = PEFTCLI(args=["--config", str(tmp_path / "run.yaml")], run=False).model
    module.configure_model()
    assert [group["lr"] for group in module.configure_optimizers().param_groups] == [0.1, 0.5]


def test_the_loss_of_a_real_model_falls(trained_on_e2e):
    losses = trained_on_e2e(LoRAPlus(rank=4))
    assert losses[-1] < losses[0] - 0.2, losses
