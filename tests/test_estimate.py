"""A dry run leaves nothing behind, and counts what a real run then does."""

import json
import os

import forks
import numpy as np
import pytest
import torch

from attr_engine import Cancelled, UserError, attribute, dry_run
from attr_engine.estimate import STAGES, estimate, left_of, mirrored
from attr_engine.index_store import Index
from attr_engine.jobs import Job, Work, make_queries, plan_of
from attr_engine.monitor import Progress
from attr_engine.pipeline import FISHER
from attr_engine.probe import Probe
from attr_engine.runs import Run
from attr_engine.scoring import EFFECTS
from attr_engine.tensorfile import load_tensors
from attr_engine.updates import Update


class CancelAt:
    def __init__(self, n) -> None:
        self.n, self.looks = n, 0

    def is_set(self) -> bool:
        self.looks += 1
        return self.looks >= self.n


@pytest.fixture
def world(seed):
    return forks.make(seed)


def job_of(world, folder, **changes):
    model, tracks, queries = world
    settings = forks.small(**changes)
    return Job(Run(folder, settings), model, tracks, make_queries(tracks, [queries], settings.self_influence))


def snapshot(folder):
    """Every file and folder below, with bytes and time of change of files."""
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) if p.is_file() else None
        for p in folder.rglob("*")
    }


class Counted:
    """Rows that go through a model and updates that are written and read, while a run goes on."""

    def __init__(self, model, monkeypatch) -> None:
        self.forward = self.gradients = self.read = self.written = 0
        predict, load, save = model.predict, Update.load, Update.save

        def counted(x, *more):
            kind = "gradients" if torch.is_grad_enabled() else "forward"
            setattr(self, kind, getattr(self, kind) + len(x))
            return predict(x, *more)

        def loading(*arguments):
            self.read += 1
            return load(*arguments)

        def saving(*arguments):
            self.written += 1
            return save(*arguments)

        monkeypatch.setattr(model, "predict", counted)
        monkeypatch.setattr(Update, "load", staticmethod(loading))
        monkeypatch.setattr(Update, "save", saving)


COMPARED = 2 * 2  # rows that a Fisher compares at its beginning: two in a batch, and alone


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"functions": ("loss_change",), "steps": 1, "resident": 0.0},
        {"functions": ("influence",), "unit_tracks": 4},
    ],
    ids=str,
)
def test_the_work_that_is_left_is_the_work_that_is_done(changes, world, tmp_path, monkeypatch, rng):
    model, tracks, queries = world
    settings, out = forks.small(**changes), tmp_path / "run"
    monkeypatch.setattr(
        Progress, "tick", lambda self, share=0.0: None
    )  # what stops within a unit works in vain
    kinds = ["forward", "gradients", "written"] + ["read"] * (settings.resident == 0)
    sittings = 0
    while not (out / EFFECTS).exists():
        with mirrored(out, settings) as run:
            left = left_of(job_of(world, run.path, **changes))
        fitted = (out / FISHER).exists()
        # The third look is within a unit of the Fisher, which leaves a checkpoint.
        cancel = CancelAt(3 if sittings == 0 else int(rng.integers(2, 30)) if sittings < 4 else 10**9)
        with monkeypatch.context() as patch:
            done = Counted(model, patch)
            try:
                attribute(model, tracks, queries, settings, out, cancel)
                after = dict.fromkeys(STAGES[:3], Work())
            except Cancelled:
                with mirrored(out, settings) as run:
                    after = left_of(job_of(world, run.path, **changes))
        for kind in kinds:
            expected = sum(getattr(left[s], kind) - getattr(after[s], kind) for s in left)
            expected += COMPARED * (kind == "gradients" and not fitted)
            assert getattr(done, kind) == expected, kind
        sittings += 1
        assert sittings > 1 or list(out.glob("fisher/*.so-far.safetensors"))
    assert sittings > 1


def test_the_plan_is_the_sum_of_the_stages(world, tmp_path):
    job = job_of(world, tmp_path)
    left = left_of(job)
    assert f"{sum(w.gradients for w in left.values())} gradients" in plan_of(job)
    assert f"{sum(w.forward for w in left.values())} forward passes" in plan_of(job)


@pytest.mark.parametrize("changes", [{}, {"rows": 0}, {"rows": 0, "memory": 0.5}, {"gradients": "loop"}], ids=str)  # fmt: skip
def test_a_dry_run_leaves_no_trace(changes, world, tmp_path, rng):
    model, tracks, queries = world
    settings, out = forks.small(**changes), tmp_path / "folder" / "run"
    weights = {n: p.detach().clone() for n, p in model.module.named_parameters()}
    found = dry_run(model, tracks, queries, settings, out)
    assert [s.name for s in found.stages] == list(STAGES[:3])
    assert list(tmp_path.iterdir()) == []
    for stage in found.stages:
        low, middle, high = stage.seconds
        assert 0 < low <= middle <= high < float("inf")
        assert stage.memory_bytes > sum(p.numel() * p.element_size() for p in weights.values())
        assert stage.disk_bytes >= stage.kept_bytes > 0
    with pytest.raises(Cancelled):
        attribute(model, tracks, queries, settings, out, CancelAt(int(rng.integers(3, 20))))
    for _ in range(2):
        before = snapshot(tmp_path)
        again = dry_run(model, tracks, queries, settings, out)
        assert snapshot(tmp_path) == before
        assert all(torch.equal(p, weights[n]) for n, p in model.module.named_parameters())
        assert sum(again.seconds) >= 0
        attribute(model, tracks, queries, settings, out)
    assert all(stage.work == Work() and stage.seconds == (0, 0, 0) for stage in again.stages)
    assert again.disk_bytes == 0 and again.text().count("done") == 3


