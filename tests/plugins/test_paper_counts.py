"""How many parameters are trained, in the configurations of the paper that introduced LoRA: Hu et al. 2021, arXiv:2106.09685.

Each row names a line of the tables there. Its ``formula`` is that of the paper's appendix, or the sizes of the layers where it
has none, and the model must have exactly that many; ``printed`` is what the table says, to be met within the rounding of its
last digit. A row is one line, so that methods that come later add theirs.

* LoRA: ``2 x matrices x width x rank``
* adapter layers: ``adapters x (2 x width x r + r + width) + 2 x norms x width``
* PreEmbed: ``width x (l_p + l_i)``, all of it in front here
* PreLayer: ``layers x width x (l_p + l_i)``, which keys and values of half as many positions have as well

Left out, as what is published does not determine them:

* Table 2, AdptD on RoBERTa base (0.3M, 0.9M): measured elsewhere, and no bottleneck width is given.
* Table 2, fine-tuning and adapters of DeBERTa XXL other than LoRA: 1500.0M is rounded to no unit that is said.
* Table 3, AdapterH on GPT-2 (11.09M): no whole bottleneck width gives it, with trained norms or without.
* Table 4, fine-tuning GPT-3 (175,255.8M) and BitFit (14.2M): of a model that is not public. One built like GPT-2 has
  174,604M parameters, and 11 widths of biases a block (13.0M), where the paper counts 12.
"""

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

import pytest
import torch
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
)

from lightning_peft import (
    BitFit,
    Bottleneck,
    FullFineTuning,
    LoRA,
    Method,
    PrefixTuning,
    PromptTuning,
    TopLayers,
    inject,
    trainable_summary,
)

QUERY_VALUE = ("query", "value")

# -- the models, of their published sizes ------------------------------------------------------------------------------

ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
XXL = {
    "vocab_size": 128100, "hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24, "intermediate_size": 6144,
    "type_vocab_size": 0, "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "conv_kernel_size": 3, "conv_act": "gelu",
}  # fmt: skip
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "RoBERTa base": lambda: RobertaForMaskedLM(RobertaConfig(**ROBERTA)),
    "RoBERTa base, encoder": lambda: RobertaModel(RobertaConfig(**ROBERTA), add_pooling_layer=False),
    "RoBERTa large": lambda: RobertaForMaskedLM(RobertaConfig(**ROBERTA, **LARGE)),
    "DeBERTa XXL": lambda: DebertaV2Model(DebertaV2Config(**XXL)),
    "GPT-2 medium": lambda: GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16)),
    "GPT-2 large": lambda: GPT2LMHeadModel(GPT2Config(n_embd=1280, n_layer=36, n_head=20)),
    "GPT-3": lambda: GPT2LMHeadModel(GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=2048)),
}


# -- the formulas ------------------------------------------------------------------------------------------------------


def lora(matrices: int, width: int, rank: int) -> int:
    return 2 * matrices * width * rank


def adapters(count: int, width: int, size: int, norms: int = 0) -> int:
    return count * (2 * width * size + size + width) + 2 * norms * width


def pre_embed(width: int, prefix: int, infix: int) -> int:
    return width * (prefix + infix)


def pre_layer(layers: int, width: int, prefix: int, infix: int) -> int:
    return layers * width * (prefix + infix)


def block(width: int) -> int:
    """Weights and biases of a block with an MLP of four times the width, its two norms included."""
    return 12 * width**2 + 13 * width


def biases(blocks: int, width: int) -> int:
    """Four of attention, one of four widths and one of the MLP, two norms; and the norm outside the blocks."""
    return 11 * blocks * width + width


def roberta(blocks: int, width: int) -> int:
    """Words, positions, one type, a norm; the blocks; the head's layer, norm and bias (its weight is the embedding's)."""
    embeddings = (50265 + 514 + 1) * width + 2 * width
    return embeddings + blocks * block(width) + width**2 + 3 * width + 50265


