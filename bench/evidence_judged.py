"""The tables of the evidence as JSON: each function computes one from what is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from evidence_kernels import AVERAGING, DRAWS, GROUPS, name_of, ridge
from evidence_sets import Sets, part_of, relation_of
from evidence_timesteps import WEIGHTS
from evidence_timesteps import scores as weighted_scores
from evidence_updates import matrices, together

from attr_engine import abstain, embed, evaluation, judge
from attr_engine.controls import control_scores
from attr_engine.counterfactuals import Truth
from attr_engine.diffusion import DrawPlan
from attr_engine.evaluate import families_of
from attr_engine.index_store import IndexSettings, Maker
from attr_engine.jobs import Query
from attr_engine.result import Attribution

RATE = 0.05  # of false accepts
DEFAULT = "ridge (default)"
SIZES = (1e-3, 1e-2, 3e-2)
UNLEARNED: dict[str, dict[str, Any]] = {
    "unlearning": {"plan": "track", "strengths": SIZES[:2], "score_draws": 8},
    "unlearning-shared": {"plan": "shared", "strengths": SIZES[:2], "score_draws": 8},
    "unlearning-16": {
        "plan": "shared",
        "strengths": SIZES[1:],
        "score_draws": 16,
    },  # as many draws as the default
}
CHOICE = "unlearning-targets"  # by the rank of other training tracks
LAMBDAS = (0.03, 0.1, 0.3, 1.0)


def plan(kind: str, replicates: int = 1) -> DrawPlan:
    """Of draws."""
    return DrawPlan(0, kind, replicates)


def _scores(sets: Sets, run: str) -> Attribution:
    return Attribution.from_parquet(sets.out / "runs" / run / "scores.parquet")


def _truth(sets: Sets) -> Truth:
    return Truth.open(sets.out / "retrained")


def _asked(sets: Sets, part: str) -> list[Query]:
    return [q for q in sets.queries("known", "generated") if part_of(q) == part]


def _by_ridge(sets: Sets, queries: Sequence[Query]) -> np.ndarray:
    found = _scores(sets, "ridge")
    return np.stack([found.values["ridge"][found.row(q.id)] for q in queries])


def _controls(sets: Sets, queries: Sequence[Query], base: np.ndarray) -> dict[str, np.ndarray]:
    return control_scores(sets.tracks, [(q.tracks, q.index) for q in queries], base, sets.model.frames)


def write_cosine(sets: Sets, queries: Sequence[Query]) -> None:
    """The control as a table of scores, for removals."""
    found = _controls(sets, queries, np.zeros(len(sets.tracks)))["raw-latent cosine"]
    table = Attribution(
        list(sets.tracks.ids), [(q.id, 0.0) for q in queries], {"cosine": found}, {"cosine": np.full_like(found, np.nan)},
        np.full(len(sets.tracks), np.nan), {}, np.ones(found.shape, dtype=np.int64),
    )  # fmt: skip
    folder = sets.out / "runs" / "cosine"
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / "scores.parquet")


def _kernel(
    sets: Sets, which: tuple[str, str, str], queries: Sequence[Query]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Products of the tracks, and of queries with them, by name."""
    place = {q.id: i for i, q in enumerate(sets.queries("known", "generated", "choosing_targets"))}
    rows = [place[q.id] for q in queries]
    file, n = _kept(sets, sets.kernels(*which)), len(sets.tracks)
    return {name: (value[:n], value[n:][rows]) for name, value in file.items()}


def _kept(sets: Sets, path: Path) -> dict[str, np.ndarray]:
    """Arrays that an earlier part kept."""
    with np.load(path) as file:
        found = {name: file[name] for name in file.files}
    if found.pop("of", np.array([])).tolist() != sets.made_of:
        raise SystemExit(f"{path} is of another model or other tracks: remove it")
    return found


