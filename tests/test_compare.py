"""Methods side by side: what each said is what is judged, nothing is asked twice, and costs are told."""

import json
import re
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import ToyDenoiser, make_tracks

from attr_engine import Settings, compare
from attr_engine.compare import Answer, ask, folder_of, judged
from attr_engine.errors import UserError
from attr_engine.jobs import Query
from attr_engine.methods import METHODS, method, option, parse
from attr_engine.methods.base import model_key

CALLS: list[str] = []


def leave(work):
    """What a fit keeps: 1000 bytes."""
    work.folder.mkdir(parents=True, exist_ok=True)
    (work.folder / "kept").write_bytes(b"x" * 1000)


@dataclass(frozen=True)
class Toy:
    """Scores by the place of a track, with or without something wrong."""

    sign: float = option(1.0, "of the scores")
    wrong: bool = option(False, "one score is NaN")

    def fit(self, model, tracks, work):
        CALLS.append("fit")
        leave(work)
        return FittedToy(self, len(tracks))


@dataclass(frozen=True)
class FittedToy:
    toy: Toy
    count: int

    def score(self, queries):
        CALLS.append("score")
        rows = np.stack([np.roll(np.arange(self.count, dtype=float), q.index) for q in queries])
        if self.toy.wrong:
            rows[0, 0] = np.nan
        return self.toy.sign * rows


@pytest.fixture
def place(seed, rng, monkeypatch):
    monkeypatch.setitem(METHODS, "toy", None)
    del METHODS["toy"]
    method("toy", "gradient", "a toy")(Toy)
    CALLS.clear()
    model, tracks = ToyDenoiser(seed), make_tracks(rng, 6, 3, 10)
    return model, tracks, [Query(make_tracks(rng, 4, 3, 10, "q"), i, "") for i in range(4)]


def test_what_is_there_is_not_asked_again_and_what_differs_is(place, tmp_path):
    model, tracks, queries = place
    first = ask("toy", model, tracks, queries, Settings(), tmp_path / "a")
    assert CALLS == ["fit", "score"] and first.kept >= 1000
    np.testing.assert_array_equal(
        first.scores, parse("toy")[1].fit(model, tracks, _work(tmp_path)).score(queries)
    )
    CALLS.clear()
    again = ask("toy", model, tracks, queries, Settings(), tmp_path / "a")
    assert "score" not in CALLS
    np.testing.assert_array_equal(again.scores, first.scores)
    assert (again.once, again.each, again.kept) == (first.once, first.each, first.kept)
    CALLS.clear()
    fewer = ask("toy", model, tracks, queries[2:0:-1], Settings(), tmp_path / "a")
    assert "score" not in CALLS
    np.testing.assert_array_equal(fewer.scores, first.scores[2:0:-1])
    other = [Query(tracks, 1, "training track")]
    for changed in ({"queries": [*queries, *other]}, {"settings": Settings(seed=1)}):
        CALLS.clear()
        ask(
            "toy",
            model,
            tracks,
            **{"queries": queries, "settings": Settings(), **changed},
            out=tmp_path / "a",
        )
        assert "score" in CALLS


@dataclass(frozen=True)
class Slow:
    """Keeps the queries that it has scored, as those methods do that unlearn; five seconds a fit, two a query, on the clock of the test."""

    def fit(self, model, tracks, work):
        CLOCK[0] += 5.0
        leave(work)
        return FittedSlow(work, len(tracks))


@dataclass(frozen=True)
class FittedSlow:
    work: object
    count: int

    def score(self, queries):
        CALLS.extend(q.id for q in queries)
        show = self.work.progress("scoring", "query")
        for done, query in enumerate(queries):
            path = self.work.folder / f"{query.id}.npy"
            if not path.exists():
                if STOP and query.id == STOP[0]:
                    raise SystemExit(9)
                CLOCK[0] += 2.0
                np.save(path, np.full(self.count, float(query.index)))
            show(done + 1, len(queries))
            for record in self.work.folder.parent.glob("*.json"):
                RECORDS.append(json.loads(record.read_text())["scoring"])
        return np.stack([np.load(self.work.folder / f"{q.id}.npy") for q in queries])


