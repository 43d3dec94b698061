"""Scoring in a run: what theta_0 says is kept for other runs, and one tangent serves every strength."""

import threading

import forks
import helpers
import naive
import numpy as np
import pytest
import torch

from attr_engine import SCORE_FUNCTIONS, UserError, attribute
from attr_engine.effectfile import read_effects, read_parts
from attr_engine.race import Race
from attr_engine.scoring import EFFECTS

NUMBERS = ("fisher.safetensors", "effects.safetensors")


def numbers(folder):
    """What does not hold the settings: a cache is one of them."""
    return {name: value for name, value in forks.bits(folder).items() if name in NUMBERS}


FORWARD = {"functions": ("loss_change", "displacement"), "steps": 1}


def run(number, out, queries=None, passes=None, **changes):
    model, tracks, own = forks.make(number)
    predict = model.predict
    model.predict = lambda *a: (passes if passes is not None else []).append(0) or predict(*a)
    return attribute(model, tracks, queries or own, forks.small(**{**FORWARD, **changes}), out)


def test_a_second_run_computes_neither_the_fisher_nor_theta_0_again(seed, rng, tmp_path):
    cache, counts = {"cache": str(tmp_path / "cache")}, {}
    other = helpers.make_tracks(rng, 1, 3, 10, "p")
    for name, queries, changes in (
        ("first", None, cache), ("second", other, cache), ("without", other, {}),
    ):  # fmt: skip
        counts[name] = []
        run(seed, tmp_path / name, queries, counts[name], **changes)
    assert numbers(tmp_path / "second") == numbers(tmp_path / "without")
    # 12 (track, draw) pairs are 6 passes of a unit's 4 rows, 3 at a time; the Fisher takes 6, and its check 9 of single rows and batches.
    spared = len(counts["without"]) - len(counts["second"])
    assert len(counts["first"]) == len(counts["without"]) and spared > 6


def test_other_draws_masks_models_and_tracks_are_other_entries(seed, tmp_path):
    cache = str(tmp_path / "cache")

    def entries() -> set[str]:
        return {p.parent.name for p in (tmp_path / "cache").glob("*/*.safetensors")}

    run(seed, tmp_path / "0", cache=cache)
    known = entries()
    assert len(known) == 1
    for i, changes in enumerate(({"mask_score": True}, {"seed": 1}, {"plan": "track"}, {"rows": 2})):
        run(seed, tmp_path / f"{i + 1}", cache=cache, **changes)
        assert len(entries()) == len(known) + 1
        known = entries()
    run(seed + 1, tmp_path / "model", cache=cache)
    assert len(entries()) == len(known) + 1
    run(seed, tmp_path / "layers", cache=cache, layers=("self_attn",), damping=0.3, strengths=(0.5,))
    assert len(entries()) == len(known) + 1


