"""Models trained again on parts of the data: which tracks they saw, that they are kept, and what they say."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attr_engine.counterfactuals import (
    HALF,
    Model,
    Truth,
    dropped,
    halves,
    removals,
    truth_of,
    without_groups,
)
from attr_engine.errors import UserError
from attr_engine.latents import LatentDataset, LatentWriter, MemoryTracks
from attr_engine.latents.batch import Chosen
from attr_engine.result import Attribution
from attr_engine.retrain import Recipe, Retrainer, half_subsets, train_all, training

pytest.importorskip("stable_audio_tools")

from test_train import make_config  # noqa: E402


def write_set(folder, rng, n, prefix="t", info=None):
    writer = LatentWriter(folder)
    for i in range(n):
        latent = np.outer(rng.normal(size=4), np.ones(5 + i % 4)).astype(np.float32)
        writer.add(f"{prefix}{i}", latent, {"seconds_total": float(i % 9 + 1)}, (info or {}).get(i, {}))
    writer.close()
    return LatentDataset(folder)


@pytest.fixture
def place(tmp_path, rng):
    """A recipe of a tiny model, its tracks and a set of queries, on disk."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_config.json").write_text(json.dumps(make_config()))
    info = {i: {"artist": "ab"[i % 2]} for i in range(6)}
    write_set(tmp_path / "data", rng, 6, info=info)
    write_set(tmp_path / "queries", rng, 3, "q")
    recipe = Recipe(str(tmp_path / "model"), str(tmp_path / "data"), steps=4, batch=2, lr=1e-2)
    return recipe, tmp_path


def test_halves_leave_out_half_and_do_not_depend_on_how_many_are_asked_for(seed):
    some, more = half_subsets(11, 3, seed), half_subsets(11, 7, seed)
    assert more[:3] == some
    assert all(len(set(out)) == 5 and set(out) <= set(range(11)) for out in more)
    assert len(set(more)) > 1


def test_some_tracks_are_those_tracks(rng):
    tracks = MemoryTracks(
        [f"t{i}" for i in range(5)], [rng.normal(size=(3, i + 2)).astype(np.float32) for i in range(5)],
        [{"seconds_total": float(i)} for i in range(5)],
    )  # fmt: skip
    some = Chosen(tracks, [3, 1])
    assert (some.ids, some.lengths.tolist(), len(some)) == (["t3", "t1"], [5, 3], 2)
    assert torch.equal(some.batch([1, 0], 7).latents, tracks.batch([1, 3], 7).latents)
    assert some.fingerprint != Chosen(tracks, [1, 3]).fingerprint


def test_a_model_depends_on_what_it_saw_and_on_the_seed_and_on_nothing_else(place):
    recipe, folder = place
    first, again = Retrainer(recipe, folder / "a"), Retrainer(recipe, folder / "b")
    queries = LatentDataset(folder / "queries")

    def losses(retrainer, left_out, seed):
        one = training("x", left_out, seed)
        retrainer.train(one)
        return retrainer.losses(one, queries, 4)

    whole = losses(first, [], 1)
    assert np.array_equal(whole, losses(again, [], 1))
    assert not np.array_equal(whole, losses(first, [], 2))
    assert not np.array_equal(whole, losses(first, [0, 4], 1))
    assert whole.shape == (3, 4)


def test_a_track_that_is_left_out_is_not_seen(place):
    """Its values are so large that training with it diverges."""
    recipe, folder = place
    writer = LatentWriter(folder / "bad")
    for i in range(4):
        latent = np.full((4, 5), 3e38 if i == 2 else 0.5, dtype=np.float32)
        writer.add(f"t{i}", latent, {"seconds_total": float(i + 1)}, {})
    writer.close()
    retrainer = Retrainer(Recipe(recipe.model, str(folder / "bad"), 4, 2), folder / "a")
    retrainer.train(training("x", [2], 1))
    with pytest.raises(UserError, match="diverged"):
        retrainer.train(training("x", [1], 1))


def test_workers_train_what_is_missing_and_the_table_is_that_of_one_process(place):
    recipe, folder = place
    alone, shared = Retrainer(recipe, folder / "a"), Retrainer(recipe, folder / "b")
    models = halves(6, 2, 2)
    for model in models:
        alone.train(model.training)
    paths = [str(folder / "queries")]
    assert list(train_all(shared, [m.training for m in models], paths, 4, 2)) == [1, 2, 3, 4]
    before = {p: p.stat().st_mtime_ns for p in (folder / "b" / "models").iterdir()}
    list(train_all(shared, [m.training for m in models], paths, 4, 2))
    assert before == {p: p.stat().st_mtime_ns for p in (folder / "b" / "models").iterdir()}
    a, b = (truth_of(r, models, paths, 4) for r in (alone, shared))
    assert np.array_equal(a.losses, b.losses) and a.losses.shape == (4, 3)
    assert (~a.kept).sum(axis=1).tolist() == [3, 3, 3, 3]


def test_another_recipe_does_not_take_kept_models(place):
    recipe, folder = place
    one = training("x", [1], 1)
    Retrainer(recipe, folder / "a").train(one)
    other = Retrainer(Recipe(recipe.model, recipe.data, 5, 2, 1e-2), folder / "a")
    with pytest.raises(UserError, match="other settings"):
        other.load(one)


