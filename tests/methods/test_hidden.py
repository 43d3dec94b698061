"""Distances of hidden states are those of an independent walk through the network; what is kept is bounded, and not made again."""

from dataclasses import replace

import naive
import numpy as np
import pytest
import torch
from helpers import ToyDenoiser, make_tracks, tiny_stable_audio

from attr_engine import Settings, UserError
from attr_engine.diffusion import DrawPlan
from attr_engine.jobs import Query
from attr_engine.latents.batch import Chosen
from attr_engine.methods import Workspace, hidden, parse

SETTINGS = Settings(dtype="float64", rows=3)


def toy_states(model, x_t, t, item) -> list[np.ndarray]:
    """Output of every block, ``[F, D]``, the prepended token left out: the network's own steps once more."""
    net = model.module
    with torch.no_grad():
        x, t = torch.from_numpy(x_t)[None], torch.tensor([t], dtype=torch.float64)
        waves = t[:, None] * torch.arange(1, 5, dtype=torch.float64) * np.pi
        embedded = net.to_timestep_embed(torch.cat([waves.cos(), waves.sin()], dim=1))
        token = model.conditioning([item.conditioning])
        context = torch.cat([token[:, None], net.null_token], dim=1)
        x = (x + net.preprocess_conv(x)).transpose(1, 2)
        x, out = torch.cat([embedded[:, None], net.transformer.project_in(x)], dim=1), []
        for layer in net.transformer.layers:
            x = layer(x, context)
            out.append(x[0, 1:].numpy())
    return out


def noised(model, item, seed: int, draw: int, t: float) -> np.ndarray:
    e = naive.normals(naive.key_of(DrawPlan(seed, "shared", 1), "score", "", draw), *item.latent.shape)
    e = e.astype(np.float32).astype(np.float64)
    if model.objective == "v":
        return np.cos(np.pi / 2 * t) * item.latent + np.sin(np.pi / 2 * t) * e
    return (1 - t) * item.latent + t * e


def directions(model, item, seed: int, draws: int, t: float | None = 0.1) -> np.ndarray:
    """``[draws, layers, valid, D]``, every vector of length 1."""
    plan, found = DrawPlan(seed, "shared", 1), []
    for d in range(draws):
        at = naive.time_of(plan, "score", "", d) if t is None else t
        states = toy_states(model, noised(model, item, seed, d, at), at, item)
        found.append(
            [x[: item.valid] / np.sqrt((x[: item.valid] ** 2).sum(1, keepdims=True)) for x in states]
        )
    return np.array(found)


def expected_scores(model, tracks, queries, seed, draws, t=0.1, window=1, layer=slice(None)) -> np.ndarray:
    def windows(x):
        if window == 0:
            return x.mean(axis=2, keepdims=True)
        return np.stack([x[:, :, k : k + window].mean(axis=2) for k in range(0, x.shape[2], window)], axis=2)

    of = [
        [windows(directions(model, item, seed, draws, t)[:, layer]) for item in naive.items(s, model.frames)]
        for s in (queries, tracks)
    ]
    out = []
    for q in of[0]:
        row = []
        for x in of[1]:
            both = min(q.shape[2], x.shape[2])
            row.append(-((q[:, :, :both] - x[:, :, :both]) ** 2).sum(axis=3).mean())
        out.append(row)
    return np.array(out)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("lpips", {"draws": 4}),
        ("lpips:draws=3,window=4", {"draws": 3, "window": 4}),
        ("lpips:window=0,draws=1,layer=1", {"draws": 1, "window": 0, "layer": slice(1, 2)}),
        ("lpips:timestep=-1,draws=3", {"draws": 3, "t": None}),
    ],
)
def test_scores_are_those_of_a_walk_through_the_network(text, options, seed, rng, tmp_path, measured):
    model = ToyDenoiser(seed, str(rng.choice(["v", "rectified_flow"])))
    tracks, queries = make_tracks(rng, 19, 3, 10), make_tracks(rng, 3, 3, 10, "q")
    fitted = parse(text)[1].fit(model, tracks, Workspace(tmp_path, replace(SETTINGS, seed=seed)))
    found = fitted.score([Query(queries, i, "") for i in (2, 0, 1)])
    expected = expected_scores(model, tracks, queries, seed, **options)[[2, 0, 1]]
    measured("relative_error", naive.relative_error(found, expected))
    # Numbers of a track have 11 bits, subnormal ones 24 places: a vector x, never longer than 1, moves by u at most, |q - x|^2 by
    # 2 u |q - x| + u^2, and a mean of roots is at most the root of the mean.
    u = 2.0**-11 + np.sqrt(8) * 2.0**-25
    assert (np.abs(found - expected) <= 2 * u * np.sqrt(-expected) + u**2 + 1e-9).all()
    alone = fitted.score([Query(queries, 0, "")])
    np.testing.assert_allclose(alone[0], found[1], rtol=1e-9)


