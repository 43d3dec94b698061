"""Where a run's time goes: a trace of the first passes of every stage, and NVTX ranges where a GPU works.

A pass is one prediction of the model and what follows until the next one, so its backward pass is in it. Nothing is computed
differently: the model's ``predict`` is called through a wrapper that counts.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from attr_engine.files import whole_file, write_text
from attr_engine.units import held, rank

if TYPE_CHECKING:
    from torch import Tensor
    from torch.profiler import profile

    from attr_engine.models.protocol import Denoiser

FOLDER, TABLE = "profile", "profile.md"
PASSES = 4
"""Passes of a stage that ``--profile`` traces: few enough for a file that a browser opens."""
_OPERATORS = 15


class Profile:
    """Of one process of a run.

    Args:
        folder: the run directory; gets ``profile.md`` and the folder ``profile`` with a Chrome trace for each stage.
        passes: how many of every stage are traced; 0: none, and nothing is written.
    """

    def __init__(self, folder: Path, passes: int) -> None:
        self._folder, self._passes = folder, passes
        self._stage, self._count = "", 0
        self._trace: _Trace | None = None
        self._ranges = contextlib.ExitStack()  # NVTX, of the pass that is going on

    def watch(self, model: Denoiser) -> Denoiser:
        """The model, each of whose predictions begins a pass; as it is where nobody looks at passes."""
        return cast("Denoiser", _Watched(model, self)) if self._passes or _cuda() else model

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage begins and ends with the block; one within another is part of that."""
        if self._stage or not (self._passes or _cuda()):
            yield
            return
        self._stage, self._count = name, 0
        self._trace = _Trace(name) if self._passes else None
        try:
            with _nvtx(name), self._ranges:
                yield
            self._end(write=self._count > 0)
        finally:
            self._end(write=False)
            self._stage = ""

    def begin_pass(self) -> None:
        """The next pass of a stage begins; with the one after the last that is traced the trace is written."""
        if not self._stage:
            return
        self._count += 1
        if self._count > self._passes:
            self._end(write=True)
        self._ranges.close()
        self._ranges.enter_context(_nvtx(f"{self._stage}: pass {self._count}"))
        if self._trace is not None:
            self._trace.begin_pass(self._count)

    def _end(self, write: bool) -> None:
        """The trace ends, if there is one."""
        trace, self._trace = self._trace, None
        if trace is not None:
            trace.end()
            if write:
                own = f"-{rank()}" if rank() else ""
                trace.write(self._folder / FOLDER / f"{self._stage}{own}.json")

    def write(self, timings: Callable[[], Mapping[str, float]]) -> None:
        """Write ``profile.md``: what the stages took, and the operators of those that were traced.

        Args:
            timings: gives the seconds of every stage, as :meth:`attr_engine.runs.Run.timings`; asked while no other process writes.
        """
        if not self._passes:
            return
        with held(self._folder / ".profile.lock", wait=True):
            self._write(timings())

    def _write(self, seconds: Mapping[str, float]) -> None:
        total = sum(seconds.values()) or 1.0
        lines = ["# Where the time went", "", "| stage | seconds | share |", "|---|---|---|"]
        lines += [f"| {name} | {s:.2f} | {s / total:.3f} |" for name, s in seconds.items()]
        lines += [
            "",
            "Seconds of a clock, of all processes and sittings together, tracing and its files included.",
        ]
        for name in seconds:
            for path in sorted((self._folder / FOLDER).glob(f"{name}*.md")):
                lines += ["", path.read_text(encoding="utf-8").rstrip()]
        write_text(self._folder / TABLE, "\n".join(lines) + "\n")


class _Watched:
    """A denoiser that says when a pass begins; everything else is the model's own."""

    def __init__(self, model: Denoiser, profile: Profile) -> None:
        self._model, self._profile = model, profile

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        self._profile.begin_pass()
        return self._model.predict(x_t, t, conditioning)


class _Trace:
    """What torch's profiler sees from now on, the stage and its passes as named ranges in it."""

    def __init__(self, stage: str) -> None:
        from torch.profiler import ProfilerActivity, profile, record_function

        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if _cuda() else [])]
        self._stage, self._passes = stage, 0
        self._profiler: profile = profile(activities=activities, acc_events=True)
        self._profiler.start()
        self._whole, self._pass = contextlib.ExitStack(), contextlib.ExitStack()
        self._whole.enter_context(record_function(stage))

    def begin_pass(self, number: int) -> None:
        from torch.profiler import record_function

        self._passes = number
        self._pass.close()
        self._pass.enter_context(record_function(self._pass_name(number)))

    def end(self) -> None:
        self._pass.close()
        self._whole.close()
        self._profiler.stop()

    def write(self, path: Path) -> None:
        """The trace, and beside it the operators that took longest, as Markdown."""
        with whole_file(path) as part:
            self._profiler.export_chrome_trace(str(part))
        write_text(path.with_suffix(".md"), self._operators(path))

    def _operators(self, path: Path) -> str:
        own = {self._stage, *(self._pass_name(i + 1) for i in range(self._passes))}
        rows = [r for r in self._profiler.key_averages() if r.key not in own]
        where = "device" if _cuda() else "cpu"
        took = {r.key: float(getattr(r, f"self_{where}_time_total")) for r in rows}
        total = sum(took.values()) or 1.0
        longest = sorted(rows, key=lambda r: -took[r.key])[:_OPERATORS]
        device = "GPU" if where == "device" else "CPU"
        return "\n".join([
            f"## {path.stem}, passes 1 to {self._passes} of this sitting",
            "",
            f"Trace: `{FOLDER}/{path.name}`, for chrome://tracing or ui.perfetto.dev. Times of the {device}, without what an operator "
            "itself calls.",
            "",
            "| operator | calls | ms | share |",
            "|---|---|---|---|",
            *(f"| `{r.key.replace('|', '/')}` | {r.count} | {took[r.key] / 1e3:.2f} | {took[r.key] / total:.3f} |" for r in longest),
            "",
        ])  # fmt: skip

    def _pass_name(self, number: int) -> str:
        return f"{self._stage}: pass {number}"


def _cuda() -> bool:
    """Whether this process has begun to use a GPU; torch is not imported for the question."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()


@contextlib.contextmanager
def _nvtx(name: str) -> Iterator[None]:
    """A range that NVIDIA's tools show; nothing without a GPU."""
    if not _cuda():
        yield
        return
    from torch.cuda import nvtx

    nvtx.range_push(name)
    try:
        yield
    finally:
        nvtx.range_pop()
