"""Where the base model comes from: objects that load it when the Trainer asks, not before.

A loader is a frozen dataclass, so it can stand in a YAML file, be validated at once and load late, on every rank.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import nn
from typing_extensions import override

from lightning_peft.adapter_layer import base_modules, unwrapped
from lightning_peft.arithmetic.parameter_copies import parameter_places, replaced_names
from lightning_peft.composition import Adaptation
from lightning_peft.errors import ConfigError, LightningPEFTError
from lightning_peft.families import ModelFamily
from lightning_peft.injection import Injection, all_places
from lightning_peft.interfaces import Method
from lightning_peft.quantized_layers import packed_layers
from lightning_peft.saved_modules import inside, note_new
from lightning_peft.surgery import plan, resolve_family
from lightning_peft.targets import Targets, matches

_DTYPES = ("auto", "float32", "bfloat16", "float16")


class ModelLoader(ABC):
    """Loads a base model. A subclass is a ``@dataclass(frozen=True, kw_only=True)``."""

    @abstractmethod
    def load(self) -> nn.Module:
        """Return the base model, freshly loaded."""

    def load_for(self, method: Method) -> nn.Module:
        """Return the base model for ``method``, which may be prepared for it while it is loaded.

        A loader that reads weights one by one uses :meth:`~lightning_peft.interfaces.Method.layer_preparation`. The others
        leave it to the injection.
        """
        return self.load()

    def load_unread(self) -> nn.Module | None:
        """Return the base model without the values of its parameters, which are on the meta device with notes of where they are.

        Asked for where every process keeps a part of the base only: see :mod:`lightning_peft.unread_weights`. None says that this
        loader, or what it loads, cannot be read in parts.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class TransformersLoader(ModelLoader):
    """A model of transformers, from a local folder or a hub id; a subclass says of which kind.

    Modules that the checkpoint has no weights for, such as the head of a task that is new, are noted: see :func:`~lightning_peft.saved_modules.new_modules`.
    """

    auto_class: ClassVar[str]
    """The class of transformers that loads such a model, such as ``AutoModelForCausalLM``."""
    kind: ClassVar[str]
    """What such a model is called in messages."""

    path: str
    """Local folder, or id on the Hugging Face hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; ``auto`` is that of the checkpoint."""
    attn_implementation: str | None = None
    """Attention: ``sdpa``, ``eager``, ``flash_attention_2``; transformers' choice if None."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python code that the hub repository brings along. Only for repositories you trust."""

    def __post_init__(self) -> None:
        label = type(self).__name__
        if not self.path:
            raise ConfigError(f"{label} path must be a folder or a hub id, got {self.path!r}")
        if self.dtype not in _DTYPES:
            raise ConfigError(f"{label} dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")

    def model_options(self) -> dict[str, Any]:
        """Return what of this kind goes into the configuration of the model, for ``from_pretrained``."""
        return {}

    @override
    def load(self) -> nn.Module:
        """Return the model in train mode, so that its dropout is active when it is trained.

        Raises:
            ConfigError: nothing can be loaded from ``path``.
        """
        return self._ready(self._from_pretrained())

    @override
    def load_for(self, method: Method) -> nn.Module:
        """Return the model as :meth:`load` and ``method.prepare`` would give it, prepared layer by layer as its weights are read.

        So a quantised model never stands in memory in full precision. A method without a layer preparation, and a
        checkpoint that is quantised already, are loaded as usual.

        Raises:
            ConfigError: nothing can be loaded from ``path``.
        """
        if type(method).layer_preparation is Method.layer_preparation or self._is_quantized():
            return self.load()
        from lightning_peft.layerwise_loading import load_layerwise

        return self._ready(load_layerwise(self._from_pretrained, method))

    def _from_pretrained(self, **more: Any) -> nn.Module:
        import transformers

        options = {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code, **self.model_options(), **more}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        if self.revision is not None:
            options["revision"] = self.revision
        model: nn.Module
        try:
            model, found = getattr(transformers, self.auto_class).from_pretrained(
                self.path, output_loading_info=True, **options
            )
        except LightningPEFTError:  # from a method that looked at the model
            raise
        except (OSError, ValueError) as error:
            raise ConfigError(f"no {self.kind} could be loaded from {self.path!r}: {error}") from error
        note_new(model, _roots(model, [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]))
        return model

    def _is_quantized(self) -> bool:
        """Tell whether the configuration of the checkpoint says that its weights are quantised."""
        from transformers import PretrainedConfig

        revision = {} if self.revision is None else {"revision": self.revision}
        try:
            config, _ = PretrainedConfig.get_config_dict(self.path, **revision)
        except (OSError, ValueError):
            return False  # from_pretrained will say what is wrong
        parts = [config, *(part for part in config.values() if isinstance(part, dict))]
        return any(part.get("quantization_config") for part in parts)

    def _ready(self, loaded: nn.Module) -> nn.Module:
        """Return a loaded model as it is trained."""
        model: Any = loaded
        if self.gradient_checkpointing:
            # The non-reentrant kind also works when the inputs of a block need no gradient, as over a frozen base.
            # Newer versions of transformers have another name for it.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            model.config.use_cache = False
        return loaded.train()


