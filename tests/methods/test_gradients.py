"""Scores of gradients are those of whole gradients in float64, one (track, draw) pair at a time, and of literal leave-one-out."""

from dataclasses import replace

import naive
import numpy as np
import pytest
import torch
from helpers import ToyDenoiser, make_tracks

from attr_engine import Settings, UserError
from attr_engine.diffusion import DrawPlan
from attr_engine.jobs import Query
from attr_engine.latents.batch import Chosen
from attr_engine.methods import Workspace, parse
from attr_engine.methods import gradients as module
from attr_engine.methods.passes import plan_of

SETTINGS = Settings(dtype="float64", score_draws=4, update_draws=8, rows=3, layers=("*.cross_attn.*", "*.ff.*"))  # fmt: skip
WHOLE = "rank=1000000"  # a projection onto all of a weight is none


@pytest.fixture
def setting(seed, rng):
    model = ToyDenoiser(seed, str(rng.choice(["v", "rectified_flow"])))
    s = replace(SETTINGS, seed=seed, plan=str(rng.choice(["track", "shared"])))
    return model, make_tracks(rng, 6, 3, 10), make_tracks(rng, 3, 3, 10, "q"), s


def each_gradient(model, tracks, s, plan, purpose, draws, masked, function="loss") -> np.ndarray:
    """``[N, draws, parameters of the layers]``."""
    loop = naive.Loop(model, plan)
    names = [n for n in loop.theta if ".cross_attn." in n or ".ff." in n]
    return np.array(
        [
            [
                np.concatenate([g[n].ravel() for n in names])
                for g in (loop.gradient(item, purpose, d, masked, function) for d in range(draws))
            ]
            for item in naive.items(tracks, model.frames)
        ]
    )


def asked(queries) -> list[Query]:
    return [Query(queries, i, "") for i in (2, 0, 1)]


@pytest.mark.parametrize("gradients", ["batch", "loop"])
@pytest.mark.parametrize("normalised", [False, True])
def test_tracin_is_the_inner_product_of_mean_gradients(normalised, gradients, setting, tmp_path, measured):
    model, tracks, queries, s = setting
    s = replace(s, gradients=gradients)
    fitted = parse(f"tracin:normalised={normalised}")[1].fit(model, tracks, Workspace(tmp_path, s))
    found = fitted.score(asked(queries))
    plan = plan_of(s)
    g = each_gradient(model, tracks, s, plan, "score", 4, s.mask_score).mean(axis=1)
    q = each_gradient(model, queries, s, plan, "update", 8, s.mask_update).mean(axis=1)
    if normalised:
        g, q = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (g, q))
    error = naive.relative_error(found, (q @ g.T)[[2, 0, 1]])
    measured("relative_error", error)
    assert error < 1e-9
    # Beside the largest: rounding is relative to the lengths of the gradients, and a single product may be almost 0.
    assert np.abs(fitted.score(asked(queries)[1:2])[0] - found[1]).max() < 1e-12 * np.abs(found).max()


def test_tracin_holds_as_many_queries_as_there_is_room_for(setting, tmp_path, monkeypatch):
    model, tracks, queries, s = setting
    method = parse("tracin")[1]
    together = method.fit(model, tracks, Workspace(tmp_path / "a", s)).score(asked(queries))
    monkeypatch.setattr(module, "DIRECTION_BYTES", 1)
    one = method.fit(model, tracks, Workspace(tmp_path / "b", s)).score(asked(queries))
    assert naive.relative_error(one, together) < 1e-12


def ridge_of(model, tracks, queries, s, function, unit) -> tuple[np.ndarray, ...]:
    """Features of tracks and queries, and lambda at damping 0.05."""
    plan, found = DrawPlan(s.seed, s.plan, 1), []
    for items, purpose, draws in ((tracks, "score", 4), (queries, "update", 8)):
        g = each_gradient(model, items, s, plan, purpose, draws, s.mask_fisher, function)
        found.append((g / np.linalg.norm(g, axis=2, keepdims=True) if unit else g).mean(axis=1))
    return *found, 0.05 * (found[0] ** 2).sum(axis=1).mean()


