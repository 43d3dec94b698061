"""Which settings of an index give the answer of whole gradients with many draws, and find planted relations?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import attr_engine as ae
from attr_engine.diffusion import ROW_FUNCTIONS, DrawPlan, noised_rows
from attr_engine.evaluate import average_precision, clusters, parents_of, self_rank
from attr_engine.features import Projector
from attr_engine.index import spectrum
from attr_engine.index_numbers import largest, products, stored
from attr_engine.models.protocol import select_parameters
from attr_engine.persample import per_sample_backward, summed_gradient

Row = dict[str, Any]
PROJECTIONS = (
    ("gaussian", 2),
    ("gaussian", 4),
    ("gaussian", 8),
    ("gaussian", 16),
    ("rademacher", 8),
    ("identity", 8),
    ("coordinates", 8),
)
BASE = {"projection": "gaussian 8", "replicates": 1, "draws": 8, "averaging": "unit", "function": "squared_norm",
        "ridge": 0.1, "normalised": False, "width": 0, "numbers": "float32"}  # fmt: skip
DRAWS, TRUE_DRAWS, TRUE_SEED, ROWS = (4, 8, 16), 32, 1001, 16
SETS = (("tracks", "score"), ("queries", "update"), ("held-out", "update"))
Gradients = dict[str, Tensor]


class Demo:
    """A finished demo: model, tracks, queries, and what is known of them.

    Args:
        folder: written by ``attr-engine demo``.
    """

    def __init__(self, folder: Path) -> None:
        self.model = ae.load_model(folder / "model")
        self.tracks, self.held = ae.LatentDataset(folder / "latents"), ae.LatentDataset(folder / "held-out")
        self.parameters = select_parameters(self.model, ("transformer",))
        self.sets = {"tracks": self.tracks, "queries": self.tracks, "held-out": self.held}
        self.copies = clusters(self.tracks.ids, self.tracks.info)
        self.families: dict[str, set[str]] = {}
        for name, row in zip(self.tracks.ids, self.tracks.info, strict=True):
            if row.get("family") and "+" not in row["family"]:
                self.families.setdefault(row["family"], set()).add(name)


# -- features and truth, made once into a folder ---------------------------------------------------------


def gather(demo: Demo, work: Path, say: Callable[[str], None]) -> dict[str, Gradients]:
    """Mean features by name of a configuration: set to ``[n, width]``."""
    one, four = DrawPlan(0, "track", 1), DrawPlan(0, "track", 4)
    first = [p for p in PROJECTIONS if p == ("gaussian", 8)]
    out: dict[str, Gradients] = {}
    for plan, function, projections, draws in (
        (one, "squared_norm", PROJECTIONS, DRAWS), (four, "squared_norm", first, DRAWS), (one, "loss", first, (8,)),
    ):  # fmt: skip
        path = work / f"features-{function}-{plan.replicates}.pt"
        if not path.exists():
            say(f"features of {function}, {plan.replicates} replicates")
            torch.save(_features(demo, plan, function, projections, draws), path)
        out |= torch.load(path, weights_only=True)
    return out


def name_of(settings: Mapping[str, Any]) -> str:
    """Name under which the features of some settings lie."""
    return " ".join(str(settings[n]) for n in ("function", "replicates", "projection", "draws", "averaging"))


def _features(
    demo: Demo, plan: DrawPlan, function: str, projections: Sequence[tuple[str, int]], draws: Sequence[int]
) -> dict[str, Gradients]:
    makers = {f"{k} {r}": Projector(demo.parameters, k, r, 0) for k, r in projections}
    out: dict[str, Gradients] = {}
    for name, purpose in SETS:
        for i in range(len(demo.sets[name])):
            rows = _rows(demo, plan, function, makers, name, purpose, i, max(draws))
            for kind, each in rows.items():
                unit = each / each.norm(dim=1, keepdim=True)
                for d in draws:
                    for averaging, x in (("unit", unit), ("plain", each)):
                        settings = {"function": function, "replicates": plan.replicates, "projection": kind,
                                    "draws": d, "averaging": averaging}  # fmt: skip
                        held = out.setdefault(name_of(settings), {})
                        if name not in held:
                            held[name] = torch.zeros(len(demo.sets[name]), each.shape[1])
                        held[name][i] = x[:d].mean(dim=0)
    return out


def _rows(
    demo: Demo, plan: DrawPlan, function: str, makers: Mapping[str, Projector], name: str, purpose: Any, i: int, draws: int
) -> dict[str, Tensor]:  # fmt: skip
    """Per-draw features ``[draws, width]`` of one item by every projection, from one backward pass a few rows."""
    batch, parts = demo.sets[name].batch([i], demo.model.frames), []
    for first in range(0, draws, ROWS):
        pairs = [(0, d) for d in range(first, min(first + ROWS, draws))]
        rows = noised_rows(demo.model, batch, pairs, plan, purpose, False)
        totals = {kind: torch.zeros(len(pairs), maker.width) for kind, maker in makers.items()}

        def sink(parameter: str, gradient: Any, totals: dict[str, Tensor] = totals) -> None:
            for kind, maker in makers.items():
                maker.add(totals[kind], parameter, gradient)

        per_sample_backward(demo.model, demo.parameters, rows, sink, ROW_FUNCTIONS[function])
        parts.append(totals)
    return {kind: torch.cat([part[kind] for part in parts]) for kind in makers}


def truth(demo: Demo, work: Path, say: Callable[[str], None]) -> dict[str, Gradients]:
    """By averaging: inner products of whole gradients by draws of another seed: set to ``[N, n]`` float64, and norms of queries."""
    path = work / "truth.pt"
    if not path.exists():
        say(f"whole gradients of {TRUE_DRAWS} draws, one row at a time")
        torch.save(_truth(demo), path)
    return torch.load(path, weights_only=True)


def cause(demo: Demo, work: Path, say: Callable[[str], None]) -> dict[str, Gradients]:
    """What the first index had, from whole gradients: products by four draws of four replicates, and lengths by timestep."""
    path = work / "cause.pt"
    if not path.exists():
        say("whole gradients of four draws, and of single rows")
        torch.save(_cause(demo), path)
    return torch.load(path, weights_only=True)


def _cause(demo: Demo) -> dict[str, Gradients]:
    plan, held, times, lengths = DrawPlan(0, "track", 4), {}, [], []
    for name, purpose in SETS:
        each = [_flat(demo, name, purpose, i, plan, range(4)) / 4 for i in range(len(demo.sets[name]))]
        held[name] = torch.stack(each)
    for i in range(0, len(demo.tracks), 8):
        for d in range(16):
            times.append(plan.timestep("fisher", demo.tracks.ids[i], d))
            lengths.append(float(_flat(demo, "tracks", "fisher", i, plan, [d]).norm()))
    products = {n: _dots(held["tracks"], x) for n, x in held.items()}
    return {"products": {**products, **{f"norm of {n}": x.double().norm(dim=1) for n, x in held.items()}},
            "rows": {"t": torch.tensor(times), "length": torch.tensor(lengths)}}  # fmt: skip


def _flat(demo: Demo, name: str, purpose: Any, i: int, plan: DrawPlan, draws: Sequence[int]) -> Tensor:
    """The sum over draws of an item's whole gradient, ``[parameters]``."""
    batch = demo.sets[name].batch([i], demo.model.frames)
    rows = noised_rows(demo.model, batch, [(0, d) for d in draws], plan, purpose, False)
    found = summed_gradient(demo.model, demo.parameters, rows, ROW_FUNCTIONS["squared_norm"])
    return torch.cat(
        [torch.zeros(demo.parameters[n].numel()) if g is None else g.flatten() for n, g in found.items()]
    )


