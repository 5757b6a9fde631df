"""What tokens of an upcycled model see of each other: padding is left out, later tokens change nothing before them."""

import pytest
import torch

from lightning_peft.moe.padding import real_tokens
from lightning_peft.testing import tiny_llama, token_batch
from tests.plugins.test_moe_upcycling import apart, mixture, upcycled

# -- padding -------------------------------------------------------------------------------------------------------------


def padded(left=False):
    ids = token_batch(length=12)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, slice(0, 4) if left else slice(8, 12)] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("left", [False, True])
def test_padding_is_not_routed(attention, left):
    model = upcycled(tiny_llama(attn_implementation=attention), experts=4)
    batch, seen = padded(left), []
    found = mixture(model)
    found.assign = lambda *args, bound=found.assign: seen.append(bound(*args)) or seen[-1]
    model(**batch)
    assert torch.equal(seen[0].valid.view(-1, 2)[:, 0], batch["attention_mask"].bool().flatten())
    model(**token_batch())
    assert seen[1].valid is None or seen[1].valid.all()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_in_padding_changes_no_gradient(left, checkpointing):
    gradients = []
    for token in (5, 77):
        model = upcycled(tiny_llama(), experts=4, expert_noise=0.1, balance_coef=1.0, z_coef=1.0).train()
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        batch = padded(left)
        batch["input_ids"] = torch.where(batch["attention_mask"] == 0, token, batch["input_ids"])
        real = batch["attention_mask"].bool()
        model(**batch).logits[real].square().mean().backward()
        gradients.append(mixture(model, "model.layers.1.mlp").router.grad)
    assert apart(*gradients) <= 1e-5


def test_the_mask_of_every_kind_of_attention_is_read():
    real = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    causal = torch.ones(3, 3).tril().bool()
    four = real[:, None, None, :] & causal
    wide = torch.where(four, 0.0, torch.finfo(torch.float32).min)
    outer = (real[:, None, None, :] & real[:, None, :, None]).float()  # DeBERTa's
    for mask in (
        real,
        real.long(),
        real[:, None, None, :],
        four,
        wide,
        outer,
        torch.where(real, 0.0, -9e9)[:, None, None, :],
    ):
        assert torch.equal(real_tokens(mask, (2, 3)), real.flatten())
    assert torch.equal(real_tokens(~real, (2, 3), inverted=True), real.flatten())
    assert torch.equal(real_tokens(causal[None, None], (2, 3)), torch.ones(6, dtype=torch.bool))
    assert real_tokens(four[:, :, 2:], (2, 1)) is None  # one more token, over a cache of unknown length
    room = torch.nn.functional.pad(four, (0, 4))  # a static cache: keys of tokens that are still to come
    for start in (0, torch.tensor(0)):
        assert torch.equal(real_tokens(room, (2, 3), start=start), real.flatten())
        assert torch.equal(real_tokens(room[:, :, :1], (2, 1), start=start), real[:, 0])
        assert torch.equal(real_tokens(four[:, :, 2:], (2, 1), start=start + 2), real[:, 2])
        assert torch.equal(real_tokens(real.long(), (2, 2), start=start + 1), real[:, 1:].flatten())
    assert real_tokens(four[:, :, 2:], (2, 1), start=3) is None
    assert real_tokens(None, (2, 3)) is None


# -- causality -----------------------------------------------------------------------------------------------------------


def test_later_tokens_change_nothing_before_them():
    model = upcycled(tiny_llama(), experts=4, expert_noise=0.1)
    ids = token_batch()["input_ids"]
    later = torch.cat([ids[:, :6], ids[:, 6:] + 1], dim=1) % 128
    with torch.no_grad():
        assert apart(model(input_ids=later).logits[:, :6], model(input_ids=ids).logits[:, :6]) <= 1e-5
        free = upcycled(
            tiny_llama(), experts=4, expert_noise=0.1, router="expert_choice", allow_noncausal=True, capacity=1.0
        )
        assert apart(free(input_ids=later).logits[:, :6], free(input_ids=ids).logits[:, :6]) > 1e-3


def test_decoding_with_a_cache_is_teacher_forcing():
    model = upcycled(tiny_llama(use_cache=True), experts=4, expert_noise=0.1)
    ids, steps, cache = token_batch()["input_ids"], [], None
    with torch.no_grad():
        for part in (ids[:, :7], *ids[:, 7:].split(1, dim=1)):
            output = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        assert apart(torch.cat(steps, dim=1), model(input_ids=ids).logits) <= 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("router", ["topk", "expert_choice"])
def test_a_padded_batch_generates_the_same_over_any_cache(router, attention):
    """Over a static cache the keys are more than the tokens from the start; what is padding is known all the same."""
    model = tiny_llama(use_cache=True, attn_implementation=attention)
    upcycled(model, experts=4, expert_noise=0.1, router=router, allow_noncausal=True)
    found, seen = mixture(model.eval()), []
    found.assign = lambda *args, bound=found.assign: seen.append(args[1]) or bound(*args)
    ids = token_batch(length=8)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    fixed = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    runs = []
    for cache in ({}, {"cache_implementation": "static"}):
        run = model.generate(
            input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **fixed, **cache
        )
        runs.append((run.sequences, torch.stack(run.logits, dim=1)))
    assert torch.equal(runs[0][0], runs[1][0])
    assert apart(runs[1][1], runs[0][1]) <= 1e-6
    steps = [1 if noted is None else noted.int().tolist() for noted in seen]
    assert steps[:4] == steps[4:] == [mask.flatten().tolist(), *[[1] * len(ids)] * 3]
