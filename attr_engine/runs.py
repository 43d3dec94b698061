"""A run directory: what was asked, in which environment, what is done, and that nobody else writes there."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attr_engine.errors import UserError
from attr_engine.files import remove_leftovers, write_json, writing_in
from attr_engine.models.checkpoint import read_json
from attr_engine.monitor import RUN, Cancel, Monitor, Progress, add_costs, costs_now
from attr_engine.profiling import Profile
from attr_engine.settings import Settings, differences, read_settings, to_json
from attr_engine.units import held, lock, rank, workers

CONFIG, ENVIRONMENT, TIMINGS, LOCKS = "config.json", "environment.json", "timings.json", "locks"
_SECONDS_TO_WAIT = 10.0  # for others to tidy up, and for an earlier process of this rank to end


def key_of(*parts: Any) -> str:
    """A short hash of anything JSON can hold: names a stage's inputs and settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def environment() -> dict[str, Any]:
    """Versions, host and threads that a run depends on."""
    from importlib import metadata

    import torch

    versions = {}
    for name in ("attr-engine", "torch", "numpy", "safetensors", "pyarrow", "stable-audio-tools", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": platform.processor() or platform.machine(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
    }


class Run:
    """An open run directory.

    Attributes:
        path: the directory.
        settings: what this run computes.
        monitor: what it tells while it works.
        profile: where its time goes.
    """

    def __init__(
        self, path: Path, settings: Settings, cancel: Cancel | None = None, bars: bool = False
    ) -> None:
        self.path, self.settings = path, settings
        self.monitor = Monitor(path, cancel, bars)
        self.profile = Profile(path, settings.profile)

    def record(self) -> None:
        """Bind the directory to the settings, before its first result: a refused call binds nothing."""
        # Not in the folder of locks, which another process may just be removing.
        alone = held(self.path / ".record.lock", wait=True) if workers() > 1 else contextlib.nullcontext()
        with alone:
            write_json(self.path / CONFIG, to_json(self.settings))
            write_json(self.path / ENVIRONMENT, environment())
        self.monitor.begin(RUN)

    def progress(self, stage: str, unit: str, what: str = "") -> Progress:
        """What a stage calls to say how far it is; see :meth:`attr_engine.monitor.Monitor.progress`."""
        return self.monitor.progress(stage, unit, what)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Tell when a stage begins and ends, and what it costs; costs of resumed stages add up in ``timings.json``."""
        before = costs_now()
        try:
            with self.monitor.stage(name), self.profile.stage(name):
                yield
        except BaseException:
            with contextlib.suppress(OSError, UserError):  # what ended the stage is the error to tell
                self._add(name, before)
            raise
        self._add(name, before)
        self.profile.write(self.timings)

    def _add(self, name: str, before: dict[str, float]) -> None:
        now = costs_now()
        more = {k: v if k.startswith("peak") else v - before.get(k, v) for k, v in now.items()}
        path = self.path / (TIMINGS if rank() == 0 else f"timings-{rank()}.json")
        timings = _read_costs(path) if path.exists() else {}
        write_json(path, {**timings, name: add_costs(timings.get(name, {}), more)})

    def costs(self) -> dict[str, dict[str, float]]:
        """Stage to what it cost, over all sittings and processes.

        Returns:
            Of each stage ``seconds``, ``bytes_read`` and ``bytes_written`` of all processes together, ``peak_rss_bytes`` of the
            largest process until the end of the stage, and on a GPU ``peak_gpu_bytes``
            (:func:`attr_engine.monitor.costs_now`).
        """
        total: dict[str, dict[str, float]] = {}
        for path in sorted(self.path.glob("timings*.json")):
            for name, costs in _read_costs(path).items():
                total[name] = add_costs(total.get(name, {}), costs)
        return total

    def timings(self) -> dict[str, float]:
        """Stage to seconds, over all sittings and processes."""
        return {name: costs["seconds"] for name, costs in self.costs().items()}


def _read_costs(path: Path) -> dict[str, dict[str, float]]:
    found = read_json(path, "table of timings")
    return {k: v if isinstance(v, dict) else {"seconds": float(v)} for k, v in found.items()}


@contextlib.contextmanager
def open_run(
    path: str | Path, settings: Settings, cancel: Cancel | None = None, bars: bool = False
) -> Iterator[Run]:
    """Open a run directory, new or to be continued: for this process alone, or for those that ``torchrun`` started.

    Args:
        path: the directory.
        settings: what the run computes.
        cancel: says when to stop (:class:`attr_engine.errors.Cancelled`), such as a ``threading.Event``.
        bars: whether to draw bars on standard error.

    Raises:
        UserError: it holds a run with other settings (each is named), or another process works there, or a file in it
            cannot be written, now or while the block runs.
    """
    root = Path(path)
    with writing_in(root), contextlib.ExitStack() as stack:
        root.mkdir(parents=True, exist_ok=True)
        file = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        stack.callback(os.close, file)
        _enter(file, root)
        if workers() > 1:
            _take_rank(stack, root)
        check_same(root, settings)
        run = Run(root, settings, cancel, bars)
        try:
            yield run
        except BaseException as error:
            run.monitor.close(error)
            raise
        run.monitor.close()


def check_same(root: Path, settings: Settings) -> None:
    """Refuse other settings than those that a run directory is bound to.

    Raises:
        UserError: each is named.
    """
    if not (root / CONFIG).exists():
        return
    changed = differences(read_settings(root / CONFIG), settings)
    if changed:
        raise UserError(
            f"{root} holds a run with other settings ({'; '.join(changed)}): use the same, or another --out"
        )


def _enter(file: int, root: Path) -> None:
    """Lock the directory: for this process alone, or for all that were started together; who finds nobody else tidies up."""
    until = time.monotonic() + _SECONDS_TO_WAIT
    while True:
        if lock(file, root / ".lock", fcntl.LOCK_EX | fcntl.LOCK_NB):
            _sweep(root)
            if workers() == 1:
                return
        if workers() > 1 and lock(file, root / ".lock", fcntl.LOCK_SH | fcntl.LOCK_NB):
            return
        if workers() == 1 or time.monotonic() > until:
            raise UserError(f"another process works in {root}: wait for it, or use another --out")
        time.sleep(0.1)


def _take_rank(stack: contextlib.ExitStack, root: Path) -> None:
    """Be the only process of this rank, whose files nobody else writes.

    The workers of a ``torchrun`` that was killed itself live on, and there may be two that know nothing of each other.
    """
    until = time.monotonic() + _SECONDS_TO_WAIT
    while not stack.enter_context(held(root / f".rank-{rank()}.lock")):
        if time.monotonic() > until:
            raise UserError(
                f"another process of rank {rank()} works in {root}, of an earlier start or another torchrun: "
                "wait for it or end it, or use another --out"
            )
        time.sleep(0.1)


def _sweep(root: Path) -> None:
    """Remove what a killed process of this run left half-written; other folders that a user keeps there are not entered."""
    if (root / CONFIG).exists():
        for folder in (root, root / "updates", root / "units", root / "fisher"):
            remove_leftovers(folder)
