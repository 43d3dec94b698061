"""The command line: from audio to a report, replays, and one sentence for every mistake."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("stable_audio_tools")

from attr_engine.cli import main  # noqa: E402
from attr_engine.latents import LatentDataset, LatentWriter  # noqa: E402
from attr_engine.result import Attribution  # noqa: E402

torch.set_num_threads(1)

RATE = 16000
COMMANDS = (
    "ingest",
    "shards",
    "train",
    "generate",
    "index",
    "search",
    "fisher",
    "unlearn",
    "score",
    "attribute",
    "report",
    "rollup",
    "retrain",
    "evaluate",
    "grid",
    "figures",
    "robustness",
    "compare",
    "listening",
    "curves",
    "forget",
    "musicgen-forget",
    "demo",
    "doctor",
)
QUICK = [
    "--functions",
    "loss_change",
    "skew",
    "displacement",
    "--fisher-draws",
    "4",
    "--update-draws",
    "4",
    "--score-draws",
    "4",
    "--threads",
    "1",
]


def tune(path: Path, seed: int, seconds: float) -> None:
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    waves = [np.sin(2 * np.pi * f * time) * 0.2 for f in rng.uniform(100, 2000, 3)]
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.sum(waves, axis=0), RATE)


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with music, an autoencoder, a data set, a model and a run, all made by the command line."""
    root = tmp_path_factory.mktemp("world")
    for i in range(6):
        tune(root / "music" / f"t{i}.wav", i, 0.5 + 0.25 * i)
    (root / "music" / "metadata.csv").write_text(
        "path,title,artist,tempo\n" + "".join(f"t{i}.wav,Tune {i},<b>Ann</b>,{90 + i}\n" for i in range(6))
    )
    for i in range(2):
        tune(root / "queries" / f"q{i}.wav", 10 + i, 0.8)
    (root / "queries" / "metadata.csv").write_text("path,tempo\nq0.wav,91\nq1.wav,95\n")
    table = root / "music" / "metadata.csv"
    assert run("train", "autoencoder", root / "music", "--hop", 256, "--out", root / "ae") == 0
    assert run("ingest", root / "music", "--autoencoder", root / "ae", "--seconds", 2, "--metadata", table,
               "--condition", "tempo", "--out", root / "latents") == 0  # fmt: skip
    assert run("train", "diffusion", root / "latents", "--autoencoder", root / "ae", "--condition", "seconds_total",
               "tempo", "--width", 32, "--depth", 1, "--patch", 16, "--steps", 3, "--batch", 4,
               "--out", root / "model") == 0  # fmt: skip
    assert run("attribute", "--model", root / "model", "--data", root / "latents", "--queries", root / "queries",
               "--self-influence", "t3.wav", *QUICK, "--out", root / "run") == 0  # fmt: skip
    return root


def complaint(capsys, *arguments: object) -> str:
    """The one line with which a call is refused."""
    capsys.readouterr()
    code = run(*arguments)
    out = capsys.readouterr()
    lines = out.err.splitlines()
    assert code == 2, (code, out)
    assert len(lines) == 1 and lines[0].startswith("attr-engine: "), out.err
    assert "Traceback" not in out.err + out.out
    return lines[0]


def attribute(world: Path, out: Path, **changes: object) -> list[object]:
    """Arguments of a call that works, with changes; None leaves a flag out."""
    flags = {
        "model": world / "model",
        "data": world / "latents",
        "self_influence": "t1.wav",
        "out": out,
        **changes,
    }
    words: list[object] = ["attribute", *QUICK]
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [value])]
    return words


def write_set(
    folder: Path, latents: dict[str, np.ndarray], conditioning: dict | None = None, **options
) -> Path:
    writer = LatentWriter(folder, **options)
    for name, latent in latents.items():
        writer.add(
            name, latent, {"seconds_total": 1.0, "tempo": 90} if conditioning is None else conditioning, {}
        )
    writer.close()
    return folder


def scores(folder: Path) -> Attribution:
    return Attribution.from_parquet(folder / "scores.parquet")


# -- from audio to a report -----------------------------------------------------------------------


