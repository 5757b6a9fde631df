"""The page beside an adapter: what it says, that it loads what it shows, and that it never replaces somebody else's."""

import hashlib
import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from torch import nn

from lightning_peft import BitFit, CardFacts, LoRA, inject, load_adapter, save_adapter
from lightning_peft.adapter_files import OWN_CONFIG
from lightning_peft.model_card import CARD, public_name
from lightning_peft.testing import tiny_llama


@pytest.fixture
def model():
    made = tiny_llama()
    inject(made, LoRA(rank=2), ["query"], modules_to_save="lm_head")
    return made


def test_the_front_matter_is_that_of_a_model_card(model, tmp_path):
    model.config._name_or_path = "acme/tiny"
    save_adapter(model, tmp_path, facts=CardFacts(data="Tales", metrics={"val_loss": 1.25}, step=300))
    data = ModelCard.load(tmp_path / CARD).data
    assert (data.base_model, data.library_name) == ("acme/tiny", "peft")
    assert data.tags == ["adapter", "lightning_peft", "lora", "peft"]


def test_it_says_what_the_adapter_is(model, tmp_path):
    save_adapter(model, tmp_path, facts=CardFacts(data="Tales", metrics={"val_loss": 1.25}, step=300))
    text, own = (tmp_path / CARD).read_text(), json.loads((tmp_path / OWN_CONFIG).read_text())
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for line in (
        f"| fingerprint of the base | `{own['base']['digest']}` |",
        f"| numbers in the adapter | {numbers:,} |",
        "| data | Tales |",
        "| optimizer steps | 300 |",
        "| val_loss | 1.25 |",
        "| `rank` | `2` |",
        "* `model.layers.1.self_attn.q_proj`",
        "* `lm_head`, trained in full",
        f"| torch | {torch.__version__} |",
    ):
        assert line in text, line


def test_the_code_it_shows_loads_the_adapter(model, tmp_path, monkeypatch):
    base, folder = tmp_path / "tiny", tmp_path / "adapter"
    tiny_llama().save_pretrained(base)
    model.config._name_or_path = str(base)
    save_adapter(model, folder)
    text = (folder / CARD).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3  # here, with HF PEFT, with transformers
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(6)[None]
    for block in blocks:
        space: dict = {}
        exec(block.replace("path/to/adapter", "adapter"), space)
        loaded = space.get("model", space["base"])
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)


def test_no_path_of_this_machine_is_in_it(model, tmp_path):
    base = tmp_path / "secret" / "my-base"
    base.mkdir(parents=True)
    model.config._name_or_path = str(base)
    save_adapter(model, tmp_path / "adapter")
    text = (tmp_path / "adapter" / CARD).read_text()
    assert 'base_model: "my-base"' in text
    assert "secret" not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("acme/tiny", "acme/tiny"),
        ("/a/b", "b"),
        ("C:\\models\\b", "b"),
        ("./b", "b"),
        ("~/a/b", "b"),
        ("", None),
        (None, None),
    ],
)
def test_of_a_local_base_the_last_part_is_shown(name, shown):
    assert public_name(name) == shown


def test_a_method_that_hf_peft_does_not_know_is_only_ours(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4))
    inject(net, BitFit())
    save_adapter(net, tmp_path)
    text = (tmp_path / CARD).read_text()
    assert ModelCard.load(tmp_path / CARD).data.library_name == "lightning_peft"
    assert "HF PEFT" not in text
    assert "from lightning_peft import load_adapter" in text


def test_ours_is_written_again_and_an_edited_one_is_not(model, tmp_path):
    save_adapter(model, tmp_path, facts=CardFacts(data="Tales"))
    save_adapter(model, tmp_path, facts=CardFacts(data="Poems"))
    page = tmp_path / CARD
    assert "| data | Poems |" in page.read_text()
    edited = page.read_text().replace("Poems", "Poems of mine")
    page.write_text(edited)
    save_adapter(model, tmp_path, facts=CardFacts(data="Songs"))
    assert page.read_text() == edited
    load_adapter(tiny_llama(), tmp_path)  # nothing vouches for the page


@pytest.mark.parametrize("content", [b"# mine\n", b"\xff\xfe"])
def test_a_page_that_was_there_stays(content, model, tmp_path):
    (tmp_path / CARD).write_bytes(content)
    save_adapter(model, tmp_path)
    assert (tmp_path / CARD).read_bytes() == content


def test_the_other_files_do_not_vouch_for_it(model, tmp_path):
    save_adapter(model, tmp_path)
    files = json.loads((tmp_path / OWN_CONFIG).read_text())["files"]
    assert CARD not in files
    assert all(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest for name, digest in files.items())
