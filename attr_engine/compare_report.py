"""From the answers of methods to the page that shows them side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from attr_engine.evaluation import Case
from attr_engine.figures import correlations
from attr_engine.latents.batch import Tracks
from attr_engine.methods.base import no_progress
from attr_engine.models.protocol import Denoiser
from attr_engine.report.build import track_info
from attr_engine.report.comparison import Comparison, Figure, SideBySide, Top, write_comparison
from attr_engine.report.data import Table, TrackInfo
from attr_engine.report.sound import Sound
from attr_engine.report.tables import relatives, text_of
from attr_engine.result import order_of
from attr_engine.settings import Settings

if TYPE_CHECKING:
    from attr_engine.compare import Answer

PAGE = "methods.html"
QUERIES, PLAYERS = 50, 3  # that the page shows; tracks of every method that it plays
_FIGURES = {
    "figure1": "Scores of every method over the tracks, sorted by the first method: mean and standard deviation over the queries",
    "figure2": "Correlation of the methods' scores, the mean over the queries",
}


def side_by_side(case: Case, index: int, controls: set[str], show: int) -> SideBySide:
    """What all methods say of one query.

    Args:
        case: methods and controls.
        index: of the query.
        controls: which of the names in ``case`` are no methods.
        show: tracks a method, at most.
    """
    query, ids = case.queries[index], case.tracks.ids
    tops = []
    for name, scores in case.methods.items():
        first = order_of(scores[index])[:show].tolist()
        tops.append(
            Top(name, name in controls, [ids[i] for i in first], [float(scores[index][i]) for i in first])
        )
    hits, relation = relatives(case.tracks, query), text_of(query.tracks.info[query.index], "relation")
    notes = [f"known relatives among the training tracks: {len(hits)}"] if hits else []
    if query.kind != "training track" and relation:
        notes.append(f"this query is held out; it is {relation}")
    agreement = correlations({name: s[index : index + 1] for name, s in case.methods.items()}, "Spearman")
    return SideBySide(track_info(query.tracks, query.index, None), query.kind, notes, tops, hits, agreement)


def write_page(
    out: Path, case: Case, answers: Sequence[Answer], tables: Sequence[Table], model: Denoiser, settings: Settings,
    failed: Mapping[str, str] | None = None, queries: int = QUERIES, players: int = PLAYERS, drawn: bool = True,
    progress: Callable[[str, str], Callable[[int, int], None]] = no_progress,
) -> Path:  # fmt: skip
    """Write ``methods.html``.

    Args:
        out: folder of the comparison.
        case: the methods that were asked, then the controls.
        answers: of the methods.
        tables: that of all methods first.
        model: theta_0; its decoder gives the sound of tracks without a recording.
        settings: ``show`` tracks a method, ``title`` of the page; layers and draws are told.
        failed: methods that could not be asked, and why.
        queries: how many of the queries are shown, the first ones.
        players: how many of the first tracks of every method can be played; 0: nothing can.
        drawn: whether ``figure1.svg`` and ``figure2.svg`` of this comparison are in ``out``.
        progress: makes a progress callback from a title and a unit.

    Returns:
        The file.
    """
    names, shown = {a.name for a in answers}, case.queries[:queries]
    controls = {name for name in case.methods if name not in names}
    sections = [side_by_side(case, i, controls, settings.show) for i in range(len(shown))]
    tops = [top for section in sections for top in section.tops]
    heard = {t for top in tops if not top.is_control for t in top.tracks[:players]}
    sound, show = Sound(model), progress("audio of the page", "clip")
    done, total = 0, len(shown) + len(heard)

    def described(tracks: Tracks, index: int, hear: bool) -> TrackInfo:
        nonlocal done
        if not (hear and players):
            return track_info(tracks, index, None)
        show(done, total)
        done += 1
        return track_info(tracks, index, sound.clip(tracks, index))

    sections = [
        replace(section, info=described(q.tracks, q.index, True))
        for section, q in zip(sections, shown, strict=True)
    ]
    where = {name: i for i, name in enumerate(case.tracks.ids)}
    infos = {
        t: described(case.tracks, where[t], t in heard)
        for t in sorted({t for top in tops for t in top.tracks})
    }
    show(total, total)
    data = Comparison(
        title=settings.title or "Methods side by side",
        subtitle="The same queries asked of every method, judged by the same tables",
        warnings=[f"{name} could not be asked: {why}" for name, why in (failed or {}).items()],
        summary=_summary(case, len(answers), model, settings, len(shown), players),
        tables=list(tables),
        figures=[
            Figure(title, f"{title}; numbers: figures.json", (out / f"{name}.svg").read_bytes())
            for name, title in _FIGURES.items()
            if drawn
        ],
        queries=sections,
        tracks=infos,
    )
    write_comparison(data, out / PAGE)
    return out / PAGE


def _summary(
    case: Case, methods: int, model: Denoiser, s: Settings, shown: int, players: int
) -> list[tuple[str, str]]:
    count, queries = sum(p.numel() for p in model.module.parameters()), len(case.queries)
    return [
        ("model", f"{Path(s.model).name or 'in memory'}, {count / 1e6:.2f} M parameters, {model.objective}-objective"),
        ("training tracks", str(len(case.tracks))),
        ("queries", str(queries) if shown == queries else f"{queries}, the first {shown} on this page (--show-queries)"),
        ("methods", f"{methods}, and {len(case.methods) - methods} controls"),
        ("layers", ", ".join(s.layers)),
        ("draws", f"{s.fisher_draws} Fisher, {s.update_draws} update, {s.score_draws} score; plan {s.plan}, seed {s.seed}"),
        ("players", f"the query, and the first {players} of each method" if players else "none"),
        ("precision", f"{s.dtype} model"),
    ]  # fmt: skip
