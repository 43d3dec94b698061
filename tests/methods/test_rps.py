"""Representer points are sums over tokens, one at a time; and where the theorem holds, the tracks add up to the prediction."""

from dataclasses import replace

import naive
import numpy as np
import pytest
import torch
from helpers import ToyDenoiser, make_tracks, tiny_stable_audio

from attr_engine import Settings, UserError
from attr_engine.diffusion import noised_rows
from attr_engine.jobs import Query
from attr_engine.methods import Workspace, hidden, parse
from attr_engine.methods.passes import plan_of
from attr_engine.methods.rps import target_of

SETTINGS = Settings(dtype="float64", score_draws=4, update_draws=8, rows=3)


class Recorded(naive.Loop):
    """The loop, and what the last layer was given in each of its passes: ``[F, D]``."""

    def __init__(self, model, plan) -> None:
        super().__init__(model, plan)
        layer = self.model.module.transformer.project_out
        layer.register_forward_pre_hook(lambda _, args: setattr(self, "given", args[0][0].detach()))

    @torch.no_grad()
    def points(self, items, purpose, draws, masked):
        """Of each item: inputs of the last layer ``[P, D]``, predictions ``[P, C]`` and targets ``[P, C]`` of all its tokens."""
        out = []
        for item in items:
            parts = []
            for d in range(draws):
                prediction, target = self.rows(item, purpose, d)
                n = item.valid if masked else item.latent.shape[1]
                parts.append((self.given[-len(prediction[0]) :][:n], prediction.T[:n], target.T[:n]))
            out.append([torch.cat(x).numpy() for x in zip(*parts, strict=True)])
        return out


def expected(model, tracks, queries, s, damping) -> np.ndarray:
    """``[Q, N]``, token by token."""
    loop = Recorded(model, plan_of(s))
    training = loop.points(naive.items(tracks, model.frames), "score", s.score_draws, s.mask_score)
    asked = loop.points(naive.items(queries, model.frames), "update", s.update_draws, s.mask_update)
    n, scores = sum(len(f) for f, _, _ in training), np.zeros((len(asked), len(training)))
    for q, (f_q, _, _) in enumerate(asked):
        for i, (f_i, prediction, target) in enumerate(training):
            alpha = -(prediction - target) / (damping * n)
            parts = [[alpha[p] * (f_i[p] @ x) for p in range(len(f_i))] for x in f_q]
            scores[q, i] = np.mean(np.sum(parts, axis=1))  # over tokens of the query and components
    return scores


@pytest.mark.parametrize("masked", [(True, False), (False, True)])
def test_scores_are_those_of_tokens_one_at_a_time(masked, seed, rng, tmp_path, measured):
    s = replace(SETTINGS, seed=seed, mask_update=masked[0], mask_score=masked[1], plan=str(rng.choice(["track", "shared"])))  # fmt: skip
    model = ToyDenoiser(seed, str(rng.choice(["v", "rectified_flow"])))
    tracks, queries = make_tracks(rng, 5, 3, 10), make_tracks(rng, 3, 3, 10, "q")
    fitted = parse("rps:damping=0.02")[1].fit(model, tracks, Workspace(tmp_path, s))
    found = fitted.score([Query(queries, i, "") for i in (1, 2, 0)])
    error = naive.relative_error(found, expected(model, tracks, queries, s, 0.02)[[1, 2, 0]])
    measured("relative_error", error)
    assert error < 1e-9
    # Beside the largest: a score is a sum with both signs, and may be almost 0.
    assert np.abs(fitted.score([Query(queries, 0, "")])[0] - found[2]).max() < 1e-12 * np.abs(found).max()


@pytest.mark.parametrize("masked", [True, False])
def test_where_the_last_layer_is_the_optimum_the_tracks_add_up_to_the_prediction(
    masked, seed, rng, tmp_path, measured
):
    s = replace(SETTINGS, seed=seed, mask_score=masked)
    damping, model = float(rng.uniform(0.01, 0.1)), ToyDenoiser(seed)
    tracks, queries = make_tracks(rng, 7, 3, 10), make_tracks(rng, 3, 3, 10, "q")
    training = Recorded(model, plan_of(s)).points(
        naive.items(tracks, model.frames), "score", s.score_draws, masked
    )
    f, _, y = (np.concatenate(x) for x in zip(*training, strict=True))
    # The minimum of 1/n sum |W f - y|^2 + damping |W|^2.
    optimum = np.linalg.solve(f.T @ f + damping * len(f) * np.eye(f.shape[1]), f.T @ y).T
    with torch.no_grad():
        model.module.transformer.project_out.weight.copy_(torch.from_numpy(optimum))
    asked = Recorded(model, plan_of(s)).points(
        naive.items(queries, model.frames), "update", s.update_draws, True
    )
    fitted = parse(f"rps:damping={damping!r}")[1].fit(model, tracks, Workspace(tmp_path, s))
    found = fitted.score([Query(queries, i, "") for i in range(3)]).sum(axis=1)
    error = naive.relative_error(found, [prediction.mean() for _, prediction, _ in asked])
    measured("relative_error", error)
    assert error < 1e-9


