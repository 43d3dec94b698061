"""Do the methods of attr_engine give what other libraries give, on the same rows of the same small denoiser?

One draw a track and query, so that a (noised latent, timestep, target) row is an ordinary sample of an ordinary regression.
The libraries run in an environment of their own, in one process with attr_engine; what none of them has is said so.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import record
import score_libraries as libraries
import torch
from peers_env import Environment
from score_libraries import Regression, mse, square
from torch import Tensor, nn

import attr_engine as ae
from attr_engine.diffusion import DrawPlan, Purpose, noised_rows
from attr_engine.files import write_json
from attr_engine.jobs import Query
from attr_engine.latents.memory import MemoryTracks
from attr_engine.methods import Workspace, parse

HERE = Path(__file__).resolve().parent
PACKAGES = ("traker", "dattri", "captum", "kronfluence", "torch", "numpy")
TRACKS, QUERIES, CHANNELS, FRAMES, WIDTH = 24, 6, 4, 12, 16
DAMPING = 0.1
WHOLE = "rank=1000000"  # a projection onto all of a weight is none
DRAWS: tuple[Purpose, ...] = ("score", "update", "fisher")


class Network(nn.Module):
    """Linear layers over frames, which see each other through their mean: all of its parameters are known to every library."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(CHANNELS + 2, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, CHANNELS, bias=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predictions ``[B, C, F]`` for ``[B, C, F]`` and ``[B]``."""
        waves = torch.stack([(math.pi * t).cos(), (math.pi * t).sin()], dim=1)
        seen = torch.cat([x.transpose(1, 2), waves[:, None].expand(-1, x.shape[2], -1)], dim=2)
        h = torch.tanh(self.first(seen))
        h = torch.tanh(self.second(h + h.mean(dim=1, keepdim=True)))
        return self.out(h).transpose(1, 2)


class Small:
    """The network as a denoiser."""

    objective, channels, frames, last_layer = "v", CHANNELS, FRAMES, "out"
    layer_groups: dict[str, tuple[str, ...]] = {}

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.module = Network().double().eval()
        self.fingerprint = hashlib.sha256(str(seed).encode()).hexdigest()

    def conditioning(self, items: Sequence[Any]) -> None:
        return None

    def predict(self, x_t: Tensor, t: Tensor, conditioning: None) -> Tensor:
        return self.module(x_t.double(), t.double())


class Case:
    """Model, tracks and queries, and their rows as tensors.

    Attributes:
        rows: purpose of the draws to (x_t, t, target).
    """

    def __init__(self, seed: int, folder: Path) -> None:
        rng = np.random.default_rng(seed)
        self.model, self.folder, self.seed = Small(seed), folder, seed
        self.tracks = self._tracks(rng, TRACKS, "t")
        self.queries = self._tracks(rng, QUERIES, "q")
        self.settings = ae.Settings(
            layers=("all",), seed=seed, score_draws=1, update_draws=1, fisher_draws=1, replicates=1, mask_update=False, rows=5,
            dtype="float64", plan="track",
        )  # fmt: skip
        self.rows = {purpose: self._rows(purpose) for purpose in DRAWS}

    def _tracks(self, rng: np.random.Generator, count: int, prefix: str) -> MemoryTracks:
        latents = [rng.normal(size=(CHANNELS, FRAMES)).astype(np.float32) * 1.5 for _ in range(count)]
        return MemoryTracks([f"{prefix}{i}" for i in range(count)], latents)

    def _rows(self, purpose: Purpose) -> tuple[Tensor, Tensor, Tensor]:
        tracks = self.queries if purpose == "update" else self.tracks
        batch = tracks.batch(range(len(tracks)), FRAMES)
        plan = DrawPlan(self.seed, "track", 1)
        rows = noised_rows(self.model, batch, [(i, 0) for i in range(len(tracks))], plan, purpose, False)
        return rows.x_t, rows.t, rows.target

    def ours(self, method: str) -> np.ndarray:
        """Scores ``[Q, N]``."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        fitted = parse(method)[1].fit(self.model, self.tracks, Workspace(folder, self.settings))
        return fitted.score([Query(self.queries, i, "") for i in range(QUERIES)])

    def gradients(self, purpose: Purpose, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Whole gradients ``[n, parameters]``, by autograd of one row at a time."""
        found, parameters = [], list(self.model.module.parameters())
        for x, t, y in zip(*self.rows[purpose], strict=True):
            loss = function(self.model.module(x[None], t[None]), y[None]).sum()
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        return torch.stack(found)

    def ridge(self, function: Callable[[Tensor, Tensor], Tensor]) -> float:
        """Lambda, as every library takes it."""
        return DAMPING * float(self.gradients("score", function).square().sum(dim=1).mean())

    def regression(self) -> Regression:
        """Model, tracks and queries as the libraries take them."""
        return Regression(self.model.module, self.rows["score"], self.rows["update"], self.folder, TRACKS, self.seed)  # fmt: skip


# -- the libraries, each ``[Q, N]`` ---------------------------------------------------------------------


def kronfluence_scores(case: Case, strategy: str) -> np.ndarray:
    """Of a copy of the module, with damping relative to the mean of the Fisher as ours, which theirs is not."""
    damping = DAMPING * float(case.gradients("fisher", mse).square().mean())
    copied = replace(case.regression(), module=copy.deepcopy(case.model.module), batch=8)
    run, read = libraries.kronfluence_scores(copied, strategy, case.rows["fisher"], damping)
    run()
    return read()


# -- comparing ------------------------------------------------------------------------------------------


