"""The page trusts no string, asks nothing of the network, holds each clip once and says what is unknown."""

import base64
import hashlib
import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
from pages import HOSTILE, Page

from attr_engine.report import Clip, QuerySection, Ranking, Row, Table, TrackInfo, page, write_report
from attr_engine.report.markup import clean, column, duration, number, percentages, unit_exponent

TAGS = """
    html head meta title style body a header h1 div nav ul li ol h2 small main section dl dt dd
    noscript details p bdi summary table thead tbody tr th td span svg use path symbol audio strong
    data line circle rect script
"""

ATTRIBUTES = """
    lang charset http-equiv content name class href id aria-label aria-labelledby aria-hidden role
    tabindex scope open data-label data-control data-clip value viewbox preserveaspectratio d width
    height x1 x2 y1 y2 cx cy r controls preload type
"""


@pytest.fixture
def render(tmp_path):
    def render(data):
        write_report(data, tmp_path / "report.html")
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return render


def poisoned(text, clip):
    """Return a report in which every string is ``text``."""
    info = TrackInfo(text, text, text, text, 4.0, text + "/source", 1.0, text, clip)
    rows = [
        Row(text, 1, 0.5, 0.1, 0.25, hit=text, curve=np.array([0.1, -0.2])),
        Row(f"{text} of no known track", 2, 0.25, None, 0.25),
    ]
    rankings = [Ranking(text, text, control, rows, text, 0.5, 2) for control in (False, True)]
    table = Table(text, [text, text], [[text, 1.0], [None, 2.0]], text)
    settings = {text: text, "nested": {text: [text, {text: text}]}}
    return page.ReportData(
        text, text, [(text, text)], [table], [QuerySection(info, text, rankings, [text])] * 2, {text: info},
        settings, settings, [text],
    )  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_metadata_never_becomes_markup(text, clip, render):
    shown = render(poisoned(text, clip(0)))
    harmless = render(poisoned("harmless", clip(0)))
    assert [tag for tag, _ in shown.elements] == [tag for tag, _ in harmless.elements]
    assert [list(attrs) for _, attrs in shown.elements] == [list(attrs) for _, attrs in harmless.elements]
    assert {tag for tag, _ in shown.elements} <= set(TAGS.split())
    assert {name for _, attrs in shown.elements for name in attrs} <= set(ATTRIBUTES.split())
    for name in ("id", "class", "href", "data-clip", "aria-labelledby", "d", "content"):
        assert [a.get(name) for _, a in shown.elements] == [a.get(name) for _, a in harmless.elements]
    assert shown.scripts == harmless.scripts


@pytest.mark.parametrize("text", [text for text in HOSTILE if len(text) < 100])
def test_hostile_metadata_is_still_shown_as_text(text, clip, render):
    shown = render(poisoned(text, clip(0)))
    assert shown.text.count(clean(text)) >= 10


def test_controls_and_reading_direction_are_made_visible(clip, render):
    html = render(poisoned("a\x00b\u2028c\u202ed\ud800e", clip(0))).html
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", html)
    assert "a\ufffdb\nc[U+202E]d\ufffde" in html


def test_a_very_long_title_is_cut_and_says_so(clip, render):
    html = render(poisoned("long " * 50_000, clip(0))).html
    assert "[250000 characters]" in html
    assert len(html) < 400_000


def test_no_source_lies_outside_the_file(report, render):
    shown = render(report())
    assert not [a for _, a in shown.elements if {"src", "srcset", "action", "data", "poster"} & a.keys()]
    assert all(a["href"].startswith("#") for _, a in shown.elements if "href" in a)
    assert not re.search(r"@import|url\(", shown.html)
    anchors = {a["id"] for _, a in shown.elements if "id" in a}
    assert {a["href"][1:] for _, a in shown.elements if "href" in a} <= anchors


