"""The engine's scores as methods are those of a run, whatever else is asked with them, and are kept."""

import numpy as np
import pytest
from helpers import ToyDenoiser, make_tracks

import attr_engine
from attr_engine import Settings
from attr_engine.jobs import Query
from attr_engine.methods import METHODS, Workspace, parse

SETTINGS = Settings(
    dtype="float64", score_draws=4, update_draws=4, fisher_draws=4, layers=("*.cross_attn.*",)
)


@pytest.mark.parametrize(
    "name", ["ridge", "loss_change", "skew", "displacement", "influence", "norm_influence"]
)
def test_a_score_is_that_of_a_run(seed, rng, tmp_path, name):
    model, tracks = ToyDenoiser(seed), make_tracks(rng, 6, 3, 10)
    queries, others = make_tracks(rng, 2, 3, 10, "q"), make_tracks(rng, 1, 3, 10, "r")
    asked = [
        Query(queries, 1, ""),
        Query(others, 0, ""),
        Query(tracks, 3, "training track"),
        Query(queries, 0, ""),
    ]
    fitted = parse(name)[1].fit(model, tracks, Workspace(tmp_path, SETTINGS))
    found = fitted.score(asked)
    run = attr_engine.attribute(
        model, tracks, [queries, others], Settings(**{**vars(SETTINGS), "functions": (name,), "self_influence": (tracks.ids[3],)})
    )  # fmt: skip
    expected = np.stack([run.values[name][run.row(q.id)] for q in asked])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9 * np.abs(expected).max())
    assert METHODS[name].kind in ("gradient", "unlearning")
    alone = parse(name)[1].fit(model, tracks, Workspace(tmp_path, SETTINGS)).score(asked[2:3])
    np.testing.assert_allclose(alone[0], expected[2], rtol=1e-6, atol=1e-9 * np.abs(expected).max())
