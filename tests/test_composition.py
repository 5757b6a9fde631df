"""Several methods in one model: nested in the order of the list, saved, loaded, merged and resumed together."""

import functools
import json

import pytest
import torch
from torch import nn

from lightning_peft import (
    PEFTCLI,
    Adaptation,
    AdapterCheckpoint,
    BitFit,
    Bottleneck,
    FullFineTuning,
    LoRA,
    NormTuning,
    PEFTModule,
    active_adapters,
    adapter_layers,
    adapter_names,
    adapter_state_dict,
    adapters_disabled,
    inject,
    inject_all,
    load_adapter,
    load_adapters,
    merge_adapters,
    save_adapters,
    set_active_adapters,
    unmerge_adapters,
)
from lightning_peft.composition import INDEX, named
from lightning_peft.errors import (
    AdapterFileError,
    AdapterNotFoundError,
    CheckpointMismatchError,
    ConfigError,
    InjectionError,
    TargetError,
)
from lightning_peft.testing import tiny_llama, token_batch


def tiny_bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    small = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_labels": 3}
    model = BertForSequenceClassification(BertConfig(**small, num_attention_heads=4, max_position_embeddings=64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.02)
    return model.eval()


MODELS = {"llama": tiny_llama, "bert": tiny_bert}
ATTENTION = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"]}
MLP = {"llama": ["down_proj"], "bert": ["intermediate.dense"]}
NORMS = {"llama": "norm", "bert": "re:.*LayerNorm"}


def pairs(kind):
    attention, mlp = ATTENTION[kind], MLP[kind]
    return {
        "lora+bottleneck": [Adaptation(LoRA(rank=4), attention), Adaptation(Bottleneck(), None)],
        "lora+bitfit": [Adaptation(LoRA(rank=4), attention), BitFit() if kind == "bert" else BitFit(add_missing=True)],
        "bitfit+lora": [
            Adaptation(BitFit(add_missing=kind == "llama"), attention),
            Adaptation(LoRA(rank=4), attention),
        ],
        "lora+norms": [Adaptation(LoRA(rank=4), attention), Adaptation(NormTuning(), NORMS[kind])],
        "lora+lora": [Adaptation(LoRA(rank=4), attention), Adaptation(LoRA(rank=2, alpha=3), [*attention, *mlp])],
        "full+lora": [Adaptation(FullFineTuning(), mlp), Adaptation(LoRA(rank=4), attention)],
    }


CASES = [(kind, pair) for kind in MODELS for pair in pairs(kind)]


def disturbed(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(**token_batch()).logits


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


def composed(kind, pair):
    model = MODELS[kind]()
    torch.manual_seed(1)
    inject_all(model, pairs(kind)[pair])
    return disturbed(model)


@pytest.mark.parametrize(("kind", "pair"), CASES)
def test_two_methods_act_one_around_the_other(kind, pair):
    """The reference is each adapter alone, called around what the inner one made of the same arguments."""
    model = composed(kind, pair)
    first, second = active_adapters(model)
    both = logits(model)
    for layer in adapter_layers(model).values():
        call = layer.base_layer
        for name in (first, second):
            call = functools.partial(layer.adapters[name], call) if name in layer.adapters else call
        layer.forward = call
    assert torch.equal(logits(model), both)
    for layer in adapter_layers(model).values():
        del layer.forward
    alone = []
    for name in (first, second):
        set_active_adapters(model, name)
        alone.append(logits(model))
    assert relative(alone[0], both) > 1e-3
    assert relative(alone[1], both) > 1e-3
    with adapters_disabled(model):
        assert torch.equal(logits(model), logits(MODELS[kind]()))


def test_the_first_of_the_list_is_innermost():
    """By hand, in float64: a bottleneck of LoRA is not LoRA around a bottleneck."""
    x = torch.randn(5, 4, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 4)).double()
    inject_all(model, [Adaptation(LoRA(rank=2, dtype="base"), "0", "inner"), Adaptation(BitFit(), "0", "outer")])
    disturbed(model)
    layer = model[0]
    lora, bias = layer.adapters["inner"], layer.adapters["outer"].copy_of("bias")
    expected = x @ layer.base_layer.weight.T + bias + 8.0 * x @ lora.lora_A.T @ lora.lora_B
    assert layer.active == ("inner", "outer")
    assert torch.allclose(model(x), expected, rtol=1e-9)


MERGEABLE = [
    (kind, pair) for kind, pair in CASES if "bottleneck" not in pair and not ("bitfit" in pair and kind == "llama")
]


@pytest.mark.parametrize(("kind", "pair"), MERGEABLE)
def test_merged_together_they_are_what_they_were_active(kind, pair):
    model = composed(kind, pair)
    both = logits(model)
    merge_adapters(model)
    assert relative(logits(model), both) <= 1e-5
    unmerge_adapters(model)
    assert torch.equal(logits(model), both)
    with adapters_disabled(model):
        assert torch.equal(logits(model), logits(MODELS[kind]()))


@pytest.mark.parametrize(("kind", "pair"), CASES)
def test_saved_and_loaded_together_they_are_the_same(kind, pair, tmp_path):
    model, again = composed(kind, pair), MODELS[kind]()
    save_adapters(model, tmp_path)
    names = active_adapters(model)
    assert sorted(child.name for child in tmp_path.iterdir()) == sorted([*names, INDEX])
    loaded = load_adapters(again, tmp_path)
    assert list(loaded) == names == active_adapters(again)
    assert torch.equal(logits(again), logits(model))
    one = MODELS[kind]()
    load_adapter(one, tmp_path / names[0], name=names[0])
    set_active_adapters(model, names[0])
    assert torch.equal(logits(one), logits(model))


def test_what_was_active_is_active_again_in_its_order(tmp_path):
    model = composed("llama", "lora+lora")
    inject(model, LoRA(rank=1), ["q_proj"], name="zero")
    disturbed(model)
    set_active_adapters(model, ["lora_2", "lora"])
    save_adapters(model, tmp_path)
    again = tiny_llama()
    load_adapters(again, tmp_path)
    assert adapter_names(again) == ["lora", "lora_2", "zero"]
    assert active_adapters(again) == ["lora_2", "lora"]
    assert torch.equal(logits(again), logits(model))


def test_a_single_default_keeps_its_layout(tmp_path):
    model = tiny_llama()
    inject(model, LoRA(rank=1), ["q_proj"])
    save_adapters(disturbed(model), tmp_path)
    assert not (tmp_path / INDEX).exists()
    again = tiny_llama()
    assert list(load_adapters(again, tmp_path)) == ["default"]
    assert torch.equal(logits(again), logits(model))


def test_folders_without_an_index_load_by_name(tmp_path):
    model = tiny_llama()
    inject(model, LoRA(rank=1), ["q_proj"])
    inject(model, LoRA(rank=1), ["k_proj"], name="b")
    inject(model, LoRA(rank=1), ["v_proj"], name="a")
    save_adapters(model, tmp_path)
    (tmp_path / INDEX).unlink()
    again = tiny_llama()
    load_adapters(again, tmp_path)
    assert active_adapters(again) == ["default", "a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot be read"),
        ("[]", "cannot be read"),
        ({"format_version": 1, "adapters": ["lora"]}, "cannot be read: KeyError"),
        ({"format_version": 3, "adapters": ["lora"], "active": []}, "format_version 3; this version reads 1 and 2"),
        ({"format_version": 2, "adapters": ["lora"], "active": [], "scales": {"x": 1}}, "scaled ones among them"),
        ({"format_version": 1, "adapters": ["../lora"], "active": []}, r"an adapter name is .* got '../lora'"),
        ({"format_version": 1, "adapters": ["lora", "lora"], "active": []}, "must name each adapter once"),
        ({"format_version": 1, "adapters": ["lora"], "active": ["x"]}, "must name each adapter once"),
        ({"format_version": 1, "adapters": ["lora", "gone"], "active": ["lora"]}, "gone' is not a folder"),
    ],
    ids=str,
)
def test_an_index_that_cannot_be_honoured_is_refused_without_a_trace(content, message, tmp_path):
    model = tiny_llama()
    inject(model, LoRA(rank=1), ["q_proj"], name="lora")
    save_adapters(model, tmp_path)
    (tmp_path / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))
    again = tiny_llama()
    with pytest.raises(AdapterFileError, match=message):
        load_adapters(again, tmp_path)
    assert not adapter_layers(again)
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_a_folder_or_a_model_without_adapters_is_refused(tmp_path):
    with pytest.raises(AdapterFileError, match="holds no adapter, neither itself nor in a folder inside it"):
        load_adapters(tiny_llama(), tmp_path)
    with pytest.raises(AdapterNotFoundError, match="has no such adapter"):
        save_adapters(tiny_llama(), tmp_path)


