"""An autoencoder is the same whether it stands in its own folder or in a model's, and its latents are its means."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from attr_engine.errors import UserError
from attr_engine.models.autoencoder import create_pretransform, load_autoencoder
from attr_engine.models.stable_audio import encode_mean, save_model


def noise(channels: int = 1, samples: int = 2048) -> torch.Tensor:
    return torch.as_tensor(np.random.default_rng(0).normal(size=(2, channels, samples)), dtype=torch.float32)


@pytest.fixture
def folders(tmp_path, config, build):
    """A model folder, and the folder of its autoencoder alone."""
    settings, wrapper = config(), build(config())
    save_model(wrapper, settings, tmp_path / "model")
    alone = tmp_path / "alone"
    alone.mkdir()
    state = {k: v.clone() for k, v in wrapper.pretransform.model.state_dict().items()}
    save_file(state, alone / "autoencoder.safetensors")
    (alone / "pretransform.json").write_text(
        json.dumps({"sample_rate": 16000, "pretransform": settings["model"]["pretransform"]})
    )
    return tmp_path / "model", alone


def refusal(*args) -> str:
    with pytest.raises(UserError) as caught:
        load_autoencoder(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_both_folders_and_a_config_with_weights_give_the_same_latents(folders):
    model, alone = folders
    ways = [
        load_autoencoder(model),
        load_autoencoder(alone),
        load_autoencoder(model / "model_config.json", model / "model.safetensors"),
    ]
    latents = [way.encode(noise()) for way in ways]
    assert latents[0].shape == (2, 4, 8)
    assert all(torch.equal(x, latents[0]) for x in latents)
    for way in ways:
        assert (way.sample_rate, way.samples_per_frame, way.audio_channels, way.channels) == (
            16000,
            256,
            1,
            4,
        )
        assert way.decode(latents[0]).shape == (2, 1, 2048)
        assert not way.encode(noise()).requires_grad
    assert way.fingerprint == ways[0].fingerprint


def test_latents_are_the_mean_over_the_scale_and_never_a_sample(folders):
    autoencoder = load_autoencoder(folders[1])
    with torch.no_grad():
        both = autoencoder.pretransform.model.encode(noise(), skip_bottleneck=True)
        samples = torch.stack([autoencoder.pretransform.encode(noise()) for _ in range(100)])
    got = autoencoder.encode(noise())
    assert torch.equal(got, both[:, :4] / 1.5)
    assert torch.equal(autoencoder.encode(noise()), got)
    error = samples.std(dim=0) / 10  # of the mean of 100 samples
    assert ((samples.mean(dim=0) - got).abs() < 8 * error + 1e-6).all()
    assert (samples.std(dim=0) > 0).all()


def test_the_fingerprint_changes_with_weights_scale_and_rate(folders):
    alone = folders[1]
    first = load_autoencoder(alone).fingerprint
    state, settings = (
        load_file(alone / "autoencoder.safetensors"),
        json.loads((alone / "pretransform.json").read_text()),
    )
    name = next(iter(state))
    save_file({**state, name: state[name] + 1}, alone / "autoencoder.safetensors")
    assert load_autoencoder(alone).fingerprint != first
    save_file(state, alone / "autoencoder.safetensors")
    assert load_autoencoder(alone).fingerprint == first
    (alone / "pretransform.json").write_text(json.dumps({**settings, "sample_rate": 8000}))
    assert load_autoencoder(alone).fingerprint != first
    settings["pretransform"]["scale"] = 2.0
    (alone / "pretransform.json").write_text(json.dumps(settings))
    assert load_autoencoder(alone).fingerprint != first


def test_weights_stored_in_half_precision_are_used_in_float32(folders):
    alone = folders[1]
    state = load_file(alone / "autoencoder.safetensors")
    save_file({k: v.half() for k, v in state.items()}, alone / "autoencoder.safetensors")
    latents = load_autoencoder(alone).encode(noise())
    assert latents.dtype == torch.float32
    save_file({k: v.half().float() for k, v in state.items()}, alone / "autoencoder.safetensors")
    assert torch.equal(load_autoencoder(alone).encode(noise()), latents)


def test_a_pretransform_in_half_precision_encodes_float32_audio(config):
    block = {**config()["model"]["pretransform"], "model_half": True}
    pretransform = create_pretransform(block, 16000, "config").eval()
    with torch.no_grad():
        latents = encode_mean(pretransform, noise())
    assert latents.dtype == torch.float32 and torch.isfinite(latents).all()


def test_a_pretransform_without_bottleneck_is_encoded_as_it_is():
    block = {"type": "patched", "config": {"channels": 1, "patch_size": 64}}
    pretransform = create_pretransform(block, 16000, "config")
    assert torch.equal(encode_mean(pretransform, noise()), pretransform.encode(noise()))


def test_an_encoding_at_random_whose_mean_is_not_known_is_refused(config):
    pretransform = create_pretransform(config()["model"]["pretransform"], 16000, "config")
    pretransform.model.bottleneck.__class__ = type(
        "NewBottleneck", (type(pretransform.model.bottleneck),), {}
    )
    with pytest.raises(UserError, match="NewBottleneck encodes at random"), torch.no_grad():
        encode_mean(pretransform, noise())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "lacks"),
        ({"sample_rate": 16000}, "lacks"),
        ({"sample_rate": "16000", "pretransform": {}}, "lacks"),
        ({"sample_rate": True, "pretransform": {}}, "lacks"),
        ({"sample_rate": 0, "pretransform": {}}, "lacks"),
        ({"sample_rate": 16000, "pretransform": {}}, "KeyError|not an autoencoder"),
        ({"sample_rate": 16000, "pretransform": {"type": "wish"}}, "not an autoencoder"),
        (
            {"sample_rate": 16000, "pretransform": {"type": "autoencoder", "config": {"encoder": 3}}},
            "not an autoencoder",
        ),
        ([], "list"),
    ],
)
def test_a_wrong_autoencoder_config_is_refused_by_file(folders, settings, says):
    import re

    (folders[1] / "pretransform.json").write_text(json.dumps(settings))
    message = refusal(folders[1])
    assert "pretransform.json" in message and re.search(says, message)


def test_missing_and_foreign_weights_are_refused_by_file(folders):
    alone = folders[1]
    state = load_file(alone / "autoencoder.safetensors")
    name = sorted(state)[0]
    save_file({k: v for k, v in state.items() if k != name}, alone / "autoencoder.safetensors")
    assert name in refusal(alone)
    save_file({**state, "surplus": torch.ones(1)}, alone / "autoencoder.safetensors")
    assert "surplus" in refusal(alone)
    (alone / "autoencoder.safetensors").unlink()
    assert "autoencoder.safetensors does not exist" in refusal(alone)


def test_a_model_without_autoencoder_is_refused_by_name(config, build, tmp_path):
    settings = config(autoencoder=False)
    save_model(build(settings), settings, tmp_path / "bare")
    assert "bare has no autoencoder" in refusal(tmp_path / "bare")
    whole = config()
    wrapper = build(whole)
    save_model(wrapper, whole, tmp_path / "lost")
    state = load_file(tmp_path / "lost" / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if not k.startswith("pretransform.")},
        tmp_path / "lost" / "model.safetensors",
    )
    assert "lost has no autoencoder" in refusal(tmp_path / "lost")


def test_a_missing_folder_is_refused_by_name(tmp_path):
    assert "nowhere" in refusal(tmp_path / "nowhere")
