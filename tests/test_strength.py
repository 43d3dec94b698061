"""The size that a query's own loss or prediction asks for, against the same measured by hand, and its way through a run."""

import json
import signal

import forks
import helpers
import naive
import numpy as np
import pytest
import torch

from attr_engine import Attribution, DrawPlan, UserError, attribute, dry_run, fit_fisher
from attr_engine.diffusion import noised_rows, predict, row_losses, squared_norms
from attr_engine.jobs import make_job
from attr_engine.monitor import Progress
from attr_engine.pipeline import SIZES, run_job
from attr_engine.runs import open_run
from attr_engine.strength import SEARCHED, TOLERANCE, Response, find_size
from attr_engine.tensorfile import load_meta
from attr_engine.unlearn import query_gradient, unlearn_query

DRAWS = 4


def taught(seed, rng, objective="v", dtype=torch.float64, kind="track"):
    """A toy that has learned its tracks on the draws of their updates: a fresh one is worse than predicting nothing."""
    model, plan = helpers.ToyDenoiser(seed, objective, dtype), DrawPlan(seed, kind, 2)
    tracks = helpers.make_tracks(rng, 4, model.channels, model.frames)
    batch, pairs = tracks.batch(range(4), model.frames), [(i, d) for i in range(4) for d in range(DRAWS)]
    valid, whole = (noised_rows(model, batch, pairs, plan, "update", masked) for masked in (True, False))
    parameters = list(model.module.parameters())
    optimizer = torch.optim.Adam(parameters, 2e-2)
    with torch.no_grad():
        zero = torch.zeros_like(predict(model, whole))
        nothing = torch.stack([row_losses(zero, rows).unflatten(0, (4, DRAWS)) for rows in (valid, whole)])
    for step in range(1000):
        prediction = predict(model, whole)
        each = torch.stack([row_losses(prediction, rows).unflatten(0, (4, DRAWS)) for rows in (valid, whole)])
        # Until it knows something of every track, with its draws and with half of them.
        if step >= 40 and all(bool((1.5 * each - nothing)[..., :d].sum(-1).max() < 0) for d in (2, DRAWS)):
            break
        loss = each.mean(dim=(1, 2)).sum()
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.grad = g
        optimizer.step()
    for p in parameters:
        p.grad = None
    return model, tracks, plan


def by_hand(model, plan, items, delta, masked):
    """Loss before and after, null loss and relative displacement, one draw at a time."""
    before, after = naive.Loop(model, plan), naive.Loop(model, plan)
    with torch.no_grad():
        for name, value in delta.items():
            after.theta[name] += value.double()
        rows = []
        for item in items:
            n = item.valid if masked else item.latent.shape[1]
            for d in range(DRAWS):
                (f, target), (g, _) = (loop.rows(item, "update", d) for loop in (before, after))
                parts = (f - target, g - target, target, g - f, f)
                rows.append([float((x[:, :n] ** 2).mean()) for x in parts])
    first, then, null, moved, power = np.mean(rows, axis=0)
    return {"loss_before": first, "loss_after": then, "null_loss": null, "displacement": moved / power}


def reached(unit, found):
    """What a strength is there."""
    if unit == "displacement":
        return found["displacement"]
    return (found["loss_after"] - found["loss_before"]) / (found["null_loss"] - found["loss_before"])


@pytest.mark.parametrize("index", [1, (0, 2, 3)], ids=["one", "group"])
@pytest.mark.parametrize("unit", SEARCHED)
def test_the_update_does_to_its_query_what_was_asked(unit, index, seed, rng, measured):
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        choices = [str(rng.choice(x)) for x in (["v", "rectified_flow"], ["track", "shared"])]
        model, tracks, plan = taught(seed, rng, choices[0], dtype, choices[1])
        fisher, masked = fit_fisher(model, tracks, ("transformer",), plan, 2), bool(rng.integers(2))
        items = naive.items(tracks, model.frames)
        chosen = [items[i] for i in ([index] if isinstance(index, int) else index)]
        strength = float(rng.uniform(0.02, 0.9))
        common = {"draws": DRAWS, "masked": masked, "rows": int(rng.integers(1, 6))}
        update = unlearn_query(model, tracks, index, fisher, plan, 4, strength, unit, **common)
        found = by_hand(model, plan, chosen, update.delta, masked)
        assert found["loss_before"] < found["null_loss"], "the toy has learned too little to be unlearned"
        assert abs(reached(unit, found) / strength - 1) < TOLERANCE + tolerance * 10
        assert np.isclose(update.reaction["reached"], reached(unit, found), rtol=tolerance * 10)
        for name, value in found.items():
            measured(f"{name} {dtype}", abs(update.reaction[name] / value - 1))
            assert np.isclose(update.reaction[name], value, rtol=tolerance)
        plain = unlearn_query(model, tracks, index, fisher, plan, 4, update.size, **common)
        assert np.isclose(plain.lr, update.lr, rtol=1e-6) and not plain.reaction
        assert all(naive.relative_error(update.delta[n], d) < 1e-5 for n, d in plain.delta.items())


