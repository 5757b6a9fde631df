"""A base that is read in parts: bit for bit the run over the base that each process loads whole, with no process holding it."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from transformers import MixtralConfig, MixtralForCausalLM

from lightning_peft import (
    BitFit,
    Bottleneck,
    CausalLMLoader,
    DoRA,
    FullFineTuning,
    LoRA,
    LoRAMixture,
    NormTuning,
    PEFTModule,
    PiSSA,
    PrefixTuning,
    PromptTuning,
    QLoRA,
    TrainableTokens,
    VeRA,
)
from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.errors import ConfigError
from lightning_peft.fingerprint import fingerprint, full_digests
from lightning_peft.out_of_core.tensor_files import Entry
from lightning_peft.strategies.fsdp import PEFTFSDPStrategy
from lightning_peft.testing import tiny_gpt2, tiny_llama

LORA = LoRA(rank=4, init="gaussian")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny models: in several files and in one, with an embedding that is tied and one that is not."""
    made = {}
    for name, model, size in (
        ("untied", tiny_llama(), "100KB"),
        ("tied", tiny_llama(tie_word_embeddings=True), "100KB"),
        ("one file", tiny_llama(), "1GB"),
        ("gpt2", tiny_gpt2(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0), "100KB"),
        ("bfloat16", tiny_llama().to(torch.bfloat16), "50KB"),
    ):
        made[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
        model.save_pretrained(made[name], max_shard_size=size)
    assert len(list(made["untied"].glob("*.safetensors"))) > 2
    assert len(list(made["one file"].glob("*.safetensors"))) == 1
    return made


class Looks(Callback):
    """Notes on each process what it holds of the base, and what it read."""

    def __init__(self, folder):
        self.folder, self.pieces, self.original = folder, [], None

    def setup(self, trainer, module, stage):  # before configure_model
        self.original = Entry._piece

        def piece(entry, shape, offset, size):
            found = self.original(entry, shape, offset, size)
            self.pieces.append(found.numel())
            return found

        Entry._piece = piece

    def on_fit_start(self, trainer, module):
        Entry._piece = self.original
        base = [p for _, place in base_modules(module.model) for p in unwrapped(place).parameters(recurse=False)]
        base = list({id(p): p for p in base}.values())
        llama = module.model.model
        noted = {
            "pieces": self.pieces, "held": sum(p.to_local().numel() for p in base), "whole": sum(p.numel() for p in base),
            "sharded": all(isinstance(p, DTensor) for p in base), "frozen": not any(p.requires_grad for p in base),
            "rotary": llama.rotary_emb.inv_freq.tolist(), "name": module.model.name_or_path, "training": llama.training,
            "tied": module.model.lm_head.weight is llama.embed_tokens.weight, "fingerprint": fingerprint(module.model).digest,
        }  # fmt: skip
        (self.folder / f"{dist.get_rank()}.json").write_text(json.dumps(noted))


def both(run, folder, method=LORA, *, callbacks=(), loader=None, **fields):
    """Losses over the base in parts, and over the base loaded whole by each process."""
    runs = []
    for parts in (True, False):
        module = PEFTModule(
            CausalLMLoader(path=str(folder), **(loader or {})),
            method,
            optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3),
        )
        strategy = PEFTFSDPStrategy(start_method="fork", read_weights=parts)
        runs.append(run(strategy, module=module, callbacks=callbacks if parts else (), **fields).losses)
    return runs


@pytest.mark.parametrize("name", ["untied", "tied", "one file"])
def test_the_base_is_read_in_parts_and_trains_as_if_it_were_loaded_whole(run, folders, tmp_path, name):
    parts, whole = both(run, folders[name], callbacks=[Looks(tmp_path)])
    assert parts == whole
    model = CausalLMLoader(path=str(folders[name])).load()
    total, largest = sum(p.numel() for p in model.parameters()), max(p.numel() for p in model.parameters())
    for rank in range(2):
        noted = json.loads((tmp_path / f"{rank}.json").read_text())
        assert noted["whole"] == total
        assert noted["sharded"]
        assert noted["frozen"]
        assert noted["training"]
        assert noted["held"] <= total // 2 + 64
        assert sum(noted["pieces"]) == noted["held"]  # each part is read once, and LoRA looks at no weight
        assert max(noted["pieces"]) <= largest // 2
        assert noted["rotary"] == model.model.rotary_emb.inv_freq.tolist()
        assert noted["name"] == str(folders[name])
        assert noted["tied"] == (name == "tied")
        assert noted["fingerprint"] == fingerprint(model).digest


METHODS = {
    "dora": DoRA(rank=2),
    "pissa": PiSSA(rank=2),
    "norms": NormTuning(),
    "bias": BitFit(),
    "bottleneck": Bottleneck(),
    "vera": VeRA(rank=8),
    "prefix": PrefixTuning(num_virtual_tokens=4),
    "prompt": PromptTuning(num_virtual_tokens=4),
    "tokens": TrainableTokens(tokens=[1, 5]),
    "full": FullFineTuning(),
    "mixture": LoRAMixture(rank=2, experts=2, top_k=2),
    "qlora": QLoRA(rank=4, compute_dtype="float32"),
    "two": [LoRA(rank=2), NormTuning()],
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_starts_from_what_it_starts_from_over_the_whole_base(run, folders, name):
    parts, whole = both(run, folders["gpt2" if name == "bias" else "untied"], METHODS[name])
    assert parts == whole
    assert len(set(parts)) == len(parts)


@pytest.mark.filterwarnings("ignore:precision='bf16-true' rounds the adapters")
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gpt2", {}),
        ("bfloat16", {}),
        ("bfloat16", {"loader": {"dtype": "float32"}}),
        ("untied", {"loader": {"dtype": "bfloat16", "gradient_checkpointing": True}}),
        ("untied", {"precision": "bf16-mixed"}),
        ("untied", {"precision": "bf16-true"}),
    ],
)
def test_precision_and_family_are_those_of_the_whole_load(run, folders, name, fields):
    parts, whole = both(run, folders[name], **fields)
    assert parts == whole


