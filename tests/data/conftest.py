"""Files of rows, a tokenizer whose ids are bytes, and chat templates."""

from __future__ import annotations

import json

import pytest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>\n"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def chatml():
    return CHATML


@pytest.fixture
def marked_chatml():
    return MARKED


@pytest.fixture
def jsonl(tmp_path):
    """Write rows, or lines as they are, into a file: ``jsonl("a.jsonl", [{"text": "a"}, "{broken"])``."""

    def write(name, rows):
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    """The folder of a tokenizer whose ids are the bytes of the text, with <s> = 256 and </s> = 257."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bytes")
    printable = {b: chr(b) for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    others = iter(range(256, 512))
    vocabulary = {printable.get(b) or chr(next(others)): b for b in range(256)} | {"<s>": 256, "</s>": 257}
    byte_level = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=byte_level, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def stories(data_dir):
    """The folder of the real tokenizer."""
    return str(data_dir / "models" / "stories260k")


@pytest.fixture(scope="session")
def bert_tokenizer(tmp_path_factory):
    """The folder of a tokenizer of BERT: ``[CLS] a b [SEP] c [SEP]``, in which the second text is of type 1."""
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)
    return str(folder)
