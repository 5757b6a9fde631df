"""Prompt tuning and p-tuning keep the contract, on models that count positions in different ways and on an encoder."""

import pytest
import torch
import transformers

from lightning_peft import PromptTuning, PTuning
from lightning_peft.testing import MethodConformance, tiny_gpt2, tiny_llama, token_batch

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 128,
}
T5 = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 128,
    "decoder_start_token_id": 0,
}


class TestPromptTuning(MethodConformance):
    method = PromptTuning()


class TestOnGPT2(MethodConformance):
    method = PromptTuning(num_virtual_tokens=5, init="random")

    def model(self):
        return tiny_gpt2()


class TestPTuning(MethodConformance):
    method = PTuning()


class TestLSTMOnGPT2(MethodConformance):
    method = PTuning(num_virtual_tokens=5, encoder="lstm", hidden_size=16)

    def model(self):
        return tiny_gpt2()


class TestWithACache(MethodConformance):
    method = PromptTuning(num_virtual_tokens=3)

    def model(self):
        return tiny_llama(use_cache=True)


# The head of BERT returns a view, with any method; nobody writes into it.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
class TestOnAnEncoder(MethodConformance):
    method = PromptTuning(num_virtual_tokens=4)

    def model(self):
        torch.manual_seed(0)
        config = transformers.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return transformers.BertForMaskedLM(config).eval()


class TestOnAnEncoderWithADecoder(MethodConformance):
    method = PTuning(num_virtual_tokens=4, hidden_size=16)

    def model(self):
        torch.manual_seed(0)
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, dropout_rate=0.0)).eval()

    def inputs(self, seed=0):
        ids = token_batch(seed)["input_ids"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :5]}