CLOCK, STOP, RECORDS = [0.0], [], []


def test_seconds_are_of_the_queries_that_were_scored_and_bytes_of_fit_alone(place, tmp_path, monkeypatch):
    model, tracks, queries = place
    monkeypatch.setitem(METHODS, "slow", None)
    del METHODS["slow"]
    method("slow", "gradient", "a toy")(Slow)
    monkeypatch.setattr(compare, "time", SimpleNamespace(perf_counter=lambda: CLOCK[0]))
    monkeypatch.setattr(compare, "_SECONDS_BETWEEN_RECORDS", -1.0)
    RECORDS.clear()
    STOP[:] = ["q2"]
    with pytest.raises(SystemExit):
        ask("slow", model, tracks, queries[:3], Settings(), tmp_path / "a")
    assert RECORDS == [2.0, 4.0]  # what a killed call would have left
    STOP.clear()
    found = ask("slow", model, tracks, queries[:3], Settings(), tmp_path / "a")
    assert (found.once, found.each, found.kept) == (10.0, 2.0, 1000)
    CALLS.clear()
    found = ask("slow", model, tracks, queries, Settings(), tmp_path / "a")
    assert CALLS == ["q3"] and (found.each, found.kept) == (2.0, 1000)
    assert found.scores[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]


def _work(path):
    from attr_engine.methods import Workspace

    return Workspace(path / "work")


def test_scores_that_are_no_scores_are_refused_by_name(place, tmp_path):
    model, tracks, queries = place
    with pytest.raises(UserError, match=r"method 'toy:wrong=yes' gave scores \[4, 6\], 1 of them not finite"):
        ask("toy:wrong=yes", model, tracks, queries, Settings(), tmp_path / "a")
    assert not (tmp_path / "a" / "scores.parquet").exists()


def test_the_table_says_of_every_method_what_it_cost_and_of_controls_nothing(place, rng):
    _, tracks, queries = place
    scores = rng.normal(size=(4, 6))
    answers = [Answer("toy", scores, 2.0, 0.5, 6000), Answer("toy:sign=-1", -scores, 3.0, 0.25, 12000)]
    case, tables = judged(answers, tracks, queries, rng.random(6), 10, None)
    rows = {row[0]: dict(zip(tables[0].columns, row, strict=True)) for row in tables[0].rows}
    assert list(rows)[:2] == ["toy", "toy:sign=-1"] and list(case.methods) == list(rows)
    assert (
        rows["toy:sign=-1"] | {"seconds once": 3.0, "seconds a query": 0.25, "kB a track": 2.0}
        == rows["toy:sign=-1"]
    )
    assert rows["toy"]["looks at"] == "gradient" and rows["random (control)"]["seconds once"] == ""
    collapse = next(t for t in tables if t.title.startswith("Collapse"))
    for row in collapse.rows:
        assert rows[row[0]]["alike for all queries"] == row[1]


def test_folders_of_methods_differ_and_are_plain():
    names = ["ridge", "ridge:rank=4", "ridge:rank=8", "clap:checkpoint=/a/b.pt", "clap:checkpoint=/a-b.pt"]
    assert len({folder_of(n) for n in names}) == len(names)
    assert all("/" not in folder_of(n) and folder_of("ridge") == "ridge" for n in names)