def lengths(rows: Gradients) -> list[Row]:
    """Median length of single gradients in each fifth of the timesteps."""
    out = []
    for k in range(5):
        here = rows["length"][(rows["t"] >= k / 5) & (rows["t"] < (k + 1) / 5)]
        quantiles = torch.quantile(here, torch.tensor([0.0, 0.5, 1.0])).tolist()
        out.append(
            {
                "from": k / 5,
                "to": (k + 1) / 5,
                "least": quantiles[0],
                "median": quantiles[1],
                "largest": quantiles[2],
            }
        )
    return out


def _truth(demo: Demo) -> dict[str, Gradients]:
    plan, size = DrawPlan(TRUE_SEED, "track", 4), sum(p.numel() for p in demo.parameters.values())
    held = {(n, a): torch.zeros(len(demo.sets[n]), size) for n, _ in SETS for a in ("unit", "plain")}
    for name, purpose in SETS:
        for i in range(len(demo.sets[name])):
            for d in range(TRUE_DRAWS):
                flat = _flat(demo, name, purpose, i, plan, [d])
                held[name, "plain"][i] += flat / TRUE_DRAWS
                held[name, "unit"][i] += flat / flat.norm() / TRUE_DRAWS
    out: dict[str, Gradients] = {}
    for averaging in ("unit", "plain"):
        phi = held["tracks", averaging]
        out[averaging] = {n: _dots(phi, held[n, averaging]) for n, _ in SETS}
        for n, _ in SETS:
            out[averaging][f"norm of {n}"] = held[n, averaging].double().norm(dim=1)
    return out


