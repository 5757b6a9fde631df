"""MoEUpcycling under the contract of methods: gated and plain MLPs, MLPs in parts, routers of both kinds, everything trained."""

import torch

from lightning_peft import MoEUpcycling
from lightning_peft.testing import MethodConformance, tiny_gpt2


class TestOnLlama(MethodConformance):
    method = MoEUpcycling(experts=4)


class TestOnGPT2(MethodConformance):
    method = MoEUpcycling(experts=4, combine="softmax")

    def model(self):
        return tiny_gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


class TestOneExpertAToken(MethodConformance):
    method = MoEUpcycling(experts=4, top_k=1, combine="straight_through")


class TestOfShardsWithNoise(MethodConformance):
    method = MoEUpcycling(experts=2, top_k=4, granularity=2, expert_noise=0.01, reinit=0.25, z_coef=1e-3, jitter=0.01)


class TestEverythingTrained(MethodConformance):
    method = MoEUpcycling(experts=2, train="all", layers="last_half")


def tiny_bert():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=128, **sizes), add_pooling_layer=False).eval()


class TestExpertChoiceOnBERT(MethodConformance):
    method = MoEUpcycling(experts=4, router="expert_choice", group="sequence", uncovered="dense")

    def model(self):
        return tiny_bert()