def _embedding(sets: Sets, queries: Sequence[Query]) -> np.ndarray:
    """Cosine of latent statistics, ``[Q, N]``: what an embedding without weights finds."""
    found = embed.latent_statistics(sets.tracks)
    assert found.of_latents is not None
    rows = []
    for query in queries:
        batch = query.tracks.batch([query.index], sets.model.frames)
        rows.append(found.of_latents([batch.latents[0, :, : int(batch.valid[0])].numpy()])[0])
    a, b = np.stack(rows), found.values
    return np.asarray((a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1))


# -- by retraining ------------------------------------------------------------------------------


def _lds(sets: Sets, scores: np.ndarray, queries: Sequence[Query]) -> np.ndarray:
    kept, losses = _truth(sets).halves()
    columns = _truth(sets).columns([q.id for q in queries])
    return judge.lds(scores, kept, losses[:, :, columns].mean(axis=0))


def lds(sets: Sets) -> dict[str, Any]:
    """All methods on the judging part; whose settings had to be chosen has those that were best on the choosing part."""
    asked, choosing = _asked(sets, "judge"), _asked(sets, "choose")
    unlearned, influence = _scores(sets, "unlearning"), _scores(sets, "influence")
    methods = {DEFAULT: _by_ridge(sets, asked)}
    for name, how in UNLEARNED.items():
        found = matrices(_scores(sets, name), asked)
        label = f"unlearning, {how['score_draws']} {how['plan']} draws"
        methods |= {f"{score} ({label})": s for score, s in found.items()}
    names = {
        "influence": "influence, diagonal Fisher",
        "norm_influence": "influence of the squared norm, diagonal Fisher",
    }
    methods |= {names[k.split(" at ")[0]]: s for k, s in matrices(influence, asked).items()}
    settings = {}
    for label, which in (
        ("D-TRAK, whole gradients", ("squared_norm", "shared", "none")),
        ("TRAK, whole gradients", ("loss", "shared", "none")),
    ):
        chosen = _kernel(sets, which, choosing)
        options = {
            (a, x): float(np.nanmean(_lds(sets, ridge(*chosen[name_of(a, "transformer", max(DRAWS))], x), choosing)))
            for a in AVERAGING for x in LAMBDAS
        }  # fmt: skip
        averaging, damping = max(options, key=lambda k: options[k])
        settings[label] = {"averaging": averaging, "lambda": damping}
        methods[label] = ridge(
            *_kernel(sets, which, asked)[name_of(averaging, "transformer", max(DRAWS))], damping
        )
    methods["gradient dot product (TracIn), loss"] = _kernel(sets, ("loss", "shared", "none"), asked)[
        name_of("plain", "transformer", max(DRAWS))
    ][1]
    methods["cosine of latent statistics (embedding)"] = _embedding(sets, asked)
    methods |= {f"{name} (control)": s for name, s in _controls(sets, asked, unlearned.base).items()}
    kept, losses = _truth(sets).halves()
    losses = losses[:, :, _truth(sets).columns([q.id for q in asked])]
    top = judge.ceiling(losses)
    return {
        "halves": len(kept), "seeds": len(losses), "queries": [q.id for q in asked], "settings": settings,
        "methods": {name: judge.lds(s, kept, losses.mean(axis=0)).tolist() for name, s in methods.items()},
        "split_half": top.seeds.tolist(), "attainable": top.attainable.tolist(),
    }  # fmt: skip


def sweep(sets: Sets) -> dict[str, Any]:
    """LDS on the choosing part of every setting of the kernel method, and of the curvatures of an update."""
    asked, rows = _asked(sets, "choose"), []
    for which in (("squared_norm", "shared", "none"), ("squared_norm", "shared", "both"), ("squared_norm", "shared", "mixed"),
                  ("squared_norm", "track", "mixed"), ("loss", "shared", "none"), ("loss", "track", "mixed")):  # fmt: skip
        found = _kernel(sets, which, asked)
        for averaging in AVERAGING:
            for group in GROUPS:
                for draws in DRAWS:
                    for damping in LAMBDAS:
                        scores = ridge(*found[name_of(averaging, group, draws)], damping)
                        rows.append(
                            [
                                *which,
                                averaging,
                                group,
                                draws,
                                damping,
                                round(float(np.nanmean(_lds(sets, scores, asked))), 4),
                            ]
                        )
    kept = _kept(sets, sets.out / "curvature.npz")
    some = {q.id: q for q in asked}
    queries = [some[str(name)] for name in kept.pop("ids")]
    curvature = {name: _lds(sets, value, queries).tolist() for name, value in kept.items()}
    return {"columns": ["function", "plan", "masks", "averaging", "layers", "draws", "lambda", "LDS"], "rows": rows,
            "queries": len(asked), "curvature": curvature}  # fmt: skip


