"""CLAP embeds as laion_clap and transformers do, from files in their formats, and fetches nothing."""

import importlib.util
import json
import os

import numpy as np
import pytest
import torch
from claps import clap_folder

from attr_engine import UserError
from attr_engine.methods import parse
from attr_engine.methods.clap import LaionAudio, TransformersClap, laion_embedder, text_audio_scores


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whatever opens a connection fails at once."""

    def refuse(*args, **kwargs):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture(scope="module")
def laion(tmp_path_factory):
    """A checkpoint with random weights as the training of laion_clap writes it, and the tensors in it."""
    if importlib.util.find_spec("laion_clap") is None:
        pytest.skip("laion-clap is not installed")
    torch.manual_seed(int(os.environ["ATTR_TEST_SEED"]))
    module = LaionAudio("tiny").eval()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.05 * torch.randn_like(p)
    state = {f"module.{k}": v for k, v in module.state_dict().items()}
    state |= {
        "module.logit_scale_a": torch.ones(()),
        "module.text_branch.embeddings.position_ids": torch.arange(4),
    }
    path = tmp_path_factory.mktemp("clap") / "music.pt"
    torch.save({"epoch": np.int64(15), "name": "x", "state_dict": state, "best": np.float64(0.9)}, path)
    return path, module, state


def by_hand(module, audio):
    """Steps of laion_clap's hook: 16 bits, repetition and silence, the network, the projection, unit length."""
    out = []
    for x in audio:
        x = (np.clip(x, -1.0, 1.0) * 32767.0).astype(np.int16)
        x = (x / 32767.0).astype(np.float32)
        whole = np.concatenate([x] * (480000 // len(x)))
        whole = np.concatenate([whole, np.zeros(480000 - len(whole), np.float32)])
        with torch.inference_mode():
            h = module.audio_branch({"waveform": torch.from_numpy(whole)[None]}, device="cpu")["embedding"][
                0
            ].double()
        w = {k: v.double() for k, v in module.audio_projection.state_dict().items()}
        h = torch.relu(w["0.weight"] @ h + w["0.bias"])
        h = (w["2.weight"] @ h + w["2.bias"]).numpy()
        out.append(h / np.sqrt((h**2).sum()))
    return np.array(out)


def test_laion_checkpoints_give_what_laion_clap_gives(laion, rng):
    path, module, _ = laion
    found = laion_embedder(path)
    assert (found.rate, found.window, found.hop) == (48000, 10.0, 1.0) and "tiny" in found.name
    vectors = []
    for samples, scale in ((480000, 0.02), (130000, 1.5)):
        x = rng.normal(size=(1, samples)).astype(np.float32) * np.float32(scale)
        vectors.append(by_hand(module, x))
        np.testing.assert_allclose(found.embed(x), vectors[-1], atol=2e-5)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3
    with pytest.raises(UserError, match="at most 10 s, not 11 s: use window=10"):
        found.embed(np.zeros((1, 528000), np.float32))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"module.audio_branch.patch_embed.fusion_model.local_att.0.weight": torch.ones(2)}, "with fusion"),
        ({"module.audio_branch.patch_embed.proj.weight": torch.ones(90, 1, 4, 4)}, "no audio network of CLAP"),
        ({"module.audio_projection.0.weight": torch.ones(512, 3)}, r"audio_projection.0.weight is \[512, 3\]"),
    ],
)  # fmt: skip
def test_another_checkpoint_is_refused(laion, tmp_path, change, words):
    torch.save({"state_dict": {**laion[2], **change}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=words) as said:
        laion_embedder(tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in str(said.value)


def test_a_folder_of_transformers_gives_what_transformers_gives(seed, rng, tmp_path):
    module, extractor = clap_folder(tmp_path, seed)
    found = parse(f"clap:checkpoint={tmp_path}")[1].embedder()
    assert (found.rate, found.window, found.hop) == (48000, 10.0, 1.0)
    x = rng.normal(size=(3, 60000)).astype(np.float32) * np.float32([[0.02], [0.3], [1.5]])
    features = extractor(list(x), sampling_rate=48000, return_tensors="pt")
    with torch.inference_mode():
        expected = module.get_audio_features(**features).pooler_output.numpy()
    assert np.abs(expected[0] - expected[1]).max() > 1e-4
    np.testing.assert_allclose(found.embed(x), expected, atol=1e-5)
    clap_folder(tmp_path / "other", seed + 1)
    assert TransformersClap(tmp_path / "other").fingerprint != found.fingerprint


def test_texts_are_scored_by_the_cosine_with_the_windows(seed, rng, tmp_path):
    module, extractor = clap_folder(tmp_path, seed, tokenizer=True)
    texts = ["slow piano", "loud drums loud drums"]
    audio = [rng.normal(size=n).astype(np.float32) for n in (30000, 500000)]
    with torch.inference_mode():
        wanted = np.concatenate(
            [
                module.get_text_features(torch.tensor([ids])).pooler_output.double().numpy()
                for ids in ([4, 5], [7, 6, 7, 6])
            ]
        )
        pieces = [[audio[0]], [audio[1][:480000], audio[1][20000:]]]
        vectors = [
            [extractor(x, sampling_rate=48000, return_tensors="pt")["input_features"] for x in piece]
            for piece in pieces
        ]
        vectors = [
            np.concatenate([module.get_audio_features(f).pooler_output.double().numpy() for f in piece])
            for piece in vectors
        ]
    expected = np.stack([(v @ wanted.T).mean(0) for v in vectors])
    found = text_audio_scores(tmp_path, audio, texts)
    assert found.shape == (2, 2) and found.dtype == np.float64 and np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(UserError, match="at least one text"):
        text_audio_scores(tmp_path, audio, [])


def test_a_folder_that_cannot_serve_is_refused(seed, tmp_path):
    clap_folder(tmp_path, seed)
    with pytest.raises(UserError, match="holds no tokenizer"):
        text_audio_scores(tmp_path, [np.zeros(100, np.float32)], ["x"])
    clap_folder(tmp_path / "fused", seed, fusion=True)
    with pytest.raises(UserError, match="with fusion"):
        TransformersClap(tmp_path / "fused")
    config = json.loads((tmp_path / "config.json").read_text())
    for change, words in (
        ({"audio_config": {**config["audio_config"], "depths": [1, 2, 1, 1]}}, "it lacks audio_model"),
        ({"text_config": {**config["text_config"], "vocab_size": 2**40}}, "does not fit"),
        ({"model_type": "bert"}, "not a folder of CLAP"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=words):
            TransformersClap(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / "model.safetensors").read_bytes()
    for content, words in ((whole[: len(whole) // 2], "cannot be read"), (b"<html>", "web page")):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match=words):
            TransformersClap(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="neither model.safetensors nor pytorch_model.bin"):
        TransformersClap(tmp_path)