def test_ids_are_unique(report, render):
    ids = [a["id"] for _, a in render(report()).elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_the_policy_allows_this_script_and_nothing_from_elsewhere(report, render):
    shown = render(report())
    policy = shown.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    active = [text for attrs, text in shown.scripts if "type" not in attrs]
    assert len(active) == 1
    digest = base64.b64encode(hashlib.sha256(active[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert policy.startswith(
        "default-src 'none'; media-src data: blob:; img-src data:; style-src 'unsafe-inline'; "
    )
    assert "http" not in policy
    assert {attrs["type"] for attrs, _ in shown.scripts if "type" in attrs} == {"application/json"}


def test_each_distinct_audio_is_embedded_once(report, render, clip):
    data = report(queries=3, rows=6, tracks=8)
    first = next(iter(data.tracks))
    twin = data.tracks[first].clip
    copy = Clip(twin.mime, bytes(bytearray(twin.data)), twin.peaks.copy())  # equal, and another object
    data.tracks[first] = replace(data.tracks[first], clip=copy)
    query = replace(data.queries[0], info=replace(data.queries[0].info, clip=twin))
    shown = render(replace(data, queries=[query, *data.queries[1:]]))
    clips = [json.loads(text) for attrs, text in shown.scripts if "type" in attrs]
    assert len(clips) == len(set(clips))
    assert shown.html.count(base64.b64encode(twin.data).decode()) == 1
    assert len(shown.all("audio")) > 2 * len(clips)
    assert {a["data-clip"] for a in shown.all("audio")} == {str(i) for i in range(len(clips))}


def test_a_player_leads_to_the_bytes_of_its_track(report, render):
    data = report(queries=1)
    shown = render(data)
    blocks = {attrs["id"]: json.loads(text) for attrs, text in shown.scripts if "type" in attrs}
    clip = data.queries[0].info.clip
    player = shown.all("audio")[0]
    assert (
        blocks[f"clip-{player['data-clip']}"]
        == f"data:{clip.mime};base64,{base64.b64encode(clip.data).decode()}"
    )


def test_a_clip_is_only_embedded_where_it_is_shown(report, render):
    data = report(queries=1, rows=2, tracks=8)
    used = {row.track for ranking in data.queries[0].rankings for row in ranking.rows}
    shown = render(data)
    with_audio = [track for track in used if data.tracks[track].clip]
    assert len([1 for attrs, _ in shown.scripts if "type" in attrs]) == len(with_audio) + 1


def test_a_missing_audio_is_said(report, render):
    data = report()
    tracks = {key: replace(track, clip=None) for key, track in data.tracks.items()}
    queries = [replace(query, info=replace(query.info, clip=None)) for query in data.queries]
    shown = render(replace(data, tracks=tracks, queries=queries))
    assert not shown.all("audio")
    rows = sum(len(ranking.rows) for query in queries for ranking in query.rankings)
    assert shown.text.count("no audio") == rows + len(queries)


def single(error, score=0.5, share=0.25, curve=None, title="one"):
    """Return a report of one row."""
    ranking = Ranking(
        "displacement", "", False, [Row("a", 1, score, error, share, curve=curve)], "softmax", 1 - share, 9
    )
    query = QuerySection(TrackInfo("q"), "generated", [ranking], [])
    return page.ReportData(title, "", [], [], [query], {"a": TrackInfo("a")}, {}, {}, [])


@pytest.mark.parametrize("error", [None, float("nan"), float("inf")])
def test_a_missing_standard_error_is_not_zero(error, render):
    shown = render(single(error))
    assert "\u00b1 not available" in shown.text
    assert "\u00b1 0" not in shown.text
    assert shown.all("circle", **{"class": "dot hollow"})
    assert not shown.all("line", **{"class": "error"})


def test_a_score_is_kept_in_full_beside_the_rounded_one(render):
    shown = render(single(1.5e-8, score=1.23456789e-6))
    assert [a["value"] for a in shown.all("data")] == ["1.23456789e-06"]
    assert "1.235" in shown.text
    assert "\u00b1 0.015" in shown.text
    assert "10\u207b\u2076" in shown.text


@pytest.mark.parametrize("score", [float("nan"), float("inf"), 0.0, -0.0, 1e300, -1e-300, 5e-324])
def test_a_strange_score_does_not_stop_the_report(score, render):
    assert "everything else" in render(single(0.1, score=score)).text


@pytest.mark.parametrize("frames", [1, 2, 119, 120, 121, 2584])
def test_a_curve_of_any_length_is_drawn_within_its_box(frames, render):
    shown = render(single(0.1, curve=np.linspace(-1, 1, frames)))
    paths = [a["d"] for a in shown.all("path") if a.get("class") in ("pos", "neg")]
    assert len(paths) == (1 if frames == 1 else 2)
    assert all(0 <= int(y) <= 60 for d in paths for y in re.findall(r"L\d+ (-?\d+)", d))
    assert all(0 <= int(x) <= 600 for d in paths for x in re.findall(r"L(-?\d+) ", d))


def test_a_broken_curve_is_said_and_not_drawn(render):
    shown = render(single(0.1, curve=np.array([0.0, np.nan])))
    assert "effect curve not finite" in shown.text
    assert not shown.all("path", **{"class": "pos"})


def test_shares_and_everything_else_sum_to_100_percent_as_printed(report, render):
    shown = render(report(queries=2, rows=6, tracks=40))
    rows = re.findall(r'<tbody role="rowgroup">(.*?)</tbody>', shown.html, re.S)
    assert len(rows) == 12
    for body in rows:
        printed = re.findall(r'<span class="value">([\d.]+)\u202f%</span>', body)
        assert len(printed) == 7
        assert sum(round(1e4 * float(text)) for text in printed) == 1_000_000


def test_percentages_sum_exactly_for_any_parts(rng):
    for scale in (1.0, 1e-2, 1e-4, 1e-9):
        parts = rng.dirichlet(np.full(11, 0.3))[:10] * scale
        printed = percentages([*parts, 1 - parts.sum()])
        assert sum(round(1e4 * float(text)) for text in printed) == 1_000_000
    assert percentages([1 / 3, 1 / 3, 1 / 3]) in (["33.4", "33.3", "33.3"], ["33.3", "33.3", "33.4"])
    assert percentages([0.0, 1.0]) == ["0.0", "100.0"]


@pytest.mark.parametrize("share, rest", [(0.5, 0.4), (float("nan"), 0.5), (-0.2, 1.2), (1.5, -0.5)])
def test_shares_that_are_not_parts_of_one_are_refused_by_name(share, rest, tmp_path):
    data = single(0.1)
    ranking = data.queries[0].rankings[0]
    ranking = replace(ranking, rows=[replace(ranking.rows[0], share=share)], everything_else=rest)
    data = replace(data, queries=[replace(data.queries[0], rankings=[ranking])])
    with pytest.raises(ValueError, match="query 'q', ranking 'displacement'"):
        write_report(data, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "broken",
    [
        Clip("text/html", b"x", np.zeros((4, 2))),
        Clip('audio/x"><script>', b"x", np.zeros((4, 2))),
        Clip("audio/mpeg\n", b"x", np.zeros((4, 2))),
        Clip("audio/mpeg", b"x", np.zeros(4)),
        Clip("audio/mpeg", b"x", np.full((4, 2), np.nan)),
    ],
)
def test_a_clip_that_cannot_be_shown_is_refused_by_name(broken, tmp_path):
    data = replace(single(0.1), tracks={"a": TrackInfo("a", clip=broken)})
    with pytest.raises(ValueError, match="track 'a'"):
        write_report(data, tmp_path / "report.html")


def test_a_table_row_of_the_wrong_length_is_refused(tmp_path):
    data = replace(single(0.1), tables=[Table("results", ["a", "b"], [["x", 1], ["y"]])])
    with pytest.raises(ValueError, match="row 1 of table 'results'"):
        write_report(data, tmp_path / "report.html")


@pytest.mark.parametrize("step", ["page_parts", "fsync", "replace"])
def test_a_half_written_report_never_has_the_final_name(step, report, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_report(single(0.1, title="the older one"), path)
    before = path.read_bytes()

    def fail(*_):
        if step == "page_parts":
            yield "<!DOCTYPE html>"
        raise OSError("disk full")

    def fail_now(*_):
        raise OSError("disk full")

    target = page if step == "page_parts" else os
    monkeypatch.setattr(target, step, fail if step == "page_parts" else fail_now)
    with pytest.raises(OSError, match="disk full"):
        write_report(report(), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_the_same_data_give_the_same_bytes(report, tmp_path):
    data = report()
    write_report(data, tmp_path / "a.html")
    write_report(data, tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_report_of_nothing_is_a_page(render):
    shown = render(page.ReportData("", "", [], [], [], {}, {}, {}, []))
    assert shown.all("main")


def test_without_script_the_first_ranking_is_open_and_all_are_there(report, render):
    shown = render(report(queries=2))
    rankings = shown.all("details", **{"class": "ranking"})
    assert ["open" in attrs for attrs in rankings] == [True, False, False, False, False, False] * 2
    assert [attrs["data-control"] for attrs in rankings[:6]] == ["no"] * 3 + ["yes"] * 3


def test_every_player_and_drawing_has_a_name(report, render):
    shown = render(report())
    named = shown.all("audio") + shown.all("svg", **{"class": "wave"})
    assert all(attrs["aria-label"] for attrs in named)


def test_the_assets_end_no_element_that_holds_them():
    assert not re.search("</|<!--", page._asset("page.js"))
    assert "<" not in page._asset("page.css")


def test_settings_that_hold_themselves_are_printed(render):
    loop: dict = {"a": 1}
    loop["self"] = loop
    listed: list = []
    listed.append(listed)
    shown = render(replace(single(0.1), config={"loop": loop, "listed": listed, "odd": {(1, 2): {3}}}))
    assert "loop.a" in shown.text
    assert "odd.(1, 2)" in shown.text


def test_numbers_have_four_digits_and_keep_their_size():
    shown = [number(v) for v in (0, 1, 0.5, 12.3456, 12345.6, -0.00012346, 1.5e-9, 2e20, float("nan"))]
    assert shown == [
        "0", "1.000", "0.5000", "12.35", "12346", "\u22120.0001235", "1.500\u00d710\u207b\u2079",
        "2.000\u00d710\u00b2\u2070", "not finite",
    ]  # fmt: skip
    assert column([12.3456, 0.5, 0.0, float("nan")]) == ["12.35", "0.50", "0.00", "not finite"]
    assert column([1234.5, 0.001]) == ["1234", "0.001000"]
    assert [unit_exponent([v]) for v in (0.0, 0.5, 2e-6, 9.99e-4, 3e7)] == [0, 0, -6, -6, 6]


def test_durations_read_like_a_clock():
    shown = [duration(v) for v in (4.04, 59.94, 59.96, 125, 3725, float("nan"), -1)]
    assert shown == ["4.0\u00a0s", "59.9\u00a0s", "1:00", "2:05", "1:02:05", "not available", "not available"]
