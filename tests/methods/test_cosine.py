"""The method is the control, for queries of several sets and for groups."""

import numpy as np
from helpers import ToyDenoiser, make_tracks

from attr_engine.controls import control_scores
from attr_engine.jobs import Query
from attr_engine.methods import Workspace, parse


def test_it_is_the_control(seed, rng, tmp_path):
    model, tracks = ToyDenoiser(seed), make_tracks(rng, 70, 3, 10)
    queries = make_tracks(rng, 3, 3, 10, "q")
    fitted = parse("cosine")[1].fit(model, tracks, Workspace(tmp_path))
    found = fitted.score([Query(queries, 2, ""), Query(tracks, 66, ""), Query(queries, 0, "", "g", (0, 1))])
    asked = [(queries, 2), (tracks, 66), (queries, 0), (queries, 1)]
    expected = control_scores(tracks, asked, np.zeros(70), model.frames)["raw-latent cosine"]
    np.testing.assert_allclose(found[:2], expected[:2], atol=1e-12)
    np.testing.assert_allclose(found[2], np.maximum(expected[2], expected[3]), atol=1e-12)
    assert found[1].argmax() == 66
