"""The page of a comparison: what every method says of the same query, side by side, in the frame of the report."""

from __future__ import annotations

import base64
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from attr_engine.errors import UserError
from attr_engine.files import whole_file
from attr_engine.report.data import Table, TrackInfo
from attr_engine.report.drawing import ClipTable
from attr_engine.report.markup import PROSE_CHARACTERS, bdi, column, esc
from attr_engine.report.page import framed, overview, result_table
from attr_engine.report.sections import player, query_head, track_details

_READING = (
    (
        "Method",
        "One way to say which training tracks a piece came from. Its scores are larger for tracks that it holds "
        "more responsible; those of two methods have different units: compare their orders, never their sizes.",
    ),
    (
        "3 of 5 methods",
        "So many methods, controls left out, have the track among the first shown of this query. Methods that "
        "agree may be wrong together: whether a method is right is judged in the tables above, by retraining.",
    ),
    (
        "Agreement",
        "For one query and two methods: the rank correlation (Spearman) of their scores of all training tracks, "
        "from -1 to 1, and how many of the first tracks shown they share.",
    ),
    ("Relation", "The track is a known (planted) relative of the query. That is not the truth of influence."),
    (
        "Control",
        "A ranking that knows nothing of the model\u2019s training, or nothing of the query. A method that finds "
        "no more than the controls has shown nothing.",
    ),
)


@dataclass(frozen=True)
class Figure:
    """A drawing.

    Attributes:
        title: its caption.
        text: what it shows, for those who do not see it.
        svg: the whole file; it is shown as an image, in which nothing can run.
    """

    title: str
    text: str
    svg: bytes


@dataclass(frozen=True)
class Top:
    """What one method ranks first for one query.

    Attributes:
        name: the method.
        is_control: whether it is a control.
        tracks: ids, best first.
        scores: of these, larger = more responsible.
    """

    name: str
    is_control: bool
    tracks: list[str]
    scores: list[float]


@dataclass(frozen=True)
class SideBySide:
    """One query, as all methods see it.

    Attributes:
        info: the query itself.
        kind: "generated", "held-out" or "training track".
        notes: further sentences.
        tops: M of them, equally long.
        hits: id of a training track to its known relation to the query.
        agreement: rank correlations of the methods over all tracks, ``[M, M]``; NaN where one says the same of all.
    """

    info: TrackInfo
    kind: str
    notes: list[str]
    tops: list[Top]
    hits: Mapping[str, str]
    agreement: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """Everything that the page shows; strings may hold anything.

    Attributes:
        title, subtitle: of the page.
        warnings: what the reader must know first.
        summary: (name, value) of the key facts.
        tables: results over all queries; the first one, of all methods, is open.
        figures: over all queries.
        queries: in the order of the page.
        tracks: id to track, for every track of a ``Top``; those with a clip get a player.
    """

    title: str
    subtitle: str
    warnings: list[str]
    summary: list[tuple[str, str]]
    tables: list[Table]
    figures: list[Figure]
    queries: list[SideBySide]
    tracks: Mapping[str, TrackInfo]


def holders(tops: Sequence[Top]) -> dict[str, list[tuple[str, int]]]:
    """Track to (method, rank) of every method but the controls that has it among its first; most methods first, then the best rank."""
    found: dict[str, list[tuple[str, int]]] = {}
    methods = [top for top in tops if not top.is_control]
    for place in range(max((len(top.tracks) for top in methods), default=0)):
        for top in methods:
            if place < len(top.tracks):
                found.setdefault(top.tracks[place], []).append((top.name, place + 1))
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def write_comparison(data: Comparison, path: Path) -> None:
    """Write the page as one self-contained HTML file, complete or not at all.

    Args:
        data: what to show.
        path: of the file.

    Raises:
        UserError: agreements that are not of the methods shown.
        OSError: the file cannot be written.
    """
    for query in data.queries:
        if query.agreement.shape != (len(query.tops),) * 2:
            raise UserError(
                f"comparison: query {query.info.id!r} has {len(query.tops)} methods and agreements of shape "
                f"{query.agreement.shape}: give one for each pair"
            )
    with whole_file(path) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(page_parts(data))


