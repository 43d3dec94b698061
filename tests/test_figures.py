"""The numbers of the figures against their definitions, tables that do not fit, and files that show something."""

import dataclasses
import json
import math
import sys

import helpers
import naive
import numpy as np
import pytest

from attr_engine import LatentWriter, Settings, UserError, attribute
from attr_engine.controls import control_scores
from attr_engine.figures import chosen, collect, correlations, draw, middle_ranks, scaled, sorted_curves
from attr_engine.latents import LatentDataset
from attr_engine.result import Attribution

SETTINGS = Settings(
    dtype="float64", fisher_draws=4, update_draws=4, score_draws=4, rows=4, strengths=(1e-2, 1e-1), functions=("loss_change", "skew")
)  # fmt: skip


def table(rng, tracks, queries, functions=("f",), strengths=(0.5,), meta=None):
    updates = [(q, x) for q in queries for x in strengths]
    values = {f: rng.normal(size=(len(updates), len(tracks))) for f in functions}
    return Attribution(
        tracks=list(tracks), updates=updates, values=values, errors={f: np.abs(v) for f, v in values.items()},
        base=rng.random(len(tracks)), meta=meta or {}, draws=np.full((len(updates), len(tracks)), 4),
    )  # fmt: skip


def write_set(folder, tracks):
    writer = LatentWriter(folder, padding=tracks.silence)
    for name, latent, conditioning in zip(tracks.ids, tracks.raw, tracks.conditioning, strict=True):
        writer.add(name, latent, conditioning, {})
    writer.close()
    return LatentDataset(folder)


# -- the numbers ------------------------------------------------------------------------------------


def test_scaled_scores(rng):
    scores = rng.normal(size=20) * 7 + 3
    line = scaled(scores, "min-max")
    assert math.isclose(line.min(), 0) and math.isclose(line.max(), 1)
    assert np.allclose(np.diff(line) / np.diff(scores), 1 / (scores.max() - scores.min()))
    z = (scores - scores.mean()) / scores.std()
    assert np.allclose(scaled(scores, "softmax"), np.exp(z) / np.exp(z).sum())
    assert not scaled(np.full(4, 2.0), "min-max").any()
    assert np.allclose(scaled(np.full(4, 2.0), "softmax"), 0.25)


@pytest.mark.parametrize("how", ["min-max", "softmax"])
def test_curves_are_sorted_by_the_first_method(how, rng):
    methods = {name: rng.normal(size=(5, 12)) for name in "abc"}
    curves = sorted_curves(methods, how)
    for name, scores in methods.items():
        rows = []
        for q in range(5):
            order = sorted(range(12), key=lambda i, q=q: -methods["a"][q, i])
            own = scaled(scores[q], how)
            rows.append([own[i] for i in order])
        assert np.allclose(curves[name][0], np.mean(rows, axis=0))
        assert np.allclose(curves[name][1], np.std(rows, axis=0))
    assert (np.diff(curves["a"][0]) <= 0).all()


def test_correlations_are_the_mean_over_queries(rng):
    methods = {name: rng.normal(size=(4, 15)) for name in "ab"}
    methods["c"] = methods["a"] ** 3

    def mean(of):
        pairs = [[(x, y) for y in methods.values()] for x in methods.values()]
        return [[np.mean([of(x[q], y[q]) for q in range(4)]) for x, y in row] for row in pairs]

    pearson, spearman = mean(lambda x, y: np.corrcoef(x, y)[0, 1]), mean(naive.spearman)
    assert np.allclose(correlations(methods, "Pearson"), pearson, atol=1e-12)
    assert np.allclose(correlations(methods, "Spearman"), spearman, atol=1e-12)
    assert math.isclose(correlations(methods, "Spearman")[0, 2], 1.0)


def test_equal_scores_share_their_ranks_and_a_constant_has_no_correlation(rng):
    scores = rng.integers(0, 4, 30).astype(float)
    expected = [(scores < x).sum() + ((scores == x).sum() + 1) / 2 for x in scores]
    assert np.array_equal(middle_ranks(scores), expected)
    found = correlations({"a": rng.normal(size=(2, 5)), "b": np.full((2, 5), 0.1)}, "Pearson")
    assert math.isclose(found[0, 0], 1.0) and np.isnan(found[0, 1]) and np.isnan(found[1, 1])


# -- the methods ------------------------------------------------------------------------------------


