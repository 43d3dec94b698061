"""A grid of unlearned training tracks: its numbers, its tables, interruptions, and what is refused."""

import csv
import dataclasses
import json
import math

import helpers
import numpy as np
import pytest
import torch
from test_frechet import Sampler

from attr_engine import Settings, UserError, attribute
from attr_engine.embed import embedding, similarity
from attr_engine.errors import Cancelled
from attr_engine.evaluate import self_rank
from attr_engine.frechet import Pieces
from attr_engine.grid import Grid
from attr_engine.grid_settings import Judging, plan_of, settings_of_runs
from attr_engine.grid_table import Judged, Row, interval, judge, ordered, rank_of, record
from attr_engine.result import Attribution
from attr_engine.updates import Update, applied

BASE = Settings(
    dtype="float64", fisher_draws=4, update_draws=4, score_draws=4, rows=4, unit_tracks=3, strengths=(1e-2, 1e-1),
    functions=("loss_change", "displacement"),
)  # fmt: skip
AXES = {"layers": [("self_attn",), ("cross_attn.to_kv",)], "mask_update": [True, False]}
QUIET = Judging(targets=2, pieces=0)
TABLES = ("table1.md", "table1.csv", "table1.json")


def world(rng, seed, n=9):
    return Sampler(seed), helpers.make_tracks(rng, n, 3, 10)


def tables(folder):
    return {name: (folder / name).read_bytes() for name in TABLES}


class Count:
    """Says after how many looks to stop."""

    def __init__(self, after: float = math.inf) -> None:
        self.looks, self.after = 0, after

    def is_set(self) -> bool:
        self.looks += 1
        return self.looks > self.after


def test_every_cell_is_what_a_run_of_its_own_says(rng, seed, tmp_path):
    model, tracks = world(rng, seed)
    grid = Grid(model, tracks, BASE, AXES, tmp_path / "grid", QUIET, order="grid")
    rows = grid.run()
    assert len(rows) == 2 * 2 * 2 * 2 and len(grid.targets) == 2
    values, expected = embedding("latent-statistics", tracks).values, []
    for layers in AXES["layers"]:
        for masked in AXES["mask_update"]:
            own = dataclasses.replace(BASE, layers=layers, mask_update=masked, self_influence=grid.targets)
            result = attribute(model, tracks, settings=own)
            for function in BASE.functions:
                for strength in BASE.strengths:
                    found = []
                    for target in grid.targets:
                        scores = result.values[function][result.row(target, strength)]
                        own_place = tracks.ids.index(target)
                        order = [i for i in np.argsort(-scores) if i != own_place]
                        near = similarity(values, own_place)
                        found.append(
                            (
                                self_rank(scores, tracks.ids, {target}),
                                near[order[:2]].mean(),
                                near[order[-2:]].mean(),
                            )
                        )
                    expected.append((layers, masked, function, strength, found))
    for row, (layers, masked, function, strength, found) in zip(rows, expected, strict=True):
        s = row.settings
        assert (s.layers, s.mask_update, row.function, row.strength) == (layers, masked, function, strength)
        assert [j.rank for j in row.judged] == [rank for rank, _, _ in found]
        assert np.allclose([(j.top, j.bottom) for j in row.judged], [x[1:] for x in found], atol=1e-12)
    assert len(list((tmp_path / "grid" / "cache").glob("fisher-*.safetensors"))) == 2


