"""The whole way: the same bits after kills, the same ranking in any batch, refusals by name, a lock."""

import dataclasses
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import helpers
import naive
import numpy as np
import pytest
import torch

from attr_engine import SCORE_FUNCTIONS, Attribution, Settings, UserError, attribute
from attr_engine.diffusion import ROW_FUNCTIONS
from attr_engine.effectfile import read_parts, to_tensors
from attr_engine.pipeline import SCORES_PARQUET
from attr_engine.runs import open_run
from attr_engine.scoring import EFFECTS


@pytest.fixture(scope="module")
def process() -> Iterator[forks.Forks]:
    server = forks.Forks()
    yield server
    server.close()


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.fixture
def whole(process, seed, tmp_path) -> tuple[Path, dict[str, Any]]:
    """A run without interruption, and what its child counted."""
    out = tmp_path / "whole"
    counts = process.run(out=out, seed=seed)
    assert counts["code"] == 0
    forks.check_whole(out)
    return out, counts


# Forward passes of forks.small: a pass for each of 6 tracks, and 3 that compare the first with single rows; then 2 chunks a
# gradient, one gradient a query and one a step after the first, of two functions; then 2 chunks a unit: theta_0, 6 updates,
# 2 functions whose gradients meet all updates at once.
FISHER_PASSES, UPDATE_PASSES, SCORE_PASSES = 9, 2 * (3 * 2 + 6 * 2), 3 * 2 * 9


def test_the_stages_cost_what_they_should(whole):
    assert whole[1]["predict"] == FISHER_PASSES + UPDATE_PASSES + SCORE_PASSES


def test_a_run_killed_anywhere_carries_on_to_the_same_bits(process, whole, seed, rng, tmp_path):
    reference, counts = whole
    for round_ in range(3):
        out, eager = tmp_path / f"killed {round_}", bool(round_ % 2)
        stages = [(1, FISHER_PASSES), (1, UPDATE_PASSES), (1, SCORE_PASSES)]
        for first, last in stages:  # one kill in each stage, of one and the same run
            counted = process.run(
                out=out, seed=seed, eager=eager, die=["predict", int(rng.integers(first, last + 1))]
            )
            assert counted["code"] == -signal.SIGKILL
            forks.check_whole(out)
        assert process.run(out=out, seed=seed)["code"] == 0
        forks.check_whole(out)
        assert forks.bits(out) == forks.bits(reference)
        assert names(out) == names(reference), "nothing is left lying about"


@pytest.mark.parametrize("what", ["file", "write"])
def test_a_run_killed_between_or_within_files_carries_on_to_the_same_bits(
    what, process, whole, seed, rng, tmp_path
):
    reference, counts = whole
    assert counts[what] > 10
    points = rng.choice(np.arange(1, counts[what] + 1), 3, replace=False).tolist()
    for n in sorted({*points, *(counts["removals"] if what == "file" else [])}):
        out = tmp_path / f"killed at {n}"
        assert process.run(out=out, seed=seed, die=[what, int(n)])["code"] == -signal.SIGKILL
        forks.check_whole(out)
        assert process.run(out=out, seed=seed)["code"] == 0
        assert forks.bits(out) == forks.bits(reference)
        assert names(out) == names(reference)


def test_a_run_killed_at_any_moment_carries_on_to_the_same_bits(process, whole, seed, rng, tmp_path):
    reference, _ = whole
    out = tmp_path / "killed"
    code, kills = None, 0
    while code != 0:
        pid = process.start(out=out, seed=seed, eager=True)
        if kills < 5:
            time.sleep(rng.uniform(0.02, 0.3))
            os.kill(pid, signal.SIGKILL)
            kills += 1
        code = process.end()["code"]
        assert code in (0, -signal.SIGKILL)
        forks.check_whole(out)
    assert forks.bits(out) == forks.bits(reference)


