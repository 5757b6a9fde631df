"""Parameter-efficient fine-tuning for PyTorch Lightning.

Names are imported when they are first used, so that ``import lightning_peft`` costs no more than ``import lightning``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_peft import strategies as _strategies

if TYPE_CHECKING:
    from lightning_peft.activation import active_adapters as active_adapters
    from lightning_peft.activation import adapters_disabled as adapters_disabled
    from lightning_peft.activation import drop_adapters as drop_adapters
    from lightning_peft.activation import set_active_adapters as set_active_adapters
    from lightning_peft.adapter_formats import AdapterFormat as AdapterFormat
    from lightning_peft.adapter_formats import ForeignAdapter as ForeignAdapter
    from lightning_peft.adapter_layer import AdapterLayer as AdapterLayer
    from lightning_peft.adapter_layer import adapter_layers as adapter_layers
    from lightning_peft.adapter_layer import adapter_names as adapter_names
    from lightning_peft.adapter_tools.combining import combine_adapters as combine_adapters
    from lightning_peft.adapter_tools.combining import combine_folders as combine_folders
    from lightning_peft.adapter_tools.comparing import diff_adapters as diff_adapters
    from lightning_peft.adapter_tools.comparing import spectrum as spectrum
    from lightning_peft.adapter_tools.conversion import extract_lora as extract_lora
    from lightning_peft.adapter_tools.conversion import to_lora as to_lora
    from lightning_peft.adapter_tools.distilling import distil_adapter as distil_adapter
    from lightning_peft.adapter_tools.pruning import prune_folder as prune_folder
    from lightning_peft.adapter_tools.pruning import prune_rank as prune_rank
    from lightning_peft.adapter_tools.spectra import analyze_weights as analyze_weights
    from lightning_peft.adapter_tools.spectra import subspace_similarity as subspace_similarity
    from lightning_peft.calibration import initialize_from_data as initialize_from_data
    from lightning_peft.callbacks import AdapterCheckpoint as AdapterCheckpoint
    from lightning_peft.callbacks import ForgettingEvaluation as ForgettingEvaluation
    from lightning_peft.callbacks import MergeAdapters as MergeAdapters
    from lightning_peft.callbacks import Phase as Phase
    from lightning_peft.callbacks import PhaseSchedule as PhaseSchedule
    from lightning_peft.callbacks import ResourceMonitor as ResourceMonitor
    from lightning_peft.callbacks import RouterMonitor as RouterMonitor
    from lightning_peft.callbacks import SpectrumMonitor as SpectrumMonitor
    from lightning_peft.cli import PEFTCLI as PEFTCLI
    from lightning_peft.composition import Adaptation as Adaptation
    from lightning_peft.composition import inject_all as inject_all
    from lightning_peft.composition import load_adapters as load_adapters
    from lightning_peft.composition import save_adapters as save_adapters
    from lightning_peft.data import ClassificationDataModule as ClassificationDataModule
    from lightning_peft.data import ImageFolderDataModule as ImageFolderDataModule
    from lightning_peft.data import InstructionDataModule as InstructionDataModule
    from lightning_peft.data import MultipleChoiceDataModule as MultipleChoiceDataModule
    from lightning_peft.data import RowsDataModule as RowsDataModule
    from lightning_peft.data import Seq2SeqDataModule as Seq2SeqDataModule
    from lightning_peft.data import TextDataModule as TextDataModule
    from lightning_peft.data import TokenClassificationDataModule as TokenClassificationDataModule
    from lightning_peft.errors import LightningPEFTError as LightningPEFTError
    from lightning_peft.errors import LightningPEFTWarning as LightningPEFTWarning
    from lightning_peft.evaluation.anchors import AnchorText as AnchorText
    from lightning_peft.evaluation.budget import ForgettingBudget as ForgettingBudget
    from lightning_peft.evaluation.forgetting import measure_forgetting as measure_forgetting
    from lightning_peft.families import Fused as Fused
    from lightning_peft.families import ModelFamily as ModelFamily
    from lightning_peft.fused_blocks import fuse_blocks as fuse_blocks
    from lightning_peft.fused_blocks import unfuse_blocks as unfuse_blocks
    from lightning_peft.half_precision import FrozenHalfPrecision as FrozenHalfPrecision
    from lightning_peft.hookspecs import hookimpl as hookimpl
    from lightning_peft.injection import Injection as Injection
    from lightning_peft.interfaces import Adapter as Adapter
    from lightning_peft.interfaces import EvalTask as EvalTask
    from lightning_peft.interfaces import Exporter as Exporter
    from lightning_peft.interfaces import Method as Method
    from lightning_peft.interfaces import Quantizer as Quantizer
    from lightning_peft.interfaces import Slice as Slice
    from lightning_peft.interfaces import Target as Target
    from lightning_peft.inventory import AdapterInfo as AdapterInfo
    from lightning_peft.inventory import list_adapters as list_adapters
    from lightning_peft.inventory import rename_adapter as rename_adapter
    from lightning_peft.layer_paths import ComputePath as ComputePath
    from lightning_peft.layer_paths import ComputePaths as ComputePaths
    from lightning_peft.layer_paths import compute_paths as compute_paths
    from lightning_peft.loaders import CausalLMLoader as CausalLMLoader
    from lightning_peft.loaders import ImageClassificationLoader as ImageClassificationLoader
    from lightning_peft.loaders import ModelLoader as ModelLoader
    from lightning_peft.loaders import MultipleChoiceLoader as MultipleChoiceLoader
    from lightning_peft.loaders import Seq2SeqLoader as Seq2SeqLoader
    from lightning_peft.loaders import SequenceClassificationLoader as SequenceClassificationLoader
    from lightning_peft.loaders import TokenClassificationLoader as TokenClassificationLoader
    from lightning_peft.loaders import TransformersLoader as TransformersLoader
    from lightning_peft.losses_in_chunks import ChunkedLoss as ChunkedLoss
    from lightning_peft.losses_in_chunks import chunked_loss as chunked_loss
    from lightning_peft.merged_copies import merged_copy as merged_copy
    from lightning_peft.merging import merge_adapters as merge_adapters
    from lightning_peft.merging import unmerge_adapters as unmerge_adapters
    from lightning_peft.mixin import PEFTMixin as PEFTMixin
    from lightning_peft.model_card import CardFacts as CardFacts
    from lightning_peft.module import PEFTModule as PEFTModule
    from lightning_peft.offloading import bring_back_adapters as bring_back_adapters
    from lightning_peft.offloading import offload_adapters as offload_adapters
    from lightning_peft.optimization import parameter_groups as parameter_groups
    from lightning_peft.optimization import scale_learning_rates as scale_learning_rates
    from lightning_peft.out_of_core import merge_folder as merge_folder
    from lightning_peft.plugins.adalora import AdaLoRA as AdaLoRA
    from lightning_peft.plugins.adalora import allocated_ranks as allocated_ranks
    from lightning_peft.plugins.bitfit import BitFit as BitFit
    from lightning_peft.plugins.bottleneck import Bottleneck as Bottleneck
    from lightning_peft.plugins.compacter import Compacter as Compacter
    from lightning_peft.plugins.dora import DoRA as DoRA
    from lightning_peft.plugins.eva import EVA as EVA
    from lightning_peft.plugins.exact_match import ExactMatch as ExactMatch
    from lightning_peft.plugins.full import FullFineTuning as FullFineTuning
    from lightning_peft.plugins.gguf_format import GGUFAdapter as GGUFAdapter
    from lightning_peft.plugins.gguf_format import GGUFFile as GGUFFile
    from lightning_peft.plugins.litgpt_format import LitGPTFile as LitGPTFile
    from lightning_peft.plugins.lm_eval_harness import LMEvalHarness as LMEvalHarness
    from lightning_peft.plugins.loftq import LoftQ as LoftQ
    from lightning_peft.plugins.lora import LoRA as LoRA
    from lightning_peft.plugins.lora_fa import LoRAFA as LoRAFA
    from lightning_peft.plugins.lora_ga import LoRAGA as LoRAGA
    from lightning_peft.plugins.lora_mixture import LoRAMixture as LoRAMixture
    from lightning_peft.plugins.lora_plus import LoRAPlus as LoRAPlus
    from lightning_peft.plugins.loralib_format import LoralibFile as LoralibFile
    from lightning_peft.plugins.minimal_pairs import MinimalPairs as MinimalPairs
    from lightning_peft.plugins.mix_lora import MixLoRA as MixLoRA
    from lightning_peft.plugins.moe_upcycling import MoEUpcycling as MoEUpcycling
    from lightning_peft.plugins.multiple_choice import MultipleChoice as MultipleChoice
    from lightning_peft.plugins.norm_tuning import NormTuning as NormTuning
    from lightning_peft.plugins.olora import OLoRA as OLoRA
    from lightning_peft.plugins.p_tuning import PTuning as PTuning
    from lightning_peft.plugins.perplexity import Perplexity as Perplexity
    from lightning_peft.plugins.pissa import PiSSA as PiSSA
    from lightning_peft.plugins.prefix_tuning import PrefixTuning as PrefixTuning
    from lightning_peft.plugins.prompt_tuning import PromptTuning as PromptTuning
    from lightning_peft.plugins.qlora import QLoRA as QLoRA
    from lightning_peft.plugins.quantizers import FP4 as FP4
    from lightning_peft.plugins.quantizers import NF4 as NF4
    from lightning_peft.plugins.quantizers import Int8 as Int8
    from lightning_peft.plugins.token_diversity import TokenDiversity as TokenDiversity
    from lightning_peft.plugins.top_layers import TopLayers as TopLayers
    from lightning_peft.plugins.torchtune_format import TorchtuneFile as TorchtuneFile
    from lightning_peft.plugins.trainable_tokens import TrainableTokens as TrainableTokens
    from lightning_peft.plugins.vera import VeRA as VeRA
    from lightning_peft.population import Halving as Halving
    from lightning_peft.population import Member as Member
    from lightning_peft.population import MemberGrid as MemberGrid
    from lightning_peft.population import MemberResult as MemberResult
    from lightning_peft.population import PopulationCheckpoint as PopulationCheckpoint
    from lightning_peft.population import PopulationModule as PopulationModule
    from lightning_peft.quantized_merging import MergeReport as MergeReport
    from lightning_peft.registry import get_registry as get_registry
    from lightning_peft.routers import Assignment as Assignment
    from lightning_peft.routers import Router as Router
    from lightning_peft.rows import adapter_rows as adapter_rows
    from lightning_peft.rows import set_row_adapters as set_row_adapters
    from lightning_peft.scaling import adapter_scale as adapter_scale
    from lightning_peft.scaling import adapters_scaled as adapters_scaled
    from lightning_peft.scaling import scale_adapters as scale_adapters
    from lightning_peft.state import adapter_state_dict as adapter_state_dict
    from lightning_peft.state import load_adapter as load_adapter
    from lightning_peft.state import save_adapter as save_adapter
    from lightning_peft.strategies.clipping import clip_gradients_by_norm as clip_gradients_by_norm
    from lightning_peft.strategies.clipping import gradient_norm as gradient_norm
    from lightning_peft.strategies.cost import communication_cost as communication_cost
    from lightning_peft.strategies.cost import step_cost as step_cost
    from lightning_peft.strategies.cost import tensors_of as tensors_of
    from lightning_peft.strategies.ddp import PEFTDDPStrategy as PEFTDDPStrategy
    from lightning_peft.strategies.expert_cost import expert_cost as expert_cost
    from lightning_peft.strategies.fsdp import PEFTFSDPStrategy as PEFTFSDPStrategy
    from lightning_peft.strategies.split_cost import tensor_parallel_bytes as tensor_parallel_bytes
    from lightning_peft.summary import trainable_summary as trainable_summary
    from lightning_peft.surgery import delete_adapter as delete_adapter
    from lightning_peft.surgery import inject as inject
    from lightning_peft.surgery import materialize_adapters as materialize_adapters
    from lightning_peft.surgery import unload_adapters as unload_adapters
    from lightning_peft.swapping import pad_adapter_rank as pad_adapter_rank
    from lightning_peft.swapping import swap_adapter as swap_adapter
    from lightning_peft.targets import Targets as Targets
    from lightning_peft.targets import resolve_targets as resolve_targets
    from lightning_peft.tasks import CausalLMTask as CausalLMTask
    from lightning_peft.tasks import ClassificationTask as ClassificationTask
    from lightning_peft.tasks import MultipleChoiceTask as MultipleChoiceTask
    from lightning_peft.tasks import Seq2SeqTask as Seq2SeqTask
    from lightning_peft.tasks import Task as Task
    from lightning_peft.tasks import TokenClassificationTask as TokenClassificationTask

__version__ = "0.1.0.dev0"

_HOME = {
    "AdaLoRA": "plugins.adalora",
    "Adaptation": "composition",
    "Adapter": "interfaces",
    "AdapterCheckpoint": "callbacks",
    "AdapterFormat": "adapter_formats",
    "AdapterInfo": "inventory",
    "AdapterLayer": "adapter_layer",
    "AnchorText": "evaluation.anchors",
    "Assignment": "routers",
    "BitFit": "plugins.bitfit",
    "Bottleneck": "plugins.bottleneck",
    "CardFacts": "model_card",
    "CausalLMLoader": "loaders",
    "CausalLMTask": "tasks",
    "ChunkedLoss": "losses_in_chunks",
    "ClassificationDataModule": "data",
    "ClassificationTask": "tasks",
    "Compacter": "plugins.compacter",
    "ComputePath": "layer_paths",
    "ComputePaths": "layer_paths",
    "DoRA": "plugins.dora",
    "EVA": "plugins.eva",
    "EvalTask": "interfaces",
    "ExactMatch": "plugins.exact_match",
    "Exporter": "interfaces",
    "FP4": "plugins.quantizers",
    "ForeignAdapter": "adapter_formats",
    "ForgettingBudget": "evaluation.budget",
    "ForgettingEvaluation": "callbacks",
    "FrozenHalfPrecision": "half_precision",
    "FullFineTuning": "plugins.full",
    "Fused": "families",
    "GGUFAdapter": "plugins.gguf_format",
    "GGUFFile": "plugins.gguf_format",
    "Halving": "population",
    "ImageClassificationLoader": "loaders",
    "ImageFolderDataModule": "data",
    "Injection": "injection",
    "InstructionDataModule": "data",
    "Int8": "plugins.quantizers",
    "LMEvalHarness": "plugins.lm_eval_harness",
    "LightningPEFTError": "errors",
    "LightningPEFTWarning": "errors",
    "LitGPTFile": "plugins.litgpt_format",
    "LoRA": "plugins.lora",
    "LoRAFA": "plugins.lora_fa",
    "LoRAGA": "plugins.lora_ga",
    "LoRAMixture": "plugins.lora_mixture",
    "LoRAPlus": "plugins.lora_plus",
    "LoftQ": "plugins.loftq",
    "LoralibFile": "plugins.loralib_format",
    "Member": "population",
    "MemberGrid": "population",
    "MemberResult": "population",
    "MergeAdapters": "callbacks",
    "MergeReport": "quantized_merging",
    "Method": "interfaces",
    "MinimalPairs": "plugins.minimal_pairs",
    "MixLoRA": "plugins.mix_lora",
    "MoEUpcycling": "plugins.moe_upcycling",
    "ModelFamily": "families",
    "ModelLoader": "loaders",
    "MultipleChoice": "plugins.multiple_choice",
    "MultipleChoiceDataModule": "data",
    "MultipleChoiceLoader": "loaders",
    "MultipleChoiceTask": "tasks",
    "NF4": "plugins.quantizers",
    "NormTuning": "plugins.norm_tuning",
    "OLoRA": "plugins.olora",
    "PEFTCLI": "cli",
    "PEFTDDPStrategy": "strategies.ddp",
    "PEFTFSDPStrategy": "strategies.fsdp",
    "PEFTMixin": "mixin",
    "PEFTModule": "module",
    "PTuning": "plugins.p_tuning",
    "Perplexity": "plugins.perplexity",
    "Phase": "callbacks",
    "PhaseSchedule": "callbacks",
    "PiSSA": "plugins.pissa",
    "PopulationCheckpoint": "population",
    "PopulationModule": "population",
    "PrefixTuning": "plugins.prefix_tuning",
    "PromptTuning": "plugins.prompt_tuning",
    "QLoRA": "plugins.qlora",
    "Quantizer": "interfaces",
    "ResourceMonitor": "callbacks",
    "Router": "routers",
    "RouterMonitor": "callbacks",
    "RowsDataModule": "data",
    "Seq2SeqDataModule": "data",
    "Seq2SeqLoader": "loaders",
    "Seq2SeqTask": "tasks",
    "SequenceClassificationLoader": "loaders",
    "Slice": "interfaces",
    "SpectrumMonitor": "callbacks",
    "Target": "interfaces",
    "Targets": "targets",
    "Task": "tasks",
    "TextDataModule": "data",
    "TokenClassificationDataModule": "data",
    "TokenClassificationLoader": "loaders",
    "TokenClassificationTask": "tasks",
    "TokenDiversity": "plugins.token_diversity",
    "TopLayers": "plugins.top_layers",
    "TorchtuneFile": "plugins.torchtune_format",
    "TrainableTokens": "plugins.trainable_tokens",
    "TransformersLoader": "loaders",
    "VeRA": "plugins.vera",
    "active_adapters": "activation",
    "adapter_layers": "adapter_layer",
    "adapter_names": "adapter_layer",
    "adapter_rows": "rows",
    "adapter_scale": "scaling",
    "adapter_state_dict": "state",
    "adapters_disabled": "activation",
    "adapters_scaled": "scaling",
    "allocated_ranks": "plugins.adalora",
    "analyze_weights": "adapter_tools.spectra",
    "bring_back_adapters": "offloading",
    "chunked_loss": "losses_in_chunks",
    "clip_gradients_by_norm": "strategies.clipping",
    "combine_adapters": "adapter_tools.combining",
    "combine_folders": "adapter_tools.combining",
    "communication_cost": "strategies.cost",
    "compute_paths": "layer_paths",
    "delete_adapter": "surgery",
    "diff_adapters": "adapter_tools.comparing",
    "distil_adapter": "adapter_tools.distilling",
    "drop_adapters": "activation",
    "expert_cost": "strategies.expert_cost",
    "extract_lora": "adapter_tools.conversion",
    "fuse_blocks": "fused_blocks",
    "get_registry": "registry",
    "gradient_norm": "strategies.clipping",
    "hookimpl": "hookspecs",
    "initialize_from_data": "calibration",
    "inject": "surgery",
    "inject_all": "composition",
    "list_adapters": "inventory",
    "load_adapter": "state",
    "load_adapters": "composition",
    "materialize_adapters": "surgery",
    "measure_forgetting": "evaluation.forgetting",
    "merge_adapters": "merging",
    "merge_folder": "out_of_core",
    "merged_copy": "merged_copies",
    "offload_adapters": "offloading",
    "pad_adapter_rank": "swapping",
    "parameter_groups": "optimization",
    "prune_folder": "adapter_tools.pruning",
    "prune_rank": "adapter_tools.pruning",
    "rename_adapter": "inventory",
    "resolve_targets": "targets",
    "save_adapter": "state",
    "save_adapters": "composition",
    "scale_adapters": "scaling",
    "scale_learning_rates": "optimization",
    "set_active_adapters": "activation",
    "set_row_adapters": "rows",
    "spectrum": "adapter_tools.comparing",
    "step_cost": "strategies.cost",
    "subspace_similarity": "adapter_tools.spectra",
    "swap_adapter": "swapping",
    "tensor_parallel_bytes": "strategies.split_cost",
    "tensors_of": "strategies.cost",
    "to_lora": "adapter_tools.conversion",
    "trainable_summary": "summary",
    "unfuse_blocks": "fused_blocks",
    "unload_adapters": "surgery",
    "unmerge_adapters": "merging",
}
"""Public name to the module that defines it."""

__all__ = sorted(_HOME)


_strategies.register()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