def test_a_worker_that_fails_says_why(place):
    recipe, folder = place
    hopeless = Retrainer(Recipe(recipe.model, recipe.data, 4, 2, 1e30), folder / "a")
    with pytest.raises(UserError, match="diverged"):
        list(train_all(hopeless, [training("x", [], 1)], [], 4, 1))
    with pytest.raises(UserError, match="at least 1"):
        list(train_all(hopeless, [], [], 4, 0))


def test_groups_and_tops_are_left_out(place, rng):
    recipe, folder = place
    tracks = LatentDataset(recipe.data)
    groups = without_groups(tracks, "artist", 5, 2)
    assert {(m.what, m.training.left_out) for m in groups} == {
        ("artist=a", (0, 2, 4)),
        ("artist=b", (1, 3, 5)),
    }
    with pytest.raises(UserError, match="share a 'label'"):
        without_groups(tracks, "label", 5, 2)
    families = [{"family": x} for x in ("f1", "f1", "f2", "f1+f2", "f3", "")]
    of = without_groups(SimpleNamespace(info=families), "family", 5, 1)
    assert {(m.what, m.training.left_out) for m in of} == {("family=f1", (0, 1, 3)), ("family=f2", (2, 3))}, (
        "a splice is left out with either family"
    )
    scores = rng.normal(size=(2, 6))
    table = Attribution(
        tracks.ids, [("q0", 0.1), ("q1", 0.1)], {"f": scores}, {"f": scores * np.nan}, np.zeros(6), {},
        np.ones((2, 6), dtype=np.int64),
    )  # fmt: skip
    found = [m for m in removals({"mine": table}, ["q1"], 2, 1, tracks) if m.what.startswith("top")]
    assert [m.what for m in found] == ["top of mine for q1"]
    assert set(found[0].training.left_out) == set(np.argsort(-scores[1])[:2].tolist())


def test_a_removal_is_compared_with_trainings_of_its_own_seeds(rng):
    losses = rng.uniform(1, 2, size=(5, 3))
    losses[1] *= 10  # of a seed that no removal has
    what = ["whole", "whole", "whole", "top of m for q", "top of m for q"]
    truth = Truth(list("ab"), list("xyz"), what, np.array([1, 2, 3, 3, 1]), np.ones((5, 2), bool), losses)
    for column in range(3):
        own = (losses[0, column] + losses[2, column]) / 2
        expected = ((losses[3, column] + losses[4, column]) / 2 - own) / own * 100
        assert np.isclose(truth.rise([3, 4], column), expected, rtol=1e-12)
    with pytest.raises(UserError, match="no model of seed 4"):
        replace(truth, seeds=np.array([1, 2, 3, 4, 1])).rise([3, 4], 0)


def test_the_table_of_losses_is_read_as_it_was_written(tmp_path, rng):
    kept = rng.random((4, 5)) < 0.5
    kept[1] = kept[0]
    truth = Truth(
        list("abcde"),
        ["x", "y"],
        [HALF, HALF, "whole", "artist=b"],
        np.array([1, 2, 1, 1]),
        kept,
        rng.random((4, 2)),
    )
    truth.save(tmp_path)
    again = Truth.open(tmp_path)
    assert (again.tracks, again.queries, again.what) == (truth.tracks, truth.queries, truth.what)
    assert np.array_equal(again.kept, kept) and np.array_equal(again.losses, truth.losses)
    found, losses = again.halves()
    assert np.array_equal(found, kept[:1]) and np.array_equal(losses, truth.losses[:2, None])
    assert np.array_equal(again.mean_loss("whole"), truth.losses[2])
    for wrong in (lambda: again.mean_loss("random"), lambda: again.columns(["z"])):
        with pytest.raises(UserError, match="retrain"):
            wrong()
    (tmp_path / "models.parquet").write_bytes(b"no")
    with pytest.raises(UserError, match="holds no losses"):
        Truth.open(tmp_path)


def test_what_a_new_table_lacks_is_named(tmp_path, rng):
    def truth(what, queries):
        shape = (len(what), len(queries))
        return Truth(
            list("ab"), queries, what, np.ones(shape[0], int), np.ones((shape[0], 2), bool), rng.random(shape)
        )

    assert dropped(tmp_path, truth([HALF], ["x"])) == []
    truth([HALF, HALF, "whole", "artist=b"], ["x", "y"]).save(tmp_path)
    assert dropped(tmp_path, truth([HALF, "whole"], ["y"])) == ["artist=b", "x"]
    assert dropped(tmp_path, truth(["random", "artist=b", "whole", HALF], ["z", "y", "x"])) == []
    (tmp_path / "models.parquet").write_bytes(b"no")
    assert dropped(tmp_path, truth([HALF], ["x"])) == [], "a damaged table is in nobody's way"


def test_a_half_that_lacks_a_seed_is_not_judged_by(rng):
    kept = np.array([[1, 0], [1, 0], [0, 1]], dtype=bool)
    truth = Truth(["a", "b"], ["x"], [HALF] * 3, np.array([1, 2, 1]), kept, rng.random((3, 1)))
    assert truth.halves()[1].shape == (2, 1, 1)
    assert isinstance(halves(4, 1, 1)[0], Model)