def test_a_killed_run_does_not_begin_again(process, seed, tmp_path):
    out = tmp_path / "run"
    process.run(out=out, seed=seed, eager=True, die=["predict", 8])  # in the second draw of the fourth track
    process.run(out=out, seed=seed, eager=True, die=["predict", 6 + 5])  # in the second update
    process.run(out=out, seed=seed, eager=True, die=["predict", UPDATE_PASSES - 2 + 19])  # in the second unit
    assert process.run(out=out, seed=seed)["predict"] == SCORE_PASSES - 18
    assert process.run(out=out, seed=seed)["predict"] == 0


def test_a_directory_belongs_to_one_process(process, seed, tmp_path):
    out = tmp_path / "run"
    pid = process.start(out=out, seed=seed, hold=True)
    while not (out / "config.json").exists():
        time.sleep(0.01)
    model, tracks, queries = forks.make(seed)
    with pytest.raises(UserError, match=f"another process works in {out}"):
        attribute(model, tracks, queries, forks.small(), out)
    os.kill(pid, signal.SIGKILL)
    process.end()
    assert attribute(model, tracks, queries, forks.small(), out).tracks == tracks.ids
    with (
        open_run(out, forks.small()),
        pytest.raises(UserError, match="another process"),
        open_run(out, forks.small()),
    ):
        pass


def test_a_directory_that_cannot_be_written_is_refused(process, seed, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), open_run(tmp_path / "file" / "run", Settings()):
        pass
    files = [Path(x).resolve() for x in (os.__file__, forks.__file__, f"{tempfile.gettempdir()}/run")]
    if os.geteuid() == 0 and not all(p.stat().st_mode & 0o001 for file in files for p in file.parents):
        pytest.skip(
            "root may write anywhere, and another user cannot get to this Python's library or this folder"
        )
    base = Path(tempfile.mkdtemp(prefix="attr-engine-test-"))
    try:
        base.chmod(0o755)
        out = base / "run"
        assert process.run(out=out, seed=seed)["code"] == 0
        for path in (base, out):
            path.chmod(0o555)
        user = {"user": 65534} if os.geteuid() == 0 else {}
        for place in (out, base / "new"):
            assert "cannot be written" in process.run(out=place, seed=seed, **user)["refused"]
        (out / ".lock").chmod(0o666)
        assert "cannot be written" in process.run(out=out, seed=seed, **user)["refused"]
    finally:
        for path in (base, out):
            path.chmod(0o755) if path.exists() else None
        shutil.rmtree(base)


@pytest.fixture
def finished(seed, tmp_path):
    model, tracks, queries = forks.make(seed)
    out = tmp_path / "run"
    return model, tracks, queries, out, attribute(model, tracks, queries, forks.small(), out)


OTHER = {
    "self_influence": ("t1",), "layers": ("self_attn",), "functions": ("skew",), "strengths": (1e-2,), "unit": "lr",
    "steps": 1, "damping": 0.2, "mask_update": False, "mask_score": True, "mask_fisher": True, "fisher_draws": 4,
    "update_draws": 2, "score_draws": 4, "replicates": 1, "plan": "track", "seed": 1, "dtype": "float64",
    "device": "cuda", "rows": 4, "unit_tracks": 3, "threads": 1, "ema": False, "gradients": "loop", "memory": 1.0, "model": "m",
    "strengths_by": "tangent", "update_dtype": "bfloat16", "top": 3, "groups": "artist", "index": "i", "rescore": 5,
    "race_draws": 8, "ridge": 0.2, "projection_rank": 4, "confidence": 0.9, "race_share": 0.5,
    "checkpointing": True, "compile": "forward", "weights": "w", "data": "d", "queries": "q",
}  # fmt: skip
PRESENTATION = {
    "keep_updates": True,
    "show": 3,
    "shares": "softmax",
    "title": "x",
    "cache": "c",
    "resident": 0.0,
    "controls": "p",
    "false_accepts": 0.1,
    "profile": 2,
}


def test_changed_settings_are_refused_by_name(finished):
    model, tracks, queries, out, result = finished
    assert {f.name for f in dataclasses.fields(Settings)} == {*OTHER, *PRESENTATION}, (
        "a new setting needs a decision"
    )
    for name, value in OTHER.items():
        old = getattr(forks.small(), name)
        with pytest.raises(UserError) as refused:
            attribute(model, tracks, queries, forks.small(**{name: value}), out)
        assert f"{name}: {old!r} -> {value!r}" in str(refused.value)
        assert str(refused.value).count(" -> ") == 1
    again = attribute(
        model, tracks, queries, forks.small(**{**PRESENTATION, "cache": str(out.parent / "c")}), out
    )
    assert all(np.array_equal(again.values[f], result.values[f]) for f in result.values)