def test_audio_becomes_a_report_with_every_query_and_track(world):
    data = LatentDataset(world / "latents")
    assert data.ids == [f"t{i}.wav" for i in range(6)] and data.channels == 64
    assert [c["tempo"] for c in data.conditioning] == [90 + i for i in range(6)]
    result = scores(world / "run")
    assert {query for query, _ in result.updates} == {"q0.wav", "q1.wav", "t3.wav"}
    assert list(result.tracks) == data.ids
    assert all(np.isfinite(v).all() for v in result.values.values())
    page = (world / "run" / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in ("q0.wav", "q1.wav", "t3.wav", "&lt;b&gt;Ann&lt;/b&gt;"))
    assert "<b>Ann</b>" not in page
    for name in (
        "config.json",
        "environment.json",
        "scores.parquet",
        "scores.csv",
        "report.html",
        "timings.json",
    ):
        assert (world / "run" / name).is_file()
    assert not (world / "run" / "updates").exists()
    assert not list((world / "run").rglob("*.part"))


def test_a_config_replays_a_run_to_the_same_bits(world, tmp_path):
    assert run("attribute", "--config", world / "run" / "config.json", "--out", tmp_path / "other") == 0
    first, second = scores(world / "run"), scores(tmp_path / "other")
    assert first.updates == second.updates and list(first.tracks) == list(second.tracks)
    for function, values in first.values.items():
        assert values.tobytes() == second.values[function].tobytes()
        assert first.errors[function].tobytes() == second.errors[function].tobytes()
    names = ("scores.csv", "scores.parquet", "config.json", "fisher.safetensors")
    assert all((world / "run" / n).read_bytes() == (tmp_path / "other" / n).read_bytes() for n in names)


def test_stages_one_by_one_give_the_same_bits_as_all_at_once(world, tmp_path, capsys):
    out = ["--out", tmp_path / "steps"]
    assert run("fisher", "--config", world / "run" / "config.json", *out) == 0
    assert "Fisher of" in capsys.readouterr().out
    assert run("unlearn", *out) == 0
    assert run("score", *out) == 0
    assert not (tmp_path / "steps" / "report.html").exists()
    assert run("report", *out) == 0
    assert (tmp_path / "steps" / "report.html").exists()
    assert (tmp_path / "steps" / "scores.csv").read_bytes() == (world / "run" / "scores.csv").read_bytes()


def test_a_report_is_written_again_after_the_updates_are_gone(world, tmp_path):
    shutil.copytree(world / "run", tmp_path / "run")
    before = (tmp_path / "run" / "scores.csv").read_bytes()
    assert not (tmp_path / "run" / "updates").exists()
    shown = []
    for top in (3, 5):
        assert run("report", "--out", tmp_path / "run", "--show", top, "--title", f"The {top} best") == 0
        page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
        assert f"The {top} best" in page
        shown.append(page.count("Tune "))
    assert shown[0] < shown[1]
    assert (tmp_path / "run" / "scores.csv").read_bytes() == before
    assert not (tmp_path / "run" / "updates").exists()


def test_a_run_that_is_done_is_not_computed_again(world, tmp_path):
    shutil.copytree(world / "run", tmp_path / "run")
    stamps = {
        n: (tmp_path / "run" / n).stat().st_mtime_ns for n in ("fisher.safetensors", "effects.safetensors")
    }
    assert run("attribute", "--out", tmp_path / "run") == 0
    assert all((tmp_path / "run" / n).stat().st_mtime_ns == s for n, s in stamps.items())