# -- names and conflicts -----------------------------------------------------------------------------------------------


def test_names_are_those_of_the_methods_and_numbered():
    given = [LoRA(), Adaptation(LoRA(), name="lora_2"), LoRA(), BitFit(), Adaptation(BitFit(), name="mine")]
    assert [one.name for one in named(given)] == ["lora", "lora_2", "lora_3", "bitfit", "mine"]
    assert [one.name for one in named([LoRA(), Adaptation(BitFit(), name="lora")])] == ["lora_2", "lora"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"a list of methods needs at least one, got \[\]"),
        (["lora"], r"holds Adaptation\(method, targets\) or methods, got 'lora'"),
        ([Adaptation(LoRA(), name="a"), Adaptation(BitFit(), name="a")], "the name 'a' is given to 2 adaptations"),
        ([Adaptation(LoRA(), name="a.b")], "an adapter name is .* got 'a.b'"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        inject_all(tiny_llama(), given)


def test_an_adaptation_needs_a_method():
    with pytest.raises(ConfigError, match=r"needs an instance of a Method such as LoRA\(rank=8\), got 'lora'"):
        Adaptation("lora")


def untouched(model):
    return not adapter_layers(model) and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([Adaptation(FullFineTuning(), "mlp"), Adaptation(LoRA(), "up")], InjectionError,
         r"the adapters \['full', 'lora'\] all adapt 'model.layers.0.mlp.up_proj', but 'full' acts alone at a place"),
        ([Adaptation(LoRA(), "up", modules_to_save="lm_head"), Adaptation(LoRA(), "lm_head")], InjectionError,
         r"\['lora', 'lora_2'\] all adapt 'lm_head', but modules_to_save of 'lora' trains the module in full"),
        ([Adaptation(LoRA(), "up", modules_to_save="lm_head"), Adaptation(LoRA(), "down", modules_to_save="lm_head")],
         InjectionError, "all adapt 'lm_head', but modules_to_save of 'lora' trains"),
        ([LoRA(), Adaptation(BitFit(), "q_prj")], TargetError, "target 'q_prj' matches no module"),
        ([LoRA(), Adaptation(LoRA(dropout=0.1, rank_pattern={"nothing": 2}), "query")], TargetError, "nothing"),
    ],
)  # fmt: skip
def test_a_conflict_is_refused_and_the_model_is_what_it_was(given, error, message):
    model = tiny_llama()
    with pytest.raises(error, match=message):
        inject_all(model, given)
    assert untouched(model)