@pytest.mark.parametrize("unit", SEARCHED)
def test_a_larger_strength_has_a_larger_size(unit, seed, rng):
    model, tracks, plan = taught(seed, rng)
    fisher = fit_fisher(model, tracks, ("all",), plan, 2)
    strengths = np.cumprod(rng.uniform(1.05, 2.0, 12))
    strengths *= 0.95 / strengths[-1]
    sizes = [unlearn_query(model, tracks, 2, fisher, plan, 4, float(s), unit, draws=DRAWS).size for s in strengths]  # fmt: skip
    assert (np.diff(sizes) > 0).all()


class Wavy:
    """Says whatever it likes of a size: displacement of a query without weights."""

    loss, null, power = 1.0, 2.0, 1.0

    def __init__(self, function) -> None:
        self.function, self.tried = function, []

    def at(self, size):
        self.tried.append(size)
        return 1.0 + self.function(size), self.function(size)


def test_sizes_are_in_the_order_of_strengths_whatever_the_loss_does_between(rng):
    # A search tells logarithms of sizes apart to log 4 / 2^22. Knots are 0.07 apart at least: of a jump by 10 between two of them,
    # 1e-4 is within the tolerance.
    step = np.log(2.0**20) / 40
    knots = (np.arange(40) - 39.5 + rng.uniform(-0.4, 0.4, 40)) * step
    heights = 2.0 * knots + rng.normal(size=40) * 2  # of a curve that goes up and down on its way

    def function(size):
        return float(np.exp(np.interp(np.log(size), knots, heights)))

    strengths = np.exp(np.sort(rng.uniform(heights[0], heights[-1], 200)))
    inside = [s for s in strengths if function(2.0**-20) < s * 0.98 and s * 1.02 < function(1.0)]
    sizes = []
    for s in inside:
        size, found = find_size(Wavy(function), float(s), "displacement", "q")
        assert abs(found["reached"] / s - 1) <= TOLERANCE and found["reached"] == function(size)
        sizes.append(size)
    assert len(inside) > 20 and (np.diff(sizes) >= 0).all()


def test_a_search_tries_no_more_sizes_than_an_estimate_counts(rng):
    from attr_engine.strength import _USUALLY_TRIED

    for power in (1.0, 1.5, 2.0):
        for size in np.exp(rng.uniform(np.log(2.0**-19.9), -0.01, 50)):
            response = Wavy(lambda x, p=power: x**p)
            found, _ = find_size(response, float(size**power), "displacement", "q")
            assert np.isclose(found, size, rtol=1.1 * TOLERANCE)
            assert len(response.tried) <= _USUALLY_TRIED


@pytest.mark.parametrize(
    ("function", "strength", "unit", "named"),
    [
        (lambda x: 1e-3 * x, 0.5, "null_loss", r"as large as the weights takes query 'q' to null_loss 0.001, .* smaller"),
        (lambda x: 10.0, 0.5, "displacement", "relative size of 1e-06 takes query 'q' .* larger strength"),
        (lambda x: float(x > 0.01), 0.5, "displacement", "'q' jumps past displacement 0.5 at a relative size of 0.01"),
        (lambda x: x if x < 0.05 else float("nan"), 0.5, "displacement", "'q' jumps"),
    ],
)  # fmt: skip
def test_what_cannot_be_reached_is_refused_by_name(function, strength, unit, named):
    with pytest.raises(UserError, match=named):
        find_size(Wavy(function), strength, unit, "q")


