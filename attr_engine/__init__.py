"""attr_engine: which training tracks made this generated piece of music, and how sure are we."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attr_engine.diffusion import DrawPlan
    from attr_engine.effectfile import read_effects
    from attr_engine.effects import measure_effects
    from attr_engine.errors import Cancelled, UserError
    from attr_engine.estimate import Estimate, dry_run
    from attr_engine.fisher import Fisher, fit_fisher
    from attr_engine.follow import finished_units
    from attr_engine.latents import LatentDataset, LatentWriter, MemoryTracks
    from attr_engine.models.stable_audio import load_model
    from attr_engine.monitor import read_status
    from attr_engine.pipeline import attribute
    from attr_engine.result import Attribution
    from attr_engine.rollup import roll_up
    from attr_engine.score import SCORE_FUNCTIONS, scores
    from attr_engine.scorefile import read_scores
    from attr_engine.settings import Settings
    from attr_engine.unlearn import unlearn_query
    from attr_engine.updates import Update

__version__ = "0.1.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())  # the program decides where messages go

# Where each public name lives: they are imported when first used, so that what needs no torch
# (help, the composer of the demo) does not wait for it.
_HOMES = {
    "SCORE_FUNCTIONS": "score",
    "Attribution": "result",
    "Cancelled": "errors",
    "DrawPlan": "diffusion",
    "Estimate": "estimate",
    "Fisher": "fisher",
    "LatentDataset": "latents",
    "LatentWriter": "latents",
    "MemoryTracks": "latents",
    "Settings": "settings",
    "Update": "updates",
    "UserError": "errors",
    "attribute": "pipeline",
    "dry_run": "estimate",
    "finished_units": "follow",
    "fit_fisher": "fisher",
    "load_model": "models.stable_audio",
    "measure_effects": "effects",
    "read_effects": "effectfile",
    "read_scores": "scorefile",
    "read_status": "monitor",
    "roll_up": "rollup",
    "scores": "score",
    "unlearn_query": "unlearn",
}

__all__ = [
    "SCORE_FUNCTIONS",
    "Attribution",
    "Cancelled",
    "DrawPlan",
    "Estimate",
    "Fisher",
    "LatentDataset",
    "LatentWriter",
    "MemoryTracks",
    "Settings",
    "Update",
    "UserError",
    "attribute",
    "dry_run",
    "finished_units",
    "fit_fisher",
    "load_model",
    "measure_effects",
    "read_effects",
    "read_scores",
    "read_status",
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
