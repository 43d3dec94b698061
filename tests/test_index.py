"""Features are projected gradients, scores are kernel ridge over them, and an index is whole, resumable and refuses what is not its own."""

from dataclasses import replace

import helpers
import naive
import numpy as np
import pytest
import torch
from test_index_numbers import HALF_STEP

from attr_engine import DrawPlan, UserError, kernels
from attr_engine.diffusion import ROW_FUNCTIONS
from attr_engine.features import AVERAGING, KINDS, Projector, _seed, track_features
from attr_engine.index import FEATURES, IDS, META, SOLVER, Index, IndexSettings, build_index, spectrum
from attr_engine.index_store import Maker
from attr_engine.models.protocol import select_parameters

WHOLE = IndexSettings(("all",), draws=2, replicates=2, projection="identity", rank=10**6, numbers="float32")


@pytest.fixture
def setting(seed, rng):
    model = helpers.ToyDenoiser(seed, str(rng.choice(["v", "rectified_flow"])))
    tracks = helpers.make_tracks(rng, 9, model.channels, model.frames)
    return model, tracks, helpers.make_tracks(rng, 2, model.channels, model.frames, "q")


def gradients(model, tracks, settings, purpose) -> np.ndarray:
    """``[N, parameters]``: whole gradients, by the loop of ``naive``."""
    loop = naive.Loop(model, settings.draw_plan)
    rows = []
    for item in naive.items(tracks, model.frames):
        draws = [
            loop.gradient(item, purpose, d, settings.masked, settings.function) for d in range(settings.draws)
        ]
        flat = [np.concatenate([g[n].ravel() for n in loop.theta]) for g in draws]
        if settings.averaging == "unit":
            flat = [x / np.sqrt(np.sum(x**2)) for x in flat]
        rows.append(np.mean(flat, axis=0))
    return np.array(rows)


def ridge_scores(phi: np.ndarray, asked: np.ndarray, settings) -> np.ndarray:
    """Kernel ridge over tracks, ``(K + lambda I)^-1 K_q``: ``[Q, N]``."""
    if settings.normalised:
        phi, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (phi, asked))
    kernel = phi @ phi.T
    ridge = settings.ridge * np.diag(kernel).mean() * np.eye(len(phi))
    return np.linalg.solve(kernel + ridge, phi @ asked.T).T


@pytest.mark.parametrize("function", ROW_FUNCTIONS)
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("averaging", AVERAGING)
def test_unprojected_features_are_the_gradients(averaging, function, masked, setting, measured):
    model, tracks, _ = setting
    s = replace(WHOLE, function=function, masked=masked, averaging=averaging)
    parameters = select_parameters(model, ("all",))
    projector = Projector(parameters, "identity", 10**6, 0)
    batch = tracks.batch(range(9), model.frames)
    found = track_features(
        model, parameters, batch, s.draw_plan, "score", 2, masked, projector, function, 5, averaging
    )
    expected = gradients(model, tracks, s, "score")
    assert projector.width == expected.shape[1]
    error = naive.relative_error(found, expected)
    measured("relative_error", error)
    assert error < 1e-9


def matrix(kind: str, small: int, size: int, seed: int) -> torch.Tensor:
    """A projection: that of the kernels, or rows of the identity by the order of the normals of the seed."""
    if kind != "coordinates":
        return kernels.projection(kind, small, size, seed, dtype=torch.float64)
    chosen = np.sort(np.argsort(naive.normals(seed, size, 1)[:, 0])[:small])
    return torch.eye(size, dtype=torch.float64)[chosen]


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_is_projected_on_both_sides_and_a_vector_on_one(kind, setting, seed):
    model, tracks, _ = setting
    parameters = select_parameters(model, ("all",))
    projector, rank = Projector(parameters, kind, 3, seed), 3
    plan = DrawPlan(seed, replicates=2)
    found = track_features(
        model, parameters, tracks.batch([4], model.frames), plan, "score", 2, False, projector, "loss",
        averaging="plain",
    )  # fmt: skip
    loop = naive.Loop(model, plan)
    item = naive.items(tracks, model.frames)[4]
    draws = [loop.gradient(item, "score", d, False) for d in range(2)]
    expected = []
    for name, p in parameters.items():
        g = torch.from_numpy(np.mean([d[name] for d in draws], axis=0))
        g = g.reshape(len(g), -1) if p.dim() > 1 else g.reshape(1, -1)
        for axis, side, most in ((0, "out", rank), (1, "in", rank if g.shape[0] > 1 else rank**2)):
            if g.shape[axis] > most:
                side_matrix = matrix(kind, most, g.shape[axis], _seed(seed, name, side))
                g = side_matrix @ g if axis == 0 else g @ side_matrix.T
        expected.append(g.flatten())
    assert naive.relative_error(found[0], torch.cat(expected)) < 1e-9


