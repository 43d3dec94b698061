"""The report of a run shows what the run found, reads no file that was not ingested, and survives any metadata."""

import base64
import hashlib
import io
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ToyDenoiser, make_tracks

from attr_engine.abstain import Controls
from attr_engine.jobs import Job, make_queries
from attr_engine.latents import LatentDataset, LatentWriter
from attr_engine.pipeline import run_job
from attr_engine.report.build import _section, build_report
from attr_engine.report.sound import Sound
from attr_engine.runs import open_run
from attr_engine.settings import Settings

soundfile = pytest.importorskip("soundfile")

RATE = 16000
SETTINGS = Settings(
    fisher_draws=4, update_draws=4, score_draws=4, layers=("all",), threads=1, show=3, dtype="float64"
)
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "\x1b[31m\u202e",
    "\ud800",
    "a" * 100_000,
]


class Model(ToyDenoiser):
    """A toy that also plays: decoding gives a tone of 100 Hz, so that it is known from any file."""

    sample_rate = RATE

    def decode(self, latents):
        time = torch.arange(latents.shape[2] * 256) / RATE
        return torch.sin(2 * torch.pi * 100 * time).expand(len(latents), 1, -1) * 0.5


def write_set(folder: Path, infos, extra=None, seed: int = 0) -> LatentDataset:
    """A data set of as many random tracks as there are infos, for the toy model."""
    tracks = make_tracks(np.random.default_rng(seed), len(infos), 3, 10)
    writer = LatentWriter(folder, padding=tracks.silence, extra=extra)
    for i, info in enumerate(infos):
        writer.add(info.pop("id", f"t{i}"), tracks.raw[i], tracks.conditioning[i], info)
    writer.close()
    return LatentDataset(folder)


def report(out: Path, tracks, queries=(), targets=("t0",), model=None, **changes) -> str:
    """Run everything and return the page."""
    with open_run(out, replace(SETTINGS, **changes)) as run:
        job = Job(run, model or Model(1), tracks, make_queries(tracks, list(queries), targets))
        return build_report(job, run_job(job)).read_text(encoding="utf-8")


def clips(page: str) -> list[np.ndarray]:
    """Every sound in the page, decoded."""
    found = re.findall(
        r"data:audio/[a-z]+;base64,([A-Za-z0-9+/=]+)|\"((?:SUQz|//|T2dn|UklG)[A-Za-z0-9+/=]{200,})", page
    )
    sounds = []
    for a, b in found:
        audio, rate = soundfile.read(io.BytesIO(base64.b64decode(a or b)))
        assert rate == RATE
        sounds.append(audio)
    return sounds


def pitch(audio: np.ndarray) -> float:
    audio = audio if audio.ndim == 1 else audio[:, 0]
    return float(np.abs(np.fft.rfft(audio * np.hanning(len(audio)), 1 << 16)).argmax() * RATE / (1 << 16))


