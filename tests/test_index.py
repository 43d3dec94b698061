"""Features are projected gradients, scores are kernel ridge over them, and an index is whole, resumable and refuses what is not its own."""

from dataclasses import replace

import helpers
import naive
import numpy as np
import pytest
import torch

from attr_engine import DrawPlan, UserError, kernels
from attr_engine.diffusion import ROW_FUNCTIONS
from attr_engine.features import Projector, _seed, track_features
from attr_engine.index import FEATURES, IDS, META, SOLVER, Index, IndexSettings, build_index
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
        rows.append(np.mean([np.concatenate([g[n].ravel() for n in loop.theta]) for g in draws], axis=0))
    return np.array(rows)


@pytest.mark.parametrize("function", ROW_FUNCTIONS)
@pytest.mark.parametrize("masked", [True, False])
def test_unprojected_features_are_the_gradients(function, masked, setting, measured):
    model, tracks, _ = setting
    s = replace(WHOLE, function=function, masked=masked)
    parameters = select_parameters(model, ("all",))
    projector = Projector(parameters, "identity", 10**6, 0)
    batch = tracks.batch(range(9), model.frames)
    found = track_features(
        model, parameters, batch, s.draw_plan, "score", 2, masked, projector, function, rows=5
    )
    expected = gradients(model, tracks, s, "score")
    assert projector.width == expected.shape[1]
    error = naive.relative_error(found, expected)
    measured("relative_error", error)
    assert error < 1e-9


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "identity"])
def test_a_weight_is_projected_on_both_sides_and_a_vector_on_one(kind, setting, seed):
    model, tracks, _ = setting
    parameters = select_parameters(model, ("all",))
    projector, rank = Projector(parameters, kind, 3, seed), 3
    plan = DrawPlan(seed, replicates=2)
    found = track_features(
        model, parameters, tracks.batch([4], model.frames), plan, "score", 2, False, projector, "loss"
    )
    loop = naive.Loop(model, plan)
    item = naive.items(tracks, model.frames)[4]
    draws = [loop.gradient(item, "score", d, False) for d in range(2)]
    expected = []
    for name, p in parameters.items():
        g = torch.from_numpy(np.mean([d[name] for d in draws], axis=0))
        g = g.reshape(len(g), -1) if p.dim() > 1 else g.reshape(1, -1)
        for axis, side, most in ((0, "out", rank), (1, "in", rank if g.shape[0] > 1 else rank**2)):
            if g.shape[axis] > most:
                matrix = kernels.projection(kind, most, g.shape[axis], _seed(seed, name, side), dtype=g.dtype)
                g = matrix @ g if axis == 0 else g @ matrix.T
        expected.append(g.flatten())
    assert naive.relative_error(found[0], torch.cat(expected)) < 1e-9


def test_inner_products_are_kept_in_expectation(setting):
    model, tracks, _ = setting
    parameters = select_parameters(model, ("cross_attn",))
    batch, plan = tracks.batch([0, 1], model.frames), DrawPlan(0, replicates=2)

    def gram(kind, rank, seed):
        projector = Projector(parameters, kind, rank, seed)
        features = track_features(model, parameters, batch, plan, "score", 2, False, projector)
        return (features @ features.T).numpy()

    whole = gram("identity", 10**6, 0)
    for kind in ("gaussian", "rademacher"):
        some = np.array([gram(kind, 3, seed) for seed in range(150)])
        error = some.std(axis=0) / np.sqrt(len(some))
        assert (np.abs(some.mean(axis=0) - whole) < 5 * error).all()


@pytest.mark.parametrize("normalised", [False, True])
def test_scores_are_kernel_ridge_over_tracks(normalised, setting, tmp_path, measured):
    model, tracks, queries = setting
    s = replace(WHOLE, normalised=normalised, ridge=0.3)
    found = build_index(model, tracks, tmp_path / "index", s).search(model, queries)
    phi, asked = gradients(model, tracks, s, "score"), gradients(model, queries, s, "update")
    if normalised:
        phi, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (phi, asked))
    kernel = phi @ phi.T
    ridge = 0.3 * np.diag(kernel).mean() * np.eye(9)
    expected = np.linalg.solve(kernel + ridge, phi @ asked.T).T
    error = naive.relative_error(found, expected)
    measured("relative_error", error)
    assert error < 1e-5  # features are stored in float32


def test_sixteen_bits_rank_as_thirty_two_do(setting, tmp_path, measured):
    model, tracks, queries = setting
    s = IndexSettings(("all",), draws=2, replicates=2, rank=4)
    scores = [
        build_index(model, tracks, tmp_path / n, replace(s, numbers=n)).search(model, queries)
        for n in ("float16", "float32")
    ]
    error = naive.relative_error(*scores)
    measured("relative_error", error)
    assert error < 1e-2


def test_an_index_continues_and_opens_to_the_same_bits(setting, tmp_path, monkeypatch):
    model, tracks, queries = setting
    monkeypatch.setattr("attr_engine.index._UNIT_TRACKS", 2)
    s = IndexSettings(("all",), draws=2, replicates=2, rank=3)
    whole = build_index(model, tracks, tmp_path / "whole", s)
    predict, calls = model.predict, []

    def stops(*arguments):
        calls.append(0)
        if len(calls) == 5 + 3:  # 5 compare the first rows
            raise KeyboardInterrupt
        return predict(*arguments)

    model.predict = stops
    with pytest.raises(KeyboardInterrupt):
        build_index(model, tracks, tmp_path / "index", s)
    assert not (tmp_path / "index" / META).exists()
    with pytest.raises(UserError, match="no index"):
        Index.open(tmp_path / "index")
    again = build_index(model, tracks, tmp_path / "index", s)
    assert len(calls) == 8 + 5 + 3, "two of five units were there"
    for name in (META, IDS, FEATURES, SOLVER):
        assert (tmp_path / "index" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {p.name for p in again.folder.iterdir()} == {META, IDS, FEATURES, SOLVER}
    model.predict = predict
    assert np.array_equal(again.search(model, queries), whole.search(model, queries))
    build_index(model, tracks, tmp_path / "index", s)
    assert len(calls) == 16, "an index that is there is opened"


def test_what_does_not_belong_together_is_refused(setting, seed, tmp_path):
    model, tracks, queries = setting
    s = IndexSettings(("all",), draws=2, replicates=2, rank=2)
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
    path.write_bytes(data)
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
        ({"numbers": "int8"}, "int8"),
        ({"ridge": 0.0}, "ridge 0"),
        ({"draws": 3}, "draws is 3"),
        ({"layers": ("nothing",)}, "nothing"),
    ],
)
def test_unusable_settings_are_refused_by_name(change, named, setting, tmp_path):
    model, tracks, _ = setting
    with pytest.raises(UserError, match=named):
        build_index(model, tracks, tmp_path / "index", replace(WHOLE, **change))