def test_the_command_says_what_there_is(capsys):
    from attr_engine.cli import main

    assert main(["compare", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}: {entry.text}" in out for name, entry in METHODS.items())
    assert main(["compare", "--methods", "rigde", "--out", "x"]) == 2
    assert "there is no method 'rigde'" in capsys.readouterr().err


def test_the_command_compares_judges_and_draws(tmp_path, rng, capsys):
    pytest.importorskip("stable_audio_tools")
    pytest.importorskip("matplotlib")
    from test_retrain import write_set
    from test_train import make_config

    from attr_engine import train
    from attr_engine.cli import main
    from attr_engine.latents import LatentDataset

    info = {i: {"family": "fg"[i % 2], "relation": "original", "seconds": 3.0} for i in range(6)}
    write_set(tmp_path / "data", rng, 6, info=info)
    write_set(
        tmp_path / "queries", rng, 3, "q", {i: {"parents": "t0;t2", "relation": "gain"} for i in range(3)}
    )
    train.train_diffusion(make_config(), LatentDataset(tmp_path / "data"), tmp_path / "model", 4, batch=2)
    call = ["compare", "--methods", "ridge", "skew:strength=0.1", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"),
            "--queries", str(tmp_path / "queries"), "--self-influence", "t1", "--update-draws", "4", "--score-draws", "4",
            "--out", str(tmp_path / "out")]  # fmt: skip
    assert main(call) == 0
    tables = json.loads((tmp_path / "out" / "methods.json").read_text())
    assert [row[0] for row in tables[0]["rows"]][:2] == ["ridge", "skew:strength=0.1"]
    assert (tmp_path / "out" / "figure2.png").stat().st_size > 1000
    page = (tmp_path / "out" / "methods.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2 and page.count('<table class="grid">') == 4
    assert all(f"<bdi>{row[0]}</bdi>" in page for row in tables[0]["rows"])
    rows = pq.read_table(tmp_path / "out" / "methods" / "ridge" / "scores.parquet").to_pylist()
    best = max((r for r in rows if r["query"] == "q0"), key=lambda r: r["score"])
    first = re.search(r'scope="row" class="rank">1</th><td class="track">(.*?)</td>', page)[1]
    assert f"<bdi>{best['track']}</bdi>" in first and f'value="{best["score"]!r}"' in first
    scored = tmp_path / "out" / "methods" / folder_of("ridge") / "scores.parquet"
    assert main(["evaluate", str(scored), "--out", str(tmp_path / "judged")]) == 0
    before = scored.stat().st_mtime_ns
    assert main(call) == 0
    assert scored.stat().st_mtime_ns == before
    capsys.readouterr()
    assert (
        main([*call, "--where", "relation=none", "--queries", str(tmp_path / "queries")]) == 0
    )  # the target is left
    assert main([*call[:-2], "--out", str(tmp_path / "other"), "--update-draws", "3"]) == 2
    assert "no method could be asked" in capsys.readouterr().err
    assert main([*call, "--players", "-1"]) == 2
    assert "--players -1: use 0 or more" in capsys.readouterr().err


def test_a_call_that_was_cut_off_after_the_scores_counts_as_whole(place, tmp_path):
    """Scores and costs are one file: nothing can be there without the other."""
    model, tracks, queries = place
    first = ask("toy", model, tracks, queries, Settings(), tmp_path / "a")
    for path in (tmp_path / "a" / "work").glob("*.json"):
        path.unlink()
    again = ask("toy", model, tracks, queries, Settings(), tmp_path / "a")
    assert again.each == first.each and again.kept == first.kept
    assert CALLS.count("score") == 1


def test_scores_belong_to_the_dtype_and_to_the_files_that_a_method_read(place, tmp_path, rng):
    model, tracks, _ = place
    queries = [Query(tracks, i, "training track") for i in range(2)]
    vectors, path = rng.normal(size=(len(tracks), 4)), tmp_path / "v.npy"
    (tmp_path / "ids.json").write_text(json.dumps(list(tracks.ids)))
    name, found = f"embedding:path={path}", []
    for values in (vectors, vectors, vectors[::-1]):
        np.save(path, values)
        found.append(ask(name, model, tracks, queries, Settings(), tmp_path / "a").scores)
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.allclose(found[0], found[2])
    same = type(
        "Same", (), {"__getattr__": lambda self, key: getattr(model, key), "fingerprint": model.fingerprint}
    )()
    before = model_key(same)
    model.module.to(torch.bfloat16)
    assert model_key(same) != before


def test_groups_are_refused_where_only_single_pieces_can_be_scored(place, tmp_path):
    model, tracks, _ = place
    group = [Query(tracks, 0, "group", "some", (0, 1))]
    for name in ("ridge", "trak", "rps", "loss_change"):
        with pytest.raises(UserError, match="'some' is a group of tracks"):
            ask(
                name,
                model,
                tracks,
                group,
                Settings(layers=("*.cross_attn.*",), score_draws=4, update_draws=4),
                tmp_path / name,
            )
