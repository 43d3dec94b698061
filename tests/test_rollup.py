"""Groups of tracks: against loops over single tracks, with per-draw effects, hostile metadata, and by the command line."""

import csv
import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import forks
import numpy as np
import pyarrow.parquet as pq
import pytest
from test_result import DOCS, documented, naive_ranks, stored

from attr_engine import Attribution, UserError, attribute, read_effects, roll_up
from attr_engine.diffusion import standard_error
from attr_engine.effects import Effects
from attr_engine.grouping import DUPLICATES, RECORDING, label, make_levels, read_groups
from attr_engine.rollup import FORMAT, SEVERAL, UNKNOWN, Groups, Level, RollUp
from attr_engine.score import SCORE_FUNCTIONS, scores

FUNCTIONS = ("loss_change", "skew")


def made(rng, n: int, plan: str | None = "track", missing: float = 0.2) -> Attribution:
    """Random scores under three updates, some of them not measured."""
    updates = [("q", 0.1), ("q", 0.2), ("r", 0.1)]
    values = {f: rng.normal(size=(3, n)) for f in FUNCTIONS}
    errors = {f: rng.random((3, n)) for f in FUNCTIONS}
    lost = rng.random((3, n)) < missing
    for table in (*values.values(), *errors.values()):
        table[lost] = np.nan
    settings = {} if plan is None else {"plan": plan, "replicates": 4}
    draws = np.where(lost, 0, 8)
    return Attribution(
        [f"t{i}" for i in range(n)], updates, values, errors, np.zeros(n), {"settings": settings}, draws
    )


def naive(
    names: Sequence[str], values: Sequence[float], errors: Sequence[float], how: str
) -> dict[str, tuple[float, float]]:
    """Score and standard error of every group, track by track, for independent errors."""
    out = {}
    for name in dict.fromkeys(names):
        members = [
            (v, e) for g, v, e in zip(names, values, errors, strict=True) if g == name and not math.isnan(v)
        ]
        if how == "count":
            out[name] = (float(len(members)), 0.0)
        elif not members:
            out[name] = (math.nan, math.nan)
        elif how == "max":
            out[name] = max(members)
        else:
            count = len(members) if how == "mean" else 1
            total = 0.0
            for value, _ in members:
                total += value
            out[name] = (total / count, math.sqrt(math.fsum(e * e for _, e in members)) / count)
    return out


def close(found: float, wanted: float) -> bool:
    return math.isclose(found, wanted, rel_tol=1e-12, abs_tol=1e-15) or (
        math.isnan(found) and math.isnan(wanted)
    )


def compare(groups: Groups, u: int, function: str, wanted: dict[str, tuple[float, float]]) -> None:
    assert list(groups.names) == list(wanted), "in the order of their first tracks"
    for i, name in enumerate(groups.names):
        assert close(groups.values[function][u, i], wanted[name][0]), (name, groups.how)
        assert close(groups.errors[function][u, i], wanted[name][1]), (name, groups.how)


