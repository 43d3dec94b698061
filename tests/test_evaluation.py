"""Tables of the judges on planted cases: what is known to be right comes out right, and the wrong does not."""

from dataclasses import replace

import numpy as np
import pytest

from attr_engine import UserError
from attr_engine.counterfactuals import HALF, Truth
from attr_engine.evaluation import (
    Case,
    group_table,
    lds_table,
    planted_table,
    removal_table,
    self_table,
    tables,
    with_controls,
)
from attr_engine.jobs import Query
from attr_engine.latents import MemoryTracks


def make_set(rng, names, info, frames=6):
    latents = [rng.normal(size=(3, int(rng.integers(3, frames + 1)))).astype(np.float32) for _ in names]
    return MemoryTracks(list(names), latents, [{"seconds_total": 1.0} for _ in names], info)


@pytest.fixture
def case(rng):
    """Twelve tracks in four families of three; four queries, one a family; a right and a wrong method."""
    names = [f"t{i}" for i in range(12)]
    info = [
        {"family": f"f{i % 4}", "relation": "original" if i < 4 else "gain", "seconds": 2.0 * i + 1}
        for i in range(12)
    ]
    tracks = make_set(rng, names, info)
    rows = [
        {
            "relation": "noise" if q % 2 else "gain",
            "parents": f"t{q};t{q + 4};t{q + 8}",
            "near": f"t{q};t{q + 4}",
        }
        for q in range(4)
    ]
    queries = make_set(rng, [f"q{q}" for q in range(4)], rows)
    noise = 0.1 * rng.random((4, 12))
    # Models of all tracks then have the same loss for every query, and rises are in the order of scores.
    noise -= noise.mean(axis=1, keepdims=True)
    truth = np.array([[2.0 * (i % 4 == q) for i in range(12)] for q in range(4)]) + noise
    asked = [Query(queries, q, "query") for q in range(4)]
    return Case(tracks, asked, {"right": truth, "wrong": -truth}), truth


def make_truth(case, scores, rng, models=24):
    kept = rng.random((models, 12)) < 0.5
    losses = 10 - (scores @ kept.T).T
    what, seeds = [HALF] * models * 2, np.repeat([1, 2], models)
    kept, losses = np.concatenate([kept, kept]), np.concatenate([losses, losses])

    def model(name, left_out):
        row = np.ones(12, bool)
        row[left_out] = False
        return name, row, 10 - scores @ row

    more = [
        model("whole", []),
        model("random", [5]),
        model("family=f1", [1, 5, 9]),
        model("family=f2", [2, 6, 10]),
    ]
    more += [model(f"top of right for q{q}", np.argsort(-scores[q])[:3]) for q in range(4)]
    more += [model(f"top of wrong for q{q}", np.argsort(scores[q])[:3]) for q in range(4)]
    return Truth(
        case.tracks.ids, [q.id for q in case.queries], what + [m[0] for m in more], np.append(seeds, np.ones(len(more), int)),
        np.concatenate([kept, np.array([m[1] for m in more])]), np.concatenate([losses, np.array([m[2] for m in more])]),
    )  # fmt: skip


def by_method(table):
    return {row[0]: row for row in table.rows}


def test_retraining_tells_right_from_wrong(case, rng):
    case, scores = case
    truth = make_truth(case, scores, rng)
    rows = by_method(lds_table(case, truth))
    assert rows["right"][1] == 1.0 and rows["wrong"][1] == -1.0
    assert rows["wrong"][4:7] == [2.0, 2.0, 2.0]
    assert rows["retraining with another seed (split half)"][1] == 1.0
    rows = by_method(removal_table(case, truth))
    assert rows["right"][1] > rows["random tracks"][1] and rows["right"][1] > rows["wrong"][1]
    assert rows["right"][2] <= rows["right"][1] <= rows["right"][3]
    alike = Case(case.tracks, case.queries, {**case.methods, "the same for all": np.ones((4, 12))})
    assert by_method(group_table(alike, truth))["the same for all"][1:] == [""] * 6
    rows = by_method(group_table(case, truth))
    assert rows["right"][1] > 0.9 and rows["wrong"][1] < -0.9


def test_planted_relatives_are_judged_by_relation_and_other_relatives_do_not_count(case):
    case, _ = case
    scores = -np.tile(np.arange(12.0), (4, 1))
    for q in range(4):  # another relative first, then the near ones
        scores[q, [q + 8, q, q + 4]] = [30, 20, 10]
    rows = planted_table(Case(case.tracks, case.queries, {"m": scores})).rows
    assert [row[:4] for row in rows] == [["m", "gain", 2, 1.0], ["m", "noise", 2, 1.0]]
    assert [row[6] for row in rows] == [1.0, 1.0]
    last = Case(case.tracks, case.queries, {"m": -scores})
    # Of eleven that count the tenth and the eleventh.
    assert [(row[3], row[6]) for row in planted_table(last).rows] == [
        (round((1 / 10 + 2 / 11) / 2, 4), 0.5)
    ] * 2
    scores[:, 11] = 40  # unrelated to three of the queries
    rows = planted_table(Case(case.tracks, case.queries, {"m": scores})).rows
    assert min(row[3] for row in rows) < 1.0


def test_ranks_of_targets_are_told_by_length(case):
    case, _ = case
    targets = [Query(case.tracks, i, "training track") for i in (0, 7)]
    scores = np.zeros((2, 12))
    scores[0, 0], scores[1, :4] = 1, 1
    rows = self_table(Case(case.tracks, targets, {"m": scores})).rows
    assert [(row[1], row[2], row[3]) for row in rows] == [
        ("all", 2, 4.5), ("no exact copy", 2, 4.5), ("under 10 s", 1, 1.0)
    ]  # fmt: skip


def test_all_tables_and_controls_are_made(case, rng):
    case, scores = case
    whole = with_controls(case, rng.random(12), 6)
    found = tables(whole, make_truth(case, scores, rng))
    assert [t.title.split()[0] for t in found] == ["Linear", "Removal", "Leave", "Planted", "Collapse"]
    names = set(by_method(found[0]))
    assert {
        "random (control)",
        "duration (control)",
        "training loss (control)",
        "raw-latent cosine (control)",
    } <= names
    other = replace(make_truth(case, scores, rng), tracks=[f"u{i}" for i in range(12)])
    with pytest.raises(UserError, match="retrained models are of other training tracks"):
        tables(whole, other)
    without = with_controls(case, np.full(12, np.nan), 6)
    assert "training loss (control)" not in without.methods
    assert [t.title.split()[0] for t in tables(whole)] == ["Planted", "Collapse"]


def test_windows_of_a_recording_are_relatives_where_the_recording_is(rng):
    info = [{"parent": "song" if i < 2 else ""} for i in range(6)]
    tracks = make_set(rng, ["song#000", "song#001", "a", "b", "c", "d"], info)
    queries = make_set(rng, ["q"], [{"parents": "song", "relation": "slower"}])
    scores = np.array([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    case = Case(tracks, [Query(queries, 0, "query")], {"right": scores, "wrong": -scores})
    rows = {row[0]: row for row in planted_table(case).rows}
    assert rows["right"][3] == 1.0 and rows["wrong"][3] < 0.4