def _dots(left: Tensor, right: Tensor) -> Tensor:
    out = torch.zeros(len(left), len(right), dtype=torch.float64)
    for c in range(0, left.shape[1], 2**16):
        out += left[:, c : c + 2**16].double() @ right[:, c : c + 2**16].double().T
    return out


# -- scores -----------------------------------------------------------------------------------------------


def true_scores(inner: Gradients, ridge: float, normalised: bool) -> dict[str, np.ndarray]:
    """Kernel ridge over whole gradients: set to ``[n, N]``."""
    lengths = {n: inner[f"norm of {n}"] if normalised else torch.ones(1).double() for n, _ in SETS}
    scaled = {n: inner[n] / lengths["tracks"][:, None] / lengths[n] for n, _ in SETS}
    kernel = scaled["tracks"]
    full = kernel + ridge * kernel.diagonal().mean() * torch.eye(len(kernel), dtype=torch.float64)
    return {n: torch.linalg.solve(full, scaled[n]).T.numpy() for n in ("queries", "held-out")}


def index_scores(features: Gradients, s: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """As an index answers: set to ``[n, N]``."""
    wide = {n: x.double() for n, x in features.items()}
    if s["normalised"]:
        wide = {n: x / x.norm(dim=1, keepdim=True) for n, x in wide.items()}
    phi = wide["tracks"]
    values, vectors = spectrum(iter([phi]), len(phi), phi.shape[1])
    ridge = s["ridge"] * float(values.sum()) / len(phi)
    transform = (vectors / (values + ridge).sqrt()[:, None])[: s["width"] or None]
    rows, scales = stored((phi @ transform.T).numpy(), s["numbers"])
    return {
        n: products(rows, (wide[n] @ transform.T).float()).double().numpy() * scales
        for n in ("queries", "held-out")
    }


def solved_afterwards(features: Gradients, s: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """As an index would answer that stores the features themselves and solves for the query: what it costs in few bits."""
    phi = features["tracks"].double()
    rows, scales = stored(phi.numpy(), s["numbers"])
    gram = phi.T @ phi
    gram.diagonal().add_(s["ridge"] * float(gram.trace()) / len(phi))
    asked = {
        n: torch.cholesky_solve(features[n].double().T, torch.linalg.cholesky(gram)).T
        for n in ("queries", "held-out")
    }
    return {n: (rows.astype(np.float64) @ x.T.numpy()).T * scales for n, x in asked.items()}


# -- judgement --------------------------------------------------------------------------------------------


def judge(
    demo: Demo, scores: Mapping[str, np.ndarray], true: Mapping[str, np.ndarray] | None
) -> dict[str, Row]:
    """Figures of the even positions of both kinds of query (to choose by) and of the odd ones (to report)."""
    return {half: _judge(demo, scores, true, k) for k, half in enumerate(("choose", "report"))}


def _judge(
    demo: Demo, scores: Mapping[str, np.ndarray], true: Mapping[str, np.ndarray] | None, k: int
) -> Row:
    ids, precision, own = list(demo.tracks.ids), [], []
    for i in range(k, len(ids), 2):
        own.append(self_rank(scores["queries"][i], ids, demo.copies[ids[i]]))
        family = demo.families.get(demo.tracks.info[i].get("family", ""), set()) - {ids[i]}
        if family:
            others = scores["queries"][i].copy()
            others[i] = -np.inf
            precision.append(average_precision(others, ids, family))
    held = [average_precision(scores["held-out"][i], ids, parents_of(demo.held.info[i]))
            for i in range(k, len(demo.held), 2)]  # fmt: skip
    held = [x for x in held if not np.isnan(x)]
    row = {"self_mean": float(np.mean(own)), "self_worst": int(max(own)), "self_first": float(np.mean(np.array(own) == 1)),
           "family_map": float(np.mean(precision)), "family_error": float(np.std(precision) / len(precision) ** 0.5),
           "family_queries": len(precision), "parents_map": float(np.mean(held)), "parents_queries": len(held)}  # fmt: skip
    if true is not None:
        for top in (10, 50):
            row[f"recall_{top}"] = float(np.mean([
                len(np.intersect1d(largest(scores[n][i], top), largest(true[n][i], top))) / top
                for n in ("queries", "held-out") for i in range(k, len(true[n]), 2)]))  # fmt: skip
    return row


def measure(demo: Demo, work: Path, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """A question a section: what was varied, with everything else as in ``BASE``."""
    true, features = truth(demo, work, say), gather(demo, work, say)
    sections = {
        "draws": [{"draws": d, "replicates": r, "averaging": a}
                  for a in ("plain", "unit") for r in (4, 1) for d in DRAWS],
        "projection": [{"projection": f"{k} {r}"} for k, r in PROJECTIONS],
        "width": [{"width": w} for w in (0, 192, 128, 96, 64, 32)],
        "numbers": [{"numbers": n, "way": w} for w in ("rows solved for", "features as they are")
                    for n in ("float32", "float16", "int8")],
        "ridge": [{"ridge": r, "normalised": n} for n in (False, True) for r in (0.01, 0.03, 0.1, 0.3, 1.0)],
        "function": [{"function": f} for f in ("squared_norm", "loss")],
    }  # fmt: skip
    out = []
    for name, changes in sections.items():
        rows = []
        for change in changes:
            s: dict[str, Any] = {**BASE, **change}
            known = (
                true_scores(true[s["averaging"]], s["ridge"], s["normalised"])
                if s["function"] == "squared_norm"
                else None
            )
            way = solved_afterwards if s.get("way") == "features as they are" else index_scores
            found = way(features[name_of(s)], s)
            numbers = features[name_of(s)]["tracks"].shape[1]
            rows.append({"changed": change, "of_a_feature": numbers, **judge(demo, found, known)})
        out.append({"question": name, "rows": rows})
    size = sum(p.numel() for p in demo.parameters.values())
    whole = [
        ("plain", 4, cause(demo, work, say)["products"]),
        *((a, TRUE_DRAWS, true[a]) for a in ("plain", "unit")),
    ]
    rows = [{"changed": {"whole gradients": a, "draws": d, "replicates": 4}, "of_a_feature": size,
             **judge(demo, true_scores(x, BASE["ridge"], False), None)} for a, d, x in whole]  # fmt: skip
    return [{"question": "whole gradients", "rows": rows}, *out]
