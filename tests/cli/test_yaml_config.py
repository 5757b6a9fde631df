import pytest
import yaml

from lightning_peft.cli.yaml_config import load


def test_numbers_are_read_as_jsonargparse_reads_them():
    assert load("{lr: 1e-3, day: 2020-01-01}") == {"lr": 0.001, "day": "2020-01-01"}


def test_a_key_that_stands_twice_is_refused_with_its_place():
    with pytest.raises(yaml.YAMLError, match=r"the key 'rank' stands twice\n  in \"run.yaml\", line 3"):
        load("method:\n  rank: 1\n  rank: 2\n", path="run.yaml")
    with pytest.raises(yaml.YAMLError, match="the key 'rank' stands twice"):
        load("- {rank: 1, rank: 2}")


def test_an_alias_is_refused():
    with pytest.raises(yaml.YAMLError, match="an alias .* is not allowed here"):
        load("a: &x [1, 2]\nb: *x\n")


def test_a_tag_that_makes_objects_is_refused():
    with pytest.raises(yaml.YAMLError, match="could not determine a constructor"):
        load("a: !!python/object/apply:os.getcwd []")


def test_variables_and_other_keys_of_the_file_can_be_used(monkeypatch):
    monkeypatch.setenv("ACME_DATA", "/corpus")
    monkeypatch.delenv("ACME_SIZE", raising=False)
    text = (
        "base: {path: m}\ntrain: ${oc.env:ACME_DATA}/train.txt\nsize: ${oc.env:ACME_SIZE,7}\ntokenizer: ${base.path}\n"
    )
    assert load(text) == {"base": {"path": "m"}, "train": "/corpus/train.txt", "size": "7", "tokenizer": "m"}


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("ACME_DATA", raising=False)
    with pytest.raises(yaml.YAMLError, match="in run.yaml: Environment variable 'ACME_DATA' not found"):
        load("train: ${oc.env:ACME_DATA}", path="run.yaml")


@pytest.mark.parametrize(
    "text",
    ["method: lora", "model: {method: lora}", "fit: {model: {method: lora}}", "model: {method: {class_path: lora}}"],
)
def test_the_registry_name_of_a_method_becomes_its_class(text):
    assert "lightning_peft.LoRA" in str(load(text))


def test_other_words_named_lora_stay_what_they_are():
    assert load("{tags: [lora], data: {method: {name: lora}}, name: lora}") == {
        "tags": ["lora"],
        "data": {"method": {"name": "lora"}},
        "name": "lora",
    }


def test_the_short_name_of_an_optimizer_is_torchs_whatever_else_is_imported():
    import bitsandbytes.optim  # has an AdamW of its own

    assert bitsandbytes.optim.AdamW.__name__ == "AdamW"
    loaded = load("model: {optimizer: AdamW, lr_scheduler: {class_path: CosineAnnealingLR, init_args: {T_max: 3}}}")[
        "model"
    ]
    assert loaded["optimizer"] == "torch.optim.AdamW"
    assert loaded["lr_scheduler"]["class_path"] == "torch.optim.lr_scheduler.CosineAnnealingLR"
    assert load("model: {optimizer: bitsandbytes.optim.AdamW}")["model"]["optimizer"] == "bitsandbytes.optim.AdamW"
