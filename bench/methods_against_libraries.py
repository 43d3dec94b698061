"""Do the methods of attr_engine give what other libraries give, on the same rows of the same small denoiser?

One draw a track and query, so that a (noised latent, timestep, target) row is an ordinary sample of an ordinary regression.
The libraries run in an environment of their own, in one process with attr_engine; what none of them has is said so.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers_env import Environment
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


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().mean(dim=(-2, -1))


def square(prediction: Tensor, target: Tensor) -> Tensor:
    return prediction.square().mean(dim=(-2, -1))


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

    def loader(self, purpose: Purpose) -> Any:
        data = torch.utils.data.TensorDataset(*self.rows[purpose])
        return torch.utils.data.DataLoader(data, batch_size=TRACKS, shuffle=False)


# -- the libraries, each ``[Q, N]`` ---------------------------------------------------------------------


def captum_tracin(case: Case) -> np.ndarray:
    """TracInCP with one checkpoint of learning rate 1."""
    from captum.influence import TracInCP

    class Rowwise(nn.Module):
        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            return mse(prediction, target)

    tracin = TracInCP(
        case.model.module, case.loader("score"), checkpoints=["one"], checkpoints_load_func=lambda model, path: 1.0,
        loss_fn=Rowwise(), batch_size=None,
    )  # fmt: skip
    return tracin.influence(case.rows["update"]).numpy()


def dattri_task(case: Case, function: Callable[[Tensor, Tensor], Tensor]) -> Any:
    from dattri.task import AttributionTask

    module = case.model.module

    def loss(parameters: Any, data: Any) -> Tensor:
        x, t, y = data
        return function(torch.func.functional_call(module, parameters, (x[None], t[None])), y[None]).sum()

    return AttributionTask(loss_func=loss, model=module, checkpoints=[module.state_dict()])


def dattri_tracin(case: Case, normalised: bool) -> np.ndarray:
    from dattri.algorithm.tracin import TracInAttributor

    attributor = TracInAttributor(dattri_task(case, mse), torch.ones(1), normalised)
    attributor.projector_kwargs = None  # it projects to 512 numbers otherwise
    return attributor.attribute(case.loader("score"), case.loader("update")).numpy().T


def dattri_trak(case: Case, width: int) -> np.ndarray:
    from dattri.algorithm.trak import TRAKAttributor

    count = sum(p.numel() for p in case.model.module.parameters())
    attributor = TRAKAttributor(
        dattri_task(case, mse), lambda parameters, data: torch.zeros(1, dtype=torch.float64),  # Q = 1 - p = 1
        {"proj_dim": width, "proj_type": "normal", "device": "cpu", "proj_seed": case.seed % 1000},
        regularization=case.ridge(mse) / count,  # it divides gradients by the root of their length
    )  # fmt: skip
    attributor.cache(case.loader("score"))
    return attributor.attribute(case.loader("update")).numpy().T


def traker(case: Case, function: Callable[[Tensor, Tensor], Tensor], width: int = 0) -> np.ndarray:
    """Without projection where ``width`` is 0; the library multiplies all scores by one number."""
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import BasicProjector, NoOpProjector, ProjectionType

    class Output(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        def get_output(self, model: Any, weights: Any, buffers: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:  # fmt: skip
            out = torch.func.functional_call(model, (weights, buffers), (x[None], t[None]))
            return function(out, y[None]).sum()

        def get_out_to_loss_grad(self, model: Any, weights: Any, buffers: Any, batch: Any) -> Tensor:
            return torch.ones(len(batch[0]), 1)

    module = case.model.module
    count = sum(p.numel() for p in module.parameters())
    projector = (
        BasicProjector(count, width, case.seed % 1000, ProjectionType.normal, "cpu", 16, torch.float32)
        if width
        else NoOpProjector(device="cpu")
    )
    found = TRAKer(
        module, Output(), TRACKS, tempfile.mkdtemp(dir=case.folder), device="cpu", projector=projector,
        use_half_precision=False, lambda_reg=case.ridge(function) / count, logging_level=logging.ERROR,
    )  # fmt: skip
    found.load_checkpoint(module.state_dict(), model_id=0)
    found.featurize(case.rows["score"], num_samples=TRACKS)
    found.finalize_features()
    found.start_scoring_checkpoint("asked", module.state_dict(), 0, num_targets=QUERIES)
    found.score(case.rows["update"], num_samples=QUERIES)
    return np.asarray(found.finalize_scores("asked")).T


def kronfluence_scores(case: Case, strategy: str) -> np.ndarray:
    """``identity`` is TracIn; ``diagonal`` divides by the mean square of the gradients and damping."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Regression(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            x, t, y = batch
            return mse(model(x, t), y).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    def data(purpose: Purpose) -> Any:
        return torch.utils.data.TensorDataset(*case.rows[purpose])

    task, wide = Regression(), torch.float64
    model = prepare_model(copy.deepcopy(case.model.module), task)
    folder = tempfile.mkdtemp(dir=case.folder)
    analyzer = Analyzer("case", model, task, cpu=True, output_dir=folder, disable_tqdm=True, log_level=logging.ERROR)  # fmt: skip
    factors = FactorArguments(
        strategy=strategy, use_empirical_fisher=True, per_sample_gradient_dtype=wide, lambda_dtype=wide
    )
    # Ours is relative to the mean of the Fisher, theirs a number.
    damping = DAMPING * float(case.gradients("fisher", mse).square().mean())
    scores = ScoreArguments(damping_factor=damping, per_sample_gradient_dtype=wide, precondition_dtype=wide, score_dtype=wide)  # fmt: skip
    analyzer.fit_all_factors("factors", data("fisher"), per_device_batch_size=8, factor_args=factors)
    analyzer.compute_pairwise_scores(
        "scores", "factors", data("update"), data("score"), per_device_query_batch_size=QUERIES, per_device_train_batch_size=8,
        score_args=scores,
    )  # fmt: skip
    return analyzer.load_pairwise_scores("scores")["all_modules"].numpy()


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
    scale = "projection turned off; the library divides (Phi^T Phi + lambda I)^-1 by its mean absolute entry, which scales all scores alike"
    size = "ours scales each query's update to a size"
    return [
        ("tracin", "captum", "", "float64", lambda: captum_tracin(case), "TracInCP, one checkpoint, whole gradients"),
        ("tracin", "dattri", "", "float32 sums", lambda: dattri_tracin(case, False), "projection turned off"),
        ("tracin:normalised=yes", "dattri", "", "float32 sums", lambda: dattri_tracin(case, True), "Grad-Cos, projection turned off"),
        ("tracin", "kronfluence", "", "float64", lambda: kronfluence_scores(case, "identity"), "strategy identity"),
        (f"trak:{ridge}", "traker", "a factor", "float32", lambda: traker(case, mse), scale),
        (f"dtrak:{ridge}", "traker", "a factor", "float32", lambda: traker(case, square), f"of the squared norm; {scale}"),
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
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        case = Case(seed, Path(name))
        for method, library, up_to, precision, theirs, differs in exact(case):
            found, expected = case.ours(method), theirs()
            rows.append(
                {"method": method, "library": library, "max_relative_difference": difference(found, expected, up_to),
                 "up_to": up_to or "nothing", "precision_of_the_library": precision, "what_differs": differs}
            )  # fmt: skip
        whole = case.ours(f"trak:damping={DAMPING},{WHOLE}")
        for method, library, found in (
            ("trak", "attr_engine, rank 6", case.ours(f"trak:damping={DAMPING},rank=6")),
            ("trak", "traker, 128 numbers", traker(case, mse, 128)),
            ("trak", "dattri, 128 numbers", dattri_trak(case, 128)),
        ):
            rows.append(
                {"method": method, "library": library, "rank_correlation_with_no_projection": rank_correlation(found, whole),
                 "what_differs": "other random projections: ours of both sides of each weight, theirs of the whole gradient"}
            )  # fmt: skip
    versions = Environment(Path(sys.prefix), Path(), PACKAGES).versions()
    command = f"python bench/methods_against_libraries.py --seed {seed}"
    sizes = {"tracks": TRACKS, "queries": QUERIES, "parameters": sum(p.numel() for p in case.model.module.parameters())}  # fmt: skip
    write_json(out, {"command": command, "versions": versions, "sizes": sizes, "rows": rows, "not_compared": NOT_COMPARED})  # fmt: skip
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
