"""What the words of a user select: on a model nobody knows, and on tiny models of known families."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_peft.adapter_layer import adapter_layers
from lightning_peft.errors import ConfigError, LightningPEFTWarning, TargetError
from lightning_peft.families import GENERIC, ROLES, Fused, ModelFamily
from lightning_peft.interfaces import Slice, Target
from lightning_peft.plugins.lora import LoRA
from lightning_peft.registry import Registry
from lightning_peft.surgery import inject
from lightning_peft.targets import Targets, is_linear, layer_index, matches, resolve_targets


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) * self.k_proj(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.fc, self.norm = Attention(), nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(self.self_attn(x)))


class Unknown(nn.Module):
    """A model of no family: an embedding, layers, a classifier."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.classifier = nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x)


TOY = ModelFamily(
    name="toy",
    roles={
        "query": ("self_attn.q_proj",),
        "up": ("layers.*.fc",),
        "block": ("layers.*",),
        "attention": ("self_attn",),
        "head": ("classifier",),
        "norm": ("**.norm",),
    },
)


class LinearOnly(LoRA):
    """LoRA as a method that knows linear layers alone."""

    def supports(self, module: nn.Module) -> bool:
        return is_linear(module)


def tiny(model_type: str, **changes: Any) -> Any:
    sizes = {"vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, "bos_token_id": 1, "eos_token_id": 2, **changes})
    return transformers.AutoModelForCausalLM.from_config(config)


def tiny_gpt2() -> Any:
    return tiny("gpt2")


def gpt2_family() -> ModelFamily:
    return Registry(entry_points=False).model_families["gpt2"]


def paths(
    targets: str | Sequence[str] | Targets, model: nn.Module | None = None, family: ModelFamily = TOY
) -> list[str]:
    """Return what LoRA would adapt."""
    found = resolve_targets(model or Unknown(), targets, family, supports=LoRA().supports, method="LoRA")
    return [target.path for target in found]


QUERIES = [f"layers.{index}.self_attn.q_proj" for index in range(4)]


# -- roles, globs, regular expressions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    ["query", "q_proj", "self_attn.q_proj", "*.q_proj", "layers.*.q_*", "layers.?.self_attn.q_proj", "*[q]_proj",
     "re:.*q_proj", r"re:layers\.\d\.self_attn\.q_proj"],
)  # fmt: skip
def test_one_module_a_layer_has_many_names(target: str) -> None:
    assert paths(target) == QUERIES
    assert paths([target]) == QUERIES
    assert paths(Targets(include=[target])) == QUERIES


def test_the_places_come_in_the_order_of_the_model_and_once_each() -> None:
    found = resolve_targets(Unknown(2), ["classifier", "q_proj", "query", "embed"], TOY)
    assert found == [
        Target(path="embed", rule="embed"),
        Target(path="layers.0.self_attn.q_proj", rule="q_proj"),
        Target(path="layers.1.self_attn.q_proj", rule="q_proj"),
        Target(path="classifier", rule="classifier"),
    ]


def test_a_suffix_matches_whole_names_only() -> None:
    assert paths("fc") == [f"layers.{index}.fc" for index in range(4)]
    with pytest.raises(
        TargetError, match="target 'proj' matches no module of Unknown; did you mean 'q_proj' or 'k_proj'"
    ):
        paths("proj")


def test_a_regular_expression_must_match_the_whole_path() -> None:
    with pytest.raises(TargetError, match="target 're:q_proj' matches no module of Unknown; did you mean 'q_proj'"):
        paths("re:q_proj")


def test_a_star_of_a_family_stays_within_one_part_and_two_stars_do_not() -> None:
    assert matches("block", Unknown(2), TOY) == {"layers.0", "layers.1"}
    assert matches("norm", Unknown(2), TOY) == {"layers.0.norm", "layers.1.norm"}
    assert matches("layers.*", Unknown(1), TOY) > {"layers.0", "layers.0.self_attn.q_proj"}


def test_a_wildcard_that_matches_mixed_kinds_selects_what_can_be_adapted() -> None:
    expected = ["self_attn.q_proj", "self_attn.k_proj", "fc"]
    assert paths("layers.0.*") == [f"layers.0.{name}" for name in expected]
    assert paths(r"re:layers\.0.*") == [f"layers.0.{name}" for name in expected]