def test_methods_of_tables_are_put_into_one_order(rng, tmp_path):
    tracks, queries = [f"t{i}" for i in range(8)], ["q0", "q1", "q2"]
    first = table(rng, tracks, queries, ("f", "g"), (0.1, 0.5))
    order = rng.permutation(8)
    second = table(rng, [tracks[i] for i in order], ["other", *reversed(queries)])
    first.to_parquet(tmp_path / "first.parquet")
    second.to_parquet(tmp_path / "second.parquet")
    methods = collect(tmp_path / "first.parquet", [tmp_path / "second.parquet"], controls=False)
    assert list(methods) == ["f, 0.1", "f, 0.5", "g, 0.1", "g, 0.5", "second: f"]
    for q, query in enumerate(queries):
        assert np.array_equal(methods["g, 0.5"][q], first.values["g"][first.row(query, 0.5)])
        assert np.array_equal(methods["second: f"][q][order], second.values["f"][second.row(query)])
    assert list(chosen(methods, ["second: f", "f, 0.1"])) == ["second: f", "f, 0.1"]
    with pytest.raises(UserError, match=r"no method 'h'; known: f, 0\.1; "):
        chosen(methods, ["h"])


def test_controls_of_a_run(rng, seed, tmp_path):
    model = helpers.ToyDenoiser(seed)
    tracks = write_set(tmp_path / "tracks", helpers.make_tracks(rng, 7, 3, 10))
    queries = write_set(tmp_path / "pieces", helpers.make_tracks(rng, 2, 3, 10, "q"))
    paths = {"data": str(tracks.path), "queries": (str(queries.path),)}
    settings = dataclasses.replace(SETTINGS, self_influence=("t3",), **paths)
    result = attribute(model, tracks, queries, settings, out=tmp_path / "run")
    methods = collect(tmp_path / "run")
    expected = control_scores(tracks, [(queries, 0), (queries, 1), (tracks, 3)], result.base, 10, 0)
    assert list(methods)[-4:] == list(expected)
    assert all(np.array_equal(methods[name], expected[name]) for name in expected)
    with pytest.raises(UserError, match="does not hold the tracks"):
        collect(tmp_path / "run", data=str(queries.path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.tracks.__setitem__(0, "x"), "'t0' is in one of them only"),
        (lambda t: t.updates.__setitem__(0, ("x", 0.5)), "no scores for the query 'q0'"),
        (lambda t: t.values["f"].__setitem__((1, 2), math.nan), "query 'q1' and the track 't2'"),
    ],
)
def test_tables_of_something_else_are_refused(change, words, rng, tmp_path):
    tracks, queries = [f"t{i}" for i in range(5)], ["q0", "q1"]
    table(rng, tracks, queries).to_parquet(tmp_path / "first.parquet")
    other = table(rng, tracks, queries)
    change(other)
    other.to_parquet(tmp_path / "second.parquet")
    with pytest.raises(UserError, match=words):
        collect(tmp_path / "first.parquet", [tmp_path / "second.parquet"], controls=False)


def test_what_is_missing_is_named(rng, tmp_path):
    table(rng, "abc", ["q"]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="give --data, or --no-controls"):
        collect(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="nothing/scores.parquet does not exist|nothing does not exist"):
        collect(tmp_path / "nothing")
    (tmp_path / "b").mkdir()
    table(rng, "abc", ["q"]).to_parquet(tmp_path / "b" / "a.parquet")
    twice = [tmp_path / "a.parquet", tmp_path / "b" / "a.parquet"]
    with pytest.raises(UserError, match="two of the tables are called 'a'"):
        collect(tmp_path / "a.parquet", twice, controls=False)


# -- the drawings -----------------------------------------------------------------------------------


def test_figures_are_written_and_show_something(rng, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    methods = {f"method <{i}> & co": rng.normal(size=(3, 30)) for i in range(7)}
    methods["constant"] = np.ones((3, 30))
    paths = draw(methods, tmp_path / "a")
    assert [p.name for p in paths] == [
        "figure1.png",
        "figure1.svg",
        "figure2.png",
        "figure2.svg",
        "figures.json",
    ]
    for path in paths:
        assert path.stat().st_size > 1000
        if path.suffix == ".png":
            pixels = imread(path)
            assert (
                min(pixels.shape[:2]) > 200
                and len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50
            )
        if path.suffix == ".svg":
            assert path.read_text().rstrip().endswith("</svg>")
    about = json.loads((tmp_path / "a" / "figures.json").read_text())
    assert about["methods"] == list(methods) and (about["queries"], about["tracks"]) == (3, 30)
    assert np.allclose(
        np.array(about["Pearson"])[:7, :7].astype(float), correlations(methods, "Pearson")[:7, :7]
    )
    assert about["Spearman"][7] == [None] * 8
    again = draw(methods, tmp_path / "b")
    assert all(x.read_bytes() == y.read_bytes() for x, y in zip(paths, again, strict=True))


def test_figures_without_matplotlib_or_tracks_say_so(rng, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="figures of 1 tracks"):
        draw({"a": np.ones((2, 1))}, tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="figures need matplotlib .*pip install matplotlib"):
        draw({"a": rng.normal(size=(2, 5))}, tmp_path)