def test_a_size_is_found_below_one_that_breaks_the_model():
    size, _ = find_size(Wavy(lambda x: x if x < 0.1 else float("nan")), 0.05, "displacement", "q")
    assert np.isclose(size, 0.05, rtol=2 * TOLERANCE)


@pytest.mark.parametrize("unit", SEARCHED)
def test_rows_a_pass_and_what_stays_in_memory_change_nothing(unit, seed, rng):
    model, tracks, plan = taught(seed, rng)
    fisher = fit_fisher(model, tracks, ("transformer",), plan, 2)
    first, *others = (
        unlearn_query(
            model, tracks, (1, 3), fisher, plan, 4, 0.3, unit, draws=DRAWS, rows=rows, kept_rows=kept
        )
        for rows, kept in ((16, 100), (1, 100), (3, 0), (16, 7))
    )
    for other in others:
        assert np.isclose(other.size, first.size, rtol=1e-9)
        assert all(np.isclose(other.reaction[k], v, rtol=1e-9) for k, v in first.reaction.items())
        assert all(naive.relative_error(other.delta[n], d) < 1e-9 for n, d in first.delta.items())


def test_what_is_not_kept_is_made_again_and_theta_0_is_back(seed, rng):
    model, tracks, plan = taught(seed, rng)
    before, made = model.fingerprint, []
    batch, parameters = tracks.batch([0], model.frames), dict(model.module.named_parameters())
    direction = query_gradient(model, parameters, batch, range(DRAWS), plan, True, 4)

    def rows():
        made.append(1)
        return noised_rows(model, batch, [(0, d) for d in range(DRAWS)], plan, "update", True)

    kept, anew = (Response(model, direction, 1.0, [rows], keep) for keep in (True, False))
    assert len(made) == 2 and kept.at(0.1) == anew.at(0.1) == kept.at(0.1) == anew.at(0.1)
    assert len(made) == 4 and model.fingerprint == before


def test_a_query_that_the_model_knows_nothing_of_is_refused_by_name(seed, rng):
    model = helpers.ToyDenoiser(seed)
    with torch.no_grad():
        model.module.transformer.project_out.weight *= 30.0  # far from any target
    tracks, plan = helpers.make_tracks(rng, 3, 3, 10), DrawPlan(seed, replicates=2)
    fisher = fit_fisher(model, tracks, ("all",), plan, 2)
    with pytest.raises(UserError, match="'t1' is .*predicting nothing"):
        unlearn_query(model, tracks, 1, fisher, plan, 3, 0.3, "null_loss", draws=2)
    with pytest.raises(UserError, match="'t0 and 1 more' is .*predicting nothing"):
        unlearn_query(model, tracks, [0, 1], fisher, plan, 3, 0.3, "null_loss", draws=2)
    with torch.no_grad():
        model.module.transformer.project_out.weight.zero_()
    for unit in SEARCHED:
        with pytest.raises(UserError, match="gradient of query 't2' has norm 0"):
            zero = {n: torch.zeros_like(v) for n, v in fisher.values.items()}
            unlearn_query(model, tracks, 2, fisher, plan, 3, 0.3, unit, draws=2, first_gradient=zero)
    with pytest.raises(UserError, match="predicts nothing for query 't2'"):
        unlearn_query(model, tracks, 2, fisher, plan, 3, 0.3, "displacement", draws=2)


@pytest.mark.parametrize("unit", SEARCHED)
def test_a_query_out_of_reach_is_refused_by_name(unit, seed, rng):
    model, tracks, plan = taught(seed, rng)
    fisher = fit_fisher(model, tracks, ("*to_kv*",), plan, 2)
    strength = 1e9 if unit == "displacement" else 1e-300
    with pytest.raises(UserError, match=f"query 't3' to {unit}"):
        unlearn_query(model, tracks, 3, fisher, plan, 4, strength, unit, draws=2)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"unit": "null_loss", "strength": 1.5}, "at most 1"),
        ({"unit": "null_loss", "steps": 2}, "--steps 1 with unit 'null_loss'"),
        ({"unit": "displacement", "steps": 4}, "4 steps have 4"),
        ({"unit": "null_loss", "function": squared_norms}, "norm_influence"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, named, seed, rng):
    model, tracks = helpers.ToyDenoiser(seed), helpers.make_tracks(rng, 2, 3, 10)
    fisher = fit_fisher(model, tracks, ("all",), DrawPlan(seed, replicates=2), 2)
    with pytest.raises(UserError, match=named):
        unlearn_query(
            model,
            tracks,
            0,
            fisher,
            DrawPlan(seed, replicates=2),
            2,
            **{"strength": 0.1, "draws": 2, **settings},
        )


