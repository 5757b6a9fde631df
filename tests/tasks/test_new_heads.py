"""A head that is new: each adapter that is to answer with it trains it and holds it whole."""

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from lightning_peft import (
    Adaptation,
    BitFit,
    FullFineTuning,
    LoRA,
    Member,
    PEFTModule,
    PopulationModule,
    PromptTuning,
    QLoRA,
    SequenceClassificationLoader,
    load_adapter,
    save_adapter,
)
from lightning_peft.errors import ConfigError

IDS = torch.randint(3, 40, (4, 6), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def loader(tmp_path_factory):
    """A BERT whose checkpoint has neither pooler nor classifier."""
    folder = tmp_path_factory.mktemp("bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=40, **sizes)).save_pretrained(folder)
    return SequenceClassificationLoader(path=str(folder), num_labels=3)


@pytest.mark.parametrize(
    ("method", "targets"),
    [
        (LoRA(rank=2), "re:.*dense"),
        (LoRA(rank=2), "all_linear"),
        (LoRA(rank=2), ["query", "re:.*pooler.dense"]),
        (BitFit(), "re:.*dense"),
        (PromptTuning(num_virtual_tokens=2), None),
        (FullFineTuning(), "re:.*"),
        (FullFineTuning(), "classifier"),
    ],
    ids=["pattern", "all linear", "a part by name", "only biases", "around the backbone", "in full", "the head alone"],
)
def test_an_adapter_holds_a_new_head_whole_whatever_the_method_adapts(method, targets, loader, tmp_path):
    module = PEFTModule(loader, method, targets)
    module.configure_model()
    for parameter in module.model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(module.model, tmp_path / "adapter")
    torch.manual_seed(99)  # another random head
    again = loader.load()
    load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(IDS).logits, module.model.eval()(IDS).logits, rtol=0, atol=0)


def test_targets_in_a_new_head_alone_are_refused(loader):
    with pytest.raises(ConfigError, match="adapt nothing but classifier"):
        PEFTModule(loader, LoRA(rank=2), "classifier").configure_model()


def test_a_new_head_that_was_quantised_is_refused_with_what_to_do(tmp_path):
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=40, **sizes)).save_pretrained(tmp_path / "bert")
    wide = SequenceClassificationLoader(path=str(tmp_path / "bert"), num_labels=3)
    with pytest.raises(ConfigError, match=r"bert.pooler.dense .*skip=\['bert.pooler.dense'\]"):
        PEFTModule(wide, QLoRA(rank=2)).configure_model()
    module = PEFTModule(wide, QLoRA(rank=2, skip=["bert.pooler.dense"]))
    module.configure_model()
    assert list(module.model.bert.pooler.dense.adapters) == ["default"]


def test_of_methods_that_act_together_one_trains_a_new_head(loader):
    module = PEFTModule(loader, [LoRA(rank=2), BitFit()])
    module.configure_model()
    head = module.model.classifier, module.model.bert.pooler.dense
    assert [list(layer.adapters) for layer in head] == [["lora"], ["lora"]]


@pytest.mark.parametrize("population", [True, False], ids=["population", "rows"])
def test_each_adapter_with_rows_of_its_own_trains_a_new_head(population, loader):
    if population:
        module = PopulationModule(loader, [Member(LoRA(rank=2), name="a"), Member(LoRA(rank=1), name="b", lr=0.1)])
    else:
        both = [Adaptation(LoRA(rank=2), name="a"), Adaptation(LoRA(rank=1), name="b")]
        module = PEFTModule(loader, both, by_rows=True)
    module.configure_model()
    for layer in (module.model.classifier, module.model.bert.pooler.dense):
        assert list(layer.adapters) == ["a", "b"]
    start = {n: p.detach().clone() for n, p in module.model.named_parameters() if "classifier.adapters" in n}
    loss = module.predict_outputs({"input_ids": IDS, "labels": torch.arange(4) % 3, "adapter": ["a", "b"] * 2}).loss
    loss.backward()
    assert all(module.model.get_parameter(name).grad.abs().sum() > 0 for name in start)