@pytest.mark.parametrize(("name", "function"), [("trak", "loss"), ("dtrak", "squared_norm")])
def test_trak_is_kernel_ridge_over_whole_gradients(name, function, setting, tmp_path, measured):
    model, tracks, queries, s = setting
    fitted = parse(f"{name}:damping=0.05,{WHOLE}")[1].fit(model, tracks, Workspace(tmp_path, s))
    phi, phi_q, least = ridge_of(model, tracks, queries, s, function, unit=False)
    kernel = phi @ phi.T + least * np.eye(6)
    expected = np.linalg.solve(kernel, phi @ phi_q.T).T[[2, 0, 1]]
    found = fitted.score(asked(queries))
    error = naive.relative_error(found, expected)
    measured("relative_error", error)
    assert error < 1e-5  # rows of an index are float32
    assert naive.relative_error(fitted.score(asked(queries)[:1])[0], found[0]) < 1e-5


@pytest.mark.parametrize("squared", [False, True])
def test_das_weighs_by_residuals_and_leverage(squared, setting, tmp_path, measured):
    model, tracks, queries, s = setting
    text = f"das:damping=0.05,{WHOLE},squared={squared}"
    found = parse(text)[1].fit(model, tracks, Workspace(tmp_path, s)).score(asked(queries))
    phi, phi_q, least = ridge_of(model, tracks, queries, s, "squared_norm", unit=True)
    inverse = np.linalg.inv(phi.T @ phi + least * np.eye(phi.shape[1]))
    loop, expected = naive.Loop(model, DrawPlan(s.seed, s.plan, 1)), np.empty((3, 6))
    for i, item in enumerate(naive.items(tracks, model.frames)):
        roots = np.sqrt([loop.loss(item, "score", d, s.mask_fisher).item() for d in range(4)])
        residual = np.mean(roots / np.sqrt(np.sum(roots**2)))
        leverage = phi[i] @ inverse @ phi[i]
        assert 0 < leverage < 1
        expected[:, i] = phi_q @ inverse @ phi[i] * residual / (1 - leverage)
    error = naive.relative_error(found, (expected**2 if squared else expected)[[2, 0, 1]])
    measured("relative_error", error)
    assert error < 2e-5


def test_das_is_what_leaving_a_track_out_does_to_a_regression(setting, rng, tmp_path, measured):
    """With residuals of a ridge regression for the model's, the score is the change of its prediction, refitted without the track."""
    model, tracks, queries, s = setting
    fitted = parse(f"das:damping=0.05,{WHOLE},squared=no")[1].fit(model, tracks, Workspace(tmp_path, s))
    phi, phi_q, least = ridge_of(model, tracks, queries, s, "squared_norm", unit=True)
    y, eye = rng.normal(size=6), least * np.eye(phi.shape[1])

    def predicted(there) -> np.ndarray:
        some = phi[there]
        return phi_q @ np.linalg.solve(some.T @ some + eye, some.T @ y[there])

    everything = np.arange(6)
    whole = predicted(everything)
    left_out = np.array([whole - predicted(everything[everything != i]) for i in range(6)]).T
    beta = np.linalg.solve(phi.T @ phi + eye, phi.T @ y)

    class Residuals:
        def all(self, name: str) -> torch.Tensor:
            return torch.from_numpy(y - phi @ beta)

    found = replace(fitted, residuals=Residuals()).score([Query(queries, i, "") for i in range(3)])
    error = naive.relative_error(found, left_out)
    measured("relative_error", error)
    assert error < 2e-5


@pytest.mark.parametrize("name", ["trak", "dtrak", "das", "tracin:normalised=yes"])
def test_what_was_fitted_is_not_fitted_again(name, setting, tmp_path, monkeypatch):
    model, tracks, queries, s = setting
    work, method = Workspace(tmp_path, s), parse(name)[1]
    first = method.fit(model, tracks, work).score(asked(queries))
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert stamps

    def broken(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    for what in ("index.save_tensors", "methods.passes.save_tensors", "index.write_json"):
        monkeypatch.setattr(f"attr_engine.{what}", broken)
    again = method.fit(model, tracks, work)
    np.testing.assert_array_equal(again.score(asked(queries)), first)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == stamps
    with pytest.raises(AssertionError, match="made again"):
        method.fit(model, Chosen(tracks, [1, 0, 2, 3, 4, 5]), work)


def test_options_and_models_that_cannot_be_are_refused(setting, tmp_path):
    model, tracks, _, s = setting
    for text, message in (("trak:damping=0", "the ridge must be above 0"), ("das:rank=0", "of rank 0")):
        with pytest.raises(UserError, match=message):
            parse(text)[1].fit(model, tracks, Workspace(tmp_path, s))
    with pytest.raises(UserError, match="update draws is 6"):
        parse("tracin")[1].fit(model, tracks, Workspace(tmp_path, replace(s, update_draws=6)))