# -- what cannot be read in parts, and what is refused -----------------------------------------------------------------


def damaged(folder, tmp_path, change):
    """A copy of a folder, one of whose files is changed."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = copy / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return CausalLMLoader(path=str(copy))


def test_a_weight_that_is_missing_is_named(folders, tmp_path):
    loader = damaged(folders["one file"], tmp_path, lambda held: held.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ConfigError, match=r"lack 1 weights of the model, such as 'model.layers.1.mlp.up_proj.weight'"):
        loader.load_unread()


def test_a_weight_of_another_shape_is_named(folders, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    loader = damaged(folders["one file"], tmp_path, lambda held: held.update({name: held[name][:-1].clone()}))
    with pytest.raises(ConfigError, match=rf"{name}.*63.*64"):
        loader.load_unread()


def test_a_refusal_reaches_the_run(run, folders, tmp_path):
    loader = damaged(folders["one file"], tmp_path, lambda held: held.pop("lm_head.weight"))
    with pytest.raises(Exception, match="lack 1 weights of the model, such as 'lm_head.weight'"):
        run("fsdp", module=PEFTModule(loader, LORA))


def test_what_cannot_be_read_in_parts_is_left_to_transformers(folders, tmp_path):
    assert CausalLMLoader(path="no/such/folder").load_unread() is None
    assert CausalLMLoader(path=str(folders["one file"]), trust_remote_code=True).load_unread() is None
    pickled = tmp_path / "pickled"
    shutil.copytree(folders["one file"], pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert CausalLMLoader(path=str(pickled)).load_unread() is None


def test_fused_experts_are_loaded_whole_as_their_weights_are_made_of_several(run, tmp_path):
    size = {
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "num_local_experts": 2,
    }
    config = MixtralConfig(hidden_size=64, intermediate_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **size)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    assert CausalLMLoader(path=str(tmp_path)).load_unread() is None
    parts, whole = both(run, tmp_path, LoRA(rank=2, init="gaussian"))
    assert parts == whole


def test_outside_of_the_strategy_the_base_is_loaded_whole(folders):
    module = PEFTModule(CausalLMLoader(path=str(folders["untied"])), LORA)
    module.configure_model()
    assert not any(parameter.is_meta for parameter in module.parameters())


def test_an_unread_model_is_the_loaded_one_in_all_but_its_values(folders):
    for name in folders:
        unread, loaded = (
            CausalLMLoader(path=str(folders[name])).load_unread(),
            CausalLMLoader(path=str(folders[name])).load(),
        )
        assert all(parameter.is_meta for parameter in unread.parameters())
        for kind in ("named_parameters", "named_buffers"):
            ours, theirs = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (unread, loaded))
            assert {k: (v.shape, v.dtype, v.requires_grad) for k, v in ours.items()} == {
                k: (v.shape, v.dtype, v.requires_grad) for k, v in theirs.items()
            }
        assert all(torch.equal(a, b) for a, b in zip(unread.buffers(), loaded.buffers(), strict=True))
        assert unread.config.to_dict() == loaded.config.to_dict()
        assert unread.generation_config.to_dict() == loaded.generation_config.to_dict()
        assert unread.name_or_path == loaded.name_or_path
        assert str(unread) == str(loaded)
        assert unread.training == loaded.training
        assert fingerprint(unread) == fingerprint(loaded)
        assert full_digests(unread) == full_digests(loaded)


# -- with checkpoints and adapter folders ------------------------------------------------------------------------------


def test_a_run_over_a_base_in_parts_is_resumed_over_a_whole_one_and_back(run, folders, tmp_path):
    def go(strategy, **fields):
        module = PEFTModule(
            CausalLMLoader(path=str(folders["tied"])), LORA, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3)
        )
        return run(strategy, module=module, **fields).losses

    alone = go("fsdp", steps=4)
    go("fsdp", steps=2, save=tmp_path / "parts")
    go("ddp", steps=2, save=tmp_path / "whole")
    assert go("ddp", steps=4, resume=str(tmp_path / "parts" / "step=2.ckpt")) == alone[2:]
    assert go("fsdp", steps=4, resume=str(tmp_path / "whole" / "step=2.ckpt")) == alone[2:]


def test_an_adapter_folder_goes_on_over_a_base_in_parts_and_another_base_is_refused(run, folders, tmp_path):
    run("ddp", module=PEFTModule(CausalLMLoader(path=str(folders["untied"])), LORA), steps=1, save=tmp_path)
    adapter = str(tmp_path / "step=1.adapter")
    losses = [
        run(
            PEFTFSDPStrategy(start_method="fork", read_weights=parts),
            module=PEFTModule(CausalLMLoader(path=str(folders["untied"])), adapter=adapter),
        ).losses
        for parts in (True, False)
    ]
    assert losses[0] == losses[1]
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(Exception, match="BaseMismatchError"):
        run("fsdp", module=PEFTModule(CausalLMLoader(path=str(tmp_path / "other")), adapter=adapter))
