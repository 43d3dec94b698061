"""What a run tells while it works: status lines, log messages, bars; and whether it was told to stop.

A run directory has ``status.jsonl``, with a JSON object a line (:meth:`Monitor.line`); of further processes
``status-<rank>.jsonl``. Lines are appended whole and never rewritten.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from attr_engine import progress
from attr_engine.errors import Cancelled, one_line
from attr_engine.units import rank, workers

STATUS = "status"
RUN = "run"  # the stage that stands for the whole call
_LEAST_SECONDS, _MOST_SECONDS = 1.0, 30.0  # between two lines of a stage that runs
_LINES = 1000  # about so many before lines become rarer

log = logging.getLogger(__name__)


class Cancel(Protocol):
    """What says that work has to stop, such as a ``threading.Event``."""

    def is_set(self) -> bool:
        """Whether it has to."""
        ...


class Progress:
    """Told by a stage how far it is: ``show(done, total)``, and ``show.tick(share)`` within a unit.

    Both raise :class:`attr_engine.errors.Cancelled` where the run was told to stop, so they are called where everything that
    is finished is durable or can be made again.
    """

    def __init__(
        self, monitor: Monitor, stage: str, unit: str, bar: Callable[[float, int], None] | None
    ) -> None:
        self.monitor, self.stage, self.unit, self._bar = monitor, stage, unit, bar
        self.done, self.total, self._own = 0.0, 0, False
        self.speed = progress.Speed(processes=workers())
        self._written = float("-inf")
        self._begun = time.monotonic()

    def __call__(self, done: float, total: int) -> None:
        """So much of the stage is done, by all processes and sittings."""
        first = not self.total
        self._own = (self.monitor.begin(self.stage) and first) or self._own
        if first and done:
            log.info("%s: %g of %d (%s) were done before", self.stage, done, total, self.unit)
        self.done, self.total = max(done, self.done), total  # what others did may have been counted already
        self._show(self.done)
        if self._own and done >= total:  # a stage that no block surrounds
            self.monitor.end(self.stage)

    def tick(self, share: float = 0.0) -> None:
        """Called after each pass through the model within a unit; ``share`` of the unit, 0 to 1, is done."""
        self._show(min(self.done + min(share, 1.0), self.total))

    def within(self, passes: int) -> Callable[[], None]:
        """What to call before each of a unit's passes: it counts them, and says how far the unit is."""
        count = 0

        def tick() -> None:
            nonlocal count
            self.tick(count / max(passes, 1))
            count += 1

        return tick

    def _show(self, done: float) -> None:
        self.speed.add(done)
        if self._bar is not None and self.total:
            self._bar(done, self.total)
        now = time.monotonic()
        pause = max((now - self._begun) / _LINES, _LEAST_SECONDS)
        if now - self._written >= min(pause, _MOST_SECONDS) and self.total:
            self._written = now
            self.monitor.line(self.stage, "running", done)
        self.monitor.check()


