"""The built-in routers of mixtures of experts: tokens choose experts by softmax, with noise, by sigmoid, or experts choose tokens.

Their arithmetic is in :mod:`lightning_peft.moe.routing`.
"""

from __future__ import annotations

from lightning_peft.hookspecs import hookimpl
from lightning_peft.moe.routing import ExpertChoiceRouter, NoisyTopKRouter, SigmoidRouter, TopKRouter
from lightning_peft.routers import Router


@hookimpl
def register_routers() -> list[type[Router]]:
    """Register the routers."""
    return [TopKRouter, NoisyTopKRouter, SigmoidRouter, ExpertChoiceRouter]
