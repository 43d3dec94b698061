"""From a finished run to its report: players, rankings, controls, tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attr_engine.abstain import Controls, controls_of_run
from attr_engine.effects import frame_effects
from attr_engine.files import write_json, write_text
from attr_engine.jobs import UPDATE_SETTINGS, Job
from attr_engine.latents.batch import Tracks
from attr_engine.pipeline import fisher_stage, update_stage
from attr_engine.report.data import Clip, QuerySection, Ranking, ReportData, Row, TrackInfo
from attr_engine.report.page import write_report
from attr_engine.report.shares import shares
from attr_engine.report.sound import Sound
from attr_engine.report.tables import (
    controls_of,
    markdown,
    number_of,
    rankings_of,
    relatives,
    result_tables,
    strength_text,
    text_of,
)
from attr_engine.result import Attribution, order_of
from attr_engine.runs import ENVIRONMENT, key_of
from attr_engine.score import RIDGE
from attr_engine.settings import Settings, to_json
from attr_engine.tensorfile import load_tensors, save_tensors
from attr_engine.updates import Update

REPORT, CURVES, TABLES = "report.html", "curves.safetensors", "tables.json"
_MAX_CURVE = 240
_CONTROL_ROWS = 5


def track_info(tracks: Tracks, index: int, clip: Clip | None) -> TrackInfo:
    """A track as its metadata describe it."""
    info = tracks.info[index]
    title, parent, start = text_of(info, "title"), text_of(info, "parent"), number_of(info, "start") or 0.0
    return TrackInfo(
        id=tracks.ids[index],
        title=f"{title or parent}, from {start:.0f} s" if parent else title,
        artist=text_of(info, "artist"),
        licence=text_of(info, "licence", "license"),
        seconds=number_of(info, "seconds"),
        source=text_of(info, "source"),
        start=start,
        parent=parent,
        clip=clip,
        owner=text_of(info, "owner"),
    )


def curves(job: Job, result: Attribution) -> dict[str, dict[str, np.ndarray]]:
    """Where the leading update acts in each query's top tracks: query -> track -> ``[frames]``; kept on disk."""
    s, path = job.run.settings, job.run.path / CURVES
    if not job.measured:  # nothing was unlearned
        return {}
    function = job.measured[0] if job.measured[0] in ("displacement", "loss_change") else "displacement"
    key = key_of(
        job.key(*UPDATE_SETTINGS, "functions", "strengths", "score_draws"),
        s.show,
        [q.id for q in job.queries],
    )
    update_key = job.key(*UPDATE_SETTINGS)
    if path.exists():
        tensors, meta = load_tensors(path)
        if meta.get("key") == key:
            names = meta["names"]
            return {q: {t: tensors[slot].numpy() for t, slot in row.items()} for q, row in names.items()}
    if not all(job.update_path(q, s.strengths[0]).exists() for q in job.queries):
        update_stage(job, fisher_stage(job))
    where = {name: i for i, name in enumerate(job.tracks.ids)}
    flat: dict[str, torch.Tensor] = {}
    out: dict[str, dict[str, np.ndarray]] = {}
    index: dict[str, dict[str, str]] = {}
    show = job.run.progress("curves", "query", "where in the tracks")
    show(0, len(job.queries))
    for done, query in enumerate(job.queries):
        update = Update.load(
            job.update_path(query, s.strengths[0]), key_of(update_key, query.tracks.fingerprint)
        )
        top = [row.track for row in result.top(s.show, query.id, s.functions[0], s.strengths[0])]
        batch = job.tracks.batch([where[t] for t in top], job.model.frames)
        effects = frame_effects(job.model, batch, update, job.plan, s.score_draws, job.rows)[function]
        out[query.id] = {t: e[: int(n)] for t, e, n in zip(top, effects, batch.valid, strict=True)}
        index[query.id] = {t: f"{done}.{k}" for k, t in enumerate(top)}
        flat.update({index[query.id][t]: torch.as_tensor(e.copy()) for t, e in out[query.id].items()})
        show(done + 1, len(job.queries))
    save_tensors(path, flat, {"key": key, "names": index})
    return out


def _short(curve: np.ndarray) -> np.ndarray:
    """At most ``_MAX_CURVE`` values: means of neighbouring frames."""
    if len(curve) <= _MAX_CURVE:
        return curve
    return np.array([part.mean() for part in np.array_split(curve, _MAX_CURVE)])


def _ranking(
    job: Job, name: str, strength: str, control: bool, scores: np.ndarray, errors: np.ndarray | None,
    order: np.ndarray, hits: Mapping[str, str], shapes: Mapping[str, np.ndarray], k: int, responsible: np.ndarray | None = None,
    refused: bool = False,
) -> Ranking:  # fmt: skip
    """The first k tracks of ``order``; those that were not measured have no score, no share and no row."""
    measured, share = np.flatnonzero(~np.isnan(scores)), np.zeros(len(scores))
    if len(measured) and not refused:
        share[measured] = shares(scores[measured], job.run.settings.shares)
    if responsible is not None:
        share[~responsible] = 0.0
    rows = []
    for n, i in enumerate(order[:k]):
        if np.isnan(scores[i]):
            continue
        track = job.tracks.ids[i]
        error = float(errors[i]) if errors is not None and np.isfinite(errors[i]) else None
        curve = _short(shapes[track]) if track in shapes else None
        rows.append(Row(track, n + 1, float(scores[i]), error, float(share[i]), hits.get(track, ""), curve))
    rest = float(1.0 - sum(row.share for row in rows))
    return Ranking(name, strength, control, rows, job.run.settings.shares, rest, len(scores), refused)