def test_tables_hold_the_cells(rng, seed, tmp_path):
    model, tracks = world(rng, seed)
    tracks.info = [{"seconds": 30.0 if i else 3.0} for i in range(len(tracks))]
    base = dataclasses.replace(BASE, self_influence=("t0", "t4", "t7"))
    rows = Grid(model, tracks, base, {"steps": [1, 2]}, tmp_path, QUIET).run()
    about = json.loads((tmp_path / "table1.json").read_text())
    assert about["targets"] == ["t0", "t4", "t7"] and about["tracks"] == 9 and about["similar"] == 2
    assert about["runs"] == about["runs_done"] == 2
    with open(tmp_path / "table1.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    markdown = [x for x in (tmp_path / "table1.md").read_text().splitlines() if x.startswith("| ")]
    assert len(rows) == len(about["cells"]) == len(lines) == len(markdown) - 2 == 8
    for row, cell, line in zip(rows, about["cells"], lines, strict=True):
        ranks = [j.rank for j in row.judged]
        assert list(cell["ranks"]) == ["t0", "t4", "t7"] and list(cell["ranks"].values()) == ranks
        assert cell["mean_rank"] == float(line["mean_rank"]) == np.mean(ranks)
        assert (cell["median_rank"], cell["worst_rank"]) == (np.median(ranks), max(ranks))
        assert (cell["mean_rank_short"], cell["short_targets"]) == (ranks[0], 1)
        assert cell["mean_rank_low"] <= cell["mean_rank"] <= cell["mean_rank_high"]
        assert (cell["steps"], cell["frechet"]) == (row.settings.steps, None)
    means = [cell["mean_rank"] for cell in about["cells"]]
    assert means == sorted(means), "the best cell comes first"


def test_an_interrupted_grid_carries_on_to_the_same_tables(rng, seed, tmp_path):
    model, tracks = world(rng, seed)
    judging = Judging(targets=2, pieces=4, piece_targets=1, sampler_steps=3)

    def grid(name: str) -> Grid:
        return Grid(model, tracks, BASE, AXES, tmp_path / name, judging)

    counted = Count()
    grid("whole").run(counted)
    for point in rng.choice(np.arange(1, counted.looks), 3, replace=False):
        with pytest.raises(Cancelled):
            grid(f"stopped {point}").run(Count(int(point)))
        grid(f"stopped {point}").run()
        assert tables(tmp_path / f"stopped {point}") == tables(tmp_path / "whole")


def test_a_finished_grid_computes_nothing_and_a_larger_one_only_what_is_new(rng, seed, tmp_path):
    model, tracks = world(rng, seed)
    said = []
    Grid(model, tracks, BASE, AXES, tmp_path, QUIET).run(say=lambda *x: said.append(x))
    assert [x[:2] for x in said] == [(i, 4) for i in range(5)] and said[1][
        2
    ] == "layers self_attn, mask_update off"
    before, calls, predict = tables(tmp_path), 0, model.predict

    def counting(*args):
        nonlocal calls
        calls += 1
        return predict(*args)

    model.predict = counting
    said.clear()
    Grid(model, tracks, BASE, AXES, tmp_path, QUIET).run(say=lambda *x: said.append(x))
    assert calls == 0 and tables(tmp_path) == before and said == [(4, 4, "")]
    rows = Grid(model, tracks, BASE, {**AXES, "mask_score": [False, True]}, tmp_path, QUIET).run()
    assert calls > 0 and len(rows) == 32 and len(list((tmp_path / "runs").iterdir())) == 8


def test_another_model_is_not_given_the_runs_of_this_one(rng, seed, tmp_path):
    model, tracks = world(rng, seed)
    Grid(model, tracks, BASE, {}, tmp_path, QUIET).run()
    rows = Grid(Sampler(seed + 1), tracks, BASE, {}, tmp_path, QUIET).run()
    assert all("belongs to other settings, another model" in row.error for row in rows)


# -- the Frechet distance ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["passes", "difference"])
def test_pieces_are_made_by_the_unlearned_models(way, rng, seed, tmp_path):
    model, tracks = world(rng, seed)
    base = dataclasses.replace(BASE, strengths_by=way, layers=("all",))
    judging = Judging(targets=3, pieces=4, piece_targets=2, sampler_steps=3)
    grid = Grid(model, tracks, base, {}, tmp_path / "grid", judging, order="grid")
    rows = grid.run()
    pieces = Pieces(model, tracks, embedding("latent-statistics", tracks), 4, 3, 3.0, base.seed)
    own = dataclasses.replace(base, self_influence=grid.targets, keep_updates=True, strengths_by="passes")
    attribute(model, tracks, settings=own, out=tmp_path / "own")
    expected = {}
    for path in (tmp_path / "own" / "updates").iterdir():
        update = Update.load(path)
        with applied(model, update.delta):
            expected[update.query, update.strength] = pieces.distance()
    for row in rows:
        wanted = [expected[t, row.strength] for t in grid.targets[:2]]
        assert np.allclose(row.frechet, wanted, rtol=1e-9)
    about = json.loads((tmp_path / "grid" / "table1.json").read_text())
    assert about["frechet_untouched"] == pieces.distance()
    assert len({x for row in rows for x in row.frechet}) == 4, "every model made pieces of its own"


def test_pieces_may_be_asked_for_later(rng, seed, tmp_path):
    model, tracks = world(rng, seed)
    judging = Judging(targets=2, pieces=4, piece_targets=1, sampler_steps=3)
    Grid(model, tracks, BASE, {}, tmp_path / "later", QUIET).run()
    later = Grid(model, tracks, BASE, {}, tmp_path / "later", judging).run()
    Grid(model, tracks, BASE, {}, tmp_path / "at once", judging).run()
    assert tables(tmp_path / "later") == tables(tmp_path / "at once")
    assert all(len(row.frechet) == 1 and math.isfinite(row.frechet[0]) for row in later)
    assert not (tmp_path / "later" / "runs" / later[0].run / "updates").exists()


def test_runs_with_the_same_updates_share_their_pieces(rng, seed, tmp_path):
    model, tracks = world(rng, seed)
    sample, calls = model.sample, 0

    def counting(*args):
        nonlocal calls
        calls += 1
        return sample(*args)

    model.sample = counting
    judging = Judging(targets=2, pieces=4, piece_targets=2, sampler_steps=3)
    axes = {"mask_score": [True, False], "steps": [1, 2]}
    base = dataclasses.replace(BASE, layers=("all",))
    rows = Grid(model, tracks, base, axes, tmp_path, judging, order="grid").run()
    assert calls == 1 + 2 * 2 * 2  # theta_0; targets, strengths, steps
    frechets = [list(row.frechet) for row in rows]
    assert frechets[:8] == frechets[8:] and frechets[0] != frechets[4]


# -- judging -----------------------------------------------------------------------------------------


def test_rank_without_ties_is_that_of_the_best_copy(rng):
    for _ in range(100):
        n = int(rng.integers(2, 20))
        scores = rng.normal(size=n)
        members = rng.choice(n, int(rng.integers(1, n)), replace=False).tolist()
        others = [i for i in range(n) if i not in members]
        best = members[int(np.argmax(scores[members]))]
        kept = [best, *others]  # copies count as one
        assert rank_of(scores, members) == self_rank(scores[kept], kept, {best})


def test_rank_does_not_depend_on_the_place_in_the_data_set(rng):
    scores = rng.integers(0, 3, 12).astype(float)
    for _ in range(20):
        order = rng.permutation(12)
        assert rank_of(scores[order], [list(order).index(4)]) == rank_of(scores, [4])
    assert rank_of(np.zeros(9), [0]) == rank_of(np.zeros(9), [8]) == 5.0
    assert rank_of(np.array([1.0, np.nan, 0.0]), [1]) == rank_of(np.full(3, np.nan), [0]) == 3.0
    assert rank_of(np.array([np.inf, 1.0, -5.0]), [2]) == 3.0


def test_copies_are_one_with_the_target_and_no_neighbours_of_it():
    scores = np.array([[0.5, 0.9, 0.7, 0.2, 0.1]])
    result = Attribution(
        tracks=list("abcde"), updates=[("a", 0.1)], values={"f": scores}, errors={"f": scores * 0}, base=np.zeros(5), meta={},
        draws=np.ones((1, 5), dtype=np.int64),
    )  # fmt: skip
    near = np.array([1.0, 1.0, 0.3, 0.2, -0.5])
    assert judge(result, "f", 0, {0, 1}, near, 1, True) == Judged("a", 1.0, True, 0.3, -0.5)
    assert judge(result, "f", 0, {0}, near, 2, False) == Judged("a", 3.0, False, 0.65, -0.15)
    scores[0, 4] = math.nan
    spoilt = judge(result, "f", 0, {0, 1}, near, 1, True)
    assert spoilt.rank == 1.0 and math.isnan(spoilt.top) and math.isnan(spoilt.bottom)


def test_a_target_with_a_copy_counts_its_cluster(rng, seed, tmp_path):
    tracks = helpers.make_tracks(rng, 6, 3, 10)
    twin = helpers.ToyTracks(
        [*tracks.ids, "twin"], [*tracks.raw, tracks.raw[0]], [*tracks.conditioning, tracks.conditioning[0]], tracks.silence,
        [{"family": "x", "relation": "original"}, *[{}] * 5, {"family": "x", "relation": "exact copy"}],
    )  # fmt: skip
    base = dataclasses.replace(BASE, self_influence=("t0", "twin"))
    grid = Grid(Sampler(seed), twin, base, {}, tmp_path, QUIET, order="grid")
    rows = grid.run()
    result = Attribution.from_parquet(tmp_path / "runs" / rows[0].run / "scores.parquet")
    for row in rows:
        for judged in row.judged:
            scores = result.values[row.function][result.row(judged.target, row.strength)]
            best = max(scores[0], scores[6])
            assert judged.rank == 1 + sum(x > best for x in scores[1:6])


def test_intervals_cover_the_mean_as_often_as_they_say(rng, seed):
    inside = 0
    for k in range(600):
        values = rng.normal(size=30)
        low, high = interval(values, k)
        inside += low <= 0 <= high
    # Student's t puts the coverage of 1.96 deviations at 0.936: 8 to 80 of 600 are missed in all but one of 1e9 runs.
    assert 8 <= 600 - inside <= 80
    assert interval([3.0]) is None and interval([2.0, 2.0]) == (2.0, 2.0)
    assert interval([1.0, 5.0, 9.0]) == interval([1.0, 5.0, 9.0])


def test_orders():
    def row(*ranks, error=""):
        return Row(BASE, "f", 0.1, "r", [Judged("a", r, False, 0.0, 0.0) for r in ranks], (), error)

    rows = [row(error="no"), row(3, 3), row(1, 5), row(1, 1), row(2, 4)]
    assert ordered(rows, "best") == [rows[3], rows[1], rows[4], rows[2], rows[0]]
    assert ordered(rows, "grid") == rows
    assert record(rows[0])["mean_rank"] is None and record(rows[0])["error"] == "no"


# -- what goes wrong ---------------------------------------------------------------------------------


def test_a_run_that_cannot_be_computed_does_not_end_the_grid(rng, seed, tmp_path):
    model, tracks = world(rng, seed)
    model.module.transformer.layers[0].self_attn.unused = torch.nn.Parameter(
        torch.ones(3, dtype=torch.float64)
    )
    grid = Grid(model, tracks, BASE, {"damping": [0.0, 0.1]}, tmp_path, QUIET)
    rows = grid.run()
    good, bad = rows[:4], rows[4:]
    assert all(not row.error and len(row.judged) == 2 for row in good)
    assert all("divides by the zero Fisher" in row.error and row.settings.damping == 0 for row in bad)
    assert (tmp_path / "table1.md").read_text().count("not computed: without damping") == 4


@pytest.mark.parametrize(
    ("base", "axes", "judging", "words"),
    [
        ({}, {"model": ["a", "b"]}, {}, "'model' has one value in a grid"),
        ({}, {"steps": []}, {}, "the values of 'steps'"),
        ({}, {"steps": [1, 1]}, {}, "each once"),
        ({"groups": "artist"}, {}, {}, "leave out 'groups'"),
        ({"top": 5}, {}, {}, "leave out 'top'"),
        ({"queries": ("x",)}, {}, {}, "leave out 'queries'"),
        ({"self_influence": ("nobody",)}, {}, {}, "'nobody' is not a training track"),
        ({}, {"layers": [("self_attn",), ("nothing",)]}, {}, "'nothing' matches no parameter"),
        ({}, {"damping": [0.1, -1.0]}, {}, "damping is -1.0"),
        ({"strengths": (0.0,)}, {}, {}, "positive strength"),
        ({}, {}, {"targets": 10}, "10 targets of 9"),
        ({}, {}, {"similar": 9}, "similarity to 9 of 9"),
        ({}, {}, {"pieces": 1}, "at least 2 pieces"),
        ({}, {}, {"piece_targets": 0}, "pieces after 0 targets"),
        ({}, {}, {"embedding": "clip"}, "unknown embedding 'clip'"),
        ({}, {}, {"embedding": "clap"}, "clap needs weights"),
    ],
)
def test_bad_input_is_refused_before_anything_is_computed(base, axes, judging, words, rng, seed, tmp_path):
    model, tracks = world(rng, seed)
    model.predict = None
    with pytest.raises(UserError, match=words):
        Grid(
            model, tracks, dataclasses.replace(BASE, **base), axes, tmp_path / "grid",
            dataclasses.replace(QUIET, **judging),
        )  # fmt: skip
    assert not (tmp_path / "grid").exists()


def test_two_processes_do_not_share_a_folder(rng, seed, tmp_path):
    from attr_engine.units import held

    model, tracks = world(rng, seed)
    with held(tmp_path / ".lock") as mine:
        assert mine
        with pytest.raises(UserError, match="another process works in"):
            Grid(model, tracks, BASE, {}, tmp_path, QUIET).run()


# -- settings ----------------------------------------------------------------------------------------


def test_runs_are_the_product_of_the_axes():
    runs = settings_of_runs(BASE, {"steps": [1, 2], "damping": [0.0, 0.1, 1.0]})
    assert [(s.steps, s.damping) for s in runs] == [(a, b) for a in (1, 2) for b in (0.0, 0.1, 1.0)]
    assert {dataclasses.replace(s, steps=1, damping=0.1) for s in runs} == {BASE}
    assert settings_of_runs(BASE, {}) == [BASE]


def test_a_grid_is_replayed_by_its_config(rng, seed, tmp_path):
    model, tracks = world(rng, seed)
    Grid(model, tracks, BASE, AXES, tmp_path / "first", QUIET).run()
    base, axes, judging = plan_of(tmp_path / "first" / "grid.json", {})
    assert (base, axes, judging) == (BASE, AXES, QUIET)
    Grid(model, tracks, base, axes, tmp_path / "second", judging).run()
    assert tables(tmp_path / "first") == tables(tmp_path / "second")


def test_flags_go_before_the_config(rng, seed, tmp_path):
    path = tmp_path / "grid.json"
    path.write_text(
        json.dumps(
            {
                "settings": {"steps": 3, "damping": 0.5},
                "axes": {"plan": ["track", "shared"]},
                "judging": {"pieces": 2},
            }
        )
    )
    base, axes, judging = plan_of(
        path, {"steps": [1, 2], "plan": ["shared"], "targets": 5, "strengths": [0.5]}
    )
    assert (base.damping, base.plan, base.strengths, axes) == (0.5, "shared", (0.5,), {"steps": [1, 2]})
    assert judging == Judging(targets=5, pieces=2)
    path.write_text(json.dumps({"steps": 2, "queries": ["x"], "top": 5, "self_influence": ["a"]}))  # of a run
    base, axes, _ = plan_of(path, {})
    assert (base.steps, base.queries, base.top, base.self_influence, axes) == (2, (), 0, ("a",), {})
    assert plan_of(path, {"targets": 5})[0].self_influence == ()
    with pytest.raises(UserError, match="leave out --targets or --self-influence"):
        plan_of(path, {"targets": 5, "self_influence": ["b"]})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"settings": {}, "axes": {}}, "neither of a grid nor of a run"),
        ({"settings": {"nonsense": 1}, "axes": {}, "judging": {}}, "unknown setting 'nonsense'"),
        ({"settings": {}, "axes": {"steps": 2}, "judging": {}}, "'steps' = 2"),
        ({"settings": {}, "axes": {"steps": ["two"]}, "judging": {}}, "expected int"),
        ({"settings": {}, "axes": {"model": ["x", "y"]}, "judging": {}}, "'model'"),
        ({"settings": {}, "axes": {}, "judging": {"pieces": 2.5}}, "'pieces' = 2.5"),
        ({"settings": {}, "axes": {}, "judging": {"nonsense": 1}}, "'nonsense' = 1"),
    ],
)
def test_a_config_that_is_none_is_refused(value, words, tmp_path):
    (tmp_path / "grid.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=words):
        plan_of(tmp_path / "grid.json", {})
