"""Settings of a removal: the command line and the library share this dataclass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

DEFAULTS: dict[str, tuple[float, int]] = {
    "fisher": (1e-2, 1),
    "mucs": (0.95, 300),
    "ascent": (1e-2, 4),
    "relabel": (100.0, 1),
}
"""Method to the strength and the steps that it has where none are named; what a strength is: :class:`Removal`."""


def _option(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Removal:
    """Settings of :func:`forget`, all but what is forgotten."""

    method: str = _option("fisher", "how to unlearn: fisher, mucs, ascent or relabel")
    strengths: tuple[float, ...] = _option(
        (),
        "one row each; fisher, ascent: size of the update relative to the weights (0.01); mucs: part of an untrained network's loss "
        "at which it stops (0.95); relabel: steps of Adam (100)",
    )
    steps: int = _option(0, "fisher, ascent: steps of an update (1, 4); mucs: steps at most (300); 0: these")
    layers: tuple[str, ...] = _option(("transformer",), "layer groups or name patterns")
    lr: float = _option(2e-4, "mucs, relabel: of Adam, a tenth of the training's")
    weight: float = _option(0.2, "mucs: weight of forgetting against keeping")
    batch: int = _option(16, "mucs, relabel: rows a step")
    update_draws: int = _option(64, "fisher, ascent: draws a track and step")
    fisher_draws: int = _option(4, "fisher: draws a track for the Fisher")
    damping: float = _option(0.1, "fisher: added to it, relative to its mean")
    draws: int = _option(16, "draws a track for the losses, the same before and after")
    remain: int = _option(0, "remaining tracks whose loss is measured, at random (0: all)")
    pieces: int = _option(
        16, "pieces generated from prompts of the forget set, and as many from others (0: none)"
    )
    sampler_steps: int = _option(50, "of the pieces")
    guidance: float = _option(3.0, "classifier-free guidance of the pieces")
    embedding: str = _option(
        "latent-statistics",
        "in which pieces and tracks are compared; of audio too, such as features or openl3:checkpoint=FILE",
    )
    classifier: str = _option(
        "",
        "checkpoint of PaSST: KL of the labels of pieces before and after; not downloaded (none: no such figure)",
    )
    licence: str = _option(
        "", "licence of --classifier, named by a user whose use it allows; without it none is taken"
    )
    clap: str = _option(
        "", "folder of CLAP as transformers has it: the CLAP score of the pieces and their prompts"
    )
    text: str = _option("prompt", "conditioning that holds the text of a prompt, for --clap")
    checkpoints: bool = _option(True, "write a model folder for every strength")
    seed: int = _option(0, "of all draws, batches, labels and pieces")
    rows: int = _option(16, "rows a pass")

    def all_strengths(self) -> tuple[float, ...]:
        """As named, or the method's own."""
        return self.strengths or DEFAULTS[self.method][:1]
