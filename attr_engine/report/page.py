"""The page: one HTML file that opens from disk, asks the network for nothing and trusts no string.

Two locks on hostile metadata: every string is escaped where it is printed, and a content security policy lets
no script run but the one whose hash it names and lets nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine.files import whole_file
from attr_engine.report.data import (
    Clip,
    QuerySection,
    Ranking,
    ReportData,
    Row,
    Table,
    TrackInfo,
    check_report,
)
from attr_engine.report.drawing import ClipTable
from attr_engine.report.markup import PROSE_CHARACTERS, bdi, column_texts, esc
from attr_engine.report.sections import query_section
from attr_engine.report.shares import TRANSFORMS

__all__ = [
    "Clip",
    "QuerySection",
    "Ranking",
    "ReportData",
    "Row",
    "Table",
    "TrackInfo",
    "page_parts",
    "write_report",
]

#: Nesting of the configuration that is taken apart; what lies deeper is printed in one cell.
CONFIG_DEPTH = 6

_READING = (
    (
        "Score",
        "What the named score function says about one track and one query: larger means that the track is "
        "held more responsible. Two functions, or one at two strengths, have different units: compare "
        "their orders, never their sizes.",
    ),
    (
        "Standard error",
        "From independently shifted replicates of the draws, one standard error to each side. It is the "
        "noise of the draws, not what another training run would change. Tracks whose intervals overlap "
        "are not told apart. A hollow dot has no standard error.",
    ),
    (
        "Share",
        "A named transform of the scores of all tracks, so that they sum to 100 %. It is not a probability "
        "of authorship: another transform of the same scores gives other shares.",
    ),
    (
        "Everything else",
        "What the rows shown leave of 100 %: the other tracks together, and all of it where no track stands "
        "out. Music outside the data set has no row and no share. A query that is refused has no shares at all.",
    ),
    (
        "Effect curve",
        "Where in the track the effect sits, drawn over its waveform: above the middle line it raises the "
        "score, below it lowers it. Each waveform and curve is drawn to full height, so compare shapes; "
        "sizes are in the score column.",
    ),
    (
        "Controls",
        "Rankings that know nothing of the model\u2019s training, such as random order, duration or likeness "
        "of raw latents. A score that finds no more than its controls has shown nothing.",
    ),
)


def write_report(data: ReportData, path: Path) -> None:
    """Write the report as one self-contained HTML file.

    The file appears under its name when it is complete, not before: it is written as ``<name>.part`` and
    renamed, and an older report under that name stays until then.

    Args:
        data: what to show; strings may hold anything.
        path: of the file, such as ``run/report.html``; missing folders are made.

    Raises:
        UserError: data that would be shown wrong (see ``check_report``).
        OSError: the file cannot be written.
    """
    check_report(data)
    with whole_file(Path(path)) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(page_parts(data))


def page_parts(data: ReportData) -> Iterator[str]:
    """Yield the page piece by piece: with the audio of many tracks it need not lie in memory at once."""
    clips = ClipTable()
    pages = [
        ("overview", "Overview"),
        *((f"table-{i}", t.title) for i, t in enumerate(data.tables)),
        ("replay", "Replay this run"),
    ]
    queries = [(query.info.title or query.info.id, query.kind) for query in data.queries]
    yield from framed(data.title, data.subtitle, pages, queries, _body(data, clips), clips)


def _body(data: ReportData, clips: ClipTable) -> Iterator[str]:
    yield _overview(data)
    for number, table in enumerate(data.tables):
        yield result_table(table, number)
    for number in range(len(data.queries)):
        yield from query_section(data, number, clips)
    yield _replay(data)


def framed(
    title: str, subtitle: str, pages: Sequence[tuple[str, str]], queries: Sequence[tuple[str, str]], body: Iterable[str],
    clips: ClipTable,
) -> Iterator[str]:  # fmt: skip
    """Yield a whole page around its sections.

    Args:
        title: of the page, as ``subtitle``; escaped here.
        subtitle: what it is about.
        pages: (id, title) of the sections that the index names, without the queries.
        queries: (title, kind) of the sections ``query-0``, ``query-1``, ...
        body: HTML of the sections.
        clips: filled while ``body`` is made.
    """
    script = _asset("page.js")
    yield _head(title, script)
    yield _header(title, subtitle)
    yield '<div class="layout">\n'
    yield _index(pages, queries)
    yield '<main id="main">\n'
    yield from body
    yield "</main></div>\n"
    yield '<svg class="symbols" aria-hidden="true">\n'
    yield from clips.symbols()
    yield "</svg>\n"
    yield from clips.blocks()
    yield f"<script>{script}</script>\n</body></html>\n"


def _asset(name: str) -> str:
    """Read a file that lies beside this module."""
    return resources.files("attr_engine.report").joinpath(name).read_text(encoding="utf-8")


def _head(title: str, script: str) -> str:
    """Return doctype and head: no source but this file, no script but ``script``."""
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    policy = (
        "default-src 'none'; media-src data: blob:; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<meta name="color-scheme" content="light dark">\n'
        f"<title>{esc(title)}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n"
    )


def _header(title: str, subtitle: str) -> str:
    """Return title and subtitle."""
    return (
        '<body>\n<a class="skip" href="#main">Skip to the content</a>\n<header class="top">'
        f"<h1>{bdi(title)}</h1><p>{bdi(subtitle, limit=PROSE_CHARACTERS)}</p></header>\n"
    )


def _index(pages: Sequence[tuple[str, str]], queries: Sequence[tuple[str, str]]) -> str:
    """Return the index: sections, and the queries with their kinds."""
    links = [f'<li><a href="#{anchor}">{bdi(title)}</a></li>' for anchor, title in pages]
    listed = "".join(
        f'<li><a href="#query-{i}">{bdi(title)}<small>{bdi(kind)}</small></a></li>'
        for i, (title, kind) in enumerate(queries)
    )
    return (
        '<nav class="index" aria-label="Index"><div class="everywhere"></div>'
        f'<ul class="pages">{"".join(links)}</ul><h2>Queries</h2><ol class="queries">{listed}</ol></nav>\n'
    )


def _overview(data: ReportData) -> str:
    """Return warnings, key facts and how to read the page, with the formula of every share transform that is used in it."""
    used = {ranking.share_transform for query in data.queries for ranking in query.rankings}
    transforms = [
        (f"Share: {name}", f"{TRANSFORMS[name].formula}. {TRANSFORMS[name].caveat}")
        for name in sorted(used)
        if name in TRANSFORMS
    ]
    return overview(data.warnings, data.summary, [*_READING, *transforms])


def overview(
    warnings: Sequence[str], summary: Sequence[tuple[str, str]], reading: Sequence[tuple[str, str]]
) -> str:
    """Return the first section: warnings, key facts, and how to read the page as (term, text)."""
    parts = ['<section id="overview" aria-label="Overview">\n']
    if warnings:
        items = "".join(f"<li>{bdi(text, limit=PROSE_CHARACTERS)}</li>" for text in warnings)
        title = "Warning" if len(warnings) == 1 else "Warnings"
        parts.append(f'<div class="warnings" role="note"><h2>{title}</h2><ul>{items}</ul></div>\n')
    facts = "".join(f"<div><dt>{bdi(name)}</dt><dd>{bdi(value)}</dd></div>" for name, value in summary)
    parts.append(f'<dl class="tiles">{facts}</dl>\n')
    parts.append("<noscript><p>The players need JavaScript; everything else is here.</p></noscript>\n")
    terms = "".join(
        f"<div><dt>{esc(name)}</dt><dd>{esc(text, PROSE_CHARACTERS)}</dd></div>" for name, text in reading
    )
    parts.append(
        f'<details class="reading" open><summary>How to read this</summary><dl>{terms}</dl></details>\n</section>\n'
    )
    return "".join(parts)


def result_table(table: Table, number: int, folded: bool = False) -> str:
    """Return the section ``table-<number>``, which opens on demand if ``folded``; columns that hold numbers only are set to the right."""
    columns = [[row[i] for row in table.rows] for i in range(len(table.columns))]
    css = ["number" if all(_is_number(value) for value in values) else "text" for values in columns]
    head = "".join(
        f'<th scope="col" class="{kind}">{bdi(name)}</th>'
        for name, kind in zip(table.columns, css, strict=True)
    )
    shown = [_cells(values, kind) for values, kind in zip(columns, css, strict=True)]
    body = "".join(f"<tr>{''.join(row)}</tr>\n" for row in zip(*shown, strict=True))
    note = f'<p class="caption">{bdi(table.note, limit=PROSE_CHARACTERS)}</p>' if table.note else ""
    heading = f'<h2 id="table-{number}-title">{bdi(table.title)}</h2>'
    content = (
        f'{note}<div class="scroll" role="region" tabindex="0" aria-labelledby="table-{number}-title">'
        f'<table class="results" aria-labelledby="table-{number}-title">'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )
    if folded:
        heading, content = f"<details><summary>{heading}</summary>", f"{content}</details>"
    return (
        f'<section id="table-{number}" aria-labelledby="table-{number}-title">{heading}{content}</section>\n'
    )


def _is_number(value: object) -> bool:
    """Say whether a table cell is a number or the lack of one."""
    return value is None or value == "" or isinstance(value, (int, float, np.number))


def _cells(values: list[str | float | int | None], css: str) -> list[str]:
    """Return the cells of one column."""
    cells = []
    for value, text in zip(values, column_texts(values), strict=True):
        content = f'<span class="none">{text}</span>' if value is None else bdi(text)
        cells.append(f'<td class="{css}">{content}</td>')
    return cells


def _replay(data: ReportData) -> str:
    """Return configuration and environment, folded."""
    return (
        '<section id="replay" aria-labelledby="replay-title"><h2 id="replay-title">Replay this run</h2>'
        '<p class="caption">Run the same command with the configuration below on the same checkpoint and '
        "tracks. A draw depends on the seed, its purpose, the track id and its number and on nothing else: "
        "on the same device with the same thread count the scores come out the same, bit for bit.</p>"
        f"{_settings('Configuration', data.config)}{_settings('Environment', data.environment)}</section>\n"
    )


def _settings(title: str, settings: dict[str, Any]) -> str:
    """Return a folded table of dotted key and value."""
    rows = "".join(
        f'<tr><th scope="row">{bdi(key, limit=400)}</th><td>{bdi(value, limit=PROSE_CHARACTERS)}</td></tr>\n'
        for key, value in _flat(settings)
    )
    return (
        f'<details class="settings"><summary>{title}</summary><div class="scroll"><table class="results">'
        f"<tbody>{rows}</tbody></table></div></details>\n"
    )


def _flat(settings: dict[Any, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield (dotted key, value as JSON text, strings as they are)."""
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value and depth < CONFIG_DEPTH:
            yield from _flat(value, f"{name}.", depth + 1)
        elif isinstance(value, str):
            yield name, value
        else:
            try:
                yield name, json.dumps(value, ensure_ascii=False, default=str)
            except (TypeError, ValueError, RecursionError):  # odd keys, or a structure that holds itself
                yield name, repr(value)