def page_parts(data: Comparison) -> Iterator[str]:
    """Yield the page piece by piece."""
    clips = ClipTable()
    pages = [("overview", "Overview"), *((f"table-{i}", t.title) for i, t in enumerate(data.tables))]
    if data.figures:
        pages.insert(2, ("figures", "Figures"))
    queries = [(query.info.title or query.info.id, query.kind) for query in data.queries]
    yield from framed(data.title, data.subtitle, pages, queries, _body(data, clips), clips)


def _body(data: Comparison, clips: ClipTable) -> Iterator[str]:
    yield overview(data.warnings, data.summary, _READING)
    for number, table in enumerate(data.tables):
        yield result_table(table, number, folded=number > 0)
        if number == 0 and data.figures:
            yield _figures(data.figures)
    for number in range(len(data.queries)):
        yield from _query(data, number, clips)


def _figures(figures: Sequence[Figure]) -> str:
    parts = ['<section id="figures" aria-labelledby="figures-title"><h2 id="figures-title">Figures</h2>\n']
    for figure in figures:
        image = base64.b64encode(figure.svg).decode("ascii")
        parts.append(
            f'<figure class="plot"><div class="scroll" role="region" tabindex="0" aria-label="{esc(figure.title, 400)}">'
            f'<img src="data:image/svg+xml;base64,{image}" alt="{esc(figure.text, PROSE_CHARACTERS)}"></div>'
            f'<figcaption class="caption">{bdi(figure.title, limit=PROSE_CHARACTERS)}</figcaption></figure>\n'
        )
    return "".join([*parts, "</section>\n"])


# -- a query ----------------------------------------------------------------------------------------


def _query(data: Comparison, index: int, clips: ClipTable) -> Iterator[str]:
    """Yield the section of a query: what each method ranks first, the same by track, and how much the methods agree."""
    query = data.queries[index]
    info = query.info
    yield from query_head(index, len(data.queries), info, query.kind, query.notes, clips)
    held, count = holders(query.tops), sum(not top.is_control for top in query.tops)
    name, longest = esc(info.title or info.id), max((len(top.tracks) for top in query.tops), default=0)
    for title, table, is_open in (
        (f"The first {longest} of every method", _grid(query, data.tracks, held, count, name), True),
        (f"The same by track: {len(held)} tracks, those of most methods first",
         _by_track(query, data.tracks, held, count, name, clips), False),
        ("Agreement of the methods", _agreement(query, name), False),
    ):  # fmt: skip
        yield (
            f'<details class="side"{" open" if is_open else ""}><summary><h3>{title}</h3></summary>\n{table}</details>\n'
        )
    yield "</section>\n"


