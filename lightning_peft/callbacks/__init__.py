"""Callbacks: the verbs in time. They find adapter layers in the model and know nothing of methods."""

from lightning_peft.callbacks.checkpoint import AdapterCheckpoint
from lightning_peft.callbacks.forgetting import ForgettingEvaluation
from lightning_peft.callbacks.merge import MergeAdapters
from lightning_peft.callbacks.phases import Phase, PhaseSchedule
from lightning_peft.callbacks.resources import ResourceMonitor
from lightning_peft.callbacks.router_monitor import RouterMonitor
from lightning_peft.callbacks.spectrum_monitor import SpectrumMonitor

__all__ = [
    "AdapterCheckpoint",
    "ForgettingEvaluation",
    "MergeAdapters",
    "Phase",
    "PhaseSchedule",
    "ResourceMonitor",
    "RouterMonitor",
    "SpectrumMonitor",
]
