"""Fixtures for all tests: a tiny language model in a folder, a quiet Trainer, and real data where there is some."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Read once, when triton is first imported: without a GPU its interpreter runs the kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")

VOCABULARY = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", *"0123456789", *".,;:!?-'()+*/=<>&%$#[]"]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _port_of_its_own():
    """Lightning leaves the port of a run of several processes in the environment; by the next one somebody else may have it."""
    os.environ.pop("MASTER_PORT", None)


@pytest.fixture(scope="session")
def llama_config():
    """The configuration of a Llama with two layers, 61 tokens and 32 features, with dropout in attention."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_dropout=0.2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )


@pytest.fixture(scope="session")
def llama_dir(llama_config, tmp_path_factory):
    """A model folder of transformers: that Llama with random float32 weights, and a tokenizer of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def llama(llama_dir):
    """A fresh copy of that model, in eval mode as ``from_pretrained`` returns it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(llama_dir)


@pytest.fixture(scope="session")
def make_trainer():
    """Make a Trainer on the CPU that prints and logs nothing: ``make_trainer(folder, max_steps=3)``."""
    from lightning.pytorch import Trainer

    def make(root, **options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        checkpointing = {"enable_checkpointing": False} if not options.get("callbacks") else {}
        return Trainer(accelerator="cpu", devices=1, default_root_dir=root, **{**quiet, **checkpointing, **options})

    return make


@pytest.fixture(scope="session")
def data_dir():
    """The folder of real data sets and models, for tests that need one."""
    folder = os.environ.get("LIGHTNING_PEFT_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data: set LIGHTNING_PEFT_DATA to its folder")
    return Path(folder)


@pytest.fixture(scope="session")
def paired():
    """Return ``benchmarks/paired.py``, which counts bytes."""
    spec = importlib.util.spec_from_file_location("paired", Path(__file__).parents[1] / "benchmarks" / "paired.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["paired"] = module  # dataclasses look a class up by its module
    spec.loader.exec_module(module)
    return module