@pytest.mark.parametrize("how", ["sum", "mean", "max", "count"])
def test_groups_are_those_of_a_loop_over_single_tracks(how, rng):
    for n in (1, 2, 30):
        result = made(rng, n)
        labels = [f"g{k}" for k in rng.integers(0, max(1, n // 3), n)]
        groups = roll_up(result, [Level("artist", labels, how)]).levels[0]
        assert (groups.level, groups.how) == ("artist", how)
        for function in FUNCTIONS:
            for u in range(3):
                value, error = result.values[function][u], result.errors[function][u]
                compare(groups, u, function, naive(labels, value, error, how))
                for i, name in enumerate(groups.names):
                    mine = [math.isnan(v) for g, v in zip(labels, value, strict=True) if g == name]
                    assert (groups.tracks[i], groups.unmeasured[function][u, i]) == (len(mine), sum(mine))


def test_a_chain_aggregates_the_groups_of_the_level_before(rng):
    for _ in range(10):
        result = made(rng, 40)
        low = rng.integers(0, 15, 40)
        parent, grandparent = rng.integers(0, 6, 15), rng.integers(0, 3, 6)
        labels = [[f"{x}" for x in column] for column in (low, parent[low], grandparent[parent[low]])]
        hows = [str(x) for x in rng.choice(["sum", "mean", "max", "count"], 3)]
        levels = [Level(f"level {k}", *pair) for k, pair in enumerate(zip(labels, hows, strict=True))]
        found = roll_up(result, levels).levels
        assert [g.how for g in found] == [
            hows[0],
            f"{hows[1]} of {hows[0]}",
            f"{hows[2]} of {hows[1]} of {hows[0]}",
        ]
        for function in FUNCTIONS:
            for u in range(3):
                names, values, errors = labels[0], result.values[function][u], result.errors[function][u]
                for k, groups in enumerate(found):
                    wanted = naive(names, values, errors, hows[k])
                    compare(groups, u, function, wanted)
                    if k < 2:
                        up = dict(zip(labels[k], labels[k + 1], strict=True))
                        names = [up[name] for name in wanted]
                        values, errors = zip(*wanted.values(), strict=True)
                assert groups.tracks.sum() == 40, "tracks are counted, not the groups below"
                assert groups.unmeasured[function][u].sum() == np.isnan(result.values[function][u]).sum()


def test_a_group_below_whose_tracks_disagree_goes_to_several(rng):
    result = made(rng, 5, missing=0)
    low, high = list("aabbc"), ["Ann", "Bob", "Ann", "Ann", UNKNOWN]
    rolled = roll_up(result, [Level("duplicates", low, "max"), Level("artist", high)])
    groups = rolled.levels[1]
    assert list(groups.names) == [SEVERAL, "Ann", UNKNOWN] and groups.tracks.tolist() == [2, 2, 1]
    value = result.values["skew"][0]
    assert groups.values["skew"][0].tolist() == [max(value[:2]), max(value[2:4]), value[4]]
    assert any("2 tracks" in note and SEVERAL in note for note in rolled.notes)
    assert any("1 tracks have no artist" in note and UNKNOWN in note for note in rolled.notes)


def test_what_was_not_measured_counts_as_nothing_and_ranks_last(rng, tmp_path):
    result = made(rng, 6, missing=0)
    for table in (result.values["skew"], result.errors["skew"]):
        table[:, 2:5] = np.nan
    result.values["skew"][:, :2] = -1.0
    rolled = roll_up(result, [Level("artist", ["x", "x", "y", "y", "x", "z"])])
    rolled.to_parquet(tmp_path / "g.parquet")
    rows = [r for r in pq.read_table(tmp_path / "g.parquet").to_pylist() if r["function"] == "skew"]
    for row in rows:
        if row["group"] == "y":
            assert (row["score"], row["standard_error"], row["rank"], row["unmeasured"]) == (None, None, 3, 2)
        if row["group"] == "x":
            assert (row["score"], row["tracks"], row["unmeasured"]) == (-2.0, 3, 1)
    assert any("3 of 6 tracks" in note for note in rolled.notes)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_squares_of_errors_of_any_size_neither_vanish_nor_overflow(scale, rng):
    result = made(rng, 20)
    labels = [f"g{k}" for k in rng.integers(0, 5, 20)]
    tables = [{f: v * scale for f, v in table.items()} for table in (result.values, result.errors)]
    small = dataclasses.replace(result, values=tables[0], errors=tables[1])
    plain, found = (roll_up(x, [Level("artist", labels)]).levels[0] for x in (result, small))
    for function in FUNCTIONS:
        wanted = plain.errors[function] * scale
        assert np.allclose(found.errors[function], wanted, rtol=1e-12, atol=0.0, equal_nan=True)


# -- standard errors ------------------------------------------------------------------------------


def random_effects(rng, n: int, draws: int) -> Effects:
    """Per-draw numbers with noise that all tracks share, as under the plan ``shared``."""
    common = rng.normal(size=(3, 1, draws))
    base = rng.random((n, draws)) + 1
    unlearned = base + 0.1 + rng.normal(size=(3, n, draws)) * 0.05 + 0.2 * common
    return Effects(base, unlearned, rng.random((3, n, draws)))


def scored(effects: Effects, plan: str, replicates: int) -> Attribution:
    found = scores(effects, FUNCTIONS, replicates)
    n, draws = effects.base.shape
    return Attribution(
        [f"t{i}" for i in range(n)], [("q", 0.1), ("q", 0.2), ("r", 0.1)], {f: v for f, (v, _) in found.items()},
        {f: e for f, (_, e) in found.items()}, effects.base.mean(axis=1),
        {"settings": {"plan": plan, "replicates": replicates}}, np.full((3, n), draws),
    )  # fmt: skip


@pytest.mark.parametrize("how", ["sum", "mean", "max"])
def test_with_shared_draws_the_error_of_a_sum_is_that_of_the_summed_draws(how, rng):
    effects = random_effects(rng, 12, 8)
    result = scored(effects, "shared", 4)
    labels = [f"g{k}" for k in rng.integers(0, 4, 12)]
    groups = roll_up(result, [Level("artist", labels, how)], effects).levels[0]
    for function in FUNCTIONS:
        per_draw = SCORE_FUNCTIONS[function](effects)
        for u in range(3):
            for i, name in enumerate(groups.names):
                rows = per_draw[u][[k for k in range(12) if labels[k] == name]]
                one = {
                    "sum": rows.sum(axis=0),
                    "mean": rows.mean(axis=0),
                    "max": rows[rows.mean(axis=1).argmax()],
                }[how]
                assert np.isclose(groups.values[function][u, i], one.mean(), rtol=1e-12)
                assert np.isclose(groups.errors[function][u, i], standard_error(one, 4), rtol=1e-9)


def test_the_error_of_shared_draws_covers_what_independent_ones_would_hide(rng):
    """Noise that all tracks share does not average out: the error of a mean stays that of one track."""
    effects = random_effects(rng, 200, 64)
    result = scored(effects, "shared", 16)
    one = [Level("all", ["x"] * 200, "mean")]
    right = roll_up(result, one, effects).levels[0].errors["loss_change"][:, 0]
    wrong = roll_up(scored(effects, "track", 16), one, effects).levels[0].errors["loss_change"][:, 0]
    single = result.errors["loss_change"].mean(axis=1)
    assert (right > 0.4 * single).all() and (right < 2 * single).all() and (wrong < 0.2 * single).all()


def test_a_chain_of_shared_draws_keeps_them_together(rng):
    effects = random_effects(rng, 20, 8)
    result = scored(effects, "shared", 4)
    low = rng.integers(0, 8, 20)
    parent = rng.integers(0, 3, 8)
    levels = [Level("track", [str(x) for x in low], "max"), Level("artist", [str(x) for x in parent[low]])]
    groups = roll_up(result, levels, effects).levels[1]
    per_draw = SCORE_FUNCTIONS["skew"](effects)
    for u in range(3):
        best = {
            k: max(np.flatnonzero(low == k), key=lambda i: per_draw[u, i].mean()) for k in set(low.tolist())
        }
        for i, name in enumerate(groups.names):
            total = sum(per_draw[u, best[k]] for k in best if parent[k] == int(name))
            assert np.isclose(groups.values["skew"][u, i], total.mean(), rtol=1e-12)
            assert np.isclose(groups.errors["skew"][u, i], standard_error(total, 4), rtol=1e-9)


def test_tracks_with_fewer_draws_or_none_take_part_with_what_they_have(rng):
    effects = random_effects(rng, 9, 16)
    kept = np.array([16, 8, 4, 0, 16, 4, 8, 0, 16])  # whole replicates; the rest was never drawn
    for i, count in enumerate(kept):
        effects.unlearned[:, i, count:] = np.nan
    per_draw = SCORE_FUNCTIONS["loss_change"](effects)
    full = scored(effects, "shared", 4)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.nansum(per_draw, axis=2) / kept
    result = dataclasses.replace(full, values={"loss_change": value}, errors={"loss_change": np.ones((3, 9))})
    groups = roll_up(result, [Level("artist", list("aabbbccdd"))], effects).levels[0]
    for u in range(3):
        for i, name in enumerate(groups.names):
            means = np.zeros(4)
            for k in range(9):
                if "aabbbccdd"[k] == name and kept[k]:
                    means += [per_draw[u, k, r : kept[k] : 4].mean() for r in range(4)]
            assert np.isclose(groups.errors["loss_change"][u, i], means.std(ddof=1) / 2, rtol=1e-9)
            assert np.isclose(groups.values["loss_change"][u, i], means.mean(), rtol=1e-12)


@pytest.mark.parametrize("plan", ["shared", None])
def test_without_effects_an_error_that_is_not_known_is_not_made_up(plan, rng):
    result = made(rng, 6, plan, missing=0)
    labels = list("aabbbc")
    for how in ("sum", "mean"):
        rolled = roll_up(result, [Level("artist", labels, how)])
        errors = rolled.levels[0].errors["skew"]
        assert np.isnan(errors[:, :2]).all() and np.array_equal(errors[:, 2], result.errors["skew"][:, 5])
        assert any("not independent" in note and "not known" in note for note in rolled.notes)
    rolled = roll_up(result, [Level("artist", labels, "max")])
    assert not np.isnan(rolled.levels[0].errors["skew"]).any()
    assert not any("not independent" in note for note in rolled.notes)


def test_a_single_replicate_has_no_error_with_or_without_effects(rng):
    effects = random_effects(rng, 6, 4)
    for plan in ("shared", "track"):
        result = scored(effects, plan, 1)
        for given in (effects, None):
            rolled = roll_up(result, [Level("artist", list("aabbbc"))], given)
            assert np.isnan(rolled.levels[0].errors["skew"]).all()
            assert any("no standard errors" in note for note in rolled.notes)


def test_effects_of_another_run_are_refused(rng):
    effects = random_effects(rng, 6, 8)
    result = scored(effects, "shared", 4)
    level = [Level("artist", list("aabbbc"))]
    for other in (random_effects(rng, 6, 8), random_effects(rng, 7, 8), random_effects(rng, 6, 6)):
        with pytest.raises(UserError, match="effects are not those"):
            roll_up(result, level, other)
    with pytest.raises(UserError, match="effects are not those"):
        roll_up(dataclasses.replace(result, meta={}), level, effects)


@pytest.mark.parametrize("plan", ["track", "shared"])
def test_the_scores_and_effects_of_a_run_roll_up(plan, seed, tmp_path):
    model, tracks, queries = forks.make(seed)
    result = attribute(model, tracks, queries, forks.small(plan=plan), tmp_path)
    effects = read_effects(tmp_path / "effects.safetensors")
    rolled = roll_up(
        Attribution.from_parquet(tmp_path / "scores.parquet"), [Level("artist", list("aabbcc"))], effects
    )
    for function in result.values:
        per_draw = SCORE_FUNCTIONS[function](effects)
        total = np.stack([per_draw[:, i : i + 2].sum(axis=1) for i in (0, 2, 4)], axis=1)
        assert np.allclose(rolled.levels[0].values[function], total.mean(axis=2), rtol=1e-9)
        wanted = standard_error(total, 2)
        if plan == "track":
            e = result.errors[function]
            wanted = np.stack([np.hypot(e[:, i], e[:, i + 1]) for i in (0, 2, 4)], axis=1)
        assert np.allclose(rolled.levels[0].errors[function], wanted, rtol=1e-6)


# -- which group a track belongs to ---------------------------------------------------------------

HOSTILE: list[Any] = [
    "<script>alert(1)</script>", "\x1b[31m\u202e", "\ud800 lone", "a" * 100_000, "=cmd()", 'with "quotes", and\nlines', "ünïcode ☃",
    7, -0.5, True, 10**30, ["Ann", {"b": 1}], "7",
]  # fmt: skip
NOTHING: list[Any] = [None, "", "  \t", float("nan")]


def test_hostile_metadata_are_groups_like_any_other(rng, tmp_path):
    info = [{"artist": x} for x in HOSTILE + NOTHING] + [{}]
    result = made(rng, len(info), missing=0)
    levels = make_levels(["artist"], ["sum"], result.tracks, info)
    rolled = roll_up(result, levels)
    groups = rolled.levels[0]
    assert list(groups.names) == [*map(label, HOSTILE[:-1]), UNKNOWN], "the number 7 and the text 7 are one"
    assert groups.tracks.tolist() == [1] * 7 + [2] + [1] * 4 + [len(NOTHING) + 1]
    assert [label(x) for x in (7, -0.5, True, ["é"])] == ["7", "-0.5", "true", '["é"]']
    rolled.to_parquet(tmp_path / "g.parquet")
    rolled.to_csv(tmp_path / "g.csv")
    rows = pq.read_table(tmp_path / "g.parquet").to_pylist()
    assert [row["group"] for row in rows] == list(groups.names) * 6
    csv.field_size_limit(1 << 20)
    with (tmp_path / "g.csv").open(newline="", encoding="utf-8") as file:
        assert [row["group"] for row in csv.DictReader(file)] == [row["group"] for row in rows]


def test_windows_are_put_together_by_their_recording_and_copies_by_their_family():
    ids = ["a#000", "a#001", "b", "copy of b", "c#000", "c#001", "d"]
    info = [
        {"parent": "a"}, {"parent": "a"}, {"parent": "", "family": "x", "relation": "original"},
        {"family": "x", "relation": "exact copy"}, {"parent": "c", "family": "x", "relation": "exact copy"},
        {"parent": "c", "family": "x", "relation": "exact copy"}, {"family": "x", "relation": "transposed"},
    ]  # fmt: skip
    recordings, copies = make_levels([RECORDING, DUPLICATES], ["max", "sum"], ids, info)
    assert recordings == Level("track", ["a", "a", "b", "copy of b", "c", "c", "d"], "max")
    assert copies == Level("duplicates", ["a", "a", "b", "b", "b", "b", "d"], "sum")


def test_a_csv_goes_before_the_metadata(tmp_path):
    path = tmp_path / "groups.csv"
    path.write_text(
        "\ufefftrack,owner,duplicates\na,Label,\nb#001,,x\nb,Other,y\nnobody,z,z\n", encoding="utf-8"
    )
    given = read_groups(path)
    assert given == {
        "owner": {"a": "Label", "b": "Other", "nobody": "z"},
        "duplicates": {"b#001": "x", "b": "y", "nobody": "z"},
    }
    ids, info = (
        ["a", "b#000", "b#001", "c"],
        [{"owner": "?"}, {"parent": "b"}, {"parent": "b"}, {"owner": "?"}],
    )
    owner, copies = make_levels(["owner", DUPLICATES], ["sum"], ids, info, given)
    assert owner.groups == ["Label", "Other", "Other", UNKNOWN]
    assert copies.groups == ["a", "y", "x", "c"], "without a row a track is a group of its own"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "columns"), ("track\na\n", "columns"), ("name,artist\na,b\n", "columns"), ("track,x,x\na,b,c\n", "columns"),
        ("track,artist\na,b\na,c\n", "row 3 .*'a'"), ("track,artist\n,b\n", "row 2"), ("track,artist\na,b,c\n", "row 2"),
        ('track,artist\na,"b\n', "cannot be read"), ("track,artist\na," + "x" * 2_000_000, "cannot be read"),
    ],
)  # fmt: skip
def test_a_csv_that_is_none_is_refused_by_path_and_row(text, named, tmp_path):
    path = tmp_path / "groups.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path}.*{named}"):
        read_groups(path)
    path.write_bytes(b"track,artist\na,\xff\n")
    with pytest.raises(UserError, match=f"{path} cannot be read"):
        read_groups(path)
    with pytest.raises(UserError, match="does not exist"):
        read_groups(tmp_path / "none.csv")