def test_adapted_models_keep_their_paths() -> None:
    model = Unknown()
    inject(model, LoRA(rank=1), "q_proj", name="first")
    assert paths("q_proj", model) == QUERIES
    assert paths("all_linear", model) == paths("all_linear")


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_a_typo_is_an_error_that_names_the_nearest_and_what_there_is() -> None:
    message = (
        r"target 'q_prj' matches no module of Unknown; did you mean 'q_proj' or 'k_proj'\? Roles of family 'toy': "
        "query, up, attention, block, head, norm, all_linear. Module names: classifier, embed, fc, k_proj, layers, norm, "
        "q_proj, self_attn$"
    )
    with pytest.raises(TargetError, match=message):
        paths("q_prj")


@pytest.mark.parametrize(
    ("typo", "nearest"), [("q_prj", "q_proj"), ("*.q_porj", "q_proj"), ("querry", "query"), ("re:q_pro", "q_proj")]
)
def test_a_typo_beside_a_match_is_an_error_that_names_the_nearest(typo: str, nearest: str) -> None:
    message = rf"target '{re.escape(typo)}' matches no module of Unknown; did you mean '{nearest}'"
    with pytest.raises(TargetError, match=message):
        paths(["k_proj", typo])


def test_a_typo_in_an_exclusion_is_an_error_too() -> None:
    with pytest.raises(TargetError, match="target 'clasifier' matches no module of Unknown; did you mean 'classifier'"):
        paths(Targets(include="all_linear", exclude="clasifier"))


def test_a_role_that_the_family_does_not_have_is_an_error() -> None:
    with pytest.raises(
        TargetError, match=r"target 'gate' matches no module of Unknown: it is a role, .*Roles of family 'toy': query"
    ):
        paths("gate")


def test_a_role_word_that_the_family_does_not_know_is_the_name_of_a_module() -> None:
    model = nn.ModuleDict({"query": nn.Linear(2, 2), "inner": nn.ModuleDict({"query": nn.Linear(2, 2)})})
    assert paths("query", model, GENERIC) == ["query", "inner.query"]


@pytest.mark.parametrize(
    ("target", "named"),
    [("self_attn", "'layers.0.self_attn', a Attention"), ("norm", "'layers.0.norm', a LayerNorm"),
     ("block", "'layers.0', a Block"), ("*.norm", "'layers.0.norm', a LayerNorm"),
     ("layers.1.norm", "'layers.1.norm', a LayerNorm")],
)  # fmt: skip
def test_a_target_of_unsupported_modules_is_an_error_that_names_one(target: str, named: str) -> None:
    message = f"target '{re.escape(target)}' matches {named}, which LoRA cannot adapt; name the modules inside it"
    with pytest.raises(TargetError, match=message):
        paths(target)


def test_a_literal_that_matches_mixed_kinds_is_an_error_that_names_the_unsupported() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"x": nn.Linear(2, 2)}), "b": nn.ModuleDict({"x": nn.LayerNorm(2)})})
    with pytest.raises(TargetError, match=r"target 'x' matches 'b\.x', a LayerNorm, which LoRA cannot adapt"):
        paths("x", model)
    assert paths("?.x", model) == ["a.x"]


@pytest.mark.parametrize("word", ["re:(", "re:[a", "re:*"])
def test_an_invalid_regular_expression_is_a_config_error(word: str) -> None:
    with pytest.raises(ConfigError, match=r"target 're:.*' is not a regular expression: "):
        Targets(include=["q_proj"], exclude=[word])
    with pytest.raises(ConfigError, match="is not a regular expression"):
        paths(word)


@pytest.mark.parametrize("empty", [[], (), Targets])
def test_empty_targets_are_a_config_error(empty: Any) -> None:
    with pytest.raises(ConfigError, match="targets must name at least one role, glob or 're:' expression, got "):
        paths(empty(include=[]) if empty is Targets else empty)


@pytest.mark.parametrize("word", ["", 3, None])
def test_a_target_that_is_no_word_is_a_config_error(word: Any) -> None:
    with pytest.raises(ConfigError, match=f"a target must be a non-empty string, got {word!r}"):
        paths(["q_proj", word])


# -- exclusions and layers ---------------------------------------------------------------------------------------------


def test_exclusions_are_roles_globs_or_regular_expressions() -> None:
    for exclude in ("query", "q_proj", ["re:.*q_proj"], "*.q_*"):
        found = paths(Targets(include="all_linear", exclude=exclude), Unknown(1))
        assert found == ["layers.0.self_attn.k_proj", "layers.0.fc"]