def test_a_dry_run_says_what_it_takes_and_leaves_nothing(world, tmp_path, capsys):
    call = ["--config", world / "run" / "config.json", "--out", tmp_path / "dry"]  # with audio to be encoded
    capsys.readouterr()
    assert run("attribute", *call, "--dry-run") == 0
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["fisher", "unlearn", "score", "total"]
    assert run("unlearn", *call, "--dry-run", "json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["name"] for s in found["stages"]] == ["fisher", "unlearn"] and found["disk_bytes"] > 0
    assert list(tmp_path.iterdir()) == []
    assert run("attribute", "--out", world / "run", "--dry-run") == 0
    assert capsys.readouterr().out.count("done") == 3
    assert "no model was named" in complaint(capsys, "fisher", "--out", tmp_path / "dry", "--dry-run")


def test_log_messages_are_written_where_that_is_asked_for(world, tmp_path):
    call = [
        sys.executable,
        "-m",
        "attr_engine.cli",
        "--log-level",
        "info",
        "attribute",
        "--out",
        str(tmp_path / "run"),
    ]
    shutil.copytree(world / "run", tmp_path / "run")
    (tmp_path / "run" / "effects.safetensors").unlink()
    environment = {**os.environ, "PYTHONPATH": str(Path(main.__code__.co_filename).parents[1])}
    done = subprocess.run(call, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "INFO attr_engine.monitor: score: finished after" in done.stderr
    with pytest.raises(SystemExit) as left:
        run("--log-level", "loud", "doctor")
    assert left.value.code == 2


def test_an_index_is_built_and_searched(world, tmp_path, capsys):
    assert (
        run(
            "index",
            "--model",
            world / "model",
            "--data",
            world / "latents",
            "--rank",
            4,
            "--out",
            tmp_path / "i",
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "6 tracks of 6 numbers" in out
    for text in (
        "recall@1 of projected against whole gradients",
        "of the stored float16 numbers",
        "rank of these",
    ):
        assert text in out
    call = ["search", "--index", tmp_path / "i", "--model", world / "model", "--queries", world / "latents"]
    assert run(*call, "--top", 2, "--out", tmp_path / "s.parquet") == 0
    out = capsys.readouterr().out
    assert out.count("\n   1. ") == 6 and out.count("\n   2. ") == 6 and "   3. " not in out
    result = Attribution.from_parquet(tmp_path / "s.parquet")
    assert len(result.tracks) == 6 and list(result.values) == ["index"]
    assert (result.draws == 8).all() and np.isnan(result.errors["index"]).all()
    own = [result.top(1, name)[0].track == name for name in result.tracks]
    assert sum(own) >= 5, "a training track's gradient is nearest to its own"
    other = complaint(
        capsys, "index", "--model", world / "model", "--data", world / "latents", "--out", tmp_path / "i"
    )
    assert "other settings" in other


@pytest.mark.slow
def test_processes_of_one_torchrun_give_the_bits_of_one(world, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "attr_engine.cli",
    ]
    command += [
        "attribute",
        "--config",
        str(world / "run" / "config.json"),
        "--out",
        str(tmp_path / "shared"),
    ]
    root = str(Path(main.__code__.co_filename).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report: ") == 1
    for name in ("scores.csv", "fisher.safetensors"):
        assert (tmp_path / "shared" / name).read_bytes() == (world / "run" / name).read_bytes()


def test_pieces_are_generated_and_can_be_attributed(world, tmp_path):
    call = ["generate", "--model", world / "model", "--data", world / "latents", "--count", 2, "--steps", 2]
    for out in ("a", "b"):
        assert run(*call, "--out", tmp_path / out) == 0
    made = LatentDataset(tmp_path / "a")
    assert len(made) == 2 and all(i["kind"] == "generated" for i in made.info)
    assert len(list((tmp_path / "a" / "audio").glob("*.flac"))) == 2
    assert torch.equal(
        made.batch([0, 1], 200).latents, LatentDataset(tmp_path / "b").batch([0, 1], 200).latents
    )
    assert run(*attribute(world, tmp_path / "run", queries=tmp_path / "a", self_influence=None)) == 0
    assert {q for q, _ in scores(tmp_path / "run").updates} == set(made.ids)


@pytest.mark.parametrize("flags", [{"objective": "rectified_flow"}, {"config": "model/model_config.json"}])
def test_other_models_can_be_trained(world, tmp_path, flags):
    words = [
        w
        for name, value in flags.items()
        for w in (f"--{name}", world / value if name == "config" else value)
    ]
    assert run("train", "diffusion", world / "latents", "--autoencoder", world / "ae", *words, "--width", 32,
               "--depth", 1, "--steps", 2, "--out", tmp_path / "model") == 0  # fmt: skip
    config = json.loads((tmp_path / "model" / "model_config.json").read_text())
    assert config["model"]["diffusion"]["diffusion_objective"] == flags.get("objective", "v")


# -- help -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_shows_examples(capsys, command):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"] if command else ["--help"])
    out = capsys.readouterr().out
    assert left.value.code == 0
    assert "examples:" in out and f"attr-engine {command}".strip() in out


def test_every_flag_of_every_command_is_explained():
    from attr_engine.cli_options import parser

    (commands,) = [a for a in parser()._actions if hasattr(a, "choices") and a.choices]
    assert set(commands.choices) == set(COMMANDS)
    for name, command in commands.choices.items():
        for action in command._actions:
            assert action.help or action.dest == "what", (name, action.dest)


def test_the_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "attr_engine.cli", "attribute", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "examples:" in done.stdout and done.stderr == ""


def test_without_a_command_the_usage_is_shown(capsys):
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2 and "usage: attr-engine" in capsys.readouterr().err


def test_the_doctor_answers_line_by_line(capsys):
    assert run("doctor") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("python ")
    assert all(line.split()[0] in ("ok", "missing", "broken", "note") for line in lines[1:])
    assert any("torch" in line and line.startswith("ok") for line in lines)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "nowhere"}, "nowhere"),
        ({"data": "nowhere"}, "nowhere holds no data set"),
        ({"queries": "nowhere"}, "nowhere does not exist"),
        ({"model": None}, "--model"),
        ({"data": None}, "--data"),
        ({"self_influence": None}, "no query: give --queries"),
        ({"self_influence": "t9.wav"}, "'t9.wav' is not a training track"),
        ({"self_influence": ["t1.wav", "t1.wav"]}, "'t1.wav' stands twice"),
        ({"layers": "cross_atn"}, "'cross_atn' matches no parameter"),
        ({"layers": ["all", "*.unicorn.*"]}, r"'*.unicorn.*' matches no parameter"),
        ({"functions": "magic"}, "'magic'"),
        ({"strengths": "0"}, "0"),
        ({"strengths": "-0.01"}, "-0.01"),
        ({"strengths": "nan"}, "nan"),
        ({"strengths": "inf"}, "inf"),
        ({"strengths": ["0.01", "0.01"]}, "twice"),
        ({"damping": "nan"}, "nan"),
        ({"damping": "-1"}, "-1"),
        ({"steps": "0"}, "0"),
        ({"score_draws": "0"}, "score draws"),
        ({"update_draws": "-4"}, "update draws"),
        ({"fisher_draws": "3"}, "Fisher draws"),
        ({"replicates": "0"}, "replicates"),
        ({"rows": "-1"}, "rows"),
        ({"unit_tracks": "0"}, "unit_tracks"),
        ({"threads": "-1"}, "threads"),
        ({"show": "0"}, "show"),
        ({"device": "toaster"}, "'toaster' cannot be used"),
        ({"weights": "nowhere.ckpt"}, "nowhere.ckpt does not exist"),
        ({"config": "nowhere.json"}, "nowhere.json does not exist"),
    ],
)
def test_a_run_that_cannot_be_is_refused_in_one_sentence(world, tmp_path, monkeypatch, capsys, changes, says):
    monkeypatch.chdir(tmp_path)
    assert says in complaint(capsys, *attribute(world, tmp_path / "run", **changes))
    assert not (tmp_path / "run" / "fisher.safetensors").exists()


def test_a_refused_call_does_not_bind_the_run_directory(world, tmp_path, capsys):
    complaint(capsys, *attribute(world, tmp_path / "run", model="nowhere"))
    assert run(*attribute(world, tmp_path / "run")) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(world, tmp_path, capsys):
    line = complaint(capsys, *attribute(world, tmp_path / "run", device="cuda"))
    assert "'cuda' cannot be used" in line and "--device cpu" in line


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "list"),
        ('{"modle": "x"}', "unknown setting 'modle'"),
        ('{"model": 3}', "'model' is 3"),
        ('{"strengths": 0.1}', "expected a list"),
        ('{"strengths": ["a"]}', "'strengths'"),
        ('{"strengths": []}', "strength"),
        ('{"layers": []}', "layers"),
        ('{"seed": 1.5}', "'seed' is 1.5"),
        ('{"seed": true}', "'seed' is True"),
        ('{"damping": NaN}', "'damping'"),
        ('{"damping": 1' + "0" * 400 + "}", "'damping'"),
        ('{"plan": "cunning"}', "'plan' is 'cunning'"),
        ('{"unit": 5}', "'unit'"),
        ('{"ema": "yes"}', "'ema'"),
        ('{"layers": [["a"]]}', "'layers'"),
        ("[" * 100_000, "not valid JSON"),
        ("\x00\x01", "not valid JSON"),
    ],
)
def test_a_config_file_that_is_wrong_is_refused(world, tmp_path, capsys, content, says):
    (tmp_path / "settings.json").write_text(content)
    words = ["attribute", *QUICK, "--config", tmp_path / "settings.json", "--out", tmp_path / "run",
             "--self-influence", "t1.wav"]  # fmt: skip
    for name, value in (("model", world / "model"), ("data", world / "latents")):
        if f'"{name}"' not in content:
            words += [f"--{name}", value]
    assert says in complaint(capsys, *words)