def test_another_model_other_data_or_other_queries_are_refused(finished, seed):
    model, tracks, queries, out, _ = finished
    _, fresh, others = forks.make(seed + 1)
    with torch.no_grad():
        model.module.null_token[0, 0, 0] += 1e-3
    with pytest.raises(UserError, match="another model"):
        attribute(model, tracks, queries, forks.small(), out)
    with torch.no_grad():
        model.module.null_token[0, 0, 0] -= 1e-3
    for changed in ((fresh, queries), (tracks.subset([1, 0, 2, 3, 4, 5]), queries), (tracks, others)):
        with pytest.raises(UserError, match="other data"):
            attribute(model, *changed, forks.small(), out)


def test_another_precision_of_the_model_is_refused(finished):
    model, tracks, queries, out, _ = finished
    with pytest.raises(UserError, match="other settings, another model"):
        attribute(model.double_copy(), tracks, queries, forks.small(), out)


def test_a_refused_call_leaves_the_directory_free(seed, tmp_path):
    model, tracks, queries = forks.make(seed)
    with pytest.raises(UserError, match="transfomer"):
        attribute(model, tracks, queries, forks.small(layers=("transfomer",)), tmp_path / "run")
    assert attribute(model, tracks, queries, forks.small(layers=("transformer",)), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"layers": ("cross_attn.to_kw",)}, "cross_attn.to_kw"),
        ({"layers": ()}, "no layers"),
        ({"functions": ("cosine",)}, "cosine"),
        ({"strengths": ()}, "strength"),
        ({"strengths": (1e-2, -1.0)}, "-1.0"),
        ({"strengths": (1e-2, 1e-2)}, "twice"),
        ({"strengths": (float("nan"),)}, "nan"),
        ({"unit": "volts"}, "volts"),
        ({"steps": 0}, "0 steps"),
        ({"damping": -1.0}, "damping"),
        ({"fisher_draws": 3}, "Fisher draws is 3"),
        ({"update_draws": 3}, "update draws is 3"),
        ({"score_draws": 3}, "score draws is 3"),
        ({"replicates": 0}, "replicates"),
        ({"plan": "batch"}, "batch"),
        ({"rows": -1}, "rows"),
        ({"rows": 0, "gradients": "vmap"}, "vmap"),
        ({"memory": -1.0}, "memory"),
        ({"unit_tracks": 0}, "unit_tracks"),
        ({"self_influence": ("nobody",)}, "nobody"),
        ({"self_influence": ("q0",)}, "q0"),
        ({"self_influence": ("t1", "t1")}, "'t1' stands twice"),
    ],
)
def test_unusable_settings_are_refused_before_any_work(settings, named, seed):
    model, tracks, queries = forks.make(seed)
    model.predict = None
    with pytest.raises(UserError, match=named):
        attribute(model, tracks, queries, forks.small(**settings))


def test_no_query_is_refused(seed):
    model, tracks, _ = forks.make(seed)
    with pytest.raises(UserError, match="no query"):
        attribute(model, tracks, None, forks.small(self_influence=()))


def test_a_model_that_holds_nan_is_refused(seed, tmp_path):
    model, tracks, queries = forks.make(seed)
    parameters = dict(model.module.named_parameters())
    name = list(parameters)[seed % len(parameters)]
    with torch.no_grad():
        parameters[name].view(-1)[0] = float("nan")
    for layers in (("all",), ("cross_attn.to_kv",)):
        with pytest.raises(UserError, match="not finite"):
            attribute(model, tracks, queries, forks.small(layers=layers), tmp_path / layers[0])


def test_a_model_in_training_mode_is_refused(seed):
    model, tracks, queries = forks.make(seed)
    model.module.train()
    with pytest.raises(UserError, match="training mode"):
        attribute(model, tracks, queries, forks.small())


