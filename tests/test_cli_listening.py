"""The listening test by the command line: made from a finished run, its answers judged."""

import json
from pathlib import Path

import pytest

from attr_engine.listening import Key
from attr_engine.listening_answers import binomial
from attr_engine.listening_settings import KEY, PAIR
from attr_engine.result import Attribution

soundfile = pytest.importorskip("soundfile")

from test_listening import tone  # noqa: E402
from test_listening_answers import said, write_answers  # noqa: E402


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A finished run over real files, by the command line."""
    pytest.importorskip("stable_audio_tools")
    root = tmp_path_factory.mktemp("run")
    for i in range(5):
        tone(root / "music" / f"t{i}.wav", 200 + 90 * i, 1.2 + 0.1 * i, 0.3)
    for i in range(3):
        tone(root / "pieces" / f"q{i}.wav", 900 + 90 * i, 1.3, 0.3)
    assert command("train", "autoencoder", root / "music", "--hop", 512, "--out", root / "ae") == 0
    assert (
        command(
            "ingest", root / "music", "--autoencoder", root / "ae", "--seconds", 2, "--out", root / "latents"
        )
        == 0
    )
    assert command("train", "diffusion", root / "latents", "--autoencoder", root / "ae", "--width", 32, "--depth", 1, "--patch", 16,
                   "--steps", 2, "--batch", 2, "--out", root / "model") == 0  # fmt: skip
    assert command("score", "--model", root / "model", "--data", root / "latents", "--queries", root / "pieces", "--self-influence",
                   "t2.wav", "--functions", "ridge", "--score-draws", 4, "--update-draws", 4, "--projection-rank", 4,
                   "--out", root / "run") == 0  # fmt: skip
    return root


def command(*words: object) -> int:
    from attr_engine.cli import main

    return main([str(w) for w in words])


def complaint(capsys, *words: object) -> str:
    capsys.readouterr()
    assert command(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_test_is_made_from_a_run_and_its_answers_are_judged(run_folder, tmp_path, capsys):
    run, test = run_folder / "run", tmp_path / "test"
    before = {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    assert (
        command(
            "report",
            "--out",
            run,
            "--listening-test",
            test,
            "--against",
            "random",
            "cosine",
            "--catch",
            1,
            "--repeats",
            1,
        )
        == 0
    )
    assert "trials against random" in capsys.readouterr().out
    assert not (run / "report.html").exists()
    assert {p: p.read_bytes() for p in run.iterdir() if p.is_file() and p in before} == before
    key = Key.read(test / KEY)
    result = Attribution.from_parquet(run / "scores.parquet")
    for t in (t for t in key.trials if t.kind == PAIR):
        named = [row.track for row in result.top(2, t.query) if row.track != t.query]
        assert (t.a if t.target == "A" else t.b) == named[0]
    rows = [said("Ann", t.number, t.target, test=key.test) for t in key.trials]
    answers = write_answers(tmp_path / "ann.csv", rows)
    assert command("listening", answers, "--key", test / KEY, "--out", tmp_path / "out") == 0
    assert "The retrieved track against a control" in capsys.readouterr().out
    first = json.loads((tmp_path / "out" / "listening.json").read_text())[0]
    total = dict(zip(first["columns"], first["rows"][-1], strict=True))
    asked = sum(t.kind == PAIR and not t.repeat_of for t in key.trials)
    assert (total["retrieved"], total["control"], total["share"], total["p"]) == (
        asked,
        0,
        1.0,
        binomial(asked, asked),
    )
    assert (tmp_path / "out" / "listening.md").exists() and (tmp_path / "out" / "listening.csv").exists()
    assert "holds a listening test" in complaint(capsys, "report", "--out", run, "--listening-test", test)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--trials", 3], "--trials is about a listening test"),
        (["--listening-test", "new", "--trials", 0], "at least 1 trial"),
        (["--listening-test", "new", "--against", "random", "random"], "stands twice"),
        (["--listening-test", "new", "--against", "random=scores.parquet"], "may not be called random"),
        (["--listening-test", "new", "--against", "none.parquet"], "none.parquet"),
        (["--listening-test", "new", "--groups", "artist"], "ranks groups"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(run_folder, tmp_path, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scores.parquet").write_bytes((run_folder / "run" / "scores.parquet").read_bytes())
    assert sentence in complaint(capsys, "report", "--out", run_folder / "run", *words)
    assert not (tmp_path / "new").exists()


def test_without_scores_there_is_no_test(run_folder, tmp_path, capsys):
    words = ("--model", run_folder / "model", "--data", run_folder / "latents", "--self-influence", "t1.wav")
    assert "finish the run first" in complaint(
        capsys, "report", "--out", tmp_path / "none", *words, "--listening-test", tmp_path / "t"
    )
    assert not (tmp_path / "none").exists()