def test_a_taken_name_is_refused_before_the_model_changes():
    model = tiny_llama()
    inject(model, LoRA(rank=1), ["q_proj"], name="bitfit")
    with pytest.raises(InjectionError, match="already has an adapter 'bitfit'"):
        inject_all(model, [LoRA(rank=1), BitFit(add_missing=True)])
    assert adapter_names(model) == ["bitfit"] == active_adapters(model)


# -- in a module -------------------------------------------------------------------------------------------------------


def lm_module(kind="llama", method=None, **options):
    adaptations = [
        Adaptation(LoRA(rank=2, dropout=0.1), ATTENTION[kind]),
        Bottleneck(reduction_factor=8),
        Adaptation(NormTuning(), NORMS[kind]),
    ]
    return PEFTModule(MODELS[kind](), adaptations if method is None else method, **options)


def tokens(rows=24):
    generator = torch.Generator().manual_seed(0)
    return torch.utils.data.DataLoader(
        torch.randint(0, 128, (rows, 8), generator=generator), batch_size=4, shuffle=True
    )


def fit(trainer, module, **options):
    torch.manual_seed(5)
    trainer.fit(module, tokens(), **options)
    return module


def states(module):
    return {f"{n}:{k}": v for n in adapter_names(module.model) for k, v in adapter_state_dict(module.model, n).items()}


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_run_resumes_bit_for_bit_and_its_folder_loads(tmp_path, make_trainer):
    whole = fit(make_trainer(tmp_path, max_epochs=2), lm_module())
    callback = AdapterCheckpoint(dirpath=tmp_path, filename="one")
    part = fit(make_trainer(tmp_path, max_epochs=1, callbacks=[callback]), lm_module())
    further = make_trainer(tmp_path, max_epochs=2, callbacks=[AdapterCheckpoint(dirpath=tmp_path / "further")])
    resumed = fit(further, lm_module(), ckpt_path=tmp_path / "one.ckpt")
    expected, found = states(whole), states(resumed)
    assert {key.partition(":")[0] for key in expected} == {"lora", "bottleneck", "norm_tuning"}
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    start = lm_module()
    start.configure_model()
    assert all(
        any(not torch.equal(v, states(part)[k]) for k, v in states(start).items() if k.startswith(n))
        for n in ("lora:", "bottleneck:", "norm_tuning:")
    )
    again = tiny_llama()
    load_adapters(again, tmp_path / "one.adapter")
    assert active_adapters(again) == ["lora", "bottleneck", "norm_tuning"]
    assert torch.equal(logits(again), logits(part.model.eval()))
    assert set(part.hparams["peft"]) == {"lora", "bottleneck", "norm_tuning"}
    assert part.hparams["peft"]["lora"]["targets"] == "['q_proj', 'v_proj']"