def tone(path: Path, hertz: float, seconds: float = 0.5) -> dict:
    """Write a tone and return the info that ingest would give its track."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(RATE * seconds)) / RATE), RATE)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"source": path.name, "seconds": seconds, "start": 0.0, "sha256": digest}


def heard(folder: Path, info: dict, root) -> set[int]:
    """Pitches, to 10 Hz, of the sounds in the report of a run with one track with this info."""
    tracks = write_set(folder / "set", [info, {}, {}], {"root": root})
    return {round(pitch(x), -1) for x in clips(report(folder / "run", tracks))}


# -- refusals -------------------------------------------------------------------------------------


def test_a_refused_query_has_no_shares_by_any_function_or_control(tmp_path, monkeypatch):
    tracks = write_set(tmp_path / "set", [{} for _ in range(4)])
    changes = {"functions": ("ridge", "displacement")}
    for limit, refused in ((-math.inf, False), (math.inf, True)):
        controls = Controls(limit, 19, 0.05)
        monkeypatch.setattr("attr_engine.report.build.controls_of_run", lambda *_, found=controls: found)
        page = report(tmp_path / str(refused), tracks, **changes)
        found = re.findall(r'<td role="cell" class="share">(.*?)</td>', page)
        # Three rows of each function, and of each of four controls; what is left has a row where there are shares.
        assert len(found) == 6 * (3 if refused else 4)
        assert all(("none" in cell) == refused and ("%" in cell) != refused for cell in found)
        assert ("no shares are given" in page) == ("this query is refused" in page) == refused


# -- sounds ---------------------------------------------------------------------------------------


def test_a_track_sounds_like_the_file_that_it_was_made_from_and_another_is_decoded(tmp_path):
    info = tone(tmp_path / "music" / "a.wav", 440)
    assert heard(tmp_path, info, str(tmp_path / "music")) == {440, 100}


def test_a_window_sounds_like_its_part_of_the_recording(tmp_path):
    path = tmp_path / "music" / "a.wav"
    path.parent.mkdir()
    time = np.arange(RATE) / RATE
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * np.where(time < 0.5, 440, 880) * time), RATE)
    info = {
        "source": "a.wav",
        "start": 0.5,
        "seconds": 0.5,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    assert heard(tmp_path, info, str(path.parent)) == {880, 100}


@pytest.mark.parametrize("change", ["changed", "gone", "no hash", "other hash"])
def test_a_file_that_is_not_the_one_that_was_ingested_is_not_played(tmp_path, change):
    path = tmp_path / "music" / "a.wav"
    info = tone(path, 440)
    if change == "changed":
        tone(path, 660)
    elif change == "gone":
        path.unlink()
    else:
        info.update(sha256=None if change == "no hash" else "0" * 64)
    assert heard(tmp_path, info, str(path.parent)) == {100}


@pytest.mark.parametrize(
    "source",
    [
        "../secret.wav",
        "{outside}/secret.wav",
        "sub/../../secret.wav",
        "link.wav",
        "linked/secret.wav",
        ".",
        "",
        "a\x00.wav",
    ],
)
def test_a_source_outside_the_ingested_folder_is_not_read_even_with_its_hash(tmp_path, source, monkeypatch):
    inside, outside = tmp_path / "music", tmp_path
    info = tone(outside / "secret.wav", 440)
    (inside / "sub").mkdir(parents=True)
    os.symlink(outside / "secret.wav", inside / "link.wav")
    os.symlink(outside, inside / "linked")
    monkeypatch.chdir(outside)
    info["source"] = source.format(outside=outside)
    assert heard(tmp_path, info, str(inside)) == {100}


@pytest.mark.parametrize("root", ["/", "{folder}", ".", "", None, 3, ["x"], {"a": 1}])
def test_a_manifest_cannot_make_a_report_read_what_its_maker_does_not_know(tmp_path, root, monkeypatch):
    """The root of a manifest is its maker's claim; without the hash of a file it plays nothing."""
    tone(tmp_path / "private.wav", 440)
    monkeypatch.chdir(tmp_path)
    root = root.format(folder=tmp_path) if isinstance(root, str) else root
    sources = ["private.wav", str(tmp_path / "private.wav").lstrip("/"), "etc/passwd", "dev/zero"]
    infos = [{"source": s, "audio": s, "sha256": digest} for s in sources for digest in ("", None)]
    page = report(tmp_path / "run", write_set(tmp_path / "set", infos, {"root": root}), show=8)
    assert {round(pitch(x), -1) for x in clips(page)} == {100}


def test_a_run_without_any_sound_says_so_and_has_no_player(tmp_path):
    tracks = make_tracks(np.random.default_rng(0), 4, 3, 10)
    page = report(tmp_path / "run", tracks, model=ToyDenoiser(1))
    assert clips(page) == [] and "<audio" not in page
    assert all(f"t{i}" in page for i in range(4))


def test_a_decoder_that_gives_nan_leaves_the_sound_out(tmp_path):
    model = Model(1)
    model.decode = lambda latents: torch.full((1, 1, 4096), float("nan"))
    assert clips(report(tmp_path / "run", make_tracks(np.random.default_rng(0), 3, 3, 10), model=model)) == []


# -- rankings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("measured", [3, 2, 0])
def test_survivors_come_first_and_what_was_not_measured_has_no_row(measured, tmp_path):
    """As after a cascade: t3 went on, t0 and t1 were left behind with larger scores, t2 was only ranked."""
    tracks = make_tracks(np.random.default_rng(0), 4, 3, 10)
    with open_run(tmp_path / "run", replace(SETTINGS, show=4)) as run:
        job = Job(run, Model(1), tracks, make_queries(tracks, [], ("t0",)))
        whole = run_job(job)
        scores = np.array([[7.0, 5.0, np.nan, 1.0]])
        scores[:, [3, 0, 1][measured:]] = np.nan
        raced = replace(
            whole,
            values={name: scores for name in whole.values},
            errors={name: scores / 9 for name in whole.errors},
            draws=np.array([[8, 8, 0, 64]]),
            stage=np.array([[0, 0, -1, 1]]),
        )
        rankings = _section(job, raced, 0, {}, {}, Sound(job.model), None).rankings
        build_report(job, raced)
    assert len(rankings) == len(SETTINGS.functions)
    for ranking in rankings:
        assert [row.track for row in ranking.rows] == ["t3", "t0", "t1"][:measured]
        assert [row.rank for row in ranking.rows] == [1, 2, 3][:measured]
        assert ranking.tracks == 4
    place = next(table for table in json.loads((tmp_path / "run" / "tables.json").read_text()))["rows"][0]
    assert place[0] == "t0" and set(place[2:]) == {2}