def test_inner_products_are_kept_in_expectation(setting, seed):
    model, tracks, _ = setting
    parameters = select_parameters(model, ("*.layers.0.cross_attn.to_kv.*",))
    batch, plan = tracks.batch([0, 1], model.frames), DrawPlan(0, replicates=2)
    identity = Projector(parameters, "identity", 10**6, 0)
    whole = track_features(model, parameters, batch, plan, "score", 2, False, identity, averaging="plain")
    products, rank, count, (name,) = (whole @ whole.T).numpy(), 3, 600, parameters

    def gram(kind, seed):
        projector = Projector(parameters, kind, rank, seed)
        features = torch.zeros(2, projector.width, dtype=whole.dtype)
        projector.add(features, name, whole)
        return (features @ features.T).numpy()

    # E |P G Q^T|^4 <= (1 + 2 / rank)^2 |G|^4: as much where G has rank 1 and the entries are gaussian.
    lengths = np.sqrt(np.diag(products))
    deviation = (1 + 2 / rank) * np.outer(lengths, lengths) / np.sqrt(count)
    for kind in ("gaussian", "rademacher"):
        mean = np.mean([gram(kind, seed + n) for n in range(count)], axis=0)
        assert (np.abs(mean - products) < 7 * deviation).all()


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("averaging", AVERAGING)
def test_scores_are_kernel_ridge_over_tracks(averaging, normalised, setting, tmp_path, measured):
    model, tracks, queries = setting
    s = replace(WHOLE, normalised=normalised, ridge=0.3, averaging=averaging)
    found = build_index(model, tracks, tmp_path / "index", s).search(model, queries)
    expected = ridge_scores(gradients(model, tracks, s, "score"), gradients(model, queries, s, "update"), s)
    error = naive.relative_error(found, expected)
    measured("relative_error", error)
    assert error < 1e-5  # rows are stored in float32


@pytest.mark.parametrize("projection", ["gaussian", "rademacher"])
def test_fewer_numbers_than_tracks_are_solved_for_as_well(projection, setting, tmp_path):
    model, tracks, queries = setting
    s = replace(WHOLE, layers=("*.pre_norm.gamma",), projection=projection, rank=1, ridge=0.02)
    index = build_index(model, tracks, tmp_path / "index", s)
    assert index.features.shape == (9, 2), "two gains, a number each"
    maker = Maker(model, s)
    phi, asked = (maker(x, range(len(x)), p).numpy() for x, p in ((tracks, "score"), (queries, "update")))
    assert naive.relative_error(index.search(model, queries), ridge_scores(phi, asked, s)) < 1e-5


def test_the_directions_are_the_same_from_either_side(rng):
    values = np.geomspace(1, 1e-6, 6)
    phi = (
        np.linalg.qr(rng.normal(size=(6, 6)))[0]
        * np.sqrt(values)
        @ np.linalg.qr(rng.normal(size=(9, 6)))[0].T
    )
    parts = [torch.from_numpy(x) for x in np.split(phi, 2)]
    few, many = (
        spectrum(iter(parts), 6, 9),
        spectrum(iter([*parts, torch.zeros(9, 9, dtype=torch.float64)]), 15, 9),
    )
    for found, vectors in (few, many):
        assert np.allclose(found, values, rtol=1e-6) and vectors.shape == (6, 9)
        assert np.allclose(vectors.T @ vectors, few[1].T @ few[1], atol=1e-8)
        assert np.allclose(vectors @ vectors.T, np.eye(6), atol=1e-8)


