"""PaSST gives the labels that hear21passt gives, from a file in its format, and a removal reports how far they moved."""

import hearing
import helpers
import numpy as np
import pytest
import torch

from attr_engine import UserError, passt
from attr_engine.fidelity import posterior_kl
from attr_engine.forget import forget
from attr_engine.forget_judges import LabelShift
from attr_engine.forget_settings import Removal

HOW = Removal(
    draws=4, update_draws=4, fisher_draws=4, pieces=3, sampler_steps=1, checkpoints=False, rows=4, strengths=(0.05, 0.2),
    classifier="passt.pt",
)  # fmt: skip


def write_passt(path, seed, prefix="", labels=7, **options):
    """A small network under the published names, with the published numbers of patches."""
    network = pytest.importorskip("hear21passt.models.passt").PaSST(
        img_size=(128, 998), stride=(10, 10), num_classes=labels, embed_dim=24, depth=2, num_heads=12, distilled=True, **options
    )  # fmt: skip
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(0, 0.3)
    torch.save({prefix + k: v for k, v in network.state_dict().items()}, path)
    return network.eval()


@pytest.mark.parametrize("prefix", ["", "net."])
def test_posteriors_are_those_of_the_package(seed, rng, tmp_path, capsys, prefix):
    network = write_passt(tmp_path / "x.pt", seed, prefix)
    from hear21passt.models.preprocess import AugmentMelSTFT
    from hear21passt.wrapper import PasstBasicWrapper

    mel = AugmentMelSTFT(
        n_mels=128, sr=32000, win_length=800, hopsize=320, n_fft=1024, freqm=48, timem=192, htk=False, fmin=0.0, fmax=None, norm=1,
        fmin_aug_range=10, fmax_aug_range=2000,
    )  # fmt: skip
    theirs = PasstBasicWrapper(mel, network, mode="logits").eval()
    x = rng.normal(size=(2, 320000)).astype(np.float32)
    x[1] = np.cumsum(x[1]) / 300
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x)).double().softmax(-1).numpy()
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    capsys.readouterr()
    found = passt.Passt(tmp_path / "x.pt", licence="as read").posteriors(x)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
    assert capsys.readouterr().out == ""


def test_pieces_have_the_mean_of_their_windows(seed, rng, tmp_path):
    write_passt(tmp_path / "x.pt", seed)
    made, model = passt.Passt(tmp_path / "x.pt", licence="as read"), hearing.Singer(seed)
    latent = rng.normal(size=(3, 300)).astype(np.float32)  # fifteen seconds
    audio = passt.decoder(model, 32000)(latent)
    assert len(audio) == 480000
    expected = made.posteriors(np.stack([audio[:320000], audio[-320000:]])).mean(axis=0)
    short = made.posteriors(np.resize(passt.decoder(model, 32000)(latent[:, :50]), 320000)[None])[0]
    found = made.of_latents(model, [latent, latent[:, :50]])
    np.testing.assert_allclose(found, [expected, short], rtol=1e-4, atol=1e-7)
    kl = posterior_kl(lambda x: made.of_latents(model, x), [latent], [latent[:, :50]])
    assert kl == pytest.approx((expected * np.log(expected / short)).sum(), rel=1e-3)
    with pytest.raises(UserError, match="a piece is not finite"):
        made.of_latents(model, [np.full((3, 10), np.nan, np.float32)])


def test_what_is_no_passt_is_refused(seed, tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(UserError, match="does not exist: get passt-s-f128-p16-s10-ap.476-swa.pt of github"):
        passt.Passt(path, licence="as read")
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(UserError, match="it lacks cls_token"):
        passt.Passt(path, licence="as read")
    state = write_passt(path, seed).state_dict()
    for change, words in (
        ({"time_new_pos_embed": torch.ones(1, 24, 1, 199)}, "no PaSST for ten seconds"),
        ({"cls_token": torch.ones(24)}, "no PaSST for ten seconds"),
        ({"cls_token": torch.ones(1, 1, 24000)}, "no PaSST for ten seconds"),
        ({"blocks.1.mlp.fc1.weight": torch.ones(2, 2)}, "blocks.1.mlp.fc1.weight is"),
        ({"norm.bias": torch.full((24,), float("nan"))}, "NaN or infinity in norm.bias"),
    ):
        torch.save({**state, **change}, path)
        with pytest.raises(UserError, match=words):
            passt.Passt(path, licence="as read")


def test_weights_whose_licence_nobody_named_are_not_taken(seed, rng, tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    words = "licence of the weights of passt is not known here.*licence=NAME .of forget: --licence NAME."
    with pytest.raises(UserError, match=words):
        passt.Passt(tmp_path / "x.pt")
    with pytest.raises(UserError, match=words):
        LabelShift.of(str(tmp_path / "x.pt"), "", hearing.Singer(seed), tmp_path)
    with pytest.raises(UserError, match="it lacks cls_token"):
        LabelShift.of(str(tmp_path / "x.pt"), "as read", hearing.Singer(seed), tmp_path)


def test_a_removal_reports_how_far_labels_moved(seed, rng, tmp_path, monkeypatch):
    """Pairs of the same prompt and noise, the untouched model's first, also where rows are kept; nothing moves at no update."""
    monkeypatch.setattr("attr_engine.forget_judges.Passt", lambda path, device, licence: hearing.Labels())
    model, tracks = hearing.Singer(seed), helpers.make_tracks(rng, 6, 3, 10)
    seen = []
    of_latents = hearing.Labels.of_latents
    monkeypatch.setattr(
        hearing.Labels, "of_latents", lambda self, *a: seen.append(of_latents(self, *a)) or seen[-1]
    )
    rows = forget(model, tracks, [2, 3], tmp_path / "a", HOW)
    assert len(seen) == 6  # forget and remain, thrice
    assert "kl_forget" not in rows[0]
    for k, row in enumerate(rows[1:], start=1):
        for j, name in enumerate(("forget", "remain")):
            p, q = seen[j], seen[2 * k + j]
            expected = (p * np.log(p / q)).sum(axis=1).mean()
            assert expected > 0 and row[f"kl_{name}"][0] == pytest.approx(expected, rel=1e-9)
            assert row[f"kl_{name}"][1] <= row[f"kl_{name}"][0] <= row[f"kl_{name}"][2]
    assert "| KL of labels, their prompts |" in (tmp_path / "a" / "forget.md").read_text()
    assert "kl_forget,kl_forget_low" in (tmp_path / "a" / "forget.csv").read_text()
    (tmp_path / "a" / "rows" / "0.2.json").unlink()
    assert forget(model, tracks, [2, 3], tmp_path / "a", HOW)[2]["kl_remain"] == rows[2]["kl_remain"]
    assert len(seen) == 8
    with monkeypatch.context() as patch:
        patch.setattr(hearing.Labels, "fingerprint", "others")
        with pytest.raises(UserError, match="belongs to another removal"):
            forget(model, tracks, [2, 3], tmp_path / "a", HOW)
    (tmp_path / "a" / "labels-forget.safetensors").unlink()
    (tmp_path / "a" / "rows" / "0.2.json").unlink()
    with pytest.raises(UserError, match="labels-forget.safetensors does not exist"):
        forget(model, tracks, [2, 3], tmp_path / "a", HOW)