def test_a_run_with_another_order_does_not_resume(tmp_path, make_trainer):
    both = [Adaptation(LoRA(rank=1), "query"), Adaptation(LoRA(rank=1), "query", "other")]
    trainer = make_trainer(tmp_path, max_epochs=1)
    fit(trainer, lm_module(method=both))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(
        CheckpointMismatchError, match="position of the checkpoint and of the module differ: was 0 and is 1"
    ):
        fit(make_trainer(tmp_path, max_epochs=2), lm_module(method=both[::-1]), ckpt_path=tmp_path / "one.ckpt")


def test_a_bare_method_in_a_list_has_its_own_name_and_a_single_one_is_the_default():
    for method, names in ((LoRA(rank=1), ["default"]), ([LoRA(rank=1)], ["lora"])):
        module = lm_module(method=method)
        module.configure_model()
        assert adapter_names(module.model) == names


@pytest.mark.parametrize("beside", [{"targets": "query"}, {"modules_to_save": "lm_head"}, {"name": "x"}], ids=str)
def test_settings_of_one_method_beside_a_list_are_refused(beside):
    with pytest.raises(ConfigError, match="each method of a list has its own targets, modules_to_save and name"):
        lm_module(**beside)


def test_what_is_no_method_is_refused():
    with pytest.raises(
        ConfigError, match=r"method must be a Method such as LoRA\(rank=8\), or a list of them, got 'lora'"
    ):
        lm_module(method="lora")


def test_every_data_driven_method_gets_the_batches(tmp_path, make_trainer):
    seen = []

    class FromData(LoRA):
        name = "from_data"
        data_driven = True

        def initialize(self, model, adapters, batches, loss):
            seen.append(
                (
                    sorted(adapters)[0],
                    active_adapters(model),
                    next(iter(batches)).clone(),
                    float(loss(next(iter(batches))).detach()),
                )
            )

    method = [Adaptation(FromData(rank=1), "query"), Adaptation(FromData(rank=1), "value", modules_to_save="lm_head")]
    fit(make_trainer(tmp_path, max_steps=1), lm_module(method=method))
    assert [place for place, *_ in seen] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert all(active == ["from_data", "from_data_2"] for _, active, *_ in seen)
    assert torch.equal(seen[0][2], seen[1][2])


# -- on the command line -----------------------------------------------------------------------------------------------

DATA = ["--data", "TextDataModule", "--data.tokenizer", "x", "--data.train", "y"]
PLAIN = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--model.base", "CausalLMLoader", "--model.base.path=x"]


def made(args):
    return PEFTCLI(args=[*PLAIN, *DATA, *args], run=False).model.adaptations


def test_registry_names_work_inside_a_list(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model:\n  method:\n"
        "    - method: {class_path: lora, init_args: {rank: 3}}\n      targets: [query]\n"
        "    - {class_path: Adaptation, init_args: {method: bottleneck, name: bn}}\n"
        "    - bitfit\n    - {class_path: norm_tuning}\n"
    )
    expected = [
        Adaptation(LoRA(rank=3), ["query"], "lora"),
        Adaptation(Bottleneck(), None, "bn"),
        Adaptation(BitFit(), None, "bitfit"),
        Adaptation(NormTuning(), None, "norm_tuning"),
    ]
    assert made(["--config", str(file)]) == expected
    assert made(["--model.method", "[{method: lora, targets: up}, bitfit]"]) == [
        Adaptation(LoRA(), "up", "lora"),
        Adaptation(BitFit(), None, "bitfit"),
    ]
    assert made(["--model.method=lora", "--model.method.rank=3"]) == [Adaptation(LoRA(rank=3), None, "default")]


def test_loading_one_adapter_from_a_folder_of_several_names_load_adapters_and_the_folders(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject_all(model, [Adaptation(LoRA(rank=1), ["0"], "first"), Adaptation(LoRA(rank=1), ["1"], "second")])
    save_adapters(model, tmp_path)
    with pytest.raises(
        AdapterFileError, match=r"\['first', 'second'\]; load them together with load_adapters.*first'$"
    ):
        load_adapter(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), tmp_path)


@pytest.mark.parametrize("turned", [False, True])
def test_an_adapter_inside_a_replaced_module_is_refused(turned):
    """It would neither act nor be trained."""
    from lightning_peft import MoEUpcycling
    from lightning_peft.errors import InjectionError
    from lightning_peft.testing import tiny_llama

    model = tiny_llama()
    pair = [Adaptation(MoEUpcycling(experts=2)), Adaptation(LoRA(rank=2), ["down", "query"])]
    with pytest.raises(InjectionError, match=r"inside 'model.layers.0.mlp', which does not run while 'moe_upcycling'"):
        inject_all(model, pair[::-1] if turned else pair)
    assert adapter_names(model) == []
    inject_all(model, [Adaptation(MoEUpcycling(experts=2)), Adaptation(LoRA(rank=2), ["query"])])
    assert active_adapters(model) == ["moe_upcycling", "lora"]
