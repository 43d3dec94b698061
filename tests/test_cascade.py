"""An index names candidates, which are then measured as an exhaustive run measures them."""

import forks
import numpy as np
import pytest

from attr_engine import Attribution, UserError, attribute
from attr_engine.index import Index, IndexSettings, build_index
from attr_engine.race import Race

OPTIONS = {"functions": ("displacement", "influence"), "steps": 1, "rows": 1, "rescore": 3}


@pytest.fixture
def setting(seed, tmp_path):
    model, tracks, queries = forks.make(seed)
    index = build_index(model, tracks, tmp_path / "index", IndexSettings(("all",), draws=2, rank=2))
    return model, tracks, queries, index


def go(setting, out, **changes) -> Attribution:
    model, tracks, queries, index = setting
    return attribute(
        model, tracks, queries, forks.small(**{**OPTIONS, "index": str(index.folder), **changes}), out
    )


@pytest.mark.parametrize("changes", [{}, {"functions": ("influence",)}, {"strengths_by": "tangent"}], ids=str)
def test_candidates_have_the_scores_of_an_exhaustive_run(setting, tmp_path, changes):
    model, tracks, queries, index = setting
    found, whole = (
        go(setting, tmp_path / "a", **changes),
        go(setting, tmp_path / "b", **{**changes, "index": ""}),
    )
    sets = {"q0": (queries, 0), "t1": (tracks, 1), "t4": (tracks, 4)}
    for u, (name, _) in enumerate(found.updates):
        source, place = sets[name]
        best = index.candidates(model, source, 3)[place]
        here = np.isin(np.arange(6), best)
        assert np.array_equal(found.draws[u] > 0, here) and (found.draws[u][here] == 2).all()
        for function in found.values:
            value, expected = found.values[function][u], whole.values[function][u]
            assert np.isnan(value[~here]).all() and np.isnan(found.errors[function][u][~here]).all()
            assert np.abs(value[here] - expected[here]).max() < 1e-5 * np.abs(expected).max()
            assert [row.rank for row in found.top(6, name, function, found.updates[u][1])] == [
                1,
                2,
                3,
                4,
                5,
                6,
            ]
            assert {row.track for row in found.top(3, name, function, found.updates[u][1])} == {
                tracks.ids[i] for i in best
            }


def test_more_candidates_than_tracks_are_all_tracks(setting, tmp_path):
    found, whole = go(setting, tmp_path / "a", rescore=50), go(setting, tmp_path / "b", index="")
    for function in found.values:
        assert (
            np.abs(found.values[function] - whole.values[function]).max()
            < 1e-5 * np.abs(whole.values[function]).max()
        )


def test_candidates_may_race(setting, tmp_path, monkeypatch):
    undecided = Race.undecided
    decided = []

    def first_round_decides_nothing_and_the_second_something(self, means, errors, draws, reference):
        decided.append(undecided(self, means, errors, draws, reference))
        near = np.where(np.isfinite(decided[-1]) & (draws == 2), 0.0, decided[-1])
        near[np.flatnonzero(draws == 4)[-1:]] = 2.0
        return near

    monkeypatch.setattr(Race, "undecided", first_round_decides_nothing_and_the_second_something)
    race = {
        "top": 1,
        "race_draws": 2,
        "score_draws": 16,
        "race_share": 1.0,
        "rescore": 4,
        "plan": "track",
    }
    found = go(setting, tmp_path / "a", functions=("displacement",), **race)
    assert ((found.draws == 0).sum(axis=1) == 2).all() and found.draws[found.draws > 0].min() == 4
    assert all((~np.isfinite(near)).sum() >= 2 for near in decided)  # what is no candidate takes no part
    assert np.array_equal(np.isnan(found.values["displacement"]), found.draws == 0)


def test_the_parquet_file_says_what_was_not_measured(setting, tmp_path):
    found = go(setting, tmp_path / "a")
    again = Attribution.from_parquet(tmp_path / "a" / "scores.parquet")
    assert np.array_equal(again.draws, found.draws)
    assert all(np.array_equal(again.values[f], found.values[f], equal_nan=True) for f in found.values)


def test_an_index_of_something_else_is_refused(setting, seed, tmp_path):
    model, tracks, queries, index = setting
    other, others, _ = forks.make(seed + 1)
    settings = forks.small(**{**OPTIONS, "index": str(index.folder)})
    with pytest.raises(UserError, match="index of another model"):
        attribute(other, tracks, queries, settings, tmp_path / "a")
    with pytest.raises(UserError, match="index of other tracks"):
        attribute(model, others, queries, settings, tmp_path / "b")
    with pytest.raises(UserError, match="holds no index"):
        go(setting, tmp_path / "c", index=str(tmp_path / "none"))
    with pytest.raises(UserError, match="rescore"):
        go(setting, tmp_path / "d", rescore=0)


def test_another_index_is_another_run(setting, tmp_path):
    model, tracks, queries, index = setting
    go(setting, tmp_path / "run")
    folder = index.folder.rename(tmp_path / "moved")
    build_index(model, tracks, index.folder, IndexSettings(("all",), draws=4, rank=2))
    with pytest.raises(UserError, match="belongs to other"):
        go(setting, tmp_path / "run")
    assert Index.open(folder).meta["key"] != Index.open(index.folder).meta["key"]