def difference(found: np.ndarray, expected: np.ndarray, up_to: str) -> float:
    """Largest difference over the largest number, after bringing both to one length: of all scores, of each query's, or not."""
    if up_to == "a factor":
        found, expected = (x / np.linalg.norm(x) for x in (found, expected))
    if up_to == "a factor a query":
        found, expected = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (found, expected))
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman, the mean over queries."""
    ranks = [np.argsort(np.argsort(x, axis=1), axis=1) for x in (a, b)]
    return float(np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(*ranks, strict=True)]))


def exact(case: Case) -> list[tuple[str, str, str, str, Callable[[], np.ndarray], str]]:
    """Our method, what it is compared with, up to what, in which precision, and what differs."""
    ridge = f"damping={DAMPING},{WHOLE}"
    r = case.regression()
    scale = "projection turned off; the library divides (Phi^T Phi + lambda I)^-1 by its mean absolute entry, which scales all scores alike"
    size = "ours scales each query's update to a size"
    return [
        ("tracin", "captum", "", "float64", libraries.captum_tracin(r), "TracInCP, one checkpoint, whole gradients"),
        ("tracin", "dattri", "", "float32 sums", libraries.dattri_tracin(r), "projection turned off"),
        ("tracin:normalised=yes", "dattri", "", "float32 sums", libraries.dattri_tracin(r, True), "Grad-Cos, projection turned off"),
        ("tracin", "kronfluence", "", "float64", lambda: kronfluence_scores(case, "identity"), "strategy identity"),
        (f"trak:{ridge}", "traker", "a factor", "float32", libraries.traker(r, mse, case.ridge(mse)), scale),
        (f"dtrak:{ridge}", "traker", "a factor", "float32", libraries.traker(r, square, case.ridge(square)),
         f"of the squared norm; {scale}"),
        (f"influence:damping={DAMPING}", "kronfluence", "a factor a query", "float64", lambda: kronfluence_scores(case, "diagonal"),
         f"strategy diagonal with the empirical Fisher of the same draws; {size}"),
    ]  # fmt: skip


NOT_COMPARED = {
    "das": "none of the libraries has it; against float64 leave-one-out in tests/methods/test_gradients.py",
    "rps": "dattri's is of classifiers (the softmax of the model's own outputs is its target); against the closed form in "
    "tests/methods/test_rps.py",
    "lpips": "the package lpips is of images and its own networks; against a walk through the network in tests/methods/test_hidden.py",
}


def compare(seed: int, out: Path) -> bool:
    """All comparisons, as JSON; whether every exact one agreed."""
    environment = record.environment()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        case = Case(seed, Path(name))
        for method, library, up_to, precision, theirs, differs in exact(case):
            found, expected = case.ours(method), theirs()
            rows.append(
                {"method": method, "library": library, "max_relative_difference": difference(found, expected, up_to),
                 "up_to": up_to or "nothing", "precision_of_the_library": precision, "what_differs": differs}
            )  # fmt: skip
        r, whole = case.regression(), case.ours(f"trak:damping={DAMPING},{WHOLE}")
        for method, library, found in (
            ("trak", "attr_engine, rank 6", case.ours(f"trak:damping={DAMPING},rank=6")),
            ("trak", "traker, 128 numbers", libraries.traker(r, mse, case.ridge(mse), 128)()),
            ("trak", "dattri, 128 numbers", libraries.dattri_trak(r, 128, case.ridge(mse))()),
        ):
            rows.append(
                {"method": method, "library": library, "rank_correlation_with_no_projection": rank_correlation(found, whole),
                 "what_differs": "other random projections: ours of both sides of each weight, theirs of the whole gradient"}
            )  # fmt: skip
    versions = Environment(Path(sys.prefix), Path(), PACKAGES).versions()
    command = f"python bench/methods_against_libraries.py --seed {seed}"
    sizes = {"tracks": TRACKS, "queries": QUERIES, "parameters": sum(p.numel() for p in case.model.module.parameters())}  # fmt: skip
    write_json(out, {"command": command, "environment": environment, "versions": versions, "sizes": sizes, "rows": rows,
                     "not_compared": NOT_COMPARED})  # fmt: skip
    worst = {"float64": 1e-9}
    return all(
        r.get("max_relative_difference", 0.0) < worst.get(r.get("precision_of_the_library"), 1e-4)
        for r in rows
    )


def table(path: Path) -> str:
    """The result as Markdown."""
    lines = ["| method | library | agreement | what differs |", "| --- | --- | --- | --- |"]
    for r in json.loads(path.read_text())["rows"]:
        found = r.get("max_relative_difference")
        agreement = (
            f"largest difference {found:.1e}" if found is not None
            else f"rank correlation with no projection {r['rank_correlation_with_no_projection']:.2f}"
        )  # fmt: skip
        lines.append(f"| `{r['method']}` | {r['library']} | {agreement} | {r['what_differs']} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "methods_against_libraries.json")
    parser.add_argument("--venv", type=Path, default=HERE / ".venv-methods-peers", help="where the libraries are installed")  # fmt: skip
    parser.add_argument("--inside", action="store_true", help="run here: the libraries are installed")
    args = parser.parse_args()
    if args.inside:
        return 0 if compare(args.seed, args.out) else 1
    peers = Environment(args.venv, HERE / "requirements-methods.txt", PACKAGES, dependencies=False)
    failed = peers.install()
    if failed:
        print("\n".join(f"{name}: {reason}" for name, reason in failed.items()), file=sys.stderr)
        return 1
    again = [str(peers.python()), __file__, "--inside", "--seed", str(args.seed), "--out", str(args.out)]
    code = subprocess.run(again).returncode
    if args.out.exists():
        print(table(args.out))
    return code


if __name__ == "__main__":
    sys.exit(main())