def timesteps(sets: Sets) -> dict[str, Any]:
    """LDS on the choosing part, by query, of the kernel method with weighted timesteps, each weighting at its best lambda."""
    asked, found = _asked(sets, "choose"), {}
    kept = _kept(sets, sets.quarters)
    if kept["ids"].tolist() != [q.id for q in asked]:
        raise SystemExit(f"{sets.quarters} is of other queries: remove it")
    for name, weights in WEIGHTS.items():
        options = {x: _lds(sets, weighted_scores(kept["products"], weights, x), asked) for x in LAMBDAS}
        best = max(options, key=lambda x: float(np.nanmean(options[x])))
        found[name] = {"lambda": best, "LDS": options[best].tolist()}
    return found


def projection(sets: Sets) -> dict[str, Any]:
    """LDS on the choosing part of projected gradients, 16 draws shared by all tracks: what the projection loses."""
    asked, rows = _asked(sets, "choose"), []
    for kind, rank in (("coordinates", 8), ("gaussian", 8), ("gaussian", 16), ("gaussian", 24)):
        maker = Maker(sets.model, IndexSettings(draws=max(DRAWS), plan="shared", projection=kind, rank=rank))
        size = len(sets.tracks)
        own = torch.cat(
            [maker(sets.tracks, range(i, min(i + 16, size)), "score") for i in range(0, size, 16)]
        ).double()
        other = torch.cat([maker(some, range(len(some)), "update", 64) for some in together(asked)]).double()
        for damping in LAMBDAS:
            scores = ridge((own @ own.T).numpy(), (other @ own.T).numpy(), damping)
            rows.append(
                [kind, rank, maker.width, damping, round(float(np.nanmean(_lds(sets, scores, asked))), 4)]
            )
    return {"columns": ["projection", "rank", "numbers", "lambda", "LDS"], "rows": rows}


def relations(sets: Sets) -> dict[str, Any]:
    """What retraining says about relatives: how much lower a query's loss is where one was among the tracks of a half, in percent."""
    asked, truth = sets.queries("known"), _truth(sets)
    kept, losses = truth.halves()
    losses = losses[:, :, truth.columns([q.id for q in asked])].mean(axis=0)
    info, found = list(sets.tracks.info), dict[str, dict[str, list[float]]]()
    for i, query in enumerate(asked):
        relative = losses[:, i] / losses[:, i].mean() * 100
        effect = np.array([relative[~k].mean() - relative[k].mean() for k in kept.T])
        families = families_of(query.tracks.info[query.index])
        row = found.setdefault(relation_of(query), {})
        for j, track in enumerate(info):
            mine = families_of(track) & families
            row.setdefault(str(track["relation"]) if mine else "unrelated", []).append(float(effect[j]))
    return {
        a: {b: [float(np.mean(v)), float(np.std(v)), len(v)] for b, v in row.items()}
        for a, row in found.items()
    }


def _tables(sets: Sets, queries: Sequence[Query]) -> evaluation.Case:
    unlearned = _scores(sets, "unlearning")
    methods = {DEFAULT: _by_ridge(sets, queries), **matrices(unlearned, queries)}
    return evaluation.with_controls(
        evaluation.Case(sets.tracks, queries, methods), unlearned.base, sets.model.frames
    )


def _json(table: Any) -> dict[str, Any]:
    return {} if table is None else dict(vars(table))


def removal(sets: Sets) -> dict[str, Any]:
    """Loss of queries without the top 10 of each method."""
    return _json(evaluation.removal_table(_tables(sets, _asked(sets, "judge")), _truth(sets)))