def test_a_run_with_other_settings_in_the_same_place_is_refused_by_their_names(world, tmp_path, capsys):
    shutil.copytree(world / "run", tmp_path / "run")
    line = complaint(capsys, "attribute", "--out", tmp_path / "run", "--damping", 0.5, "--seed", 3)
    assert "damping: 0.1 -> 0.5" in line and "seed: 0 -> 3" in line


def test_a_corrupted_run_is_refused_by_file(world, tmp_path, capsys):
    shutil.copytree(world / "run", tmp_path / "run")
    for name, content in (
        ("effects.safetensors", b"junk"), ("fisher.safetensors", b""), ("config.json", b"{"), ("timings.json", b"{")
    ):  # fmt: skip
        kept = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).write_bytes(content)
        capsys.readouterr()
        assert run("report", "--out", tmp_path / "run", "--show", 2) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("attr-engine: ") and name in last
        (tmp_path / "run" / name).write_bytes(kept)
    assert run("report", "--out", tmp_path / "run", "--show", 2) == 0


def test_a_latent_of_the_wrong_shape_dtype_or_value_is_refused_at_ingest(tmp_path, capsys):
    bad = {
        "flat": np.zeros(4, dtype=np.float32), "cube": np.zeros((1, 4, 3), dtype=np.float32),
        "integers": np.zeros((4, 3), dtype=np.int16), "nan": np.full((4, 3), np.nan, dtype=np.float32),
        "infinite": np.full((4, 3), np.inf, dtype=np.float32), "objects": np.array([[{}]], dtype=object),
        "empty": np.zeros((4, 0), dtype=np.float32),
    }  # fmt: skip
    for name, array in bad.items():
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / f"{name}.npy", array)
        assert name in complaint(capsys, "ingest", tmp_path / name, "--out", tmp_path / "set")
    assert not (tmp_path / "set" / "manifest.parquet").exists()


