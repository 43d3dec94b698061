"""attr_engine: which training tracks made this generated piece of music, and how sure are we."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attr_engine.diffusion import DrawPlan
    from attr_engine.effectfile import read_effects
    from attr_engine.effects import measure_effects
    from attr_engine.errors import UserError
    from attr_engine.fisher import Fisher, fit_fisher
    from attr_engine.latents import LatentDataset, LatentWriter, MemoryTracks
    from attr_engine.models.stable_audio import load_model
    from attr_engine.pipeline import attribute
    from attr_engine.result import Attribution
    from attr_engine.rollup import roll_up
    from attr_engine.score import SCORE_FUNCTIONS, scores
    from attr_engine.scorefile import read_scores
    from attr_engine.settings import Settings
    from attr_engine.unlearn import unlearn_query
    from attr_engine.updates import Update

__version__ = "0.1.0"

# Where each public name lives: they are imported when first used, so that what needs no torch
# (help, the composer of the demo) does not wait for it.
_HOMES = {
    "SCORE_FUNCTIONS": "score",
    "Attribution": "result",
    "DrawPlan": "diffusion",
    "Fisher": "fisher",
    "LatentDataset": "latents",
    "LatentWriter": "latents",
    "MemoryTracks": "latents",
    "Settings": "settings",
    "Update": "updates",
    "UserError": "errors",
    "attribute": "pipeline",
    "fit_fisher": "fisher",
    "load_model": "models.stable_audio",
    "measure_effects": "effects",
    "read_effects": "effectfile",
    "read_scores": "scorefile",
    "roll_up": "rollup",
    "scores": "score",
    "unlearn_query": "unlearn",
}

__all__ = [
    "SCORE_FUNCTIONS",
    "Attribution",
    "DrawPlan",
    "Fisher",
    "LatentDataset",
    "LatentWriter",
    "MemoryTracks",
    "Settings",
    "Update",
    "UserError",
    "attribute",
    "fit_fisher",
    "load_model",
    "measure_effects",
    "read_effects",
    "read_scores",
    "roll_up",
    "scores",
    "unlearn_query",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'attr_engine' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"attr_engine.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