def test_a_bound_on_the_width_keeps_the_leading_directions(setting, tmp_path):
    model, tracks, queries = setting
    s = replace(WHOLE, width=4)
    index = build_index(model, tracks, tmp_path / "index", s)
    assert index.features.shape == (9, 4)
    phi, asked = gradients(model, tracks, s, "score"), gradients(model, queries, s, "update")
    leading = np.linalg.svd(phi)[2][:4]
    inverse = np.linalg.inv(leading @ phi.T @ phi @ leading.T + s.ridge * (phi**2).sum() / 9 * np.eye(4))
    expected = asked @ leading.T @ inverse @ leading @ phi.T
    assert naive.relative_error(index.search(model, queries), expected) < 1e-5


@pytest.mark.parametrize("numbers", ["float16", "int8"])
def test_few_bits_score_as_thirty_two_do(numbers, setting, tmp_path, measured):
    model, tracks, queries = setting
    s = IndexSettings(("all",), draws=2, rank=4)
    few, index = (
        build_index(model, tracks, tmp_path / n, replace(s, numbers=n)) for n in (numbers, "float32")
    )
    found, expected = few.search(model, queries), index.search(model, queries)
    measured("relative_error", naive.relative_error(found, expected))
    # Every number of a row is off by at most half a step, of its largest; two products in float32 by 1e-6 of the
    # lengths each, and a row of nine numbers is at most three times as long as its largest.
    transform, scales = index._solver
    asked = (index.query_features(model, queries) @ transform.T).abs().sum(dim=1).numpy()
    most = np.abs(index.features * scales[:, None]).max(axis=1)
    assert 0 < np.abs(found - expected).max()
    assert (np.abs(found - expected) <= (HALF_STEP[numbers] + 1e-5) * asked[:, None] * most).all()


def test_candidates_are_the_top_of_the_scores(setting, tmp_path, monkeypatch):
    model, tracks, queries = setting
    index = build_index(model, tracks, tmp_path / "index", IndexSettings(("all",), draws=2, rank=3))
    monkeypatch.setattr("attr_engine.index_store._SCORES", 9)  # a query at a time
    monkeypatch.setattr("attr_engine.index_store._QUERIES", 1)
    found = index.candidates(model, queries, 4)
    # A query at a time here too: together they round to other bits, which may order two near scores otherwise.
    scores = np.concatenate([index.score(one) for one in index.query_features(model, queries).split(1)])
    monkeypatch.undo()
    assert found.dtype == np.int64
    assert np.array_equal(found, np.argsort(-scores, axis=1, kind="stable")[:, :4])
    assert naive.relative_error(scores, index.search(model, queries)) < 1e-5
    assert index.candidates(model, queries, 100).shape == (2, 9)
    with pytest.raises(UserError, match="0 candidates"):
        index.candidates(model, queries, 0)


def test_a_query_whose_gradient_is_not_finite_is_refused_by_name(setting, tmp_path):
    model, tracks, queries = setting
    index = build_index(model, tracks, tmp_path / "index", IndexSettings(("all",), draws=2, rank=2))
    predict = model.predict
    model.predict = lambda x, t, c: predict(x, t, c) * float("inf")
    with pytest.raises(UserError, match="gradient of 'q0' is infinite or NaN"):
        index.search(model, queries)
    with pytest.raises(UserError, match="gradient of 't0' is infinite or NaN"):
        build_index(model, tracks, tmp_path / "other", IndexSettings(("all",), draws=2, rank=2))
    assert not (tmp_path / "other" / META).exists()


COMPARED, MEASURED = (
    5,
    2 + 18 + 18,
)  # passes that compare the first rows, and that measure recall (9 probes, 9 tracks, 2 draws)