def test_without_rounding_they_are_the_same_to_the_last_digits(seed, rng, measured):
    model = ToyDenoiser(seed)
    tracks = make_tracks(rng, 3, 3, 10)
    names = hidden.layer_names(model)
    states = hidden.States(model, names, hidden.AtOneTime(seed, "shared", 1, 0.1), 2, 1, 4)
    means, windows = states(tracks.batch(range(3), model.frames))
    for item, got, count in zip(naive.items(tracks, model.frames), means, windows, strict=True):
        assert int(count) == item.valid and not got[:, :, item.valid :].any()
        error = naive.relative_error(got[:, :, : item.valid], directions(model, item, seed, 2))
        measured("relative_error", error)
        assert error < 1e-8


def test_a_training_track_is_nearest_to_itself(seed, rng, tmp_path):
    model, tracks = ToyDenoiser(seed), make_tracks(rng, 8, 3, 10)
    fitted = parse("lpips")[1].fit(model, tracks, Workspace(tmp_path, SETTINGS))
    found = fitted.score([Query(tracks, i, "training track") for i in range(8)])
    assert (found <= 0).all() and (found.argmax(axis=1) == np.arange(8)).all()
    assert np.abs(np.diag(found)).max() < 1e-5


@pytest.mark.parametrize(
    "options", [{"patch": 4}, {"num_memory_tokens": 3, "depth": 2}, {"global_cond": "adaLN"}]
)
def test_tokens_that_stand_in_front_are_left_out(options, seed, rng):
    pytest.importorskip("stable_audio_tools")
    model = tiny_stable_audio(seed, **options)
    batch = make_tracks(rng, 2, model.channels, model.frames).batch(range(2), model.frames)
    names, tokens = hidden.layer_names(model), hidden.tokens_of(model)
    assert len(names) == options.get("depth", 1)
    assert tokens == model.frames // options.get("patch", 1)
    conditioning = model.conditioning(batch.conditioning)
    x, t = batch.latents.double(), torch.tensor([0.2, 0.7], dtype=torch.float64)
    with torch.no_grad(), hidden.watched(model, names) as seen:
        model.predict(x, t, conditioning)
        found = [hidden.token_states(seen, name, tokens) for name in names]
        _, info = model.module(x, t, **conditioning, cfg_dropout_prob=0.0, return_info=True)
        # The states of the frames alone make the prediction.
        with hidden.watched(model, [hidden.last_layer(model)], inputs=True) as given:
            prediction = model.predict(x, t, conditioning)
        last = hidden.token_states(given, hidden.last_layer(model), tokens)
        dit = model.module.model
        out = dit.transformer.project_out(last).transpose(1, 2)
        if dit.patch_size > 1:
            out = out.unflatten(1, (-1, dit.patch_size)).permute(0, 1, 3, 2).flatten(2)
        np.testing.assert_allclose(dit.postprocess_conv(out) + out, prediction, atol=1e-9)
    for a, b in zip(found, info["hidden_states"], strict=True):
        assert a.shape == (2, tokens, 64) and b.shape[1] >= tokens
        np.testing.assert_allclose(a, b[:, -tokens:], atol=1e-12)
    np.testing.assert_allclose(last, found[-1], atol=1e-12)
    assert not any(m._forward_hooks for m in model.module.modules())


