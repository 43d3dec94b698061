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
from attr_engine.files import write_json
from attr_engine.models.checkpoint import read_json
from attr_engine.settings import Settings, differences, read_settings, to_json
from attr_engine.units import held, rank, workers

CONFIG, ENVIRONMENT, TIMINGS, LOCKS = "config.json", "environment.json", "timings.json", "locks"
_SECONDS_TO_WAIT = 10.0  # for the first of several processes to tidy up


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
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path, self.settings = path, settings

    def record(self) -> None:
        """Bind the directory to the settings, before its first result: a refused call binds nothing.

        Raises:
            UserError: it cannot be written.
        """
        try:
            with held(self.path / LOCKS / "record.lock", wait=True):
                write_json(self.path / CONFIG, to_json(self.settings))
                write_json(self.path / ENVIRONMENT, environment())
        except OSError as error:
            raise _unwritable(self.path, error) from error

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; seconds of resumed stages add up in ``timings.json``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            path = self.path / (TIMINGS if rank() == 0 else f"timings-{rank()}.json")
            timings = read_json(path, "table of timings") if path.exists() else {}
            timings[name] = timings.get(name, 0.0) + time.perf_counter() - start
            write_json(path, timings)

    def timings(self) -> dict[str, float]:
        """Stage name to seconds, over all sittings and processes."""
        total: dict[str, float] = {}
        for path in sorted(self.path.glob("timings*.json")):
            for name, seconds in read_json(path, "table of timings").items():
                total[name] = total.get(name, 0.0) + seconds
        return total


@contextlib.contextmanager
def open_run(path: str | Path, settings: Settings) -> Iterator[Run]:
    """Open a run directory, new or to be continued: for this process alone, or for those that ``torchrun`` started.

    Raises:
        UserError: it holds a run with other settings (each is named), or another process works there,
            or it cannot be written.
    """
    root = Path(path)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(root, error) from error
    try:
        config = root / CONFIG
        if _take(lock, root) and config.exists():
            _sweep(root)
        if workers() > 1:
            fcntl.flock(lock, fcntl.LOCK_SH)
        if config.exists():
            changed = differences(read_settings(config), settings)
            if changed:
                raise UserError(
                    f"{root} holds a run with other settings ({'; '.join(changed)}): use the same, or another --out"
                )
        yield Run(root, settings)
    finally:
        os.close(lock)


def _unwritable(root: Path, error: OSError) -> UserError:
    return UserError(f"the run directory {root} cannot be written ({error.strerror}): choose another --out")


def _sweep(root: Path) -> None:
    """Remove what a killed process of this run left half-written, and nothing that may be somebody else's.

    Those are our ``.part`` files and safetensors' ``.tmp`` files, in the folders that only a run has and
    directly in the run directory; folders that a user keeps beside them are not entered.
    """
    for folder in (root, root / "updates", root / "units", root / "fisher"):
        for path in [*folder.glob("*.safetensors.part"), *folder.glob(".tmp??????")]:
            path.unlink(missing_ok=True)


def _take(lock: int, root: Path) -> bool:
    """Lock the directory; returns whether for this process alone."""
    until = time.monotonic() + _SECONDS_TO_WAIT
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if workers() > 1:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        if workers() == 1 or time.monotonic() > until:
            raise UserError(f"another process works in {root}: wait for it, or use another --out")
        time.sleep(0.1)