def test_what_is_excluded_need_not_be_adaptable() -> None:
    assert paths(Targets(include="layers.0.*", exclude="norm")) == paths("layers.0.*")


@pytest.mark.parametrize(
    ("layers", "kept"),
    [([0], [0]), ([0, -1], [0, 3]), ((2,), [2]), (range(1, 3), [1, 2]), ("1:3", [1, 2]), ("-2:", [2, 3]), (":1", [0]),
     ("::2", [0, 2]), (":-3", [0]), ("3:9", [3])],
)  # fmt: skip
def test_layers_are_a_list_or_a_slice(layers: Any, kept: list[int]) -> None:
    assert paths(Targets(include="query", layers=layers)) == [QUERIES[index] for index in kept]


def test_a_target_that_layers_or_exclusions_remove_wholly_is_an_error() -> None:
    with pytest.raises(
        TargetError, match="target 'embed' of .* has no place left: exclude or layers removed every match"
    ):
        paths(Targets(include=["query", "embed"], layers=[1]))
    with pytest.raises(TargetError, match="target 'classifier' of .* has no place left"):
        paths(Targets(include=["query", "classifier"], exclude=["classifier"]))


def test_layers_count_in_each_stack_of_its_own() -> None:
    model = nn.ModuleDict({"encoder": Unknown(4), "decoder": Unknown(2)})
    assert paths(Targets(include="query", layers=[-1]), model) == [
        "encoder.layers.3.self_attn.q_proj",
        "decoder.layers.1.self_attn.q_proj",
    ]


def test_the_layer_is_the_first_number_of_a_path_and_names_with_digits_are_none() -> None:
    assert layer_index("encoder.block.3.layer.0.q") == 3
    assert layer_index("conv1.weight_0") is None
    model = nn.ModuleDict({"1x": nn.ModuleList(nn.Linear(2, 2) for _ in range(3))})
    assert paths(Targets(include="all_linear", layers=[-1]), model) == ["1x.2"]


@pytest.mark.parametrize("index", [4, 99, -5])
def test_a_layer_out_of_range_is_an_error(index: int) -> None:
    with pytest.raises(TargetError, match=rf"layer {index} was asked for, but the model has 4 layers \(0 to 3\)"):
        paths(Targets(include="query", layers=[0, index]))


@pytest.mark.parametrize("layers", ["4", "a:b", "1:2:0", "", 4, [0, "1"], [1.5]])
def test_layers_that_are_neither_are_a_config_error(layers: Any) -> None:
    with pytest.raises(ConfigError, match="layers must be a list of numbers or a slice such as '4:8' or '-2:', got "):
        Targets(include="query", layers=layers)


@pytest.mark.parametrize(
    "targets",
    [
        Targets(include="query", exclude="q_proj"),
        Targets(include="query", layers="9:"),
        Targets(include="classifier", layers=[0]),
    ],
)
def test_nothing_left_is_an_error(targets: Targets) -> None:
    with pytest.raises(TargetError, match="leaves nothing to adapt in Unknown: exclude or layers removed every match"):
        paths(targets)


# -- all linear layers -------------------------------------------------------------------------------------------------


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    inner = ["layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj", "layers.0.fc"]
    assert paths("all_linear", Unknown(1)) == inner
    assert paths("all_linear", Unknown(1), GENERIC) == [*inner, "classifier"]


def test_all_linear_leaves_out_what_is_inside_the_head() -> None:
    model = Unknown(1)
    model.classifier = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert "classifier.0" in paths("all_linear", model, GENERIC)
    assert paths("all_linear", model) == paths("all_linear", Unknown(1))


def test_all_linear_leaves_out_the_output_embedding_of_an_unknown_model() -> None:
    class WithOutput(Unknown):
        def get_output_embeddings(self) -> nn.Module:
            return self.classifier

    class Without(Unknown):
        def get_output_embeddings(self) -> nn.Module:
            raise NotImplementedError

    assert paths("all_linear", WithOutput(1), GENERIC) == paths("all_linear", Unknown(1))
    assert "classifier" in paths("all_linear", Without(1), GENERIC)


def test_all_linear_includes_conv1d_of_transformers() -> None:
    model = tiny_gpt2()
    assert is_linear(model.transformer.h[0].attn.c_attn)
    assert not is_linear(model.transformer.wte)
    assert len(paths("all_linear", model, GENERIC)) == 8


