"""Figures of fidelity against their formulas, in plain loops."""

import math

import helpers
import numpy as np
import pytest

from attr_engine import UserError
from attr_engine.embed import Embedding, latent_statistics
from attr_engine.fidelity import clap_score, cluster_kl, embedded, frechet, nearest, posterior_kl
from attr_engine.frechet import frechet_distance, pieces


def test_nearest_is_the_largest_cosine(rng):
    a, b = rng.normal(size=(5, 4)), rng.normal(size=(3, 4))
    expected = [max(float(x @ y) / math.dist(x, 0 * x) / math.dist(y, 0 * y) for y in b) for x in a]
    # Not relative: the cosine itself may be near 0, its rounding is of a few eps.
    np.testing.assert_allclose(nearest(a, b), expected, rtol=0, atol=1e-14)
    assert nearest(np.zeros((1, 4)), b) == 0


def test_frechet_of_pieces_is_that_of_their_embeddings(rng):
    tracks = helpers.make_tracks(rng, 6, 3, 10)
    of = latent_statistics(tracks)
    made = [rng.normal(size=(3, n)).astype(np.float32) for n in (4, 10, 7)]
    values = embedded(made, of)
    assert frechet(made, of) == frechet_distance(values, of.values)
    assert frechet(made, of, [0, 2, 5]) == frechet_distance(values, of.values[[0, 2, 5]])
    with pytest.raises(UserError, match="mine.npy is of the training tracks only"):
        frechet(made, Embedding("mine.npy", of.values))


def test_divergence_of_posteriors_is_that_of_a_loop(rng):
    reference, made = (list(rng.uniform(0.1, 1, (4, 3))) for _ in range(2))
    found = posterior_kl(lambda x: np.stack(x), reference, made)
    expected = []
    for p, q in zip(reference, made, strict=True):
        p, q = p / p.sum(), q / q.sum()
        expected.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert found == pytest.approx(np.mean(expected), rel=1e-12)
    assert posterior_kl(np.stack, reference, reference) == 0
    assert 0 < posterior_kl(np.stack, [np.array([1.0, 0.0])], [np.array([0.0, 1.0])]) < math.inf
    for bad in (-np.ones((4, 3)), np.zeros((4, 3)), np.full((4, 3), np.nan), np.ones(4)):
        with pytest.raises(UserError, match="a posterior is"):
            posterior_kl(lambda x, bad=bad: bad, reference, made)
    with pytest.raises(UserError, match="in pairs"):
        posterior_kl(np.stack, reference, made[:2])


def test_divergence_of_clusters_counts_them(seed, rng):
    # So far apart that k-means++ picks one of a cluster that has its centre but once in 1e13 runs.
    centres = 1e7 * np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    tracks = np.concatenate([c + rng.normal(size=(4, 2)) for c in centres])
    made = np.concatenate([centres[[0] * 7] + rng.normal(size=(7, 2)), centres[[1]]])
    p, q = [5 / 15] * 3, [8 / 11, 2 / 11, 1 / 11]
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert cluster_kl(tracks, made, 3, seed) == pytest.approx(expected, rel=1e-12)
    assert cluster_kl(tracks, tracks, 3, seed) == pytest.approx(0, abs=1e-12)


def test_clap_score_is_the_mean_cosine_of_pairs(rng):
    a, b = rng.normal(size=(2, 5, 8))
    expected = np.mean([x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)])
    assert clap_score(a, b) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UserError, match="in pairs"):
        clap_score(a, b[:3])
    with pytest.raises(UserError, match="zero or not finite"):
        clap_score(a, 0 * b)


def test_a_model_without_a_sampler_makes_no_pieces(seed):
    with pytest.raises(UserError, match="no sampler"):
        pieces(helpers.ToyDenoiser(seed), [{}], 0, 2, 1.0)