# -- in a run -------------------------------------------------------------------------------------

BY_DISPLACEMENT = {"unit": "displacement", "strengths": (0.1, 0.01), "steps": 1}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"unit": "null_loss", "strengths": (0.1,), "steps": 1}, "norm_influence"),
        ({"unit": "null_loss", "strengths": (0.1, 2.0), "functions": ("skew",), "steps": 1}, "at most 1"),
        ({**BY_DISPLACEMENT, "steps": 2}, "--steps 1"),
        ({**BY_DISPLACEMENT, "strengths_by": "tangent"}, "--strengths-by passes"),
        ({**BY_DISPLACEMENT, "strengths_by": "difference"}, "--strengths-by passes"),
    ],
)
def test_a_run_refuses_beforehand(changes, named, seed, tmp_path):
    model, tracks, queries = forks.make(seed)
    for go in (attribute, dry_run):
        with pytest.raises(UserError, match=named):
            go(model, tracks, queries, forks.small(**changes), tmp_path / "run")
    assert not list(tmp_path.glob("run/updates/*"))


def test_a_run_scores_at_the_sizes_that_it_reports(seed, rng, tmp_path):
    model, tracks, _ = taught(seed, rng)
    queries, functions = helpers.make_tracks(rng, 1, 3, 10, "q"), ("loss_change", "displacement")
    common = {"functions": functions, "self_influence": ("t1",), "steps": 1}
    settings = forks.small(**common, unit="displacement", strengths=(0.2, 0.02))
    result = attribute(model, tracks, queries, settings, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / SIZES).read_text())["updates"]
    assert Attribution.from_parquet(tmp_path / "run" / "scores.parquet").meta["updates"] == kept
    assert result.meta["updates"] == kept
    assert [(row["query"], row["strength"], row["of"]) for row in kept] == [
        (*u, "loss") for u in result.updates
    ]
    for u, row in enumerate(kept):
        fixed = forks.small(**common, unit="size", strengths=(row["size"],))
        by_size = attribute(model, tracks, queries, fixed)
        assert "updates" not in by_size.meta
        for f in functions:
            found = result.values[f][u]
            assert naive.relative_error(by_size.values[f][by_size.row(row["query"])], found) < 1e-9
    by_rate = forks.small(**{**common, "steps": 2}, unit="lr", strengths=(kept[0]["lr"] / 2,))
    rates = attribute(model, tracks, queries, by_rate).meta["updates"]
    assert {*rates[0]} == {"query", "strength", "of", "size", "lr"} and rates[0]["size"] > 0