def _section(
    job: Job,
    result: Attribution,
    q: int,
    controls: Mapping[str, np.ndarray],
    shapes: Any,
    sound: Sound,
    refuse: Controls | None,
) -> QuerySection:
    s, query = job.run.settings, job.queries[q]
    hits, rankings = relatives(job.tracks, query), []
    leading = result.values[s.functions[0]][result.row(query.id, s.strengths[0])]
    responsible = None if refuse is None else refuse.responsible(leading)
    refused = responsible is not None and not responsible.any()
    for function, strength in rankings_of(s):
        u, text = result.row(query.id, strength), strength_text(job, strength, function)
        lead = function == s.functions[0] and strength == s.strengths[0]
        scores, errors, order = (
            result.values[function][u],
            result.errors[function][u],
            result.order(function, u),
        )
        curves_here = shapes.get(query.id, {}) if lead else {}
        rankings.append(
            _ranking(job, function, text, False, scores, errors, order, hits, curves_here, s.show, responsible if lead else None, refused)
        )  # fmt: skip
    for name, scores in controls.items():
        order, count = order_of(scores[q]), min(_CONTROL_ROWS, s.show)
        rankings.append(_ranking(job, name, "", True, scores[q], None, order, hits, {}, count, None, refused))
    notes = [] if refuse is None or responsible is None else [_verdict(refuse, leading, responsible, s)]
    if hits:
        found = sum(1 for row in rankings[0].rows if row.hit)
        notes.append(f"known relatives among the top {len(rankings[0].rows)}: {found} of {len(hits)}")
    relation = text_of(query.tracks.info[query.index], "relation")
    if query.kind != "training track" and relation:
        notes.append(
            f"this query is held out; it is {relation}"
            + ("" if hits else ": no training track is a relative")
        )
    info = track_info(query.tracks, query.index, sound.clip(query.tracks, query.index))
    return QuerySection(info, query.kind, rankings, notes)


def _verdict(refuse: Controls, scores: np.ndarray, responsible: np.ndarray, s: Settings) -> str:
    """What the controls say of a query's leading ranking."""
    share, measured = np.zeros(len(scores)), ~np.isnan(scores)
    share[measured] = shares(scores[measured], s.shares)
    limit = f"{refuse.count} pieces that no training track made, of which {refuse.rate:.0%} at most pass"
    if not responsible.any():
        return f"refused: no track stands out more than for {limit}; no shares are given"
    return f"{share[~responsible].sum():.0%} unattributable: shares of tracks that stand out no more than for {limit}"


def _summary(job: Job) -> list[tuple[str, str]]:
    s, model = job.run.settings, job.model
    count = sum(p.numel() for p in model.module.parameters())
    seconds = job.run.timings()
    masks = (
        "masks",
        f"update {'valid frames' if s.mask_update else 'all frames'} (M_U {'on' if s.mask_update else 'off'}), "
        f"score {'valid frames' if s.mask_score else 'all frames'} (M_L {'on' if s.mask_score else 'off'})",
    )
    return [
        ("model", f"{Path(s.model).name or 'in memory'}, {count / 1e6:.2f} M parameters, {model.objective}-objective"),
        ("training tracks", str(len(job.tracks))),
        ("queries", str(len(job.queries))),
        ("layers", ", ".join(s.layers)),
        ("draws", f"{s.fisher_draws} Fisher, {s.update_draws} update, {s.score_draws} score; plan {s.plan}, seed {s.seed}"),
        *([masks] if job.measured else []),
        ("damping", ", ".join([f"{s.damping:g} of the mean Fisher"] * bool(job.measured)
                              + [f"ridge {s.ridge:g} of the mean squared length"] * (RIDGE in s.functions))),
        ("precision", f"{s.dtype} model, losses summed in float64"),
        ("seconds", ", ".join(f"{k} {v:.0f}" for k, v in seconds.items())),
    ]  # fmt: skip


def build_report(job: Job, result: Attribution, warnings: Sequence[str] = (), subtitle: str = "") -> Path:
    """Write ``report.html`` into the run directory and return its path."""
    sound = Sound(job.model)
    controls = controls_of(job, result)
    shapes = curves(job, result)
    refuse = controls_of_run(job.run.settings, result)
    sections = [_section(job, result, q, controls, shapes, sound, refuse) for q in range(len(job.queries))]
    shown = {row.track for section in sections for ranking in section.rankings for row in ranking.rows}
    where = {name: i for i, name in enumerate(job.tracks.ids)}
    heard = {row.track for section in sections for ranking in section.rankings[:1] for row in ranking.rows}
    infos = {
        t: track_info(job.tracks, where[t], sound.clip(job.tracks, where[t]) if t in heard else None)
        for t in sorted(shown)
    }
    tables = result_tables(job, result, controls)
    write_json(job.run.path / TABLES, [vars(table) for table in tables])
    write_text(job.run.path / "tables.md", markdown(tables))
    s = job.run.settings
    data = ReportData(
        title=s.title or "Training-data attribution",
        subtitle=subtitle or "Which training tracks made these pieces, and how sure are we",
        summary=_summary(job),
        tables=tables,
        queries=sections,
        tracks=infos,
        config={**to_json(s), "model hash": job.model.fingerprint, "data hash": job.tracks.fingerprint},
        environment=json.loads((job.run.path / ENVIRONMENT).read_text(encoding="utf-8")),
        warnings=list(warnings),
    )
    path = job.run.path / REPORT
    write_report(data, path)
    return path


__all__ = ["REPORT", "TABLES", "build_report", "curves"]