class Monitor:
    """Of one process of a run.

    Args:
        folder: the run directory.
        cancel: says when to stop; looked at between passes through the model.
        bars: whether to draw bars on standard error.
    """

    def __init__(self, folder: Path, cancel: Cancel | None = None, bars: bool = False) -> None:
        self._folder, self._cancel, self._bars = folder, cancel, bars
        self._file: int | None = None
        self._progress: dict[str, Progress] = {}
        self._begun: dict[str, float] = {}

    def check(self) -> None:
        """Raise :class:`attr_engine.errors.Cancelled` where the run was told to stop."""
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled("cancelled; the same call carries on")

    def progress(self, stage: str, unit: str, what: str = "") -> Progress:
        """What a stage calls to say how far it is.

        Args:
            stage: its name in the status lines.
            unit: what is counted, e.g. ``"track"``.
            what: the bar's text; default the stage's name.
        """
        bar = progress.bar(what or stage, unit) if self._bars else None
        self._progress[stage] = Progress(self, stage, unit, bar)
        return self._progress[stage]

    def begin(self, stage: str) -> bool:
        """A stage begins, unless it has begun; returns whether it does."""
        if stage in self._begun:
            return False
        self._begun[stage] = time.monotonic()
        log.info("%s: started", stage)
        self.line(stage, "started")
        return True

    def end(self, stage: str, error: BaseException | None = None) -> None:
        """A stage that has begun ends, for the better or the worse."""
        if stage not in self._begun:
            return
        state, seconds = _state(error), time.monotonic() - self._begun[stage]
        log.info("%s: %s after %.1f s%s", stage, state, seconds, f": {one_line(error)}" if error else "")
        shown = self._progress.get(stage)
        self.line(stage, state, shown.done if shown else None, error)
        del self._begun[stage]
        self._progress.pop(stage, None)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage: it begins and ends with the block."""
        self.check()
        self.begin(name)
        try:
            yield
        except BaseException as error:
            self.end(name, error)
            raise
        self.end(name)

    def line(
        self, stage: str, state: str, done: float | None = None, error: BaseException | None = None
    ) -> None:
        """Append a status line.

        Its keys: ``time`` (ISO 8601, UTC), ``rank``, ``stage``, ``state`` (``started``, ``running``, ``finished``, ``failed``,
        ``cancelled``), ``done``, ``total`` and ``unit`` (null where nothing is counted), ``seconds`` (of this sitting),
        ``seconds_left`` (null where it is not known), and ``error``, one line, where it failed.
        """
        shown, now = self._progress.get(stage), time.monotonic()
        left = shown.speed.seconds_left(shown.total) if shown and state == "running" else None
        record = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "rank": rank(),
            "stage": stage,
            "state": state,
            "done": None if done is None else round(done, 3),
            "total": shown.total if shown and done is not None else None,
            "unit": shown.unit if shown else None,
            "seconds": round(now - self._begun.get(stage, now), 3),
            "seconds_left": 0.0 if state == "finished" else None if left is None else round(left, 1),
        }
        if error is not None and state == "failed":
            record["error"] = one_line(error)
        try:
            os.write(self._open(), (json.dumps(record) + "\n").encode())
        except OSError as problem:  # a full disk stops the run itself soon enough, and says so better
            log.warning("no status line could be written to %s: %s", self._folder, problem.strerror)

    def _open(self) -> int:
        """The status file, at the beginning of a line."""
        if self._file is None:
            name = f"{STATUS}.jsonl" if rank() == 0 else f"{STATUS}-{rank()}.jsonl"
            self._file = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":  # a killed process' last line
                os.write(self._file, b"\n")
        return self._file

    def close(self, error: BaseException | None = None) -> None:
        """End what has not ended, the run's own stage last, and close the file."""
        for stage in sorted(self._begun, key=lambda name: name == RUN):
            self.end(stage, error)
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _state(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    return "cancelled" if isinstance(error, Cancelled | KeyboardInterrupt | GeneratorExit) else "failed"


def read_status(run: str | Path, rank: int | None = None) -> dict[str, dict[str, Any]]:
    """The last state of each stage, from a run directory at any time and from any process or thread.

    Args:
        run: the run directory.
        rank: of one process only; default the newest line of any.

    Returns:
        Stage to its newest status line, as :meth:`Monitor.line` writes it; the stage ``"run"`` is the whole call. Empty
        before the first line. What is not a whole line is left out: it is being written, or was cut by a kill.
    """
    lines: list[dict[str, Any]] = []
    for path in sorted(Path(run).glob(f"{STATUS}*.jsonl")):
        for text in path.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and {"time", "stage", "rank"} <= line.keys():
                    lines.append(line)
    last: dict[str, dict[str, Any]] = {}
    for line in sorted(
        lines, key=lambda x: str(x["time"])
    ):  # stable: lines of one process stay in their order
        if rank is None or line["rank"] == rank:
            last[line["stage"]] = line
    return last


def costs_now() -> dict[str, float]:
    """What this process has taken so far, of all its threads.

    Returns:
        ``seconds`` (of a clock), ``bytes_read`` and ``bytes_written`` (through read and write calls, whatever the file; not what
        is mapped into memory; Linux only), ``peak_rss_bytes``, and on a GPU ``peak_gpu_bytes`` of tensors.
    """
    found = {"seconds": time.perf_counter()}
    with contextlib.suppress(OSError):
        counts = dict(x.split(": ") for x in Path("/proc/self/io").read_text().splitlines())
        found |= {"bytes_read": float(counts["rchar"]), "bytes_written": float(counts["wchar"])}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found["peak_rss_bytes"] = float(peak if sys.platform == "darwin" else 1024 * peak)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found["peak_gpu_bytes"] = float(torch.cuda.max_memory_allocated())
    return found


def add_costs(total: dict[str, float], more: dict[str, float]) -> dict[str, float]:
    """Costs of one thing after another: sums, and the larger of two peaks."""
    return {
        name: max(total.get(name, 0.0), more.get(name, 0.0))
        if name.startswith("peak")
        else total.get(name, 0.0) + more.get(name, 0.0)
        for name in total.keys() | more.keys()
    }