def test_a_killed_run_finds_the_same_sizes(seed, rng, tmp_path):
    process = forks.Forks()
    try:
        whole, out = tmp_path / "whole", tmp_path / "killed"
        job = {"seed": seed, "settings": {"unit": "displacement", "steps": 1, "rows": 16, "unit_tracks": 6}}
        counted = process.run(out=whole, **job)
        assert counted["code"] == 0
        for _ in range(3):
            die = ["predict", int(rng.integers(10, counted["predict"] // 3))]
            assert process.run(out=out, die=die, **job)["code"] == -signal.SIGKILL
        assert "refused" not in counted | process.run(out=out, **job)
        assert forks.bits(out) == forks.bits(whole)
        assert (out / SIZES).read_bytes() == (whole / SIZES).read_bytes()
    finally:
        process.close()


def test_sizes_of_other_settings_are_refused(seed, tmp_path):
    model, tracks, queries = forks.make(seed)
    settings = forks.small(**BY_DISPLACEMENT)
    attribute(model, tracks, queries, settings, tmp_path / "run")
    path = tmp_path / "run" / SIZES
    path.write_text(json.dumps({**json.loads(path.read_text()), "key": "another"}))
    with pytest.raises(UserError, match=r"sizes\.json belongs to other"):
        attribute(model, tracks, queries, settings, tmp_path / "run")


@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_an_estimate_counts_the_search_at_most(memory, seed, tmp_path, monkeypatch):
    model, tracks, queries = forks.make(seed)
    settings = forks.small(**BY_DISPLACEMENT, functions=("displacement",), memory=memory)
    expected = dry_run(model, tracks, queries, settings, tmp_path / "run")
    (unlearn,) = (s for s in expected.stages if s.name == "unlearn")
    passed = dict.fromkeys(["unlearn", "score"], 0)
    stage, predict = [""], model.predict
    show = Progress.__call__

    def shown(self, *arguments):
        stage[0] = self.stage
        return show(self, *arguments)

    def counted(x, *more):
        if stage[0] in passed and not torch.is_grad_enabled():
            passed[stage[0]] += len(x)
        return predict(x, *more)

    monkeypatch.setattr(Progress, "__call__", shown)
    monkeypatch.setattr(model, "predict", counted)
    attribute(model, tracks, queries, settings, tmp_path / "run")
    assert 0.2 * unlearn.work.forward < passed["unlearn"] <= unlearn.work.forward
    assert unlearn.seconds[1] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"top": 2, "race_draws": 2, "score_draws": 8, "race_share": 0.9},
        {"self_influence": (), "groups": "artist"},
        {"functions": ("influence", "norm_influence")},
        {"update_dtype": "bfloat16", "memory": 1.0},
    ],
    ids=["race", "groups", "first order", "bounded"],
)
def test_every_kind_of_run_finds_sizes(changes, seed, tmp_path):
    model, tracks, queries = forks.make(seed)
    for i, info in enumerate(tracks.info):
        info["artist"] = f"artist {i % 2}"
    values = {**BY_DISPLACEMENT, "functions": ("displacement",), **changes}
    result = attribute(model, tracks, queries, forks.small(**values), tmp_path / "run")
    names = ["artist 0", "artist 1"] if "groups" in changes else [*queries.ids, "t1", "t4"]
    of = ["loss", "squared_norm"] if "norm_influence" in values["functions"] else ["loss"]
    rows = result.meta["updates"]
    assert sorted((r["query"], r["strength"], r["of"]) for r in rows) == sorted(
        (n, s, f) for n in names for s in values["strengths"] for f in of
    )
    assert all(abs(r["reached"] / r["strength"] - 1) <= TOLERANCE for r in rows)
    assert all(np.isfinite(v).any() for v in result.values.values())


def test_updates_keep_what_was_found_and_people_are_told(seed, tmp_path, capsys):
    from attr_engine.cli_options import print_sizes, print_top
    from attr_engine.report.build import build_report

    model, tracks, queries = forks.make(seed)
    settings = forks.small(**BY_DISPLACEMENT, functions=("displacement",))
    with open_run(tmp_path / "run", settings) as run:
        job = make_job(run, model, tracks, [queries])
        result = run_job(job)
        row = result.meta["updates"][0]
        meta = load_meta(job.update_path(job.queries[0], 0.1))
        assert {k: row[k] for k in meta["reaction"]} == meta["reaction"] and row["size"] == meta["size"]
        print_top(job, result)
        said = capsys.readouterr().out
        assert f"its update: relative size {row['size']:.3g}, its loss {row['loss_before']:.4g} to" in said
        sizes = [r["size"] for r in result.meta["updates"] if r["strength"] == 0.1]
        assert f"strength 0.1: relative sizes {min(sizes):.3g} to {max(sizes):.3g}" in said
        build_report(job, result)
    print_sizes([])
    assert capsys.readouterr().out == ""
    text = (tmp_path / "run" / "tables.md").read_text()
    assert "### Size of each update" in text
    assert f"| {queries.ids[0]} | relative displacement 0.1 | {row['size']:.4g} |" in text
    assert "| median | relative displacement 0.01 |" in text
    assert "Size of each update" in (tmp_path / "run" / "report.html").read_text()