@pytest.mark.parametrize(
    ("stop", "left", "kept"),  # of the last: passes of the first unit of recall, two gradients of two draws
    [(COMPARED + 3, 3, 0), (COMPARED + 5 + 7, 0, 4)],
    ids=["in a unit", "at the end"],
)
def test_an_index_continues_and_opens_to_the_same_bits(stop, left, kept, setting, tmp_path, monkeypatch):
    model, tracks, queries = setting
    monkeypatch.setattr("attr_engine.index._UNIT_TRACKS", 2)
    s = IndexSettings(("all",), draws=2, rank=3)
    whole = build_index(model, tracks, tmp_path / "whole", s)
    predict, calls = model.predict, []

    def stops(*arguments):
        calls.append(0)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return predict(*arguments)

    model.predict = stops
    with pytest.raises(KeyboardInterrupt):
        build_index(model, tracks, tmp_path / "index", s)
    assert not (tmp_path / "index" / META).exists()
    with pytest.raises(UserError, match="no index"):
        Index.open(tmp_path / "index")
    again = build_index(model, tracks, tmp_path / "index", s)
    total = stop + COMPARED + left + MEASURED - kept
    assert len(calls) == total, "the other units were there"
    for name in (META, IDS, FEATURES, SOLVER):
        assert (tmp_path / "index" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {p.name for p in again.folder.iterdir()} == {META, IDS, FEATURES, SOLVER}
    model.predict = predict
    assert np.array_equal(again.search(model, queries), whole.search(model, queries))
    build_index(model, tracks, tmp_path / "index", s)
    assert len(calls) == total, "an index that is there is opened"


def test_what_does_not_belong_together_is_refused(setting, seed, tmp_path):
    model, tracks, queries = setting
    s = IndexSettings(("all",), draws=2, rank=2)
    index = build_index(model, tracks, tmp_path / "index", s)
    with pytest.raises(UserError, match="another model, other data or other settings"):
        build_index(model, tracks, tmp_path / "index", replace(s, rank=3))
    with pytest.raises(UserError, match="index of another model"):
        index.search(helpers.ToyDenoiser(seed + 1), queries)
    path = tmp_path / "index" / FEATURES
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match="cannot be read"):
        Index.open(tmp_path / "index")
    np.save(path, np.zeros((9, 1)))
    with pytest.raises(UserError, match="do not belong together"):
        Index.open(tmp_path / "index")
    np.save(path, np.array([{}] * 3), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        Index.open(tmp_path / "index")
    np.save(path, np.zeros(index.features.shape))
    with pytest.raises(UserError, match="do not belong together"):
        Index.open(tmp_path / "index")
    path.write_bytes(data)
    meta = tmp_path / "index" / META
    text = meta.read_text()
    meta.write_text(text.replace("index/2", "index/1"))
    with pytest.raises(UserError, match="format 'attr_engine.index/1'.*build it again"):
        Index.open(tmp_path / "index")
    meta.write_text(text)
    (tmp_path / "index" / IDS).write_text("[")
    with pytest.raises(UserError, match="cannot be read"):
        Index.open(tmp_path / "index")


def test_a_model_that_mixes_rows_is_refused(setting, tmp_path):
    model, tracks, _ = setting
    predict = model.predict
    model.predict = lambda x, t, c: predict(x - x.mean(dim=0), t, c)
    with pytest.raises(UserError, match="mixes rows"):
        build_index(model, tracks, tmp_path / "index", WHOLE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rank": 0}, "rank 0"),
        ({"projection": "fourier"}, "fourier"),
        ({"function": "displacement"}, "displacement"),
        ({"numbers": "int4"}, "int4"),
        ({"averaging": "median"}, "median"),
        ({"width": -1}, "width -1"),
        ({"ridge": 0.0}, "ridge 0"),
        ({"draws": 3}, "draws is 3"),
        ({"layers": ("nothing",)}, "nothing"),
    ],
)
def test_unusable_settings_are_refused_by_name(change, named, setting, tmp_path):
    model, tracks, _ = setting
    with pytest.raises(UserError, match=named):
        build_index(model, tracks, tmp_path / "index", replace(WHOLE, **change))