def test_a_damaged_entry_is_named(seed, tmp_path):
    cache = tmp_path / "cache"
    run(seed, tmp_path / "a", cache=str(cache))
    victim = sorted(cache.glob("*/*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-7])
    with pytest.raises(UserError, match=victim.name):
        run(seed, tmp_path / "b", cache=str(cache))
    victim.unlink()
    run(seed, tmp_path / "b", cache=str(cache))
    assert forks.bits(tmp_path / "a") == forks.bits(tmp_path / "b")


def test_two_runs_fill_one_cache_at_the_same_time(seed, tmp_path):
    cache = tmp_path / "cache"
    settings = forks.small(**FORWARD, cache=str(cache))
    # Made one after the other: models are drawn from torch's one generator.
    threads = [
        threading.Thread(target=attribute, args=(*forks.make(seed), settings, tmp_path / name))
        for name in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run(seed, tmp_path / "c")
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b") == numbers(tmp_path / "c")
    assert not list(cache.rglob("*.part"))


@pytest.mark.parametrize("way", ["tangent", "difference"])
def test_one_tangent_serves_every_strength(seed, tmp_path, way):
    """At strengths so small that the prediction is linear, float64."""
    strengths = (1e-4, 2e-4, 5e-5)
    options = {
        "strengths": strengths, "dtype": "float64", "functions": ("loss_change", "displacement", "influence"),
    }  # fmt: skip
    passes, single = [], []

    def go(name, passes, **changes):
        model, tracks, own = forks.make(seed)
        model = model.double_copy()
        predict = model.predict
        model.predict = lambda *a: passes.append(0) or predict(*a)
        return attribute(
            model, tracks, own, forks.small(**{**FORWARD, **options, **changes}), tmp_path / name
        )

    exact = go("exact", passes)
    found = go(way, single, strengths_by=way)
    assert found.updates == exact.updates and len(single) < len(passes)
    for name in ("loss_change", "displacement"):
        for u in range(len(exact.updates)):
            scale = np.abs(exact.values[name][u]).max()
            assert np.abs(found.values[name][u] - exact.values[name][u]).max() < 0.02 * scale
    # What was read off is quadratic in the strength to the last bits.
    assert naive.relative_error(found.values["influence"], exact.values["influence"]) < 1e-12
    moved = found.values["displacement"].reshape(-1, 3, 6)
    assert naive.relative_error(moved[:, 1] / 4, moved[:, 0]) < 1e-12
    assert naive.relative_error(moved[:, 2] * 4, moved[:, 0]) < 1e-12


@pytest.mark.parametrize(
    ("dtype", "changes", "way"),
    [
        (torch.float32, {}, "passes"), (torch.bfloat16, {}, "tangent"), (torch.bfloat16, {"strengths": (1e-2,)}, "passes"),
        (torch.bfloat16, {"steps": 2}, "passes"), (torch.bfloat16, {"unit": "lr"}, "passes"),
        (torch.bfloat16, {"strengths_by": "passes"}, "passes"),
    ],
)  # fmt: skip
def test_what_rounding_would_drown_is_measured_by_tangents(seed, tmp_path, dtype, changes, way):
    _, tracks, own = forks.make(seed)
    model = helpers.ToyDenoiser(seed, dtype=dtype)
    options = {**FORWARD, "strengths": (1e-2, 1e-3), **changes}
    found = attribute(model, tracks, own, forks.small(**options), tmp_path / "auto")
    assert found.meta["effects_by"] == way
    named = attribute(model, tracks, own, forks.small(**{**options, "strengths_by": way}), tmp_path / "named")
    assert all(np.array_equal(found.values[n], named.values[n]) for n in found.values)


def test_updates_may_be_paged_resident_or_in_bfloat16(seed, tmp_path):
    paged = run(seed, tmp_path / "paged", resident=0.0)
    resident = run(seed, tmp_path / "resident", resident=1.0)
    half = run(seed, tmp_path / "half", update_dtype="bfloat16", keep_updates=True)
    assert (
        forks.bits(tmp_path / "paged")["effects.safetensors"]
        == forks.bits(tmp_path / "resident")["effects.safetensors"]
    )
    name = "displacement"
    assert np.array_equal(paged.values[name], resident.values[name])
    assert 0 < naive.relative_error(half.values[name], paged.values[name]) < 0.02


def test_what_cannot_be_is_refused_before_anything_is_computed(seed, tmp_path):
    with pytest.raises(UserError, match="not linear in its strength"):
        run(seed, tmp_path / "a", strengths_by="tangent", steps=2)
    with pytest.raises(UserError, match="forward mode"):
        run(seed, tmp_path / "b", strengths_by="tangent", compile="forward")


RACE = {
    "top": 2,
    "race_draws": 2,
    "race_share": 1.0,
    "functions": ("displacement", "loss_change"),
    "steps": 1,
}


def exhaustive(number, out, draws, **changes):
    return run(number, out, score_draws=draws, **{**RACE, "top": 0, **changes})


@pytest.mark.parametrize("functions", [("displacement", "loss_change"), ("norm_influence", "influence")])
def test_a_race_in_which_nothing_is_decided_is_exhaustive(seed, tmp_path, functions, monkeypatch):
    monkeypatch.setattr(Race, "undecided", lambda self, means, *_: 0.0 * means)
    options = {"functions": functions, "rows": 1}
    raced = run(seed, tmp_path / "race", score_draws=16, **{**RACE, **options})
    whole = exhaustive(seed, tmp_path / "whole", 16, **options)
    parts = read_parts(tmp_path / "race" / EFFECTS)
    assert sorted({(p.draws.start, p.draws.stop) for p in parts}) == [(0, 2), (2, 4), (4, 8), (8, 16)]
    for name in functions:
        scale = np.abs(whole.values[name]).max(axis=1, keepdims=True)
        assert (np.abs(raced.values[name] - whole.values[name]) < 1e-5 * scale).all()
        assert naive.relative_error(raced.errors[name], whole.errors[name]) < 1e-4


@pytest.mark.parametrize("plan", ["track", "shared"])
def test_scores_of_a_race_are_those_of_the_draws_that_were_made(seed, tmp_path, plan):
    # A row is the same bits in any round.
    raced = run(seed, tmp_path / "race", score_draws=8, rows=1, plan=plan, **RACE)
    parts = read_parts(tmp_path / "race" / EFFECTS)
    whole = read_effects(tmp_path / "race" / EFFECTS)
    for name in ("loss_change", "displacement"):
        per_draw = SCORE_FUNCTIONS[name](whole)
        for u in range(len(raced.updates)):
            there = np.isfinite(per_draw[u]).sum(axis=1)
            assert np.array_equal(raced.draws[u], there) and there.min() >= 2
            most = np.flatnonzero(there == there.max())
            common = per_draw[u][most][:, : there.max()].mean(axis=0)
            if plan == "track" or len(most) == len(there):
                common = 0 * common
            for i, n in enumerate(there):
                expected = (per_draw[u, i, :n] - common[:n]).mean() + common.mean()
                # Sums of 8 draws, less a mean over 6 tracks, may cancel: some hundred roundings of the largest draw.
                atol = 1e-13 * np.nanmax(np.abs(per_draw[u]))
                assert np.isclose(raced.values[name][u, i], expected, rtol=1e-9, atol=atol)
    assert sum(len(p.tracks) * len(p.draws) * len(p.updates) for p in parts) == raced.draws.sum()


def test_a_race_that_is_interrupted_anywhere_ends_with_the_same_bits(seed, rng, tmp_path):
    options = {**RACE, "score_draws": 16, "confidence": 0.99}
    passes = []
    run(seed, tmp_path / "whole", passes=passes, **options)
    for at in rng.choice(np.arange(1, len(passes)), 3, replace=False):
        out = tmp_path / str(at)
        model, tracks, own = forks.make(seed)
        predict, count = model.predict, []

        def interrupted(*a, predict=predict, count=count, at=at):
            count.append(0)
            if len(count) == at:
                raise KeyboardInterrupt
            return predict(*a)

        model.predict = interrupted
        with pytest.raises(KeyboardInterrupt):
            attribute(model, tracks, own, forks.small(**{**FORWARD, **options}), out)
        run(seed, out, **options)
        assert forks.bits(out) == forks.bits(tmp_path / "whole")


def test_a_race_that_cannot_be_is_refused(seed, tmp_path):
    for changes, named in (
        ({"confidence": 1.0}, "confidence"), ({"race_share": 0.0}, "share"), ({"replicates": 1}, "replicates"),
        ({"race_draws": 3}, "first round"), ({"top": -1}, "top"), ({"race_share": 0.5, "score_draws": 4}, "above 0.5"),
        ({"groups": "artist"}, "groups"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=named):
            run(seed, tmp_path / "x", **{**RACE, "score_draws": 8, **changes})