# -- metadata -------------------------------------------------------------------------------------


def junk() -> list:
    return [
        None,
        True,
        -1,
        10**400,
        1e308,
        float("nan"),
        float("inf"),
        "x",
        "nan",
        [],
        [[1]],
        {},
        {"a": [None]},
        *HOSTILE,
    ]


@pytest.mark.parametrize("number", range(len(junk())))
def test_any_value_in_the_metadata_leads_to_a_report(tmp_path, number):
    """Every entry that the report or the tables read holds something that it should not."""
    names = ("title", "artist", "licence", "license", "source", "seconds", "start", "parent", "kind", "family",
             "relation", "parents", "audio", "sha256")  # fmt: skip
    info = {name: junk()[number] for name in names}
    root = junk()[number]
    if isinstance(root, float) and not math.isfinite(root):
        root = "nan"  # no data set holds another
    tracks = write_set(tmp_path / "set", [dict(info) for _ in range(3)], {"root": root})
    queries = write_set(
        tmp_path / "queries", [{"id": "q", **info}, {"id": "r"}], {"root": str(tmp_path)}, seed=1
    )
    page = report(tmp_path / "run", tracks, [queries])
    assert "<script>alert" not in page and "<img" not in page and "\x1b" not in page and "\u202e" not in page
    assert all(f">{name}<" in page or name in page for name in ("t0", "q", "r"))


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "../../evil", "\x1b[31m\u202e\n", "a" * 5000, "=cmd()", "a;b"]
)
def test_any_id_leads_to_a_report_and_to_no_file_of_that_name(tmp_path, name):
    tracks = write_set(tmp_path / "set", [{"id": name}, {}, {}])
    page = report(tmp_path / "deep" / "run", tracks, targets=(name,), keep_updates=True)
    assert "<script>alert" not in page and "\x1b" not in page and "\u202e" not in page
    written = {p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*")}
    assert written == {"set", "deep"}
    assert {p.name for p in (tmp_path / "deep").iterdir()} == {"run"}


def test_a_query_set_cannot_pass_its_pieces_for_training_tracks(tmp_path):
    tracks = write_set(tmp_path / "set", [{"family": "x"}, {"family": "x"}])
    infos = [{"id": f"q{i}", "kind": "training track", "family": "x"} for i in range(4)]
    queries = write_set(tmp_path / "queries", infos, seed=1)
    page = report(tmp_path / "run", tracks, [queries], targets=())
    assert "itself unlearned" not in page


# -- what it shows --------------------------------------------------------------------------------


def test_the_tables_are_written_as_json_beside_the_page(tmp_path):
    infos = [{"family": "f", "relation": "original"}, {"family": "f", "relation": "exact copy"}, {}, {}]
    tracks = write_set(tmp_path / "set", infos)
    queries = write_set(tmp_path / "queries", [{"id": "q", "parents": "t2;t3"}], seed=1)
    page = report(tmp_path / "run", tracks, [queries], targets=("t0", "t2"))
    tables = json.loads((tmp_path / "run" / "tables.json").read_text())
    assert len(tables) == 2
    assert all(table["title"].split("?")[0] in page for table in tables)


def test_the_best_tracks_of_the_scores_are_those_of_the_page(tmp_path):
    tracks = make_tracks(np.random.default_rng(5), 8, 3, 10)
    with open_run(tmp_path / "run", SETTINGS) as run:
        job = Job(run, ToyDenoiser(1), tracks, make_queries(tracks, [], ("t4",)))
        result = run_job(job)
        page = build_report(job, result).read_text(encoding="utf-8")
    body = page[page.index("Query 1 of 1") :]
    first = body[: body.index("</table>")]
    for row in result.top(3):
        assert row.track in first and repr(row.score) in page


def test_the_same_run_gives_the_same_page(tmp_path):
    tracks = write_set(tmp_path / "set", [{}, {}, {}])
    first = report(tmp_path / "run", tracks)
    assert report(tmp_path / "run", tracks) == first


def test_more_places_than_tracks_show_all_tracks(tmp_path):
    page = report(tmp_path / "run", write_set(tmp_path / "set", [{}, {}]), show=50)
    assert "t0" in page and "t1" in page
