"""Kernel ridge scores of a run against the formula over gradients that autograd alone took."""

import numpy as np
import pytest
import torch
from helpers import ToyDenoiser, make_tracks

import attr_engine
from attr_engine import Settings
from attr_engine.diffusion import DrawPlan, noised_rows, squared_norms
from attr_engine.errors import UserError
from attr_engine.models.protocol import select_parameters

DRAWS, ASKED = 4, 8
LAYERS = (
    "*.cross_attn.to_q.*",
    "*.cross_attn.to_out.*",
    "*_norm.*",
)  # small enough that nothing is projected away


@pytest.fixture
def sets(seed, rng):
    model = ToyDenoiser(seed)
    return model, make_tracks(rng, 7, 3, 10), make_tracks(rng, 3, 3, 10, "q")


def settings(**more):
    return Settings(
        **{
            "functions": ("ridge",),
            "dtype": "float64",
            "score_draws": DRAWS,
            "update_draws": ASKED,
            "ridge": 0.3,
            "layers": LAYERS,
            **more,
        }
    )


def unit_gradients(model, tracks, purpose, draws, masked):
    """Per track and draw a gradient of length 1, by autograd: ``[N, draws, P]``."""
    parameters, plan, out = select_parameters(model, LAYERS), DrawPlan(0, "shared", 1), []
    for i in range(len(tracks)):
        for d in range(draws):
            rows = noised_rows(model, tracks.batch([i], model.frames), [(0, d)], plan, purpose, masked)
            model.module.zero_grad()
            squared_norms(model, rows).sum().backward()
            flat = torch.cat([p.grad.flatten() for p in parameters.values()])
            out.append(flat / flat.norm())
    return torch.stack(out).reshape(len(tracks), draws, -1).numpy()


def test_scores_and_errors_are_those_of_the_formula(sets, measured):
    model, tracks, queries = sets
    found = attr_engine.attribute(model, tracks, queries, settings())
    phi = unit_gradients(model, tracks, "score", DRAWS, False).mean(axis=1)
    kernel = phi @ phi.T
    damped = kernel + 0.3 * np.trace(kernel) / len(kernel) * np.eye(len(kernel))
    asked = unit_gradients(model, queries, "update", ASKED, False)
    each = np.stack([np.linalg.solve(damped, phi @ asked[:, r::4].mean(axis=1).T).T for r in range(4)])
    expected, error = each.mean(axis=0), each.std(axis=0, ddof=1) / 2
    scale = np.abs(expected).max()
    worst = np.abs(found.values["ridge"] - expected).max() / scale
    measured("ridge", worst)
    assert worst < 2e-3  # rows of an index are stored in 16 bits
    assert np.abs(found.errors["ridge"] - error).max() / scale < 2e-3
    assert (found.draws == DRAWS).all() and np.isnan(found.base).all()


def test_ridge_beside_measured_functions_changes_neither(sets):
    model, tracks, queries = sets
    both = attr_engine.attribute(
        model, tracks, queries, settings(functions=("ridge", "loss_change"), strengths=(0.01, 0.1))
    )
    one = attr_engine.attribute(model, tracks, queries, settings())
    other = attr_engine.attribute(
        model, tracks, queries, settings(functions=("loss_change",), strengths=(0.01, 0.1))
    )
    assert list(both.values) == ["ridge", "loss_change"]
    assert np.array_equal(both.values["ridge"], np.repeat(one.values["ridge"], 2, axis=0))
    assert np.array_equal(both.values["loss_change"], other.values["loss_change"])
    assert np.array_equal(both.base, other.base)


def test_a_run_directory_keeps_the_index_and_the_scores(sets, tmp_path):
    model, tracks, queries = sets
    first = attr_engine.attribute(model, tracks, queries, settings(), out=tmp_path / "run")
    stamp = (tmp_path / "run" / "index" / "features.npy").stat().st_mtime_ns
    again = attr_engine.attribute(model, tracks, queries, settings(), out=tmp_path / "run")
    assert np.array_equal(first.values["ridge"], again.values["ridge"])
    assert stamp == (tmp_path / "run" / "index" / "features.npy").stat().st_mtime_ns
    assert not (tmp_path / "run" / "fisher.safetensors").exists()


def test_a_cache_serves_other_queries_of_the_same_model_and_tracks(sets, tmp_path, rng):
    model, tracks, queries = sets
    shared = settings(cache=str(tmp_path / "cache"))
    first = attr_engine.attribute(model, tracks, queries, shared, out=tmp_path / "a")
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("index-*/features.npy")}
    attr_engine.attribute(model, tracks, make_tracks(rng, 2, 3, 10, "other"), shared, out=tmp_path / "b")
    assert len(stamps) == 1 and stamps == {
        p: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("index-*/features.npy")
    }
    assert np.array_equal(
        first.values["ridge"], attr_engine.attribute(model, tracks, queries, settings()).values["ridge"]
    )


def test_training_tracks_can_be_asked_for_and_find_themselves(sets):
    model, tracks, _ = sets
    found = attr_engine.attribute(
        model, tracks, None, settings(self_influence=("t0", "t3"), update_draws=32, score_draws=32)
    )
    assert [found.top(1, name)[0].track for name in ("t0", "t3")] == ["t0", "t3"]


@pytest.mark.parametrize("wrong", [{"top": 2}, {"groups": "artist"}, {"ridge": 0.0}, {"index": "i"}])
def test_what_ridge_cannot_do_is_refused(sets, wrong):
    model, tracks, queries = sets
    with pytest.raises(UserError, match="ridge"):
        for row in tracks.info:
            row["artist"] = "a"
        attr_engine.attribute(model, tracks, queries, settings(**wrong))
