"""A DiT of stable-audio-tools with random weights, its tracks, and the passes that nothing can beat. Needs stable-audio-tools."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from gpu_model import Dit, Size  # noqa: E402 - needs the path

from attr_engine.diffusion import DrawPlan, Noised, Purpose, noised_rows, predict  # noqa: E402
from attr_engine.fisher import Fisher  # noqa: E402
from attr_engine.latents.memory import MemoryTracks  # noqa: E402
from attr_engine.memory import fit_rows  # noqa: E402
from attr_engine.models.protocol import select_parameters  # noqa: E402
from attr_engine.persample import summed_gradient  # noqa: E402
from attr_engine.updates import Update  # noqa: E402

PLAN = DrawPlan(replicates=1)
LAYERS = ("transformer",)


class Case:
    """A model and tracks for it.

    Args:
        frames: F of model and tracks.
        width: of the DiT, a multiple of 64.
        depth: its layers.
        tracks: how many, all of F frames.
        seed: of weights and tracks.
        dtype: of the model; the numbers are drawn in float32 for every dtype.
    """

    def __init__(
        self, frames: int, width: int, depth: int, tracks: int, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:  # fmt: skip
        self.size = Size(
            channels=64, width=width, depth=depth, heads=width // 64, context_width=64, timing_width=64, frames=frames, context=8
        )  # fmt: skip
        self.model = Dit(self.size, dtype, torch.device("cpu"), seed)
        self.parameters = select_parameters(self.model, LAYERS)
        rng = np.random.default_rng(seed)
        latents = [rng.standard_normal((64, frames), dtype=np.float32) for _ in range(tracks)]
        conditioning = [{"row": i} for i in range(tracks)]
        self.tracks = MemoryTracks([f"t{i}" for i in range(tracks)], latents, conditioning)
        self.batch = self.tracks.batch(range(tracks), frames)

    def rows_a_pass(self) -> int:
        """As many as the engine chooses on a CPU."""
        return fit_rows(self.model, self.parameters, self.batch, PLAN)

    def noised(self, pairs: Sequence[tuple[int, int]], purpose: Purpose, rows: int) -> list[Noised]:
        """Rows of (track, draw) pairs that are ready for the model, ``rows`` of them a pass."""
        return [
            noised_rows(self.model, self.batch, pairs[k : k + rows], PLAN, purpose, False)
            for k in range(0, len(pairs), rows)
        ]

    def backward(self, passes: Sequence[Noised]) -> None:
        """The limit of all that needs gradients: forward and backward passes of ready rows."""
        for noised in passes:
            summed_gradient(self.model, self.parameters, noised)

    @torch.no_grad()
    def forward(self, passes: Sequence[Noised]) -> None:
        """The limit of a model's loss: forward passes of ready rows."""
        for noised in passes:
            predict(self.model, noised)

    def fisher(self, seed: int = 0) -> Fisher:
        """A made-up Fisher: positive numbers."""
        generator = torch.Generator().manual_seed(seed)
        return Fisher(
            {n: torch.rand(p.shape, generator=generator) + 0.5 for n, p in self.parameters.items()}, 1
        )

    def updates(self, count: int, seed: int = 0) -> list[Update]:
        """Made-up updates, of a hundredth of the size of each weight."""
        generator = torch.Generator().manual_seed(seed)

        def delta() -> dict[str, Tensor]:
            return {
                n: torch.randn(p.shape, generator=generator) * (1e-2 * p.detach().float().std())
                for n, p in self.parameters.items()
            }

        return [Update(f"q{k}", 1e-2, "size", delta(), 1.0, 1e-2) for k in range(count)]


def arguments(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """The arguments that every such benchmark has, parsed and checked; torch gets its threads."""
    parser.add_argument("--threads", type=int, default=2, help="of torch (2)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds in which everything runs once (5)")
    parser.add_argument("--quick", action="store_true", help="one small case: does it run?")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / f"{name}.json")
    args = parser.parse_args()
    if min(args.threads, args.repeat) < 1:
        parser.error("--threads and --repeat must be at least 1")
    if find_spec("stable_audio_tools") is None:
        parser.error("stable-audio-tools is not installed: pip install '.[stable-audio]'")
    torch.set_num_threads(args.threads)
    return args
