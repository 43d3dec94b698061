"""A disk that is full, read-only or becomes so: one sentence, nothing half-written under its name, and the same bits once there is room."""

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import forks
import pytest

from attr_engine import UserError
from attr_engine.cli import main
from attr_engine.files import whole_file, write_json, writing_in
from attr_engine.index import build_index
from attr_engine.jobs import Job, make_queries

# Forward passes of a run by forks.small: those of the Fisher, of the updates, and all (tests/test_pipeline.py counts them).
STAGES = {"fisher": (4, 9), "updates": (10, 45), "scoring": (46, 99), "index": (6, 17)}
TOTAL = {"run": 99, "index": 77}  # what measures the recall of an index comes after its units
BEFORE = {"fisher": 0, "updates": 9, "scoring": 45, "index": 0}


@pytest.fixture(scope="module")
def process() -> Iterator[forks.Forks]:
    server = forks.Forks()
    yield server
    server.close()


@pytest.fixture(scope="module")
def data() -> int:
    """Seed of model and tracks, the same for all tests: they share the undisturbed results."""
    return int(os.environ["ATTR_TEST_SEED"])


@pytest.fixture(scope="module")
def whole(process, data, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """Names and bytes of an undisturbed run, and index."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for kind in ("run", "index"):
        counts = process.run(out=folder / kind, seed=data, index=kind == "index")
        assert (counts["code"], counts["predict"]) == (0, TOTAL[kind])
        found[kind] = contents(folder / kind)
    return found


def contents(out: Path) -> dict[str, bytes]:
    """Every file, but what says when it was made."""
    return {
        str(p.relative_to(out)): p.read_bytes() if p.name not in ("timings.json", "status.jsonl") else b""
        for p in sorted(out.rglob("*"))
        if p.is_file()
    }


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A small disk of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def refused(result: dict, out: Path, reason: str) -> None:
    """The job ended with one sentence about a file of ``out``, and what is there is whole."""
    said = result["refused"]
    assert reason in said and str(out) in said and "the same command carries on" in said and "\n" not in said
    forks.check_whole(out)
    assert not [p for p in out.rglob("*") if p.suffix == ".part" or p.name.startswith(".tmp")]


@pytest.mark.parametrize("stage", STAGES)
def test_files_that_may_not_grow_end_any_stage_and_it_carries_on(stage, process, whole, data, rng, tmp_path):
    out, kind = tmp_path / "run", "index" if stage == "index" else "run"
    job = {"out": out, "seed": data, "index": kind == "index"}
    at = int(rng.integers(STAGES[stage][0], STAGES[stage][1] + 1))
    refused(process.run(**job, strike=["limit", at, int(rng.integers(1, 200))]), out, "there is no room for")
    done = process.run(**job)
    assert done["code"] == 0
    assert done["predict"] <= TOTAL[kind] - BEFORE[stage]
    assert contents(out) == whole[kind]


@pytest.mark.parametrize("kind", ["run", "index"])
def test_no_limit_of_the_size_of_files_leaves_a_broken_one(kind, process, whole, data, rng, tmp_path):
    expected = whole[kind]
    sizes = sorted({len(data) for data in expected.values() if data})
    for n, size in enumerate(
        rng.choice(sizes, 3, replace=False)
    ):  # one byte less than a file that is to be written
        job = {"out": tmp_path / str(n), "seed": data, "index": kind == "index"}
        refused(process.run(**job, strike=["limit", 1, int(size) - 1]), job["out"], "File too large")
        assert process.run(**job)["code"] == 0
        assert contents(job["out"]) == expected


@pytest.mark.parametrize("stage", [*STAGES, "features.npy"])
def test_a_full_disk_ends_any_stage_and_it_carries_on(stage, process, whole, data, rng, disk):
    kind = "run" if stage in ("fisher", "updates", "scoring") else "index"
    job = {"out": disk / "run", "seed": data, "index": kind == "index"}
    at = int(rng.integers(STAGES[stage][0], STAGES[stage][1] + 1)) if stage in STAGES else stage
    refused(process.run(**job, strike=["fill", at, 0]), job["out"], "No space left on device")
    refused(process.run(**job), job["out"], "there is no room for")
    (disk / "ballast").unlink()
    assert process.run(**job)["code"] == 0
    assert contents(job["out"]) == whole[kind]


@pytest.mark.parametrize("stage", STAGES)
def test_a_disk_that_becomes_read_only_ends_any_stage_and_it_carries_on(
    stage, process, whole, data, rng, disk
):
    kind = "index" if stage == "index" else "run"
    job = {"out": disk / "run", "seed": data, "index": kind == "index"}
    job["out"].mkdir()
    try:
        at = int(rng.integers(STAGES[stage][0], STAGES[stage][1] + 1))
        refused(process.run(**job, strike=["read-only", at, 0]), job["out"], "Read-only file system")
        refused(process.run(**job), job["out"], "Read-only file system")
    finally:
        subprocess.run(["umount", str(job["out"])], check=True)
    assert process.run(**job)["code"] == 0
    assert contents(job["out"]) == whole[kind]


def test_a_read_only_disk_is_refused_before_any_work_and_a_finished_index_is_read(process, data, disk):
    index = {"out": disk / "index", "seed": data, "index": True}
    assert process.run(**index)["code"] == 0
    mount("-o", "remount,ro", str(disk))
    assert process.run(**index)["predict"] == 0
    for out in (disk / "new", disk / "new" / "deep"):
        for kind in (True, False):
            result = process.run(out=out, seed=data, index=kind)
            assert "cannot be written (Read-only file system)" in result["refused"]
            assert result["predict"] <= 5, "the comparison of the first rows"


def test_the_command_line_says_it_in_one_sentence(seed, tmp_path, monkeypatch, capsys):
    model, tracks, queries = forks.make(seed)

    def load(run):
        return Job(run, model, tracks, make_queries(tracks, [queries], run.settings.self_influence))

    monkeypatch.setattr("attr_engine.load.load_job", load)
    write_json(tmp_path / "config.json", {**vars(forks.small()), "threads": 1})
    call = ["score", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, old[1]))  # more than a config, less than a Fisher
    try:
        code = main(call)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("attr-engine: ")]
    assert code == 2 and len(lines) == 1
    assert f"there is no room for {tmp_path / 'run' / 'fisher'}" in lines[0] and "carries on" in lines[0]
    assert main(call) == 0


def test_an_error_of_another_file_is_left_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError) as other, writing_in(tmp_path / "run"):
        open(tmp_path / "data")
    assert other.value.filename == str(tmp_path / "data")
    with pytest.raises(FileNotFoundError) as other, whole_file(tmp_path / "x"):
        open(tmp_path / "data")
    assert other.value.filename == str(tmp_path / "data") and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"run/a/b cannot be written \(Is a directory\).*make .*run writable"):
        (tmp_path / "run" / "a" / "b").mkdir(parents=True)
        with writing_in(tmp_path / "run"):
            open(tmp_path / "run" / "a" / "b", "w")


def test_an_index_that_cannot_be_made_names_the_file(seed, tmp_path):
    model, tracks, _ = forks.make(seed)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        build_index(model, tracks, tmp_path / "file" / "index")