@dataclass(frozen=True, kw_only=True)
class CausalLMLoader(TransformersLoader):
    """A causal language model of transformers, from a local folder or a hub id.

    Example:
        >>> CausalLMLoader(path="my-folder", dtype="float16").gradient_checkpointing
        False
    """

    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    kind: ClassVar[str] = "causal language model"

    @override
    def load_unread(self) -> nn.Module | None:
        """Return the model of a local folder of safetensors files; None for any other, or one that is quantised or brings code.

        Raises:
            ConfigError: the files lack a weight, or hold one in another shape.
        """
        if self.trust_remote_code or self.revision is not None or self._is_quantized():
            return None
        from lightning_peft.out_of_core.unread_models import unread_model

        attention = {} if self.attn_implementation is None else {"attn_implementation": self.attn_implementation}
        model = unread_model(self.path, dtype=self.dtype, **attention)
        return None if model is None else self._ready(model)


@dataclass(frozen=True, kw_only=True)
class Seq2SeqLoader(TransformersLoader):
    """A text-to-text model with encoder and decoder, such as T5 or BART."""

    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    kind: ClassVar[str] = "text-to-text model"


@dataclass(frozen=True, kw_only=True)
class MultipleChoiceLoader(TransformersLoader):
    """An encoder that scores each choice of a row, such as RoBERTa."""

    auto_class: ClassVar[str] = "AutoModelForMultipleChoice"
    kind: ClassVar[str] = "model for multiple choice"


@dataclass(frozen=True, kw_only=True)
class _ClassificationLoader(TransformersLoader):
    num_labels: int = 2
    """Classes; 1 is a number to be predicted, a regression."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.num_labels) is not int or self.num_labels < 1:
            raise ConfigError(f"{type(self).__name__} num_labels must be 1 or more, got {self.num_labels!r}")

    @override
    def model_options(self) -> dict[str, Any]:
        # A checkpoint may have a head of another size, of the task it was trained for before: it makes place for a new one.
        return {"num_labels": self.num_labels, "ignore_mismatched_sizes": True}


@dataclass(frozen=True, kw_only=True)
class SequenceClassificationLoader(_ClassificationLoader):
    """A model that puts each sequence into one of ``num_labels`` classes, or gives it a number.

    Example:
        >>> SequenceClassificationLoader(path="my-folder", num_labels=77).pad_token_id is None
        True
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    kind: ClassVar[str] = "model for the classification of sequences"

    pad_token_id: int | None = None
    """Token that fills up short rows, where the configuration of the model names none, as of most decoders: they read the class from
    the last token before."""

    @override
    def model_options(self) -> dict[str, Any]:
        padding = {} if self.pad_token_id is None else {"pad_token_id": self.pad_token_id}
        return {**super().model_options(), **padding}


@dataclass(frozen=True, kw_only=True)
class TokenClassificationLoader(_ClassificationLoader):
    """A model that puts each token into one of ``num_labels`` classes."""

    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    kind: ClassVar[str] = "model for the classification of tokens"


@dataclass(frozen=True, kw_only=True)
class ImageClassificationLoader(_ClassificationLoader):
    """A model that puts each image into one of ``num_labels`` classes, such as ViT."""

    auto_class: ClassVar[str] = "AutoModelForImageClassification"
    kind: ClassVar[str] = "model for the classification of images"


def _roots(model: nn.Module, missing: Iterable[str]) -> list[str]:
    """Return the largest modules all of whose parameters are ``missing``."""
    gone = set(missing)
    lost = {
        path
        for path, module in model.named_modules()
        if path and (names := [name for name, _ in module.named_parameters(prefix=path)]) and gone.issuperset(names)
    }
    return sorted(path for path in lost if not any(path[:end] in lost for end in _dots(path)))


def _dots(path: str) -> list[int]:
    return [place for place, letter in enumerate(path) if letter == "."]