def test_all_linear_without_linear_layers_is_an_error() -> None:
    with pytest.raises(
        TargetError, match=r"target 'all_linear' matches no module of Sequential\. Roles of family 'generic'"
    ):
        paths("all_linear", nn.Sequential(nn.ReLU()), GENERIC)


def test_all_linear_takes_fused_experts_where_the_method_can_and_warns_where_it_cannot() -> None:
    options = {"intermediate_size": 12, "num_key_value_heads": 1, "num_local_experts": 2}
    attention = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkvo"]
    found = inject(tiny("mixtral", **options), LoRA(rank=2), "all_linear").paths
    assert set(found) == {*attention, *(f"model.layers.{i}.mlp.experts" for i in range(2))}
    message = (
        "4 three-dimensional parameters such as 'model.layers.0.mlp.experts.gate_up_proj' are not adapted by LinearOnly"
    )
    with pytest.warns(LightningPEFTWarning, match=message):
        assert inject(tiny("mixtral", **options), LinearOnly(rank=2), "all_linear").paths == attention


def test_a_projection_that_multihead_attention_never_calls_is_not_adapted() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "fc": nn.Linear(4, 4)})
    assert paths("all_linear", model) == ["fc"]
    assert paths("*", model) == ["attn", "fc"]
    message = "target 'out_proj' matches 'attn.out_proj', .* which is never called: .*; name that, 'attn'"
    with pytest.raises(TargetError, match=message):
        paths("out_proj", model)


# -- a model nobody knows ----------------------------------------------------------------------------------------------


def test_the_family_is_found_by_model_type_and_is_generic_for_a_model_nobody_knows() -> None:
    registry = Registry(entry_points=False)
    assert registry.resolve_family(tiny_gpt2()) is registry.model_families["gpt2"]
    assert registry.resolve_family(Unknown()) is GENERIC
    model = Unknown()
    model.config = transformers.PretrainedConfig()  # type: ignore[assignment]
    assert registry.resolve_family(model) is GENERIC


@pytest.mark.parametrize("targets", ["all_linear", "q_proj", "layers.*", "re:.*_proj", ["embed", "fc"], None])
def test_a_plain_module_is_adapted_and_runs(targets: Any) -> None:
    model, ids = Unknown(), torch.tensor([[1, 2, 3]])
    base = model(ids)
    inject(model, LoRA(rank=1), targets)
    assert torch.equal(model(ids), base)
    for layer in adapter_layers(model).values():
        for parameter in layer.adapters.parameters():
            nn.init.ones_(parameter)
    assert not torch.allclose(model(ids), base)


def test_a_family_is_given_by_name_or_as_it_is() -> None:
    assert inject(Unknown(), LoRA(rank=1), "query", family=TOY).family == "toy"
    assert inject(Unknown(), LoRA(rank=1), "query", family="llama").paths == QUERIES


def test_a_family_with_an_unknown_role_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="family 'odd' has the unknown role 'querry'; roles are: query, key, "):
        ModelFamily(name="odd", roles={"querry": ("q",)})
    with pytest.raises(ConfigError, match="family 'odd' has the unknown role 'first'"):
        ModelFamily(name="odd", fused=(Fused(role="qkv", parts={"first": 1}),))


def test_the_roles_of_the_generic_family_are_all_linear_alone() -> None:
    assert GENERIC.role_names == ["all_linear"]
    assert "all_linear" in ROLES


# -- fused projections -------------------------------------------------------------------------------------------------

QUERY, KEY, VALUE = (
    Slice(role=role, groups=1, width=24, start=start, stop=start + 8)
    for role, start in {"query": 0, "key": 8, "value": 16}.items()
)


@pytest.mark.parametrize(
    ("targets", "slices"),
    [
        (["query"], (QUERY,)),
        (["value", "query"], (QUERY, VALUE)),
        (["qkv"], ()),
        (["query", "qkv"], ()),
        (["c_attn", "value"], ()),
        (Targets(include=["query", "key"], exclude="key"), (QUERY,)),
        (Targets(include="qkv", exclude="key"), (QUERY, VALUE)),
        (Targets(include="all_linear", exclude=["key", "value"]), (QUERY,)),
    ],
)
def test_a_part_of_a_fused_projection_is_its_module_with_a_slice(targets: Any, slices: tuple[Slice, ...]) -> None:
    found = resolve_targets(tiny_gpt2(), targets, gpt2_family())
    assert [(target.path, target.slices) for target in found if "c_attn" in target.path] == [
        ("transformer.h.0.attn.c_attn", slices),
        ("transformer.h.1.attn.c_attn", slices),
    ]