def test_bytes_of_a_run_are_counted_from_shapes(world, tmp_path):
    model, tracks, queries = world
    found = {s.name: s for s in dry_run(model, tracks, queries, forks.small(), tmp_path / "run").stages}
    attribute(model, tracks, queries, forks.small(keep_updates=True), tmp_path / "run")
    header = 8000  # names, shapes and settings in a file
    fisher = (tmp_path / "run" / FISHER).stat().st_size
    assert found["fisher"].kept_bytes <= fisher <= found["fisher"].kept_bytes + header
    assert found["fisher"].disk_bytes == 7 * found["fisher"].kept_bytes, "six units and their sum"
    files = list((tmp_path / "run" / "updates").iterdir())
    updates = sum(f.stat().st_size for f in files)
    assert found["unlearn"].kept_bytes <= updates <= found["unlearn"].kept_bytes + header * len(files)
    effects = (tmp_path / "run" / EFFECTS).stat().st_size
    tables = found["score"].kept_bytes - (found["score"].disk_bytes - found["score"].kept_bytes)
    numbers = found["score"].kept_bytes - tables
    assert numbers <= effects <= numbers + header
    csv = (tmp_path / "run" / "scores.csv").stat().st_size
    assert csv * 0.8 < tables < csv * 2


def test_bytes_of_an_index_are_counted_from_shapes(world, tmp_path):
    model, tracks, queries = world
    settings = forks.small(functions=("ridge",))
    found = next(
        s for s in dry_run(model, tracks, queries, settings, tmp_path / "run").stages if s.name == "ridge"
    )
    attribute(model, tracks, queries, settings, tmp_path / "run")
    folder = tmp_path / "run" / "index"
    names = (folder / "features.npy", folder / "solver.safetensors", tmp_path / "run" / "ridge.safetensors")
    assert found.kept_bytes <= sum(p.stat().st_size for p in names) <= found.kept_bytes + 4000
    numbers = load_tensors(names[1], Index.open(folder).meta["key"])[0]["transform"].shape[1]
    assert found.disk_bytes == found.kept_bytes + 4 * len(tracks) * numbers


def test_processes_share_the_time(world, tmp_path, monkeypatch):
    for stage in STAGES[:3]:
        monkeypatch.setattr(Probe, stage, lambda self, work: np.array([4.0, 8.0, 12.0]))
    monkeypatch.setattr(Probe, "memory", lambda self, stage: 0)
    monkeypatch.setenv("WORLD_SIZE", "4")
    found = dry_run(*world, forks.small(), tmp_path / "run")
    assert found.processes == 4 and found.seconds == (3.0, 6.0, 9.0)
    assert "4 processes" in found.text()


def test_a_disk_that_is_too_small_is_told(world, tmp_path, monkeypatch):
    found = dry_run(*world, forks.small(), tmp_path / "run")
    assert found.warning == "" and "warning" not in found.text()
    usage = type("Usage", (), {"free": found.disk_bytes - 1})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    short = dry_run(*world, forks.small(), tmp_path / "run")
    assert short.text().endswith(f"warning: {short.warning}") and "choose another --out" in short.warning
    said = json.loads(json.dumps(short.to_json()))
    assert said["warning"] == short.warning and said["stages"][2]["work"]["forward"] == 6 * 2 * 7


def test_only_the_stages_that_are_asked_for_are_estimated(world, tmp_path):
    with mirrored(tmp_path / "run", forks.small()) as run:
        found = estimate(job_of(world, run.path), STAGES[:1])
    assert [s.name for s in found.stages] == ["fisher"]


def test_what_a_run_refuses_a_dry_run_refuses(world, tmp_path):
    model, tracks, queries = world
    for changes, named in (({"layers": ("transfomer",)}, "transfomer"), ({"score_draws": 3}, "score draws")):
        with pytest.raises(UserError, match=named):
            dry_run(model, tracks, queries, forks.small(**changes), tmp_path / "run")
    attribute(model, tracks, queries, forks.small(), tmp_path / "run")
    with pytest.raises(UserError, match="damping: 0.1 -> 0.5"):
        dry_run(model, tracks, queries, forks.small(damping=0.5), tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="nothing can be written"):
        dry_run(model, tracks, queries, forks.small(), tmp_path / "file")
    assert {p.name for p in tmp_path.iterdir()} == {"run", "file"}
    assert not [name for name in os.listdir(tmp_path / "run") if name.startswith(".attr")]