def gpt2(blocks: int, width: int, positions: int = 1024) -> int:
    return (50257 + positions) * width + blocks * block(width) + 2 * width


# -- the rows ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    table: str
    model: str
    line: str
    printed: str  # in millions
    formula: int
    method: Method
    targets: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.table}: {self.model}, {self.line} {self.printed}M"


def _lin(size: int) -> Method:
    return Bottleneck.lin(bottleneck_size=size)


def _houlsby(size: int) -> Method:
    return Bottleneck.houlsby(bottleneck_size=size)


def _pfeiffer(size: int) -> Method:
    return Bottleneck.pfeiffer(bottleneck_size=size)


# Ranks are those of the appendix (tables 9 to 12 and 15). So are bottleneck widths, but for AdapterL, where the width is the
# only one that gives what is printed: see the last test.
ROWS = [
    # The paper pads 125, 355, 3 and 6 million with a zero; the last two it calls 3M and 6M in the appendix.
    Row("Table 2", "RoBERTa base", "FT", "125", roberta(12, 768), FullFineTuning()),
    Row("Table 2", "RoBERTa base, encoder", "BitFit", "0.1", biases(12, 768), BitFit()),
    Row("Table 2", "RoBERTa base", "LoRA", "0.3", lora(24, 768, 8), LoRA(rank=8), QUERY_VALUE),
    Row("Table 2", "RoBERTa large", "FT", "355", roberta(24, 1024), FullFineTuning()),
    Row("Table 2", "RoBERTa large", "LoRA", "0.8", lora(48, 1024, 8), LoRA(rank=8), QUERY_VALUE),
    Row("Table 2", "RoBERTa large", "AdptP", "3", adapters(24, 1024, 64), _pfeiffer(64)),
    Row("Table 2", "RoBERTa large", "AdptP", "0.8", adapters(24, 1024, 16), _pfeiffer(16)),
    Row("Table 2", "RoBERTa large", "AdptH", "6", adapters(48, 1024, 64), _houlsby(64)),
    Row("Table 2", "RoBERTa large", "AdptH", "0.8", adapters(48, 1024, 8), _houlsby(8)),
    Row("Table 2", "DeBERTa XXL", "LoRA", "4.7", lora(96, 1536, 16), LoRA(rank=16), QUERY_VALUE),
    Row("Table 3", "GPT-2 medium", "FT Top2", "25.19", 2 * block(1024), TopLayers(num_blocks=2)),
    Row("Table 3", "GPT-2 medium", "AdapterL", "0.37", adapters(24, 1024, 6, norms=24), _lin(6)),
    Row("Table 3", "GPT-2 medium", "AdapterL", "11.09", adapters(24, 1024, 224, norms=24), _lin(224)),
    Row("Table 3", "GPT-2 large", "FT", "774.03", gpt2(36, 1280), FullFineTuning()),
    Row("Table 3", "GPT-2 large", "AdapterL", "0.88", adapters(36, 1280, 8, norms=36), _lin(8)),
    Row("Table 3", "GPT-2 large", "AdapterL", "23.00", adapters(36, 1280, 248, norms=36), _lin(248)),
    Row("Table 4", "GPT-3", "LoRA", "4.7", lora(192, 12288, 1), LoRA(rank=1), QUERY_VALUE),
    Row("Table 4", "GPT-3", "LoRA", "37.7", lora(192, 12288, 8), LoRA(rank=8), QUERY_VALUE),
    Row("Table 4", "GPT-3", "AdapterH", "7.1", adapters(192, 12288, 1), _houlsby(1)),
    Row("Table 4", "GPT-3", "AdapterH", "40.1", adapters(192, 12288, 8), _houlsby(8)),
    Row("Table 4", "GPT-3", "PreEmbed", "3.2", pre_embed(12288, 256, 8), PromptTuning(num_virtual_tokens=264)),
    Row("Table 15", "GPT-3", "PreEmbed", "0.9", pre_embed(12288, 64, 8), PromptTuning(num_virtual_tokens=72)),
    Row("Table 15", "GPT-3", "PreEmbed", "1.7", pre_embed(12288, 128, 8), PromptTuning(num_virtual_tokens=136)),
    Row("Table 15", "GPT-3", "PreEmbed", "6.4", pre_embed(12288, 512, 8), PromptTuning(num_virtual_tokens=520)),
    Row("Table 15", "GPT-3", "LoRA of Wv", "4.7", lora(96, 12288, 2), LoRA(rank=2), ("value",)),
    Row("Table 15", "GPT-3", "LoRA", "9.4", lora(192, 12288, 2), LoRA(rank=2), QUERY_VALUE),
    Row("Table 15", "GPT-3", "LoRA", "18.9", lora(192, 12288, 4), LoRA(rank=4), QUERY_VALUE),
    Row("Table 15", "GPT-3", "AdapterH", "21.2", adapters(192, 12288, 4), _houlsby(4)),
    Row("Table 15", "GPT-3", "AdapterH", "77.9", adapters(192, 12288, 16), _houlsby(16)),
    Row("Table 15", "GPT-3", "AdapterH", "304.4", adapters(192, 12288, 64), _houlsby(64)),
]

