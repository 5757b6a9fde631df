"""What ``merge_adapters`` says of a mixture: what to do instead, with names that exist."""

import re

import pytest

from lightning_peft import LoRAMixture, MixLoRA, MoEUpcycling, get_registry, inject, merge_adapters
from lightning_peft.errors import MergeError
from lightning_peft.testing import tiny_llama


@pytest.mark.parametrize(
    ("method", "exporters"),
    [
        (MoEUpcycling(experts=2), ["transformers_moe", "mixtral"]),
        (MixLoRA(experts=2, rank=2), ["mixtral", "mixtral_peft"]),
        (LoRAMixture(experts=2, rank=2), []),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_a_mixture_that_is_to_be_merged_is_refused_with_the_exporters_that_write_it(method, exporters, tmp_path):
    model = tiny_llama()
    inject(model, method)
    with pytest.raises(MergeError, match=rf"adapter 'default' is a '{method.name}' adapter, a mixture") as caught:
        merge_adapters(model)
    message = str(caught.value)
    assert "save_adapter(model, folder)" in message
    assert re.findall(r"'(\w*(?:mixtral|moe)\w*)'", message.split("adapter, ")[1]) == exporters
    for name in exporters:
        get_registry().exporters[name]().export(model, tmp_path / name)
        assert (tmp_path / name / "export.json").is_file()
