"""Refusals: the rate of false accepts that is promised, and what may not be compared."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from attr_engine import abstain
from attr_engine.errors import UserError
from attr_engine.result import Attribution

META = {"model": "m", "data": "d", "settings": {"seed": 0, "ridge": 0.3, "queries": ["a"]}}


def table(scores, strengths=(0.1,), meta=META, function="ridge"):
    updates = [(f"q{q}", x) for q in range(len(scores)) for x in strengths]
    values = np.repeat(scores, len(strengths), axis=0)
    n = scores.shape[1]
    return Attribution(
        [f"t{i}" for i in range(n)], updates, {function: values}, {function: values * np.nan}, np.zeros(n), meta,
        np.ones(values.shape, dtype=np.int64),
    )  # fmt: skip


def test_prominence_does_not_change_with_shift_and_scale_and_counts_deviations(rng):
    scores = rng.normal(size=(3, 4001))
    found = abstain.prominence(scores)
    assert found == pytest.approx(abstain.prominence(5.0 + 7.0 * scores))
    # Quantiles of the normal distribution: their median is 0 and that of their sizes 0.6743, of which 1.4826 make 0.9997. Prominence
    # is then the number of standard deviations to 3e-4 of the largest, 3.7.
    normal = np.array([NormalDist().inv_cdf((i + 0.5) / 4001) for i in rng.permutation(4001)])
    assert abstain.prominence(normal) == pytest.approx(normal, abs=2e-3)
    some = scores.copy()
    some[:, 0] = np.nan
    assert np.isnan(abstain.prominence(some)[:, 0]).all()
    assert not abstain.prominence(np.ones(5)).any()


def test_controls_pass_no_more_often_than_promised(rng):
    """Exchangeable queries, over many calibrations: the rate on average, as ``rate (n + 1)`` is a whole number."""
    for rate, count in ((0.05, 99), (0.2, 24)):
        accepted = np.mean([
            (rng.gumbel(size=200) > abstain.threshold(rng.gumbel(size=count), rate)).mean() for _ in range(4000)
        ])  # fmt: skip
        # One calibration's part of the distribution above its threshold is a beta number of mean `rate` and variance
        # rate (1 - rate) / (n + 2); 200 queries add at most rate (1 - rate) / 200. 6.3 deviations: once in 1e9 runs.
        deviation = math.sqrt(rate * (1 - rate) * (1 / (count + 2) + 1 / 200) / 4000)
        assert abs(accepted - rate) < 6.3 * deviation


def test_too_few_controls_are_refused(rng):
    assert np.isfinite(abstain.threshold(rng.normal(size=19), 0.05))
    with pytest.raises(UserError, match="takes 19 at least"):
        abstain.threshold(rng.normal(size=18), 0.05)
    with pytest.raises(UserError, match="between 0 and 1"):
        abstain.threshold(rng.normal(size=18), 0.0)


def test_a_track_that_made_the_query_is_responsible_and_no_other(rng, tmp_path):
    table(rng.normal(size=(60, 200))).to_parquet(tmp_path / "scores.parquet")
    # All but one are below 1.4, which the best of 200 normal numbers is above but once in 1e7 controls.
    scores = np.stack([rng.permutation(np.linspace(-2, 2, 200)) for _ in range(2)])
    scores[0, 17] += 30
    found = abstain.read_controls(tmp_path, table(scores), "ridge", 0.1, 0.05)
    assert np.flatnonzero(found.responsible(scores[0])).tolist() == [17]
    assert not found.responsible(scores[1]).any()
    assert found.count == 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "another model"),
        ({"data": "other"}, "another data"),
        ({"settings": {**META["settings"], "ridge": 0.1}}, "another ridge"),
    ],
)
def test_controls_of_something_else_are_refused(change, message, rng, tmp_path):
    table(rng.normal(size=(30, 9))).to_parquet(tmp_path / "scores.parquet")
    with pytest.raises(UserError, match=message):
        abstain.read_controls(
            tmp_path, table(rng.normal(size=(2, 9)), meta={**META, **change}), "ridge", 0.1, 0.05
        )


def test_controls_without_the_function_or_the_strength_are_refused(rng, tmp_path):
    table(rng.normal(size=(30, 9)), function="skew").to_parquet(tmp_path / "scores.parquet")
    one = table(rng.normal(size=(2, 9)))
    with pytest.raises(UserError, match="no scores by 'ridge'"):
        abstain.read_controls(tmp_path, one, "ridge", 0.1, 0.05)
    with pytest.raises(UserError, match="strength 0.2"):
        abstain.read_controls(tmp_path, table(rng.normal(size=(2, 9)), function="skew"), "skew", 0.2, 0.05)
