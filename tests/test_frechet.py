"""The Frechet distance against its closed form, and pieces that are the same for every model."""

import math

import helpers
import numpy as np
import pytest
import torch

from attr_engine import UserError
from attr_engine.embed import Embedding, embedding
from attr_engine.frechet import Pieces, frechet_distance


def samples_of(rng, n, mean, covariance):
    """Samples whose mean and covariance are exactly those."""
    x = rng.normal(size=(n, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / (n - 1))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def by_eigenvalues(a, b):
    """The formula as it is written, by the eigenvalues of the product of the covariances."""
    (ca, cb), gap = (np.cov(x, rowvar=False) for x in (a, b)), a.mean(axis=0) - b.mean(axis=0)
    roots = np.sqrt(np.clip(np.linalg.eigvals(ca @ cb).real, 0, None))
    return gap @ gap + np.trace(ca) + np.trace(cb) - 2 * roots.sum()


def test_of_gaussians_with_diagonal_covariances(rng, measured):
    for _ in range(20):
        e = int(rng.integers(1, 6))
        means, spreads = rng.normal(size=(2, e)), rng.uniform(0.1, 3, (2, e))
        a, b = (samples_of(rng, 40, m, np.diag(s**2)) for m, s in zip(means, spreads, strict=True))
        expected = np.square(means[0] - means[1]).sum() + np.square(spreads[0] - spreads[1]).sum()
        # Of what is added and subtracted: the sum itself may be near 0. A few eps for each of at most 5 dimensions and 40 samples.
        terms = np.square(means).sum() + np.square(spreads).sum()
        error = abs(frechet_distance(a, b) - expected) / terms
        measured("closed form", error)
        assert error < 1e-12


def test_of_any_covariances(rng):
    def turned(e):
        """A map that is far from singular: the root of an eigenvalue that is almost 0 has few digits."""
        return np.linalg.qr(rng.normal(size=(e, e)))[0] * rng.uniform(0.3, 3, e) @ np.linalg.qr(rng.normal(size=(e, e)))[0]  # fmt: skip

    for _ in range(20):
        e, n, m = int(rng.integers(2, 6)), int(rng.integers(10, 40)), int(rng.integers(10, 40))
        a = rng.normal(size=(n, e)) @ turned(e) + rng.normal(size=e)
        b = rng.normal(size=(m, e)) @ turned(e)
        assert math.isclose(frechet_distance(a, b), by_eigenvalues(a, b), rel_tol=1e-8)
        assert math.isclose(frechet_distance(a, b), frechet_distance(b, a), rel_tol=1e-10)


def test_of_fewer_samples_than_dimensions_against_a_matrix_root(rng):
    linalg = pytest.importorskip("scipy.linalg")
    a, b = rng.normal(size=(4, 12)), rng.normal(size=(30, 12)) * 2 + 1
    ca, cb = (np.cov(x, rowvar=False) for x in (a, b))
    half = linalg.sqrtm(cb).real
    root = linalg.sqrtm(half @ ca @ half).real
    gap = a.mean(axis=0) - b.mean(axis=0)
    expected = gap @ gap + np.trace(ca) + np.trace(cb) - 2 * np.trace(root)
    assert math.isclose(frechet_distance(a, b), expected, rel_tol=1e-5)  # sqrtm of a singular matrix


def test_of_a_set_and_itself_is_zero_and_of_numbers_that_are_none_it_is_none(rng):
    a = rng.normal(size=(7, 5))
    assert frechet_distance(a, a[::-1]) < 1e-12
    assert math.isclose(frechet_distance(a, a + 2.0), 5 * 4.0, rel_tol=1e-10)
    a[3, 1] = np.inf
    assert math.isnan(frechet_distance(a, a))


@pytest.mark.parametrize(("n", "m", "width"), [(1, 5, 3), (5, 1, 3), (5, 5, 4)])
def test_too_few_samples_and_other_widths_are_refused(n, m, width):
    with pytest.raises(UserError, match="at least 2 samples"):
        frechet_distance(np.ones((n, 3)), np.ones((m, width)))


class Sampler(helpers.ToyDenoiser):
    """Makes pieces that depend on a weight, the conditioning and the seed."""

    samples_per_frame, sample_rate = 2, 2

    def sample(self, items, seed, steps, guidance):
        rng = np.random.default_rng(seed)
        noise = rng.normal(size=(len(items), self.channels, self.frames)) * guidance / steps
        shift = np.array([float(x["lead"]) for x in items])[:, None, None]
        weight = float(next(self.module.parameters()).flatten()[0].detach())
        return torch.as_tensor(noise + shift + 1e3 * weight)


def make(rng, seed):
    tracks = helpers.make_tracks(rng, 12, 3, 10)
    return Sampler(seed), tracks, embedding("latent-statistics", tracks)


def test_pieces_are_the_same_for_every_model_and_follow_its_weights(rng, seed):
    model, tracks, found = make(rng, seed)
    pieces = Pieces(model, tracks, found, 9, 5, 3.0, seed)
    before = pieces.distance()
    assert before == pieces.distance() == Pieces(model, tracks, found, 9, 5, 3.0, seed).distance()
    assert before != Pieces(model, tracks, found, 9, 5, 3.0, seed + 1).distance()
    with torch.no_grad():  # away from 0, so that the pieces go away from the tracks
        weight = next(model.module.parameters()).flatten()
        weight[0] += torch.sign(weight[0])
    assert pieces.distance() > before + 1.0
    with torch.no_grad():
        next(model.module.parameters()).flatten()[0] = math.nan
    assert math.isnan(pieces.distance())


def test_pieces_that_cannot_be_made_are_refused(rng, seed):
    model, tracks, found = make(rng, seed)
    with pytest.raises(UserError, match="at least 2 pieces"):
        Pieces(model, tracks, found, 1, 5, 3.0, seed)
    with pytest.raises(UserError, match="has no sampler"):
        Pieces(helpers.ToyDenoiser(seed), tracks, found, 4, 5, 3.0, seed)
    with pytest.raises(UserError, match="of the training tracks only"):
        Pieces(model, tracks, Embedding("clap.npy", found.values), 4, 5, 3.0, seed)