@pytest.mark.parametrize(
    "targets",
    [Targets(include="query", exclude="qkv"), Targets(include="qkv", exclude=["query", "key", "value"]),
     Targets(include="query", exclude="query"), Targets(include="key", exclude="c_attn")],
)  # fmt: skip
def test_excluding_all_parts_leaves_nothing(targets: Targets) -> None:
    with pytest.raises(TargetError, match="leaves nothing to adapt in GPT2LMHeadModel"):
        resolve_targets(tiny_gpt2(), targets, gpt2_family())


def test_slices_view_the_features_of_their_part() -> None:
    fused = Fused(role="qkv", parts={"query": 2, "key": 1}, groups="num_heads")
    query, key = fused.slices(["query", "key"], 12, transformers.PretrainedConfig(num_heads=2))
    output = torch.arange(12)
    assert query.view(output).tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert key.view(output).tolist() == [[4, 5], [10, 11]]
    assert (query.features, key.features) == (8, 4)


@pytest.mark.parametrize(("groups", "features"), [(1, 25), (5, 24), (4, 16)])
def test_features_that_do_not_divide_into_the_parts_are_an_error(groups: int, features: int) -> None:
    fused = Fused(role="qkv", parts={"query": 1, "key": 1, "value": 1}, groups=groups)
    message = (
        f"the fused role 'qkv' is cut into {groups} groups of parts .*, but {features} output features do not divide"
    )
    with pytest.raises(TargetError, match=message):
        fused.slices(["query"], features, None)


@pytest.mark.parametrize("config", [None, transformers.PretrainedConfig(num_heads=0), transformers.PretrainedConfig()])
def test_a_share_that_the_configuration_does_not_hold_is_an_error(config: Any) -> None:
    fused = Fused(role="qkv", parts={"query": "num_heads", "key": 1})
    with pytest.raises(
        TargetError, match="the fused role 'qkv' needs the integer 'num_heads' of the configuration, found"
    ):
        fused.slices(["query"], 24, config)


def test_a_part_of_a_module_without_a_width_is_an_error() -> None:
    family = ModelFamily(name="odd", roles={"qkv": ("norm",)}, fused=(Fused(role="qkv", parts={"query": 1, "key": 1}),))
    with pytest.raises(
        TargetError, match=r"role 'query' is a slice of 'layers\.0\.norm', whose output width is unknown: LayerNorm"
    ):
        resolve_targets(Unknown(), "query", family)


# -- what differs from place to place ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["query", "q_proj", "*.q_proj", "re:.*q_proj"])
def test_rank_and_alpha_differ_where_a_pattern_matches(pattern: str) -> None:
    model = Unknown(1)
    method = LoRA(rank=2, alpha=4, rank_pattern={pattern: 3}, alpha_pattern={pattern: 9, "fc": 2})
    inject(model, method, ["q_proj", "k_proj", "fc"], family=TOY)
    adapters = {path.rsplit(".", 1)[-1]: layer.adapters["default"] for path, layer in adapter_layers(model).items()}
    assert {name: (a.rank, a.scaling, tuple(a.lora_A.shape)) for name, a in adapters.items()} == {
        "q_proj": (3, 3.0, (3, 4)),
        "k_proj": (2, 2.0, (2, 4)),
        "fc": (2, 1.0, (2, 4)),
    }


def test_the_first_pattern_that_matches_counts() -> None:
    model = Unknown(2)
    inject(model, LoRA(rank=2, rank_pattern={"layers.0.*": 3, "q_proj": 4}), "q_proj", family=TOY)
    ranks = {path: layer.adapters["default"].rank for path, layer in adapter_layers(model).items()}
    assert ranks == {QUERIES[0]: 3, QUERIES[1]: 4}


@pytest.mark.parametrize("field", ["rank", "alpha"])
@pytest.mark.parametrize("pattern", ["q_prj", "k_proj", "re:.*q", "up"])
def test_a_pattern_that_matches_no_adapted_place_is_an_error(field: str, pattern: str) -> None:
    model = Unknown()
    method = LoRA(rank=2, **{f"{field}_pattern": {pattern: 4}})
    message = rf"{field}_pattern '{re.escape(pattern)}' matches none of the 4 adapted places, such as 'layers.0.self_attn.q_proj'"
    with pytest.raises(TargetError, match=message):
        inject(model, method, "query", family=TOY)
    assert not adapter_layers(model)
