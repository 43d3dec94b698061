"""``attr-engine grid`` and ``attr-engine figures`` on a tiny stable-audio-tools model."""

import json
from pathlib import Path

import helpers
import pytest

pytest.importorskip("stable_audio_tools")

from attr_engine.cli import main  # noqa: E402
from attr_engine.cli_grid import _from_anywhere  # noqa: E402

QUICK = ["--fisher-draws", 4, "--update-draws", 4, "--score-draws", 4, "--rows", 4, "--threads", 1, "--targets", 2,
         "--pieces", 3, "--piece-targets", 1, "--sampler-steps", 2]  # fmt: skip


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("world")
    return helpers.write_world(root, 8, lambda name: {"seconds": 4.0 + 2 * int(name[1:])})


def complaint(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("attr-engine: "), lines
    return lines[0]


def test_a_grid_and_the_figures_of_its_run(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", world / "model", "--data", world / "latents", *QUICK, "--layers", "self_attn+cross_attn", "cross_attn.to_kv",
             "--mask-score", "on", "off", "--strengths", "1e-2", "1e-1", "--functions", "loss_change"]  # fmt: skip
    assert run("grid", *flags, "--out", "grid") == 0
    out = capsys.readouterr()
    assert "4 runs, 8 cells, 2 targets" in out.err and "run 4 of 4" in out.err
    assert "| self\\_attn+cross\\_attn |" in out.out and "table: grid/table1.md" in out.out
    about = json.loads(Path("grid/table1.json").read_text())
    assert len(about["cells"]) == 8 and all(x["frechet"] > 0 for x in about["cells"])
    kept = Path("grid/table1.md").read_bytes()
    assert run("grid", *flags, "--out", "grid") == 0
    assert Path("grid/table1.md").read_bytes() == kept
    assert run("grid", "--config", "grid/grid.json", "--out", "again") == 0
    assert Path("again/table1.md").read_bytes() == kept
    pytest.importorskip("matplotlib")
    best = about["cells"][0]["run"]
    capsys.readouterr()
    assert run("figures", f"grid/runs/{best}", "--out", "figures") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "figures/figures.json"
    assert json.loads(Path("figures/figures.json").read_text())["methods"] == [
        "loss_change, 0.01", "loss_change, 0.1", "random", "duration", "training loss", "raw-latent cosine",
    ]  # fmt: skip


def test_a_grid_with_a_run_that_fails_ends_with_code_2(world, tmp_path, capsys, monkeypatch):
    import attr_engine.pipeline
    from attr_engine import UserError

    def fail(job):
        raise UserError("the gradient is zero")

    monkeypatch.setattr(attr_engine.pipeline, "run_job", fail)
    assert (
        run(
            "grid",
            "--model",
            world / "model",
            "--data",
            world / "latents",
            *QUICK,
            "--pieces",
            0,
            "--out",
            tmp_path / "g",
        )
        == 2
    )
    out = capsys.readouterr()
    assert "1 of 1 runs could not be computed, the first one because the gradient is zero" in out.err
    assert "not computed: the gradient is zero" in out.out


def test_bad_calls_get_one_sentence(world, tmp_path, capsys):
    grid = ["grid", "--model", world / "model", "--data", world / "latents", "--out", tmp_path / "grid"]
    assert "no model was named" in complaint(capsys, "grid", "--out", tmp_path / "grid")
    assert "'x' matches no parameter" in complaint(capsys, *grid, "--targets", 2, "--layers", "x")
    assert "'x' is not a training track" in complaint(capsys, *grid, "--self-influence", "x")
    assert "40 targets of 8" in complaint(capsys, *grid)
    assert "unknown embedding" in complaint(capsys, *grid, "--embedding", "clip")
    assert "does not exist" in complaint(capsys, *grid, "--config", tmp_path / "none.json")
    assert "run attr-engine score first" in complaint(
        capsys, "figures", tmp_path / "none", "--out", tmp_path / "f"
    )
    assert not (tmp_path / "grid").exists() and not (tmp_path / "f").exists()


def test_files_of_an_embedding_are_named_with_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given, expected in (
        ("latent-statistics", "latent-statistics"),
        ("x.npy", f"{tmp_path}/x.npy"),
        ("openl3:size=512,checkpoint=a/b.pt", f"openl3:size=512,checkpoint={tmp_path}/a/b.pt"),
        ("embedding:onnx=m.onnx,rate=8000", f"embedding:onnx={tmp_path}/m.onnx,rate=8000"),
    ):
        assert _from_anywhere(given) == expected