# Where the paper's own formula, with the paper's own rank or size, does not give what it prints, or only with digits cut off.
# What the formula gives is counted.
MISPRINTED = [
    Row("Table 3", "GPT-2 medium", "FT", "354.92", gpt2(24, 1024), FullFineTuning()),  # 354.82M
    Row("Table 3", "GPT-2 medium", "LoRA", "0.35", lora(48, 1024, 4), LoRA(rank=4), QUERY_VALUE),  # 0.39M
    Row("Table 3", "GPT-2 large", "LoRA", "0.77", lora(72, 1280, 4), LoRA(rank=4), QUERY_VALUE),  # 0.74M
    Row(
        "Table 4", "GPT-3", "PreLayer", "20.2", pre_layer(96, 12288, 8, 8), PrefixTuning(num_virtual_tokens=8)
    ),  # 18.87M
    Row(
        "Table 15", "GPT-3", "PreLayer", "76.1", pre_layer(96, 12288, 64, 0), PrefixTuning(num_virtual_tokens=32)
    ),  # 75.50M
    Row("Table 5", "GPT-3", "LoRA of Wq", "18", lora(96, 12288, 8), LoRA(rank=8), ("query",)),  # 18.87M, cut
]


def trained(row: Row) -> int:
    with torch.device("meta"):
        model = MODELS[row.model]()
    inject(model, row.method, list(row.targets) if row.targets else None)
    return trainable_summary(model).trainable


def rounds_to(count: int, printed: str) -> bool:
    """Tell whether ``count`` is what was printed in millions, to its last digit."""
    return round(Decimal(count).scaleb(-6), max(0, -int(Decimal(printed).as_tuple().exponent))) == Decimal(printed)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_as_many_are_trained_as_the_formula_gives_and_the_table_says(row):
    count = trained(row)
    assert count == row.formula
    assert rounds_to(count, row.printed), f"{count:,}"


@pytest.mark.parametrize("row", MISPRINTED, ids=str)
def test_the_formula_holds_where_the_table_differs_from_it(row):
    assert trained(row) == row.formula
    assert not rounds_to(row.formula, row.printed)


@pytest.mark.parametrize(
    ("blocks", "width", "size", "printed"),
    [(24, 1024, 6, "0.37"), (24, 1024, 224, "11.09"), (36, 1280, 8, "0.88"), (36, 1280, 248, "23.00")],
)
def test_one_bottleneck_width_alone_gives_what_is_printed_of_adapter_l(blocks, width, size, printed):
    fits = [m for m in range(1, 1024) if rounds_to(adapters(blocks, width, m, norms=blocks), printed)]
    assert fits == [size]