def test_an_update_that_breaks_the_model_is_refused_by_query_and_track(seed, tmp_path):
    model, tracks, queries = forks.make(seed)
    with pytest.raises(UserError, match=r"'q0'.*'t\d'.*smaller strength"):
        attribute(
            model,
            tracks,
            queries,
            forks.small(strengths=(1e-2, 1e35), self_influence=(), steps=1),
            tmp_path / "run",
        )


def test_strengths_that_print_alike_have_updates_of_their_own(seed, tmp_path):
    model, tracks, queries = forks.make(seed)
    close = (1e-2, 1e-2 * (1 + 1e-6))
    result = attribute(model, tracks, queries, forks.small(strengths=close), tmp_path / "a")
    value = result.values["displacement"][:2]
    assert not np.array_equal(value[0], value[1])
    whole_numbers = attribute(model, tracks, queries, forks.small(strengths=(0.5, 1)), tmp_path / "b")
    again = Attribution.from_parquet(tmp_path / "b" / SCORES_PARQUET)
    assert list(again.updates) == list(whole_numbers.updates)


def test_the_result_is_in_the_directory_bit_for_bit(finished):
    model, tracks, queries, out, result = finished
    again = Attribution.from_parquet(out / SCORES_PARQUET)
    assert (list(again.tracks), list(again.updates)) == (tracks.ids, list(result.updates))
    assert list(again.values) == list(result.values) == list(forks.small().functions)
    for name in result.values:
        assert np.array_equal(again.values[name], result.values[name])
        assert np.array_equal(again.errors[name], result.errors[name])
    assert np.array_equal(again.base, result.base)
    assert again.meta == result.meta
    config = json.loads((out / "config.json").read_text())
    assert again.meta["settings"] == {
        name: value for name, value in config.items() if name not in PRESENTATION
    }
    assert result.updates == [(q, s) for q in ("q0", "t1", "t4") for s in (1e-2, 1e-3)]
    assert not (out / "updates").exists()


def test_updates_are_kept_where_that_is_asked_for(seed, tmp_path):
    model, tracks, queries = forks.make(seed)
    attribute(model, tracks, queries, forks.small(keep_updates=True), tmp_path / "run")
    assert len(list((tmp_path / "run" / "updates").iterdir())) == 2 * 6


@pytest.mark.parametrize(
    ("kind", "masks"),
    [
        ("track", (True, False)),
        ("shared", (True, True)),
        ("track", (False, True)),
        ("shared", (False, False)),
    ],
    ids=str,
)
def test_the_whole_way_follows_the_formulas(kind, masks, seed, measured):
    """Training tracks as queries, two strengths, in float64, against the loop of ``naive``."""
    model, tracks, queries = forks.make(seed)
    model = model.double_copy()
    settings = forks.small(
        plan=kind, seed=seed, mask_update=masks[0], mask_score=masks[1], layers=("transformer",)
    )
    result = attribute(model, tracks, queries, settings)
    from attr_engine import DrawPlan

    loop = naive.Loop(model, DrawPlan(seed, kind, 2))
    items = naive.items(tracks, 10)
    fisher = loop.fisher(items, 2, False)
    group = [n for n in loop.theta if naive.GROUPS["transformer",](n)]
    worst = 0.0
    for u, (query, strength) in enumerate(result.updates):
        item = next(i for i in (*items, *naive.items(queries, 10)) if i.id == query)
        other, _ = loop.unlearned(item, fisher, group, 6, strength, "size", 2, 4, 0.1, masks[0])
        effects = loop.effects(other, items, 2, masks[1])
        for name in ROW_FUNCTIONS:
            other, _ = loop.unlearned(item, fisher, group, 6, strength, "size", 2, 4, 0.1, masks[0], name)
            effects[f"influence {name}"] = loop.influence(other, items, 2, masks[1], name)
        assert naive.relative_error(result.base, effects["base"].mean(axis=-1)) < 1e-12
        for name, function in naive.SCORES.items():
            worst = max(worst, naive.relative_error(result.values[name][u], function(effects).mean(axis=-1)))
    measured("relative_error", worst)
    assert worst < 1e-9