def training_also(
    model: nn.Module, adaptations: Sequence[Adaptation], new: Sequence[str], *, by_rows: bool = False
) -> list[Adaptation]:
    """Return ``adaptations`` with the modules ``new``, which have random weights, among the ``modules_to_save`` of the first.

    An adapter has to hold such a module whole, as its base can never be loaded again: what else was to adapt a part of it leaves it out. Left
    as it is one that an adaptation holds already: in its ``modules_to_save``, or as targets that it names and its method trains in full.

    Args:
        model: the base.
        adaptations: with their names.
        new: paths of modules.
        by_rows: each acts on rows of its own, and so each one gets them.

    Raises:
        ConfigError: an adaptation would be left with nothing but parts of ``new``, of which it cannot hold the random weights, or one
            of ``new`` is quantised.
    """
    if not new:
        return list(adaptations)
    if by_rows:
        return [training_also(model, [one], new)[0] for one in adaptations]
    family = resolve_family(model, None)
    plans = [plan(model, one.method, one.targets, one.modules_to_save, family) for one in adaptations]
    named_too = [one.targets is not None for one in adaptations]
    lacking = [
        path
        for path in new
        if not any(_holds(model, one, path, family, too) for one, too in zip(plans, named_too, strict=True))
    ]
    if not lacking:
        return list(adaptations)
    packed = [place for place in packed_layers(model) if inside(place, lacking)]
    if packed:
        raise ConfigError(
            f"{', '.join(packed)} of {type(model).__name__} has new, random weights that must be trained in full, but was quantised as it was loaded; "
            f"keep it out of that, as with skip={packed}"
        )
    first, *others = adaptations
    if first.targets is not None:  # those that nobody named leave room by themselves
        first = _without(model, first, lacking, family)
    given = [first.modules_to_save] if isinstance(first.modules_to_save, str) else first.modules_to_save or []
    return [
        replace(first, modules_to_save=[*given, *lacking]),
        *(_without(model, one, lacking, family) for one in others),
    ]


def _holds(model: nn.Module, injection: Injection, path: str, family: ModelFamily, by_method: bool) -> bool:
    """Tell whether an adapter will hold its own values of all parameters of the module at ``path``, saved or, ``by_method``, as targets."""
    if inside(path, [target.path for target in injection.saved]):
        return True
    if not by_method:
        return False
    modules = {place: unwrapped(module) for place, module in base_modules(model) if inside(place, [path])}
    held = {
        (target.path, name)
        for target in all_places(model, injection, family)
        if target.path in modules
        for name in replaced_names(injection.method.adapter(modules[target.path], target))
    }
    return held >= {(place, name) for place, names in parameter_places(model, [path]).items() for name in names}


def _without(model: nn.Module, one: Adaptation, lacking: Sequence[str], family: ModelFamily) -> Adaptation:
    """Return an adaptation that adapts no part of ``lacking``."""
    injection = plan(model, one.method, one.targets, one.modules_to_save, family)
    hit = [path for path in lacking if any(inside(target.path, [path]) for target in injection.targets)]
    if not hit:
        return one
    spec = Targets.of(one.method.default_targets if one.targets is None else one.targets)
    words = [word for word in spec.include if any(not inside(path, hit) for path in matches(word, model, family))]
    if not words:
        raise ConfigError(
            f"{type(one.method).__name__} targets={list(spec.include)} adapt nothing but {', '.join(hit)}, which the checkpoint has no weights for: "
            "an adapter must hold them whole, as no other run starts from the same random ones. Name other targets, and they are trained in "
            "full beside them; to train them alone, take a method that trains in full"
        )
    parts = [rf"re:{re.escape(path)}(\..*)?" for path in hit]
    return replace(one, targets=replace(spec, include=words, exclude=[*spec.exclude, *parts]))


def loaded(base: ModelLoader | nn.Module, strategy: object, methods: Sequence[Method]) -> nn.Module:
    """Return the base, without its values where ``strategy`` has each process read what it keeps and nothing needs them before.

    Args:
        base: a loader, or the model itself.
        strategy: that of the Trainer, if there is one.
        methods: those that adapt the base; it is loaded for the first one.
    """
    if isinstance(base, nn.Module):
        return base
    needed = any(type(one).prepare is not Method.prepare or one.data_driven for one in methods)
    model = base.load_unread() if getattr(strategy, "reads_weights", False) and not needed else None
    if model is not None:
        return model
    return base.load_for(methods[0]) if methods else base.load()