def test_components_of_a_patch_belong_to_its_token(seed, rng, tmp_path):
    pytest.importorskip("stable_audio_tools")
    model = tiny_stable_audio(seed, patch=4)
    with torch.no_grad():  # what follows the last layer does nothing, as before training
        model.module.model.postprocess_conv.weight.zero_()
    tracks, queries = (
        make_tracks(rng, n, model.channels, model.frames, name) for n, name in ((3, "t"), (1, "q"))
    )
    s = replace(SETTINGS, mask_update=False)
    found = parse("rps")[1].fit(model, tracks, Workspace(tmp_path, s)).score([Query(queries, 0, "")])
    layer, seen = model.module.model.transformer.project_out, []
    handle = layer.register_forward_hook(lambda _, args, out: seen.append((args[0][0, -4:], out[0, -4:])))
    loop, points = naive.Loop(model, plan_of(s)), {}
    loop.model = model
    with torch.no_grad():
        for items, purpose, draws in ((tracks, "score", 4), (queries, "update", 8)):
            points[purpose] = []
            for item in naive.items(items, model.frames):
                for d in range(draws):
                    _, target = loop.rows(item, purpose, d)
                    f, out = seen.pop()
                    y = target.unflatten(1, (4, 4)).permute(1, 0, 2).flatten(1)  # [tokens, channels x patch]
                    points[purpose].append((f, y - out))
    handle.remove()
    mean_f = torch.stack([f.mean(dim=0) for f, _ in points["update"]]).mean(dim=0)
    each = torch.stack([(r.mean(dim=1, keepdim=True) * f).sum(dim=0) @ mean_f for f, r in points["score"]])
    assert naive.relative_error(found[0], each.reshape(3, 4).sum(dim=1) / (1e-3 * 3 * 4 * 4)) < 1e-7


def test_the_target_is_made_again_where_it_is_not_kept(seed, rng):
    model = ToyDenoiser(seed, "rectified_flow")
    batch = make_tracks(rng, 2, 3, 10).batch(range(2), 10)
    rows = noised_rows(model, batch, [(0, 0), (1, 3)], plan_of(SETTINGS), "score", False)
    assert rows.target is not None
    torch.testing.assert_close(target_of(replace(rows, target=None)), rows.target, rtol=0, atol=0)


def test_what_is_kept_is_small_and_not_made_again(seed, rng, tmp_path, monkeypatch):
    model, tracks, work = ToyDenoiser(seed), make_tracks(rng, 20, 3, 10), Workspace(tmp_path, SETTINGS)
    method = parse("rps")[1]
    first = method.fit(model, tracks, work).score([Query(tracks, 1, "")])
    files = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    assert len(files) == 2 and sum(p.stat().st_size for p in files) < 20 * (8 * 8 + 8) + 2 * 500
    stamps = [p.stat().st_mtime_ns for p in files]
    calls = []
    original = hidden.watched
    monkeypatch.setattr(
        "attr_engine.methods.rps.watched", lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    )
    fitted = method.fit(model, tracks, work)
    assert not calls and [p.stat().st_mtime_ns for p in files] == stamps
    np.testing.assert_array_equal(fitted.score([Query(tracks, 1, "")]), first)
    assert calls


def test_what_cannot_be_is_refused(seed, rng, tmp_path):
    model, tracks = ToyDenoiser(seed), make_tracks(rng, 3, 3, 10)
    with pytest.raises(UserError, match="damping=0 of rps"):
        parse("rps:damping=0")[1].fit(model, tracks, Workspace(tmp_path, SETTINGS))
    with pytest.raises(UserError, match="the number of score draws is 6"):
        parse("rps")[1].fit(model, tracks, Workspace(tmp_path, replace(SETTINGS, score_draws=6)))
    model.module.train()
    with pytest.raises(UserError, match="training mode"):
        parse("rps")[1].fit(model, tracks, Workspace(tmp_path, SETTINGS))
