"""Shares are parts of one whole, named, and refuse broken scores."""

import numpy as np
import pytest

from attr_engine.report import TRANSFORMS, shares


@pytest.fixture
def scores(rng):
    return rng.normal(size=101) * 1e-6


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_shares_are_parts_of_one(scores, name):
    parts = shares(scores, name)
    assert parts.shape == scores.shape
    assert (parts >= 0).all()
    assert parts.sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_a_larger_score_never_has_a_smaller_share(scores, name):
    assert (np.diff(shares(scores, name)[np.argsort(scores)]) >= 0).all()


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
def test_the_unit_of_the_scores_does_not_matter(scores, name):
    np.testing.assert_allclose(shares(scores * 12345.0, name), shares(scores, name), rtol=1e-9, atol=1e-15)


def test_the_transforms_are_the_documented_formulas(scores):
    # A difference of scores has their rounding: an eps of the largest over the sum of 101 is far below 1e-15 of a
    # share, but not below any part of a share that is almost 0.
    excess = np.maximum(scores - np.median(scores), 0)
    np.testing.assert_allclose(
        shares(scores, "excess-over-median"), excess / excess.sum(), rtol=1e-9, atol=1e-15
    )
    z = np.exp((scores - scores.mean()) / scores.std())
    np.testing.assert_allclose(shares(scores, "softmax"), z / z.sum(), rtol=1e-9)
    shifted = scores - scores.min()
    np.testing.assert_allclose(shares(scores, "min-max"), shifted / shifted.sum(), rtol=1e-9, atol=1e-15)


def test_equal_scores_stand_out_for_no_transform():
    equal = np.full(7, 0.1)
    assert not shares(equal, "excess-over-median").any()
    assert not shares(equal, "min-max").any()
    np.testing.assert_allclose(shares(equal, "softmax"), 1 / 7)


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
@pytest.mark.parametrize("size", [1e-310, 1e308])
def test_scores_near_the_ends_of_float64_neither_overflow_nor_vanish(name, size):
    assert shares(np.array([-1.0, 0.5, 1.0]) * size, name).sum() == pytest.approx(1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_broken_score_is_refused_by_its_index(scores, bad):
    scores[17] = bad
    with pytest.raises(ValueError, match="score 17 of 101"):
        shares(scores)


def test_an_unknown_name_is_answered_with_the_known_ones(scores):
    with pytest.raises(ValueError, match="excess-over-median, min-max, softmax"):
        shares(scores, "percent")


@pytest.mark.parametrize("shape", [(0,), (2, 3), ()])
def test_scores_must_be_one_per_track(shape):
    with pytest.raises(ValueError, match=r"\[N\]"):
        shares(np.zeros(shape))


def test_every_transform_says_what_it_is_not():
    assert all(transform.formula and transform.caveat for transform in TRANSFORMS.values())