@pytest.mark.parametrize(
    ("source", "flags", "says"),
    [
        ("nowhere", [], "nowhere does not exist"),
        ("empty", [], "--autoencoder"),
        ("empty", ["--autoencoder", "{world}/ae"], "holds no audio"),
        ("empty", ["--kind", "pre-encoded"], "no .npy latents"),
        ("empty", ["--kind", "arrays"], "holds no arrays"),
        ("{world}/music", [], "--autoencoder"),
        ("{world}/music", ["--autoencoder", "nowhere"], "nowhere"),
        ("{world}/music", ["--autoencoder", "{world}/ae", "--seconds", "0.001"], "--seconds"),
        ("{world}/music", ["--autoencoder", "{world}/ae", "--seconds", "nan"], "--seconds"),
        ("{world}/music", ["--autoencoder", "{world}/ae", "--seconds", "inf"], "--seconds"),
        ("{world}/music", ["--autoencoder", "{world}/ae", "--seconds", "-3"], "--seconds"),
        ("{world}/music", ["--autoencoder", "{world}/ae", "--hop", "-1"], "hop"),
        ("{world}/music", ["--autoencoder", "{world}/ae", "--metadata", "nowhere.csv"], "nowhere.csv"),
        (
            "{world}/music",
            ["--autoencoder", "{world}/ae", "--seconds", "1", "--long", "error"],
            "t2.wav lasts 1.0 s",
        ),
        ("{world}/music", ["--autoencoder", "{world}/ae", "--condition", "mood"], "'mood'"),
    ],
)
def test_an_ingest_that_cannot_be_is_refused(world, tmp_path, monkeypatch, capsys, source, flags, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    words = [w.format(world=world) for w in ("ingest", source, *flags)]
    capsys.readouterr()
    code = run(*words, "--out", tmp_path / "set")
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and says in lines[-1] and lines[-1].startswith("attr-engine: ")
    assert not any("Traceback" in line for line in lines)


def test_a_bar_that_was_under_way_does_not_hide_the_message(world, tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.zeros((4, 3), dtype=np.float32))
    np.save(tmp_path / "b.npy", np.full((4, 3), np.nan, dtype=np.float32))
    assert run("ingest", tmp_path, "--out", tmp_path / "set") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("attr-engine: ") and "'b'" in last


def test_duplicate_ids_are_refused_by_id(world, tmp_path, capsys):
    table = tmp_path / "t.csv"
    table.write_text("path,id\nt1.wav,same\nt2.wav,same\n")
    words = [
        "ingest",
        world / "music",
        "--autoencoder",
        world / "ae",
        "--metadata",
        table,
        "--out",
        tmp_path / "set",
    ]
    assert "'same' stands twice" in complaint(capsys, *words)


def test_a_query_longer_than_the_model_is_refused_by_id(world, tmp_path, capsys):
    frames = json.loads((world / "model" / "model_config.json").read_text())["sample_size"] // 256
    long = write_set(tmp_path / "long", {"symphony": np.zeros((64, frames + 1), dtype=np.float32)})
    line = complaint(capsys, *attribute(world, tmp_path / "run", queries=long))
    assert f"'symphony' has {frames + 1} frames, the model takes at most {frames}" in line
    tune(tmp_path / "audio" / "opera.wav", 3, 30.0)
    assert "opera.wav lasts 30.0 s" in complaint(
        capsys, *attribute(world, tmp_path / "run2", queries=tmp_path / "audio" / "opera.wav")
    )


def test_sets_that_the_model_cannot_take_are_refused(world, tmp_path, capsys):
    wide = write_set(tmp_path / "wide", {"a": np.zeros((5, 3), dtype=np.float32)})
    bare = write_set(tmp_path / "bare", {"a": np.ones((64, 3), dtype=np.float32)}, conditioning={})
    text = write_set(
        tmp_path / "text", {"a": np.ones((64, 3), dtype=np.float32)}, {"seconds_total": 1, "tempo": "slow"}
    )
    twice = write_set(tmp_path / "twice", {"t1.wav": np.ones((64, 3), dtype=np.float32)})
    assert "5 channels" in complaint(capsys, *attribute(world, tmp_path / "1", queries=wide))
    assert "5 channels" in complaint(capsys, *attribute(world, tmp_path / "2", data=wide, self_influence="a"))
    assert "'t1.wav' stands twice" in complaint(capsys, *attribute(world, tmp_path / "3", queries=twice))
    for folder, says in ((bare, "'seconds_total'"), (text, "tempo = 'slow'")):
        capsys.readouterr()
        assert run(*attribute(world, tmp_path / folder.name / "run", queries=folder)) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("attr-engine: ") and says in last


def test_a_damaged_data_set_is_refused_by_file(world, tmp_path, capsys):
    shutil.copytree(world / "latents", tmp_path / "latents")
    shard = tmp_path / "latents" / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    tracks = LatentDataset(tmp_path / "latents")
    latent = tracks.batch([2], int(tracks.lengths[2])).latents[0].T.contiguous().numpy().tobytes()
    data[bytes(data).index(latent)] ^= 1
    shard.write_bytes(data)
    capsys.readouterr()
    assert run(*attribute(world, tmp_path / "run", data=tmp_path / "latents")) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("attr-engine: ") and "CRC" in last
    assert "shard-00000.safetensors" in last and repr(tracks.ids[2]) in last
    shard.unlink()
    assert "is missing" in complaint(capsys, *attribute(world, tmp_path / "run2", data=tmp_path / "latents"))


def test_a_data_set_is_no_model_and_the_other_way_round(world, tmp_path, capsys):
    assert "model_config.json" in complaint(
        capsys, *attribute(world, tmp_path / "1", model=world / "latents")
    )
    assert "manifest.parquet" in complaint(capsys, *attribute(world, tmp_path / "2", data=world / "model"))
    assert "ae" in complaint(capsys, *attribute(world, tmp_path / "3", model=world / "ae"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["diffusion", "{world}/latents"], "--autoencoder"),
        (["diffusion", "nowhere", "--autoencoder", "{world}/ae"], "nowhere"),
        (["diffusion", "{world}/latents", "--autoencoder", "nowhere"], "nowhere"),
        (["diffusion", "{world}/latents", "--config", "nowhere.json"], "nowhere.json"),
        (["diffusion", "{world}/latents", "--autoencoder", "{world}/ae", "--condition", "mood"], "'mood'"),
        (["diffusion", "{world}/latents", "--autoencoder", "{world}/ae", "--steps", "0"], "steps"),
        (["diffusion", "{world}/latents", "--autoencoder", "{world}/ae", "--batch", "0"], "batch"),
        (["diffusion", "{world}/latents", "--autoencoder", "{world}/ae", "--lr", "nan"], "lr"),
        (["diffusion", "{world}/latents", "--autoencoder", "{world}/ae", "--seed", "-1"], "seed"),
        (["diffusion", "{world}/latents", "--autoencoder", "{world}/ae", "--width", "50"], "width"),
        (["diffusion", "{world}/latents", "--autoencoder", "{world}/ae", "--patch", "0"], "patch"),
        (["diffusion", "{world}/latents", "--autoencoder", "{world}/ae", "--frames", "16"], "t0.wav' has"),
        (["diffusion", "{world}/latents", "--autoencoder", "{world}/ae", "--frames", "-16"], "frames"),
        (["autoencoder", "nowhere"], "nowhere"),
        (["autoencoder", "{world}/music", "--hop", "0"], "hop"),
        (["autoencoder", "{world}/music", "--sample-rate", "4000"], "sample rate"),
        (["autoencoder", "{world}/music", "--hop", "-5"], "hop"),
        (["autoencoder", "{world}/music", "--sample-rate", "0"], "sample"),
    ],
)
def test_a_training_that_cannot_be_is_refused(world, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    code = run("train", *[w.format(world=world) for w in words], "--out", tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and lines[-1].startswith("attr-engine: ") and says in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_what_exists_already_is_not_overwritten(world, capsys):
    for words in (
        ["ingest", world / "music", "--autoencoder", world / "ae", "--out", world / "latents"],
        ["train", "autoencoder", world / "music", "--out", world / "ae"],
        ["train", "diffusion", world / "latents", "--autoencoder", world / "ae", "--out", world / "model"],
    ):
        assert "already holds" in complaint(capsys, *words)


@pytest.mark.parametrize(
    "flag", [["--count", "0"], ["--count", "-1"], ["--seed", "-1"], ["--steps", "0"], ["--guidance", "nan"]]
)
def test_a_generation_that_cannot_be_is_refused(world, tmp_path, capsys, flag):
    call = ["generate", "--model", world / "model", "--data", world / "latents", "--steps", 2, "--count", 1]
    assert flag[0][2:] in complaint(capsys, *call, *flag, "--out", tmp_path / "out")


def test_an_output_that_cannot_be_written_is_refused_by_path(world, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "out"
    for words in (
        attribute(world, out),
        ["ingest", world / "music", "--autoencoder", world / "ae", "--out", out],
        [
            "generate",
            "--model",
            world / "model",
            "--data",
            world / "latents",
            "--count",
            1,
            "--steps",
            2,
            "--out",
            out,
        ],
    ):
        assert "file" in complaint(capsys, *words)


def test_a_path_that_would_play_with_the_terminal_is_shown_as_text(world, tmp_path, capsys):
    name = "evil\n\x1b[31m\u202e"
    line = complaint(capsys, *attribute(world, tmp_path / "run", data=tmp_path / name))
    assert "\x1b" not in line and "\u202e" not in line and "\\x1b" in line


def test_in_a_process_of_its_own_a_mistake_is_one_line_too(world, tmp_path):
    words = [str(w) for w in attribute(world, tmp_path / "run", layers="cross_atn", functions="magic")]
    done = subprocess.run(
        [sys.executable, "-m", "attr_engine.cli", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("attr-engine: ") and done.stderr.count("\n") == 1