def test_what_is_kept_is_bounded_and_not_made_again(seed, rng, tmp_path, monkeypatch):
    model, tracks = ToyDenoiser(seed), make_tracks(rng, 20, 3, 10)
    work = Workspace(tmp_path, SETTINGS)
    with pytest.raises(UserError, match=r"would keep .* MB a track.*gigabytes=1e-06.*window=0"):
        parse("lpips:gigabytes=1e-6")[1].fit(model, tracks, work)
    fitted = parse("lpips")[1].fit(model, tracks, work)
    size = fitted.states.track_bytes(tracks)
    assert size == 2 * 4 * 2 * 10 * 8 + 8  # 16 bits, draws, layers, tokens, channels; and a number of windows
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 2 and sum(p.stat().st_size for p in files) < 20 * size + 2 * 1000
    one = fitted.score([Query(tracks, 1, "")])

    files[0].unlink()
    calls = []
    original = hidden.States.__call__
    monkeypatch.setattr(
        hidden.States,
        "__call__",
        lambda self, batch: (calls.append(len(batch.ids)), original(self, batch))[1],
    )
    again = parse("lpips")[1].fit(model, tracks, work)
    assert sum(calls) in (1 + 16, 1 + 4)  # the one that asks for the size, and the unit that was gone
    np.testing.assert_array_equal(again.score([Query(tracks, 1, "")]), one)


def test_other_tracks_models_and_options_are_not_mixed_up(seed, rng, tmp_path):
    model, other = ToyDenoiser(seed), ToyDenoiser(seed + 1)
    tracks = make_tracks(rng, 5, 3, 10)
    asked = [Query(make_tracks(rng, 1, 3, 10, "q"), 0, "")]
    work = Workspace(tmp_path, SETTINGS)
    found = [
        parse(text)[1].fit(m, t, work).score(asked)
        for text, m, t in (
            ("lpips", model, tracks),
            ("lpips", other, tracks),
            ("lpips", model, Chosen(tracks, [4, 3, 2, 1, 0])),
            ("lpips:timestep=0.3", model, tracks),
        )
    ]
    np.testing.assert_allclose(found[2][0, ::-1], found[0][0], rtol=1e-3)
    assert not np.allclose(found[0], found[1]) and not np.allclose(found[0], found[3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lpips:layer=2", "layer=2: the denoiser has layers 0 to 1"),
        ("lpips:timestep=1", "use a timestep below 1"),
        ("lpips:draws=0", "at least 1 draw"),
    ],
)
def test_options_that_cannot_be_are_refused(text, message, seed, rng, tmp_path):
    with pytest.raises(UserError, match=message):
        parse(text)[1].fit(ToyDenoiser(seed), make_tracks(rng, 3, 3, 10), Workspace(tmp_path, SETTINGS))


def test_a_denoiser_without_transformer_layers_says_what_to_do(seed, rng, tmp_path):
    model, tracks, work = ToyDenoiser(seed), make_tracks(rng, 3, 3, 10), Workspace(tmp_path, SETTINGS)
    model.module.transformer.layers = torch.nn.Sequential(*model.module.transformer.layers)
    with pytest.raises(UserError, match="no transformer layers .*hidden_layers"):
        parse("lpips")[1].fit(model, tracks, work)
    model.hidden_layers = ["transformer.layers.0"]
    assert parse("lpips")[1].fit(model, tracks, work).score([Query(tracks, 0, "")]).shape == (1, 3)
    model.hidden_layers = ["nowhere"]
    with pytest.raises(UserError, match="no module 'nowhere'"):
        parse("lpips")[1].fit(model, tracks, work)
    model.hidden_layers = ["to_timestep_embed"]
    with pytest.raises(UserError, match="to_timestep_embed has states of shape"):
        parse("lpips")[1].fit(model, tracks, work)
    model.module.transformer.project_out = torch.nn.Identity()
    with pytest.raises(UserError, match="no last linear layer .*last_layer"):
        parse("rps")[1].fit(model, tracks, work)
