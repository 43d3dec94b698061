"""``attr-engine forget`` on a tiny stable-audio-tools model."""

import json
from pathlib import Path

import helpers
import pytest
import torch

pytest.importorskip("stable_audio_tools")

from attr_engine import DrawPlan, fit_fisher, unlearn_query  # noqa: E402
from attr_engine.cli import main  # noqa: E402
from attr_engine.latents import LatentDataset  # noqa: E402
from attr_engine.models.stable_audio import load_model  # noqa: E402
from attr_engine.retrain import query_losses  # noqa: E402

QUICK = ["--fisher-draws", 4, "--update-draws", 4, "--draws", 4, "--pieces", 2, "--sampler-steps", 2]


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    return helpers.write_world(root, 6, lambda name: {"artist": "A B" if name in ("t1", "t4") else "C"})


def test_an_unlearned_model_is_a_model(world, tmp_path, capsys):
    base = ["--model", world / "model", "--data", world / "latents", *QUICK]
    out = tmp_path / "out"
    assert run("forget", *base, "--where", "artist=A B", "--strengths", 0.1, 0.2, "--out", out) == 0
    said = capsys.readouterr()
    assert "| untouched | 0 |" in said.out and "`t1`, `t4`." in said.out
    assert f"models: {out}/model-0.1, {out}/model-0.2" in said.out
    model, tracks = load_model(world / "model"), LatentDataset(world / "latents")
    plan = DrawPlan(0, "track", 4)
    fisher = fit_fisher(model, tracks, ("transformer",), plan, 4)
    update = unlearn_query(model, tracks, [1, 4], fisher, plan, 6, 0.1, draws=4)
    found = load_model(out / "model-0.1")
    theirs = dict(found.module.named_parameters())
    for name, p in model.module.named_parameters():
        expected = p + update.delta[name] if name in update.delta else p
        torch.testing.assert_close(theirs[name], expected, rtol=1e-4, atol=1e-6)
    assert found.fingerprint != model.fingerprint
    row = json.loads((out / "forget.json").read_text())["rows"][1]
    losses = query_losses(found, tracks, 4).mean(axis=1)
    assert row["forget"][0] == pytest.approx(losses[[1, 4]].mean(), rel=1e-5)
    assert row["remain"][0] == pytest.approx(losses[[0, 2, 3, 5]].mean(), rel=1e-5)
    assert row["frechet"] > 0 and -1 <= row["similarity_forget"][0] <= 1
    kept = (out / "forget.md").read_bytes()
    assert run("forget", *base, "--where", "artist=A B", "--strengths", 0.1, 0.2, "--out", out) == 0
    assert (out / "forget.md").read_bytes() == kept


def test_bad_input_is_one_sentence(world, tmp_path, capsys):
    base = ["forget", "--model", world / "model", "--data", world / "latents", *QUICK, "--out", tmp_path / "out"]  # fmt: skip
    ids = tmp_path / "ids.txt"
    for text, message in (
        ("t1\nt44\n", "no training track 't44'"),
        ("\n\n", "nothing to forget"),
        ("\n".join(f"t{i}" for i in range(6)), "all 6 training tracks"),
    ):
        ids.write_text(text)
        assert run(*base, "--forget", ids) == 2
        line = capsys.readouterr().err.splitlines()
        assert len(line) == 1 and message in line[0]
    for flags, message in (
        (["--where", "artist"], "write COLUMN=VALUE"),
        (["--where", "artist=X"], "artist = 'X'"),
        (["--forget", tmp_path / "none.txt"], "none.txt cannot be read"),
    ):
        assert run(*base, *flags) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(*base)
