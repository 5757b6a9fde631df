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