def _region(caption: str, table: str) -> str:
    """Return a table, already HTML, that scrolls by itself and by keyboard."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">{table}</div>\n'


def _marks(track: str, held: Mapping[str, Collection[object]], count: int, hits: Mapping[str, str]) -> str:
    """Return the badges of a track: how many methods have it, where several do, and its relation to the query."""
    many = len(held.get(track, ()))
    marks = f' <span class="badge agreed">{many} of {count} methods</span>' if many > 1 else ""
    return marks + (f' <span class="badge hit">{bdi(hits[track])}</span>' if track in hits else "")


def _grid(
    query: SideBySide, tracks: Mapping[str, TrackInfo], held: Mapping[str, list[tuple[str, int]]], count: int, name: str
) -> str:  # fmt: skip
    """Return ranks down, methods across."""
    head = []
    for top in query.tops:
        found = (
            f"<small>{sum(t in query.hits for t in top.tracks)} of {len(query.hits)} known relatives</small>"
        )
        head.append(f'<th scope="col">{bdi(top.name)}{found if query.hits else ""}</th>')
    columns = [
        [_cell(tracks.get(t) or TrackInfo(t), score, text, _marks(t, held, count, query.hits))
         for t, score, text in zip(top.tracks, top.scores, column(top.scores), strict=True)]
        for top in query.tops
    ]  # fmt: skip
    rows = "".join(
        f'<tr><th scope="row" class="rank">{place + 1}</th>{"".join(row)}</tr>\n'
        for place, row in enumerate(zip(*columns, strict=True))
    )
    caption = f"The first tracks for {name}, a column a method"
    return _region(
        caption,
        f'<table class="grid"><caption><span>{caption}</span></caption><thead><tr><th scope="col" class="rank">Rank</th>'
        f"{''.join(head)}</tr></thead><tbody>\n{rows}</tbody></table>",
    )


def _cell(info: TrackInfo, score: float, text: str, marks: str) -> str:
    """Return one track in the column of a method."""
    lines = [f'<span class="title">{bdi(info.title or info.id)}</span>']
    if info.artist:
        lines.append(bdi(info.artist, "about"))
    if info.owner:
        lines.append(f'<span class="about">owner: {bdi(info.owner)}</span>')
    if info.title:
        lines.append(bdi(info.id, "id"))
    lines.append(f'<span class="about">score <data value="{float(score)!r}">{text}</data></span>')
    if marks:
        lines.append(f"<span>{marks}</span>")
    return f'<td class="track">{"".join(lines)}</td>'


def _by_track(
    query: SideBySide, tracks: Mapping[str, TrackInfo], held: Mapping[str, list[tuple[str, int]]], count: int, name: str,
    clips: ClipTable,
) -> str:  # fmt: skip
    """Return a row a track that some method has among its first, with its player."""
    rows = []
    for track, places in held.items():
        info = tracks.get(track) or TrackInfo(track)
        heard = player(info, None, clips, "track") if info.clip else '<span class="none">no player</span>'
        listed = "".join(f"<li>{bdi(method)} <b>{rank}</b></li>" for method, rank in places)
        hit = f' <span class="badge hit">{bdi(query.hits[track])}</span>' if track in query.hits else ""
        rows.append(
            f'<tr role="row"><td role="cell" class="rank">{len(places)}</td>'
            f'<td role="cell" class="track">{track_details(info, with_title=True, after_title=hit)}</td>'
            f'<td role="cell" class="listen">{heard}</td>'
            f'<td role="cell" class="places"><ul>{listed}</ul></td></tr>\n'
        )
    caption = f"Tracks for {name}: the first number is how many of the {count} methods have the track among their first"
    head = "".join(
        f'<th role="columnheader" scope="col">{title}</th>'
        for title in ("Methods", "Track", "Audio", "Rank by method")
    )
    return _region(
        caption,
        f'<table class="rows tracks" role="table"><caption><span>{caption}</span></caption>'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead>'
        f'<tbody role="rowgroup">\n{"".join(rows)}</tbody></table>',
    )


def _agreement(query: SideBySide, name: str) -> str:
    """Return a row and a column a method: rank correlation, and tracks among the first of both."""
    head = "".join(f'<th scope="col">{bdi(top.name)}</th>' for top in query.tops)
    rows = []
    for top, row in zip(query.tops, query.agreement, strict=True):
        cells = []
        for other, value in zip(query.tops, row.tolist(), strict=True):
            shared = len(set(top.tracks) & set(other.tracks))
            shade = "" if math.isnan(value) else f' style="--agreed: {max(0.0, value):.2f}"'
            text = (
                "none"
                if math.isnan(value)
                else f"{value:.2f}".replace("-0.00", "0.00").replace("-", "\u2212")
            )
            cells.append(f"<td{shade}>{text}<small>{shared} of {len(top.tracks)}</small></td>")
        rows.append(f'<tr><th scope="row">{bdi(top.name)}</th>{"".join(cells)}</tr>\n')
    caption = f"Rank correlation of two methods for {name}, and tracks that are among the first of both"
    return _region(
        caption,
        f'<table class="grid pairs"><caption><span>{caption}</span></caption><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>\n{''.join(rows)}</tbody></table>",
    )
