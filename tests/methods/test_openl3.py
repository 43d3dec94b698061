"""OpenL3 embeds as torchopenl3 does, from a file in its format; what is not such a file is refused."""

import numpy as np
import pytest
import torch

from attr_engine import UserError
from attr_engine.methods.openl3 import openl3_embedder


def write_openl3(path, seed, kind="mel128", size=512):
    """A checkpoint as it is published: the state dict of the package's network, filters included."""
    network = pytest.importorskip("torchopenl3.models").PytorchOpenl3("music", kind, size)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            if name.startswith("speclayer") or not value.is_floating_point():
                continue
            if name.endswith("var") or (name.endswith("weight") and value.ndim == 1):
                value.uniform_(0.5, 1.5)
            else:
                value.normal_(0, (2 / value[0].numel()) ** 0.5 if value.ndim > 1 else 0.1)
    torch.save(network.state_dict(), path)
    return network.eval()


@pytest.mark.parametrize(("kind", "size"), [("mel128", 512), ("linear", 6144)])
def test_it_is_the_network_of_the_package(seed, rng, tmp_path, kind, size):
    path = tmp_path / "x.pth.tar"
    network = write_openl3(path, seed, kind, size)
    found = openl3_embedder(path, size)
    assert (found.rate, found.window, kind in found.name) == (48000, 1.0, True)
    x = rng.normal(size=(1, 96000)).astype(np.float32)
    x[:, 48000:] = np.cumsum(x[:, 48000:], axis=1) / 100
    theirs, _ = pytest.importorskip("torchopenl3").get_audio_embedding(
        x[0].astype(np.float64), 48000, model=network, center=False, hop_size=1.0
    )
    expected = theirs[0].cpu().numpy()  # two frames
    assert np.abs(expected[0] - expected[1]).max() > 1e-2 * np.abs(expected).max()
    scale = np.abs(expected).max()
    seconds = found.embed(x.reshape(2, 48000))
    np.testing.assert_allclose(seconds, expected, rtol=1e-3, atol=1e-4 * scale)
    np.testing.assert_allclose(found.embed(x)[0], expected.mean(axis=0), rtol=1e-3, atol=1e-4 * scale)
    short = np.concatenate([x[:, :30000], np.zeros((1, 18000), np.float32)], axis=1)
    np.testing.assert_allclose(found.embed(x[:, :30000]), found.embed(short), rtol=1e-5, atol=1e-5 * scale)


def test_what_is_no_openl3_is_refused(seed, tmp_path):
    path = tmp_path / "x.pth.tar"
    torch.save({"encoder.weight": torch.ones(2)}, path)
    with pytest.raises(UserError, match="it lacks speclayer.dft_real_kernels; expected torchopenl3_mel256"):
        openl3_embedder(path)
    with pytest.raises(UserError, match="512 or 6144 numbers, not 5"):
        openl3_embedder(path, 5)
    network = write_openl3(path, seed)
    state = network.state_dict()
    for change, words in (
        ({"conv2d_3.weight": torch.ones(2, 2)}, "conv2d_3.weight is"),
        ({"speclayer.mel_basis": torch.ones(7, 7)}, "speclayer.mel_basis is"),
        ({"conv2d_1.bias": torch.full((64,), float("nan"))}, "NaN or infinity in conv2d_1.bias"),
    ):
        torch.save({**state, **change}, path)
        with pytest.raises(UserError, match=words):
            openl3_embedder(path)
    fingerprints = set()
    for size in (512, 6144):
        torch.save(state, path)
        fingerprints.add(openl3_embedder(path, size).fingerprint)
    assert len(fingerprints) == 2
