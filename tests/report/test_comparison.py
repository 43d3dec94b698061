"""The page of a comparison shows every method's own ranks, marks what methods agree on, and trusts no string."""

import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from browser import BINARY, browser
from helpers import ToyDenoiser, make_tracks
from pages import HOSTILE, Page

from attr_engine import Settings, UserError
from attr_engine.compare import Answer, judged
from attr_engine.compare_report import write_page
from attr_engine.jobs import Query
from attr_engine.report import Table, TrackInfo
from attr_engine.report.comparison import Comparison, Figure, SideBySide, Top, holders, write_comparison
from attr_engine.report.markup import clean

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="40" height="20"><rect width="40" height="20"/></svg>'


class Tables(HTMLParser):
    """Every table of a page: its class, and its rows of cells, a list of the texts of a cell's elements each."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.found, self._cell = [], None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.found.append((dict(attrs)["class"], []))
        elif tag == "tr":
            self.found[-1][1].append([])
        elif tag in ("td", "th"):
            self._cell = []
            self.found[-1][1][-1].append(self._cell)
        elif self._cell is not None:
            self._cell.append("")

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = None

    def handle_data(self, data):
        if self._cell is not None:
            if not self._cell:
                self._cell.append("")
            self._cell[-1] += data

    def of(self, css):
        return [[[["".join(x).strip() for x in cell if x.strip()] for cell in row] for row in rows]
                for name, rows in self.found if name == css]  # fmt: skip


def made(rng, queries=2, show=4, tracks=9, names=("ridge", "cosine", "features", "random (control)")):
    """A comparison of random scores, and these, ``[Q, M, N]``."""
    ids, scores = [f"t{i}" for i in range(tracks)], rng.normal(size=(queries, len(names), tracks))
    sections = []
    for q in range(queries):
        tops = []
        for m, name in enumerate(names):
            order = np.argsort(-scores[q, m], kind="stable")[:show]
            tops.append(Top(name, "control" in name, [ids[i] for i in order], scores[q, m][order].tolist()))
        sections.append(
            SideBySide(TrackInfo(f"q{q}", seconds=3.0), "held-out", ["a note"], tops, {"t1": "transposed"}, np.corrcoef(scores[q]))
        )  # fmt: skip
    infos = {i: TrackInfo(i, f"title of {i}", "some artist", owner="some label") for i in ids}
    tables = [Table("Methods", ["method", "LDS"], [[n, 0.5] for n in names]), Table("More", ["x"], [[1]])]
    figures = [Figure("Figure one", "curves", SVG)]
    return Comparison("A title", "", [], [("queries", "2")], tables, figures, sections, infos), scores


@pytest.fixture
def render(tmp_path):
    def render(data):
        write_comparison(data, tmp_path / "methods.html")
        return Page((tmp_path / "methods.html").read_text(encoding="utf-8"))

    return render


def poisoned(text, clip):
    """A comparison in which every string is ``text``."""
    info = TrackInfo(text, text, text, text, 4.0, text + "/source", 1.0, text, clip, text)
    tops = [Top(text, False, [text, f"{text}!"], [2.0, 1.0]), Top(text, False, [text, f"{text}?"], [3.0, 1.0]),
            Top(text, True, [text, f"{text}!"], [2.0, 1.0])]  # fmt: skip
    tables = [Table(text, [text], [[text]], text)] * 2
    query = SideBySide(info, text, [text], tops, {text: text}, np.eye(3))
    return Comparison(
        text, text, [text], [(text, text)], tables, [Figure(text, text, SVG)], [query] * 2, {text: info}
    )


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_metadata_never_becomes_markup(text, clip, render):
    shown, harmless = render(poisoned(text, clip(0))), render(poisoned("harmless", clip(0)))
    assert [tag for tag, _ in shown.elements] == [tag for tag, _ in harmless.elements]
    assert [list(attrs) for _, attrs in shown.elements] == [list(attrs) for _, attrs in harmless.elements]
    for name in ("id", "class", "href", "src", "style", "data-clip", "aria-labelledby", "d", "content"):
        assert [a.get(name) for _, a in shown.elements] == [a.get(name) for _, a in harmless.elements]
    assert shown.scripts == harmless.scripts
    if len(text) < 100:
        assert shown.text.count(clean(text)) >= 10


def test_every_method_is_there_with_its_own_first_tracks(rng, render):
    data, scores = made(rng)
    shown = render(data)
    grids = Tables(shown.html).of("grid")
    assert len(grids) == len(scores)
    for query, rows in zip(scores, grids, strict=True):
        heads = [cell[0] for cell in rows[0]]
        assert heads == ["Rank", "ridge", "cosine", "features", "random (control)"]
        for m in range(len(query)):
            best = sorted(range(query.shape[1]), key=lambda i: (-query[m][i], i))[:4]
            cells = [row[m + 1] for row in rows[1:]]
            assert [cell[0] for cell in cells] == [f"title of t{i}" for i in best]
            assert all("some artist" in cell and f"t{i}" in cell for cell, i in zip(cells, best, strict=True))
            assert all("some label" in cell for cell in cells)
        assert [row[0] for row in rows[1:]] == [["1"], ["2"], ["3"], ["4"]]
    expected = [x for q in data.queries for place in range(4) for top in q.tops for x in [top.scores[place]]]
    assert [float(a["value"]) for a in shown.all("data")] == expected


def test_tracks_that_methods_agree_on_are_marked_and_controls_do_not_count(rng, render):
    data, scores = made(rng)
    html = render(data).html
    for query, rows, by_track in zip(
        data.queries, Tables(html).of("grid"), Tables(html).of("rows tracks"), strict=True
    ):
        count: Counter[str] = Counter()
        for top in query.tops:
            if "control" not in top.name:
                for track in top.tracks:
                    count[track] += 1
        for m, top in enumerate(query.tops):
            for track, row in zip(top.tracks, rows[1:], strict=True):
                marks = [x for x in row[m + 1] if x.endswith(" methods")]
                assert marks == ([f"{count[track]} of 3 methods"] if count[track] > 1 else [])
                assert ("transposed" in row[m + 1]) == (track == "t1")
        assert [(row[1][0], int(row[0][0])) for row in by_track[1:]] == [
            (f"title of {t}", len(held)) for t, held in holders(query.tops).items()
        ]
        assert Counter({row[1][0].removeprefix("title of "): int(row[0][0]) for row in by_track[1:]}) == count
        numbers = [int(row[0][0]) for row in by_track[1:]]
        assert numbers == sorted(numbers, reverse=True)
        for row in by_track[1:]:
            track = row[1][0].removeprefix("title of ")
            listed = "".join(row[3])
            for top in query.tops[:3]:
                place = top.tracks.index(track) + 1 if track in top.tracks else None
                assert (f"{top.name}" in listed) == (place is not None)
            assert "control" not in listed


def test_agreement_is_told_for_every_two_methods(rng, render):
    data, _ = made(rng)
    hollow = data.queries[1].agreement.copy()
    hollow[3, :] = hollow[:, 3] = np.nan
    data = replace(data, queries=[data.queries[0], replace(data.queries[1], agreement=hollow)])
    for query, rows in zip(data.queries, Tables(render(data).html).of("grid pairs"), strict=True):
        for i, row in enumerate(rows[1:]):
            assert row[0] == [query.tops[i].name]
            for j, (value, shared) in enumerate(row[1:]):
                r = query.agreement[i, j]
                assert (
                    value == "none" if np.isnan(r) else abs(float(value.replace("\u2212", "-")) - r) < 0.0051
                )
                both = sum(t in query.tops[j].tracks for t in query.tops[i].tracks)
                assert shared == f"{both} of 4"
    with pytest.raises(UserError, match="query 'q0' has 4 methods and agreements of shape"):
        render(replace(data, queries=[replace(data.queries[0], agreement=np.eye(2))]))


def test_the_page_is_one_file_that_asks_nothing_of_the_network(rng, render):
    shown = render(made(rng)[0])
    sources = [a["src"] for _, a in shown.elements if "src" in a]
    assert len(sources) == 1 and sources[0].startswith("data:image/svg+xml;base64,")
    assert not [
        a for _, a in shown.elements if {"srcset", "action", "data", "poster", "xlink:href"} & a.keys()
    ]
    assert "http:" not in shown.html and "https:" not in shown.html
    assert not re.search(r"@import|url\(", shown.html)
    ids = [a["id"] for _, a in shown.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] for _, a in shown.elements if "href" in a]
    assert all(link.startswith("#") for link in links) and {link[1:] for link in links} <= set(ids)
    policy = shown.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'")


def test_tables_and_regions_have_names_and_only_the_first_table_is_open(rng, render):
    shown = render(made(rng)[0])
    assert shown.html.count("<caption>") == 6
    assert all("aria-labelledby" in a for a in shown.all("table", **{"class": "results"}))
    scrolling = [a for _, a in shown.elements if a.get("class") == "scroll"]
    assert all(
        a["tabindex"] == "0" and ("aria-label" in a or "aria-labelledby" in a)
        for a in scrolling
        if "role" in a
    )
    assert all(a["alt"] for a in shown.all("img"))
    assert shown.html.index("Methods</bdi></h2>") < shown.html.index(
        '<details><summary><h2 id="table-1-title">'
    )
    assert ["open" in a for a in shown.all("details", **{"class": "side"})] == [True, False, False] * 2


def test_players_are_there_where_there_is_sound(rng, render, clip):
    data, _ = made(rng)
    held = {t for q in data.queries for t in holders(q.tops)}
    some = sorted(held)[:2]
    tracks = {t: replace(i, clip=clip(k)) for k, (t, i) in enumerate(data.tracks.items()) if t in some}
    shown = render(replace(data, tracks={**data.tracks, **tracks}))
    rows = sum(t in holders(q.tops) for q in data.queries for t in some)
    assert len(shown.all("audio")) == rows and len(shown.scripts) == 1 + len(some)
    assert shown.text.count("no player") == sum(len(holders(q.tops)) for q in data.queries) - rows


# -- from answers -------------------------------------------------------------------------------------


class Sounding(ToyDenoiser):
    """A toy whose decoder gives every track a tone of its own."""

    sample_rate = 16000

    def decode(self, latents):
        import torch

        pitch = 100 + 50 * (float(latents.abs().sum()) % 7)
        return torch.sin(torch.arange(8000) * 2 * torch.pi * pitch / 16000).expand(len(latents), 1, -1) * 0.5


@pytest.fixture
def compared(seed, rng, tmp_path):
    """Writes the page of random answers: ``(what was asked, the page, tables of the page)``."""
    model, tracks, pieces = Sounding(seed), make_tracks(rng, 12, 3, 10), make_tracks(rng, 5, 3, 10, "q")
    for i, info in enumerate(tracks.info):
        info.update(title=f"<b>{i}</b>", owner=HOSTILE[0], relation="original", family="f")
    pieces.info[0].update(parents="t3;t5", relation="gain")
    queries = [*(Query(pieces, i, "") for i in range(5)), Query(tracks, 2, "training track")]
    answers = [Answer(name, np.round(rng.normal(size=(6, 12)), 1), 1.0, 1.0, 9) for name in ("ridge", "cosine:x=<i>")]  # fmt: skip
    case, tables = judged(answers, tracks, queries, rng.random(12), 10, None)

    def write(show=3, **options):
        s = Settings(show=show)
        path = write_page(tmp_path, case, answers, tables, model, s, drawn=False, **options)
        html = path.read_text(encoding="utf-8")
        return SimpleNamespace(case=case, page=Page(html), tables=Tables(html), path=path)

    return write


def test_ranks_are_those_of_the_scores(compared):
    found = compared()
    for q, rows in enumerate(found.tables.of("grid")):
        for m, scores in enumerate(found.case.methods.values()):
            best = sorted(range(12), key=lambda i: (-scores[q][i], i))[:3]  # ties by position
            assert all(f"t{i}" in row[m + 1] for row, i in zip(rows[1:], best, strict=True))
            assert [row[m + 1][0] for row in rows[1:]] == [f"<b>{i}</b>" for i in best]
    heads = found.tables.of("grid")[0][0]
    for name, head in zip(found.case.methods, heads[1:], strict=True):
        scores = found.case.methods[name][0]
        best = sorted(range(12), key=lambda i: (-scores[i], i))[:3]
        assert head == [name, f"{len({3, 5} & set(best))} of 2 known relatives"]
    assert "known relatives among the training tracks: 2" in found.page.text
    assert found.page.text.count(HOSTILE[0]) > 5


def test_agreement_is_spearmans(compared):
    from scipy.stats import spearmanr

    found = compared()
    names = list(found.case.methods)
    for q, rows in enumerate(found.tables.of("grid pairs")):
        for i, a in enumerate(names):
            for j, b in enumerate(names):
                x, y = found.case.methods[a][q], found.case.methods[b][q]
                if np.ptp(x) and np.ptp(y):
                    value = float(rows[i + 1][j + 1][0].replace("\u2212", "-"))
                    assert abs(value - spearmanr(x, y).statistic) < 0.0051


def test_the_page_is_as_long_as_one_says(compared):
    found = compared(show=100, queries=2, players=0)
    assert len(found.tables.of("grid")) == 2 and len(found.tables.of("grid")[0]) == 1 + 12
    assert "6, the first 2 on this page (--show-queries)" in found.page.text
    assert not found.page.all("audio")
    one = compared(players=1)
    firsts = {
        s[q].argmax() for name, s in one.case.methods.items() if "control" not in name for q in range(6)
    }
    names = {a["aria-label"] for a in one.page.all("audio")}
    assert {f"Play track: <b>{i}</b>" for i in firsts} == {x for x in names if x.startswith("Play track")}
    assert sum(x.startswith("Play query") for x in names) == 6


def test_a_method_that_failed_is_named_first(compared):
    found = compared(failed={"clap": "it needs <checkpoint>"})
    assert "clap could not be asked: it needs <checkpoint>" in found.page.text


@pytest.mark.skipif(BINARY is None, reason="no Chromium")
def test_a_browser_shows_it_at_any_width_and_plays(compared, tmp_path, rng):
    page = compared().path
    with browser(tmp_path / "profile") as b:
        for width, dark in ((1400, False), (390, True)):
            b.open(page, width, 900, dark)
            assert b.js("document.documentElement.scrollWidth") <= width
            assert b.js("document.querySelectorAll('.grid').length") == 12
        b.js("document.querySelectorAll('details').forEach(d => d.open = true)")
        b.js("document.querySelector('.tracks audio').scrollIntoView()")
        b.until("document.querySelector('.tracks audio').duration > 0.4")
        b.open(page)
        b.js("document.querySelectorAll('.side summary')[1].focus()")
        assert not b.js("document.querySelectorAll('.side')[1].open")
        b.key("Enter")
        b.until("document.querySelectorAll('.side')[1].open")
        write_comparison(made(rng)[0], tmp_path / "drawn.html")
        b.open(tmp_path / "drawn.html")
        b.until("document.querySelector('.plot img').naturalWidth === 40")  # the policy lets it be drawn


def test_nothing_to_show_is_a_page(render):
    assert render(Comparison("A", "", [], [], [], [], [], {})).all("main")
