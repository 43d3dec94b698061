"""One query of the report: its player, and its rankings row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from attr_engine.report.data import QuerySection, Ranking, ReportData, Row, TrackInfo
from attr_engine.report.drawing import ClipTable, curve_summary, interval, score_range, share_bar, waveform
from attr_engine.report.markup import (
    NOT_AVAILABLE,
    PROSE_CHARACTERS,
    bdi,
    column,
    duration,
    esc,
    number,
    percentages,
    power,
    unit_exponent,
)

SEPARATOR = " \u00b7 "

# tr and td are laid out as blocks on narrow screens, which would take their meaning from a screen reader: the
# roles keep it.
_TABLE_HEAD = """<div class="scroll"><table class="rows" role="table" aria-label="{caption}">
<thead role="rowgroup"><tr role="row"><th role="columnheader" scope="col">Rank</th>
<th role="columnheader" scope="col">Track</th>
<th role="columnheader" scope="col">Audio{curve}</th>
<th role="columnheader" scope="col">Score \u00b1 standard error{unit}</th>
<th role="columnheader" scope="col">Share<small>{transform}</small></th></tr></thead><tbody role="rowgroup">
"""


def query_head(
    index: int, count: int, info: TrackInfo, kind: str, notes: Sequence[str], clips: ClipTable
) -> Iterator[str]:
    """Yield the beginning of a query's section, whose anchor is ``query-INDEX``: title, what is known of it, player and notes."""
    yield f'<section class="query" id="query-{index}" aria-labelledby="query-{index}-title">\n'
    yield f'<p class="kind">Query {index + 1} of {count} \u00b7 {bdi(kind)}</p>'
    yield f'<h2 id="query-{index}-title">{bdi(info.title or info.id)}</h2>\n'
    yield f'<div class="track">{track_details(info, with_title=False)}</div>\n'
    yield player(info, None, clips, f"query {index + 1}")
    if notes:
        items = "".join(f"<li>{bdi(note, limit=PROSE_CHARACTERS)}</li>" for note in notes)
        yield f'<ul class="notes">{items}</ul>\n'


def query_section(data: ReportData, index: int, clips: ClipTable) -> Iterator[str]:
    """Yield the HTML of query ``index``, with its first ranking open and the others folded."""
    query = data.queries[index]
    yield from query_head(index, len(data.queries), query.info, query.kind, query.notes, clips)
    if not query.rankings:
        yield '<p class="none">No ranking was made for this query.</p>\n'
    yield '<div class="rankings">\n'
    for place, ranking in enumerate(query.rankings):
        yield from _ranking(data, query, ranking, f"query-{index}-ranking-{place}", place == 0, clips)
    yield "</div></section>\n"


def _ranking(
    data: ReportData, query: QuerySection, ranking: Ranking, anchor: str, is_open: bool, clips: ClipTable
) -> Iterator[str]:
    """Yield one ranking as a ``details`` element; page.js turns the rankings of a query into tabs."""
    control = ' <span class="badge control">control</span>' if ranking.is_control else ""
    yield (
        f'<details class="ranking" data-label="{esc(ranking.label)}" '
        f'data-control="{"yes" if ranking.is_control else "no"}"{" open" if is_open else ""}>'
        f'<summary>{bdi(ranking.label)}{control}</summary>\n<div class="panel" id="{anchor}">\n'
    )
    exponent = unit_exponent([row.score for row in ranking.rows])
    factor = 10.0**-exponent
    scores = [row.score * factor for row in ranking.rows]
    errors = [None if row.standard_error is None else row.standard_error * factor for row in ranking.rows]
    scale = score_range(scores, errors)
    yield _caption(ranking, exponent, scale)
    curves = any(row.curve is not None for row in ranking.rows)
    title = query.info.title or query.info.id
    yield _TABLE_HEAD.format(
        caption=f"Tracks for {esc(title)} by {esc(ranking.label)}",
        curve="<small>and effect curve</small>" if curves else "",
        unit=f"<small>in {power(exponent)}</small>" if exponent else "",
        transform=bdi(ranking.share_transform),
    )
    texts = column(scores)
    parts = [row.share for row in ranking.rows] + [ranking.everything_else]
    shown = ["" for _ in parts] if ranking.refused else percentages(parts)
    for row, score, error, text, percent in zip(ranking.rows, scores, errors, texts, shown[:-1], strict=True):
        info = data.tracks.get(row.track) or TrackInfo(id=row.track)
        marks = f"{_score(row, text, error)}{interval(score, error, scale)}"
        yield _row(row, info, marks, percent, clips)
    if not ranking.refused:
        yield _everything_else(ranking, shown[-1])
    yield "</tbody></table></div></div></details>\n"