def test_levels_that_cannot_be_are_refused_by_name(rng):
    result = made(rng, 2)
    info = [{"artist": "Ann"}, {"year": 1999}]
    with pytest.raises(UserError, match="'label'; known: artist, duplicates, track, year"):
        make_levels(["label"], ["sum"], result.tracks, info)
    with pytest.raises(UserError, match="none of the 1 tracks"):
        make_levels(["artist"], ["sum"], result.tracks, info, {"artist": {"x": "y"}})
    with pytest.raises(UserError, match="2 levels and 3 aggregates"):
        make_levels(["artist", "year"], ["sum"] * 3, result.tracks, info)
    with pytest.raises(UserError, match="'median'"):
        roll_up(result, [Level("artist", ["a", "b"], "median")])
    with pytest.raises(UserError, match="1 groups for 2 tracks"):
        roll_up(result, [Level("artist", ["a"])])


# -- files and the command line -------------------------------------------------------------------


def test_the_table_is_the_one_in_the_docs_and_holds_jointly_unlearned_groups_too(rng, tmp_path):
    result = made(rng, 9)
    rolled = roll_up(result, [Level("artist", list("aaabbbccd"))])
    joint = dataclasses.replace(rolled.levels[0], how="joint")
    RollUp(rolled.updates, [*rolled.levels, joint], rolled.meta, rolled.notes).to_parquet(
        tmp_path / "g.parquet"
    )
    assert stored(tmp_path / "g.parquet") == documented("Groups: rollup.parquet")
    header = json.loads(pq.read_metadata(tmp_path / "g.parquet").metadata[b"attr_engine"])
    assert header == {"format": FORMAT, "meta": dict(result.meta), "notes": list(rolled.notes)}
    rows = pq.read_table(tmp_path / "g.parquet").to_pylist()
    assert [row["how"] for row in rows] == ["sum"] * 24 + ["joint"] * 24
    for row in rows:
        u = result.updates.index((row["query"], row["strength"]))
        value = rolled.levels[0].values[row["function"]][u]
        mine = list(rolled.levels[0].names).index(row["group"])
        assert row["rank"] == naive_ranks(value)[mine]
        assert row["score"] == value[mine] or row["score"] is None and math.isnan(value[mine])
    text = DOCS.read_text(encoding="utf-8")
    assert FORMAT in text and "GUDA" in text and re.search("known to fail for groups", text)


def test_a_race_with_shared_draws_can_be_added_up(seed, tmp_path):
    model, tracks, queries = forks.make(seed)
    race = {
        "top": 2,
        "race_draws": 2,
        "score_draws": 8,
        "race_share": 1.0,
        "plan": "shared",
        "functions": ("displacement",),
    }
    result = attribute(model, tracks, queries, forks.small(**race), tmp_path)
    groups = roll_up(
        result, [Level("half", list("ababab"))], read_effects(tmp_path / "effects.safetensors")
    ).levels[0]
    for u in range(len(result.updates)):
        expected = result.values["displacement"][u].reshape(3, 2).sum(axis=0)
        assert list(groups.names) == ["a", "b"]
        assert np.allclose(groups.values["displacement"][u], expected, rtol=1e-9)
        assert (groups.errors["displacement"][u] > 0).all()