def in_every_batch(
    model, tracks, queries, rng, tmp_path, batches: dict[int, int]
) -> list[tuple[dict[str, np.ndarray], Attribution]]:
    """Per-draw numbers and scores in the order of ``tracks``, whatever the order and batch they were made in.

    ``batches`` maps rows a pass to tracks a unit.
    """
    out = []
    for rows, unit in batches.items():
        order = rng.permutation(len(tracks)) if out else np.arange(len(tracks))
        settings = Settings(
            replicates=2, fisher_draws=2, score_draws=2, update_draws=8, rows=rows, unit_tracks=unit,
            functions=tuple(SCORE_FUNCTIONS),
        )  # fmt: skip
        folder = tmp_path / str(rows)
        result = attribute(model, tracks.subset(order), queries, settings, folder)
        back = np.argsort(order)
        effects = {n: v.numpy() for n, v in to_tensors(read_parts(folder / EFFECTS)[0].effects).items()}
        effects = {n: v[back] if n == "base" else v[:, back] for n, v in effects.items()}
        values = {n: v[:, back] for n, v in result.values.items()}
        out.append((effects, dataclasses.replace(result, tracks=tracks.ids, values=values)))
    return out


def compare_batches(runs: list[tuple[dict[str, np.ndarray], Attribution]], tolerance, agreement, measured):
    (first, ranking), *others = runs
    assert set(ranking.values) == set(SCORE_FUNCTIONS)
    for effects, other in others:
        for name in ("base", "unlearned"):
            worst = float(np.abs(effects[name] / first[name] - 1).max())
            measured(name, worst)
            assert worst < tolerance
        for name in SCORE_FUNCTIONS:
            found = naive.spearman(other.values[name][0], ranking.values[name][0])
            measured(f"spearman {name}", found)
            assert found >= agreement


@pytest.mark.parametrize(
    ("dtype", "tolerance", "n", "batches"),
    [
        (torch.float64, 1e-12, 24, {1: 1, 3: 3, 16: 16}),
        (torch.float32, 1e-6, 100, {1: 10, 3: 20, 16: 100}),
    ],
    ids=["f64", "f32"],
)
def test_losses_and_rankings_do_not_depend_on_batch_or_order(
    dtype, tolerance, n, batches, seed, rng, tmp_path, measured
):
    model = helpers.ToyDenoiser(seed, str(rng.choice(["v", "rectified_flow"])), dtype, depth=1)
    tracks, queries = helpers.make_tracks(rng, n, 3, 10), helpers.make_tracks(rng, 1, 3, 10, "q")
    compare_batches(
        in_every_batch(model, tracks, queries, rng, tmp_path, batches), tolerance, 0.9999, measured
    )


def test_batches_and_order_of_a_stable_audio_model(seed, rng, tmp_path, measured):
    pytest.importorskip("stable_audio_tools")
    model = helpers.tiny_stable_audio(seed, torch.float32, objective="v", global_cond="prepend", patch=4)
    tracks, queries = helpers.make_tracks(rng, 32, 3, 16), helpers.make_tracks(rng, 1, 3, 16, "q")
    # A swap of neighbours among 32 tracks takes 6 * 2 / (32^3 - 32) = 0.00037. Scores differ by about 2e-5 of the mean gap
    # between neighbours, so a swap is seen in about one of 2000 rankings, and three in one in about one of 1e10 runs.
    compare_batches(
        in_every_batch(model, tracks, queries, rng, tmp_path, {1: 8, 16: 32}), 1e-6, 0.9992, measured
    )


def test_opening_a_run_removes_its_own_leftovers_and_nobody_elses(tmp_path):
    with open_run(tmp_path, Settings()) as run:
        run.record()
    ours = [tmp_path / "units" / "000000.safetensors.part", tmp_path / "fisher.safetensors.part"]
    theirs = [
        tmp_path / "download.part",
        tmp_path / "music" / "song.safetensors.part",
        tmp_path / "music" / ".tmpabcdef",
    ]
    for path in (*ours, *theirs):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with open_run(tmp_path, Settings()):
        pass
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in theirs)
