"""Status lines are whole and true, a cancelled run carries on to the same bits, nothing is printed, units can be followed."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forks
import numpy as np
import pytest

from attr_engine import Cancelled, UserError, attribute, cli, finished_units, follow, read_status
from attr_engine.diffusion import DrawPlan
from attr_engine.effectfile import read_effects, read_parts
from attr_engine.fisher import FisherSettings, sum_unit
from attr_engine.monitor import RUN, Monitor
from attr_engine.pipeline import FISHER
from attr_engine.runs import TIMINGS, Run, open_run
from attr_engine.scoring import EFFECTS
from attr_engine.tensorfile import load_tensors
from attr_engine.units import held

KEYS = {"time", "rank", "stage", "state", "done", "total", "unit", "seconds", "seconds_left"}


class CancelAt:
    """Set from the n-th time that it is looked at."""

    def __init__(self, n=None) -> None:
        self.n, self.looks = n, 0

    def is_set(self) -> bool:
        self.looks += 1
        return self.n is not None and self.looks >= self.n


class CancelWithUnits:
    """Set once a run has finished so many units of scoring."""

    def __init__(self, folder, units) -> None:
        self.folder, self.units = folder / "units", units

    def is_set(self) -> bool:
        return len(list(self.folder.glob("*.safetensors"))) >= self.units


def lines(folder, name="status.jsonl"):
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


@pytest.fixture
def world(seed):
    return forks.make(seed)


def test_every_stage_of_a_run_starts_runs_and_finishes(world, tmp_path):
    attribute(*world, forks.small(), tmp_path)
    found = lines(tmp_path)
    assert all(line.keys() == KEYS for line in found)
    assert [line["time"] for line in found] == sorted(line["time"] for line in found)
    assert all(line["time"].endswith("+00:00") and line["rank"] == 0 for line in found)
    units = {"fisher": (6, "track"), "unlearn": (6, "query"), "score": (3, "unit")}
    for stage, (total, unit) in units.items():
        here = [line for line in found if line["stage"] == stage]
        assert [line["state"] for line in here][:2] == ["started", "running"]
        assert here[-1]["state"] == "finished" and here[-1]["seconds_left"] == 0
        running = here[1:]
        assert all((line["total"], line["unit"]) == (total, unit) for line in running)
        assert [line["done"] for line in running] == sorted(line["done"] for line in running)
        assert running[0]["done"] == 0 and running[-1]["done"] == total
    assert (found[0]["stage"], found[0]["state"]) == (RUN, "started")
    assert (found[-1]["stage"], found[-1]["state"]) == (RUN, "finished")
    assert {stage: line["state"] for stage, line in read_status(tmp_path).items()} == dict.fromkeys(
        [RUN, *units], "finished"
    )


def test_a_stage_writes_no_more_than_a_line_a_second(tmp_path):
    run, begun = Run(tmp_path, forks.small()), time.monotonic()
    show = run.progress("score", "unit")
    with run.stage("score"):
        for i in range(20000):
            show(i, 20000)
    assert len(lines(tmp_path)) <= 3 + (time.monotonic() - begun)
    assert read_status(tmp_path)["score"]["done"] == 19999


def test_shares_of_a_unit_count(tmp_path):
    run = Run(tmp_path, forks.small())
    show = run.progress("score", "unit")
    show(1, 4)
    seen = []
    show._bar = lambda done, total: seen.append((done, total))
    for share in (0.25, 0.5, 1.0, 1.5):
        show.tick(share)
    assert seen == [(1.25, 4), (1.5, 4), (2, 4), (2, 4)]


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (UserError("two\nlines"), "failed"),
        (Cancelled("stop"), "cancelled"),
        (KeyboardInterrupt(), "cancelled"),
        (MemoryError(), "failed"),
    ],
)
def test_how_a_stage_ended_is_said(error, state, tmp_path):
    with pytest.raises(type(error)), open_run(tmp_path, forks.small()) as run:
        run.record()
        with run.stage("score"):
            raise error
    last = read_status(tmp_path)
    assert last["score"]["state"] == last[RUN]["state"] == state
    for line in last.values():
        if state == "failed":
            assert line["error"] == {UserError: "two lines", MemoryError: "MemoryError"}[type(error)]
        else:
            assert "error" not in line


def test_a_refused_call_says_nothing(world, tmp_path):
    with pytest.raises(UserError):
        attribute(*world, forks.small(layers=("transfomer",)), tmp_path)
    assert read_status(tmp_path) == {}


def test_a_cut_line_is_skipped_and_the_next_sitting_begins_a_new_one(tmp_path, rng):
    path = tmp_path / "status.jsonl"
    monitor = Monitor(tmp_path)
    for stage in ("a", "b"):
        monitor.begin(stage)
        monitor.end(stage)
    monitor.close()
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in {*rng.integers(0, len(whole), 40).tolist(), *ends, 0}:
        path.write_bytes(whole[:size])
        parsed = sum(end <= size + 1 for end in ends)  # a line that lacks its end alone is whole
        expected = {s for s, n in (("a", 1), ("b", 3)) if parsed >= n}
        assert set(read_status(tmp_path)) == expected
        other = Monitor(tmp_path)
        other.begin("c")
        other.close()
        assert set(read_status(tmp_path)) == {*expected, "c"}
        assert path.read_bytes().startswith(whole[:size])


def test_further_processes_have_files_of_their_own(tmp_path, monkeypatch):
    for rank, state in ((0, None), (3, UserError("no"))):
        monkeypatch.setenv("RANK", str(rank))
        monitor = Monitor(tmp_path)
        monitor.begin("score")
        time.sleep(0.002)
        monitor.end("score", state)
        monitor.close()
    assert {p.name for p in tmp_path.iterdir()} == {"status.jsonl", "status-3.jsonl"}
    assert read_status(tmp_path)["score"]["state"] == "failed"  # the newest line
    assert read_status(tmp_path, rank=0)["score"]["state"] == "finished"
    assert read_status(tmp_path / "nowhere") == {}


def both_end(folder, stage):
    """Wait until two processes have ended a stage."""
    end = time.monotonic() + 120
    while any(read_status(folder, k).get(stage, {}).get("state") != "finished" for k in range(2)):
        assert time.monotonic() < end, stage
        time.sleep(0.02)


def test_processes_that_share_a_run_say_what_all_have_done(seed, tmp_path):
    here, locks = Path(__file__).parent, tmp_path / "run" / "locks"
    processes = [
        subprocess.Popen(
            [sys.executable, str(here / "worker.py"), str(tmp_path / "run"), str(seed), '{"unit_tracks": 1}', "0.01"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=here,
            env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "RANK": str(i), "WORLD_SIZE": "2"},
        )
        for i in range(2)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    # A stage whose result is there is not entered, so nobody may make it before both were in the stage.
    with held(locks / "score.lock") as score:
        with held(locks / "fisher.lock") as fisher:
            assert score and fisher
            for process in processes:
                process.stdin.write("go\n")
                process.stdin.flush()
            both_end(tmp_path / "run", "fisher")
        both_end(tmp_path / "run", "score")
    assert [p.communicate(timeout=120)[1] for p in processes] == ["", ""], "no bars, no warnings"
    for rank in range(2):
        for stage, total in (("fisher", 6), ("unlearn", 6), ("score", 6)):
            last = read_status(tmp_path / "run", rank)[stage]
            assert (last["state"], last["done"], last["total"], last["rank"]) == (
                "finished",
                total,
                total,
                rank,
            )
    for name in ("status.jsonl", "status-1.jsonl"):
        done = [
            line["done"]
            for line in lines(tmp_path / "run", name)
            if line["stage"] == "score" and line["total"]
        ]
        assert done == sorted(done)


# -- cancellation ---------------------------------------------------------------------------------


def test_a_run_cancelled_anywhere_carries_on_to_the_same_bits(world, tmp_path, rng):
    counting = CancelAt()
    attribute(*world, forks.small(), tmp_path / "whole", counting)
    assert counting.looks > 15
    out, sittings = tmp_path / "cancelled", 0
    while True:
        cancel = CancelAt(
            int(rng.integers(2, counting.looks // 2))
        )  # in a unit, whose work is then done again, or between
        try:
            attribute(*world, forks.small(), out, cancel)
            break
        except Cancelled:
            sittings += 1
            assert cancel.looks == cancel.n, "it went on"
            assert read_status(out)[RUN]["state"] == "cancelled"
            assert "running" not in {line["state"] for line in read_status(out).values()}
        assert sittings < 200
    assert sittings >= 2
    assert forks.bits(out) == forks.bits(tmp_path / "whole")


def test_a_cancelled_fisher_keeps_what_it_summed(world, tmp_path, rng):
    model, tracks, _ = world
    settings = FisherSettings(("all",), DrawPlan(0, replicates=2), 2, rows=2)
    whole, used = sum_unit(model, tracks, settings, range(6))
    at, file, seen = int(rng.integers(1, 6)), tmp_path / "sum.safetensors", []

    def stop(done):
        seen.append(done)
        if done == at:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        sum_unit(model, tracks, settings, range(6), file, "key", stop)
    assert load_tensors(file, "key")[1]["done"] == at
    again, used_again = sum_unit(model, tracks, settings, range(6), file, "key", seen.append)
    assert seen == [*range(1, 7)], "no track is done twice"
    assert used == used_again and all((whole[name] == again[name]).all() for name in whole)


def test_a_thread_can_cancel(world, tmp_path):
    event = threading.Event()
    model, tracks, queries = world
    predict = model.predict
    model.predict = lambda *a: (time.sleep(0.005), predict(*a))[1]
    threading.Timer(0.3, event.set).start()
    with pytest.raises(Cancelled, match="carries on"):
        attribute(model, tracks, queries, forks.small(score_draws=40, update_draws=40), tmp_path, event)


def test_terminating_the_command_line_is_an_interruption(tmp_path, monkeypatch, capsys):
    def work(args):
        with open_run(tmp_path / "run", forks.small()) as run:
            run.record()
            with run.stage("score"):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setitem(cli._COMMANDS, "doctor", work)
    assert cli.main(["doctor"]) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == "attr-engine: terminated; the same command carries on\n"
    assert read_status(tmp_path / "run")["score"]["state"] == "cancelled"


# -- logging and printing -------------------------------------------------------------------------


def test_the_library_logs_and_prints_nothing(world, tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO, "attr_engine")
    with pytest.raises(Cancelled):
        attribute(*world, forks.small(), tmp_path, CancelAt(5))
    attribute(*world, forks.small(rows=3), tmp_path)
    assert capfd.readouterr() == ("", "")
    text = [r.getMessage() for r in caplog.records]
    assert all(r.name.startswith("attr_engine.") and r.levelno == logging.INFO for r in caplog.records)
    for stage in ("fisher", "unlearn", "score"):
        assert f"{stage}: started" in text
        assert any(t.startswith(f"{stage}: finished after ") for t in text)
    assert any("cancelled after" in t for t in text)
    assert any("(track) were done before" in t for t in text)


def test_bars_are_drawn_where_they_are_asked_for(world, tmp_path, capfd):
    attribute(*world, forks.small(), tmp_path, bars=True)
    out, err = capfd.readouterr()
    assert out == "" and all(f"{what}: 100%" in err for what in ("Fisher", "unlearning", "under 6 updates"))


# -- finished units -------------------------------------------------------------------------------


def effects_of(folder):
    return read_effects(folder / EFFECTS)


def check_units(units, whole, tracks=None):
    """Every unit holds what the finished run says of its tracks, and no track comes twice."""
    seen = []
    for part in units:
        here, effects = list(part.tracks), part.effects
        seen += here
        assert np.array_equal(effects.base, whole.base[here])
        assert np.array_equal(effects.unlearned, whole.unlearned[:, here])
        assert np.array_equal(effects.displacement, whole.displacement[:, here])
        assert list(effects.influence) == list(whole.influence)
        for name, value in effects.influence.items():
            assert np.array_equal(value, whole.influence[name][:, here])
    assert len(seen) == len(set(seen))
    assert tracks is None or sorted(seen) == list(range(tracks))
    return seen


def test_the_rounds_of_a_race_come_part_by_part(world, tmp_path):
    race = {
        "top": 2,
        "race_draws": 2,
        "score_draws": 8,
        "race_share": 1.0,
        "functions": ("loss_change",),
        "confidence": 1 - 1e-12,  # nothing is decided early, whatever the seed
    }
    attribute(*world, forks.small(**race), tmp_path / "whole")
    whole, out = read_parts(tmp_path / "whole" / EFFECTS), tmp_path / "run"
    units = []
    with pytest.raises(Cancelled):
        attribute(*world, forks.small(**race), out, CancelWithUnits(out, 4))
    reader = finished_units(out)
    units += [next(reader) for _ in range(3)]
    attribute(*world, forks.small(**race), out)
    units += reader
    pairs = [(int(i), u, d) for p in units for i in p.tracks for u in p.updates for d in p.draws]
    expected = [(int(i), u, d) for p in whole for i in p.tracks for u in p.updates for d in p.draws]
    assert sorted(pairs) == sorted(expected) and len(set(pairs)) == len(pairs)


def test_units_of_a_stopped_run_can_be_read_and_the_rest_follows(world, tmp_path):
    attribute(*world, forks.small(), tmp_path / "whole")
    whole, out = effects_of(tmp_path / "whole"), tmp_path / "run"
    assert list(finished_units(out)) == []
    for units in (1, 2):
        with pytest.raises(Cancelled):
            attribute(*world, forks.small(), out, CancelWithUnits(out, units))
        assert len(check_units(finished_units(out), whole)) == 2 * units
    attribute(*world, forks.small(), out)
    check_units(finished_units(out), whole, 6)
    check_units(finished_units(out, follow=True), whole, 6)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_no_track_is_lost_or_twice_where_units_are_put_together_meanwhile(taken, world, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Cancelled):
        attribute(*world, forks.small(), out, CancelWithUnits(out, 2))
    units = finished_units(out)
    first = [next(units) for _ in range(taken)]
    attribute(*world, forks.small(), out)
    assert not (out / "units").exists()
    check_units([*first, *units], effects_of(out), 6)


def test_a_run_can_be_followed_from_other_threads(world, tmp_path, monkeypatch):
    monkeypatch.setattr(follow, "_SECONDS_BETWEEN_LOOKS", 0.01)
    model, tracks, queries = world
    predict = model.predict
    found = {k: [] for k in range(3)}
    states, problems, over, seen = [], [], threading.Event(), threading.Event()

    def is_scoring(state):
        return state.get("score") == "running"

    def status():
        return {stage: line["state"] for stage, line in read_status(tmp_path).items()}

    def slow(*arguments):
        time.sleep(0.002)
        if is_scoring(status()):
            seen.wait(60)  # the scoring goes on once it was seen, however late a thread gets its turn
        return predict(*arguments)

    model.predict = slow

    def read(k):
        try:
            found[k].extend(finished_units(tmp_path, follow=True))
        except BaseException as error:
            problems.append(error)

    def watch():
        try:
            while not over.is_set():
                states.append(status())
                if is_scoring(states[-1]):
                    seen.set()
                time.sleep(0.005)
        except BaseException as error:
            problems.append(error)
        finally:
            seen.set()

    threads = [threading.Thread(target=read, args=(k,)) for k in found] + [threading.Thread(target=watch)]
    for thread in threads:
        thread.start()
    attribute(model, tracks, queries, forks.small(unit_tracks=1), tmp_path)
    over.set()
    for thread in threads:
        thread.join(30)
    assert not problems
    for units in found.values():
        check_units(units, effects_of(tmp_path), 6)
    assert any(map(is_scoring, states))
    assert list(finished_units(tmp_path / "none", follow=True, cancel=CancelAt(3))) == []


# -- costs ----------------------------------------------------------------------------------------


def test_seconds_and_bytes_of_every_stage_add_up_over_sittings(world, tmp_path):
    with pytest.raises(Cancelled):
        attribute(*world, forks.small(), tmp_path, CancelAt(4))
    before = Run(tmp_path, forks.small()).costs()
    attribute(*world, forks.small(), tmp_path)
    run = Run(tmp_path, forks.small())
    costs = run.costs()
    assert list(costs) == ["fisher", "unlearn", "score"]
    assert costs["fisher"]["seconds"] > before["fisher"]["seconds"] > 0
    assert run.timings() == {stage: c["seconds"] for stage, c in costs.items()}
    for c in costs.values():
        assert 1e7 < c["peak_rss_bytes"] < 1e11
    size = (tmp_path / FISHER).stat().st_size
    assert costs["fisher"]["bytes_written"] >= 6 * 0.9 * size, "six units of sums"
    (tmp_path / "timings-1.json").write_text(json.dumps(costs))
    both = run.costs()
    for stage, c in costs.items():
        assert both[stage]["seconds"] == pytest.approx(2 * c["seconds"])
        assert both[stage]["peak_rss_bytes"] == c["peak_rss_bytes"]
    (tmp_path / TIMINGS).write_text('{"fisher": 2.5}')  # of a run before bytes were counted
    (tmp_path / "timings-1.json").unlink()
    assert run.timings() == {"fisher": 2.5}