def _caption(ranking: Ranking, exponent: int, scale: tuple[float, float]) -> str:
    """Say what the ranking is and what its marks mean; a narrow screen shows no table head."""
    curves = any(row.curve is not None for row in ranking.rows)
    hits = any(row.hit for row in ranking.rows)
    text = f"Top {len(ranking.rows)} of {ranking.tracks:,} tracks by {bdi(ranking.label)}."
    text += f" Scores {f'in {power(exponent)}, ' if exponent else ''}drawn on one scale from "
    text += f"{number(scale[0], 3)} to {number(scale[1], 3)}; "
    text += (
        "no shares: this query is refused."
        if ranking.refused
        else f"shares by {bdi(ranking.share_transform)}."
    )
    if ranking.is_control:
        text += " <strong>Control</strong>: this ranking knows nothing of the model\u2019s training."
    marks = ['<li><span class="swatch wave-mark"></span>waveform</li>']
    if curves:
        marks.append('<li><span class="swatch pos-mark"></span>raises the score here</li>')
        marks.append('<li><span class="swatch neg-mark"></span>lowers it</li>')
    if hits:
        marks.append('<li><span class="badge hit">relation</span>known relation to the query</li>')
    return f'<p class="caption">{text}</p><ul class="legend" aria-label="Legend">{"".join(marks)}</ul>\n'


def _row(row: Row, info: TrackInfo, score: str, percent: str, clips: ClipTable) -> str:
    """Return the table row of one track; ``score`` is the content of its cell, no ``percent`` stands for no share."""
    hit = f' <span class="badge hit">{bdi(row.hit)}</span>' if row.hit else ""
    return (
        f'<tr role="row"><td role="cell" class="rank">{row.rank}</td>'
        f'<td role="cell" class="track">{track_details(info, with_title=True, after_title=hit)}</td>'
        f'<td role="cell" class="listen">{player(info, row.curve, clips, f"rank {row.rank}")}</td>'
        f'<td role="cell" class="score">{score}</td>'
        f'<td role="cell" class="share">{_share(row.share, percent)}</td></tr>\n'
    )


def _share(share: float, percent: str) -> str:
    """Return a share as a number and a bar."""
    if not percent:
        return '<span class="none">none</span>'
    return f'<span class="value">{percent}\u202f%</span>{share_bar(share)}'


def _score(row: Row, text: str, error: float | None) -> str:
    """Return score and standard error in the unit of the column; ``data`` has the score in full."""
    if error is None or not math.isfinite(error):
        spread = f'<span class="none">{NOT_AVAILABLE}</span>'
    else:
        spread = number(error, 2)
    return (
        f'<span class="value"><data value="{float(row.score)!r}">{text}</data> '
        f'<span class="spread">\u00b1 {spread}</span></span>'
    )


def _everything_else(ranking: Ranking, percent: str) -> str:
    """Return the last row: what the shown tracks leave."""
    hidden = ranking.tracks - len(ranking.rows)
    about = f"the other {hidden:,} tracks together" if hidden else "every track is shown"
    if not any(row.share > 0 for row in ranking.rows):
        about = "no track shown stands out"
    return (
        '<tr role="row" class="rest"><td role="cell" class="rank"></td><td role="cell" class="track">'
        f'<span class="title">everything else</span><span class="about">{about}</span></td>'
        '<td role="cell" class="listen"></td>'
        '<td role="cell" class="score"></td>'
        f'<td role="cell" class="share">{_share(ranking.everything_else, percent)}</td></tr>\n'
    )


def track_details(info: TrackInfo, with_title: bool, after_title: str = "") -> str:
    """Return title, artist, owner, licence, length, window, id and source of a track, as far as they are known.

    Args:
        info: the track.
        with_title: False where the title is already a heading.
        after_title: HTML, already escaped.
    """
    parts = []
    if with_title:
        parts.append(f'<span class="title">{bdi(info.title or info.id)}{after_title}</span>')
    if info.artist:
        parts.append(bdi(info.artist, "about"))
    if info.owner:
        parts.append(f'<span class="about">owner: {bdi(info.owner)}</span>')
    about = [bdi(info.licence)] if info.licence else []
    if info.seconds is not None:
        about.append(duration(info.seconds))
    if about:
        parts.append(f'<span class="about">{SEPARATOR.join(about)}</span>')
    if info.parent:
        parts.append(f'<span class="about">from {duration(info.start)} in {bdi(info.parent, "id")}</span>')
    if info.title or not with_title:
        parts.append(bdi(info.id, "id"))
    if info.source and info.source != info.id:
        parts.append(bdi(info.source, "id source"))
    return "".join(parts)


def player(info: TrackInfo, curve: np.ndarray | None, clips: ClipTable, what: str) -> str:
    """Return waveform, effect curve and player, or "no audio".

    The player has no src: page.js fills it from the table of clips, which holds each clip once.
    """
    label = f"{what}: {info.title or info.id}"
    words = [f"waveform of {label}"] if info.clip is not None else [label]
    note = ""
    if curve is not None and (np.ndim(curve) != 1 or np.size(curve) == 0 or not np.isfinite(curve).all()):
        curve, note = None, '<span class="none">effect curve not finite</span>'
    if curve is not None:
        words.append(curve_summary(curve, info.seconds))
    drawing = ""
    if info.clip is not None or curve is not None:
        clip_number = None if info.clip is None else clips.number(info.clip)
        drawing = f'<div class="figure">{waveform(clip_number, curve, "; ".join(words))}</div>'
    if info.clip is None:
        return f'<div class="player">{drawing}{note}<span class="none">no audio</span></div>'
    return (
        f'<div class="player">{drawing}{note}'
        f'<audio controls preload="none" data-clip="{clips.number(info.clip)}" '
        f'aria-label="Play {esc(label, 400)}"></audio></div>'
    )