def groups(sets: Sets) -> dict[str, Any]:
    """One family or artist left out."""
    return _json(evaluation.group_table(_tables(sets, _asked(sets, "judge")), _truth(sets)))


# -- by what is planted -------------------------------------------------------------------------


def planted(sets: Sets) -> dict[str, Any]:
    """Average precision by relation, on the judging part; and where only those copies are relevant that retraining confirms."""
    asked = [q for q in _asked(sets, "judge") if relation_of(q) != "generated"]
    case = _tables(sets, asked)
    confirmed = {}
    near = ("original", "exact copy", "noise", "lossy")
    for name, scores in case.methods.items():
        by_relation: dict[str, list[float]] = {}
        for i, query in enumerate(asked):
            if relation_of(query) not in ("exact copy", "noise", "lossy"):
                continue
            family = query.tracks.info[query.index]["family"]
            same = {
                t
                for t, row in zip(sets.tracks.ids, sets.tracks.info, strict=True)
                if family in families_of(row)
            }
            good = frozenset(
                t for t in same if sets.tracks.info[sets.tracks.ids.index(t)]["relation"] in near
            )
            found = judge.precision_without(scores[i], sets.tracks.ids, good, frozenset(same))
            by_relation.setdefault(relation_of(query), []).append(found)
        confirmed[name] = by_relation
    return {"table": _json(evaluation.planted_table(case)), "confirmed": confirmed}


def self(sets: Sets) -> dict[str, Any]:
    """Rank of 40 unlearned training tracks, and whether those before it are of its own family; of 40 others by the size of the update."""
    targets, others = sets.queries("targets"), sets.queries("choosing_targets")
    scores, base = _by_ridge(sets, targets), _scores(sets, "unlearning").base
    case = evaluation.Case(sets.tracks, targets, {DEFAULT: scores})
    table = evaluation.self_table(evaluation.with_controls(case, base, sets.model.frames))
    sizes = evaluation.self_table(
        evaluation.Case(sets.tracks, others, matrices(_scores(sets, CHOICE), others))
    )
    before = []
    for row, query in zip(scores, targets, strict=True):
        family = families_of(sets.tracks.info[query.index])
        before += [
            bool(family & families_of(sets.tracks.info[i])) for i in np.flatnonzero(row > row[query.index])
        ]
    return {"table": _json(table), "before": len(before), "of its family": sum(before), "sizes": _json(sizes)}


def collapse(sets: Sets) -> dict[str, Any]:
    """Hubs over all known and generated queries for the default, over the judging part for all methods."""
    every = sets.queries("known", "generated")
    one = evaluation.collapse_table(evaluation.Case(sets.tracks, every, {DEFAULT: _by_ridge(sets, every)}))
    return {
        "default": _json(one),
        "all": _json(evaluation.collapse_table(_tables(sets, _asked(sets, "judge")))),
    }


def abstention(sets: Sets) -> dict[str, Any]:
    """Accepts and refusals by kind.

    Half of the pieces that nobody made calibrate, the other half and the known ones are judged; and again the other way round.
    """
    queries = sets.queries("known", "generated", "targets", "unknown")
    best = abstain.prominence(_by_ridge(sets, queries)).max(axis=1)
    unknown = np.array([q.tracks is sets.unknown for q in queries])
    part = np.array([part_of(q) for q in queries])
    accepted: dict[str, list[bool]] = {}
    for calibrates, tests in (("choose", "judge"), ("judge", "choose")):
        limit = abstain.threshold(best[unknown & (part == calibrates)], RATE)
        for i in np.flatnonzero(part == tests):
            kind = (
                "unknown: " if unknown[i] else "targets" if queries[i].kind == "training track" else "known: "
            )
            name = kind if kind == "targets" else kind + relation_of(queries[i])
            accepted.setdefault(name, []).append(bool(best[i] > limit))
    return {"rate": RATE, "accepted": {name: [sum(v), len(v)] for name, v in accepted.items()}}
