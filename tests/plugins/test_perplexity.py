import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_peft import Perplexity
from lightning_peft.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    words = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(["<unk>", *"abcdefgh"])}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(path)
    (path / "text.txt").write_text("a b c d e f g h " * 13)
    return path


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    size = {
        "vocab_size": 9,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**size, max_position_embeddings=32))


def test_perplexity_is_the_exponential_of_the_mean_loss_over_all_predicted_tokens(folder, model):
    task = Perplexity(path=str(folder / "text.txt"), tokenizer=str(folder), block_size=16, batch_size=4)
    found = task.evaluate(model)
    ids = (torch.arange(96) % 8 + 1).view(6, 16)  # 104 tokens are six whole blocks
    expected = model.eval()(input_ids=ids, labels=ids).loss.item()
    assert found["tokens"] == 6 * 15
    assert found["loss"] == pytest.approx(expected, abs=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)


def test_the_model_is_left_in_the_modes_it_was_in(folder, model):
    task = Perplexity(path=str(folder / "text.txt"), tokenizer=str(folder), block_size=16, max_tokens=32)
    model.train()
    model.lm_head.eval()
    assert task.evaluate(model)["tokens"] == 30
    assert model.training
    assert not model.lm_head.training
    model.train()


def test_too_little_text_and_a_block_of_one_token_are_refused(folder, model):
    with pytest.raises(ConfigError, match=r"text.txt' has 104 tokens, fewer than one block of 256"):
        Perplexity(path=str(folder / "text.txt"), tokenizer=str(folder)).evaluate(model)
    with pytest.raises(ConfigError, match="Perplexity block_size is too small: 1"):
        Perplexity(path="x", tokenizer="y", block_size=1)


def test_rows_are_documents_with_a_separator_before_each(folder, model, tmp_path):
    rows = [{"a": "b c", "d": "e"}, {"a": "f g", "d": "h"}, {"a": "a", "d": "b"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    settings = {"path": str(file), "tokenizer": str(folder), "block_size": 4, "template": "{a} {d}"}
    ids = torch.tensor([[2, 3, 5, 6]])  # b c e, and the f that follows
    found = Perplexity(**settings, max_examples=2, max_tokens=4).evaluate(model)
    assert found["loss"] == pytest.approx(model.eval()(input_ids=ids, labels=ids).loss.item(), abs=1e-6)
    assert Perplexity(**settings).evaluate(model)["tokens"] == 6  # eight tokens are two blocks
    with pytest.raises(ConfigError, match=r"has no bos token; give another separator"):
        Perplexity(**settings, separator="bos").evaluate(model)
    with pytest.raises(ConfigError, match=r"rows.jsonl' line 1 does not have the field 'x'"):
        Perplexity(**{**settings, "template": "{x}"}).evaluate(model)
    file.write_text('{"a": "b"\n')
    with pytest.raises(ConfigError, match=r"rows.jsonl' line 1 is not JSON"):
        Perplexity(**settings).evaluate(model)
    file.write_text("[1]\n")
    with pytest.raises(ConfigError, match=r"rows.jsonl' line 1 is a JSON list, not an object"):
        Perplexity(**settings).evaluate(model)
    file.write_text("\n")
    with pytest.raises(ConfigError, match=r"has no rows, so there is nothing to measure"):
        Perplexity(**settings).evaluate(model)


def test_a_separator_is_a_token_of_the_tokenizer(data_dir):
    from lightning_peft import CausalLMLoader

    folder = str(data_dir / "models" / "stories260k")
    model = CausalLMLoader(path=folder).load()
    settings = {"path": str(data_dir / "lm" / "tinystories_valid.jsonl"), "tokenizer": folder, "max_tokens": 2048}
    apart, joined = (Perplexity(**settings, separator=one).evaluate(model) for one in ("bos", "none"))
    assert apart["loss"] < joined["loss"]  # the model has seen stories begin with it
    assert apart["loss"] == pytest.approx(1.2968, abs=0.1)  # the published loss on other stories
    with pytest.raises(ConfigError, match="separator must be one of none, bos, eos, got 'tab'"):
        Perplexity(**settings, separator="tab")
