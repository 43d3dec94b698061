"""What the parts of gpu.py share: the budget, inputs, time, peak memory, checks; the same code on a GPU and on a CPU."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attr_engine.kernels import launch

Row = dict[str, Any]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FLUSH = 2**29  # bytes written between two repetitions: ten times the largest second-level cache
TABLE_SOURCE = "gpu.json"


class Budget:
    """Minutes of the whole run, and of the part that is running."""

    def __init__(self, minutes: float) -> None:
        self.seconds = 60.0 * minutes
        self._end = time.monotonic() + self.seconds
        self._part = self._end

    def start(self, share: float) -> None:
        """Begin a part that may take this share of the whole."""
        self._part = min(self._end, time.monotonic() + share * self.seconds)

    def left(self) -> float:
        """Seconds of this part."""
        return self._part - time.monotonic()

    def whole(self) -> float:
        """Seconds of the run."""
        return self._end - time.monotonic()


@dataclass
class Bench:
    """One run: where it computes, what it may take, what it found so far.

    Attributes:
        device: where everything is measured.
        tiny: small shapes, whose timings mean nothing.
        budget: of time.
        seed: of all inputs.
        rows: rows a pass of the large model; 0 is as many as fit, at most 8.
        checks: every comparison with float64.
        state: what one part leaves to the next: ceilings, the model.
        skipped: what the running part left out, and why.
    """

    device: torch.device
    tiny: bool
    budget: Budget
    seed: int
    rows: int = 0
    checks: list[Row] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    skipped: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = torch.Generator(device=self.device).manual_seed(self.seed)

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers on the device, rounded to a dtype."""
        return torch.randn(shape, generator=self.random, device=self.device).to(dtype)

    def skip(self, what: str, reason: str) -> None:
        """Write down what is left out."""
        self.skipped.append({"what": what, "reason": reason})

    def check(self, kernel: str, way: str, dtype: str, what: str, green: bool, **found: Any) -> bool:
        """Write down a comparison."""
        self.checks.append(
            {"kernel": kernel, "way": way, "dtype": dtype, "what": what, "green": green, **found}
        )
        return green

    def green(self, kernel: str, dtype: str, what: str = "") -> bool:
        """Whether a kernel was compared in this dtype (and shape) and every comparison in this dtype was right."""
        found = [c for c in self.checks if (c["kernel"], c["dtype"]) == (kernel, dtype)]
        there = any(not what or c["what"] == what for c in found)
        return there and all(c["green"] for c in found)


# -- time and memory ------------------------------------------------------------------------------


def sync(device: torch.device) -> None:
    """Wait until the device has nothing to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_flushes: dict[torch.device, Tensor] = {}


def _flush(device: torch.device) -> None:
    """Empty the caches, and give the host time to launch what is timed next."""
    if device.type == "cuda":
        if device not in _flushes:
            _flushes[device] = torch.empty(FLUSH, dtype=torch.uint8, device=device)
        _flushes[device].zero_()


def release(device: torch.device) -> None:
    """Give memory that nothing holds any more back to the device."""
    gc.collect()
    if device.type == "cuda":
        _flushes.clear()
        torch.cuda.empty_cache()


def once(call: Callable[[], Any], device: torch.device, cold: bool = False) -> float:
    """Seconds that one call takes on the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if cold:
        _flush(device)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def alternate(
    ways: Mapping[str, Callable[[], Any]], bench: Bench, repeats: int = 10, seconds: float = 2.0, cold: bool = True,
    least: int = 3,
) -> dict[str, Row]:  # fmt: skip
    """Repetitions of several ways, taking turns; each is run once before that, and once more to see how long it takes.

    Args:
        ways: name to call.
        bench: gives the device.
        repeats: of each way.
        seconds: of a way together.
        cold: whether the caches are emptied before every repetition.
        least: repetitions of each way that are made even where ``seconds`` are used up before.
    """
    expected = {}
    for name, way in ways.items():
        way()
        sync(bench.device)
        expected[name] = once(way, bench.device, cold)
    count = {
        name: 2 if bench.tiny else max(least, min(repeats, int(seconds / max(took, 1e-9))))
        for name, took in expected.items()
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(max(count.values())):
        for name, way in ways.items():
            if turn < count[name]:
                found[name].append(once(way, bench.device, cold))
    return {name: summary(values) for name, values in found.items()}


def summary(seconds: list[float]) -> Row:
    """Repetitions, median and spread."""
    middle = statistics.median(seconds)
    return {
        "seconds": [float(f"{s:.6g}") for s in seconds],
        "median": middle,
        "spread": (max(seconds) - min(seconds)) / middle if middle else 0.0,
    }


def peak(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call needs at most, above what is held already.

    On a CPU: what the high-water mark of the process grew by, which says nothing after a larger call.
    """
    if device.type != "cuda":
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call()
        return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    sync(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    call()
    sync(device)
    return int(torch.cuda.max_memory_allocated(device)) - held


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError)


# -- comparisons ----------------------------------------------------------------------------------


def relative(out: Tensor, wanted: Tensor) -> float:
    """Relative RMS error; the reference must be finite and not zero."""
    norm = float(wanted.double().norm())
    assert 0.0 < norm < float("inf"), "zeros, or what is not finite, would be compared"
    return float((out.double() - wanted.double()).norm()) / norm


def products(g: Tensor, a: Tensor) -> Tensor:
    """Per-sample gradients ``[B, O, I]`` in float32 by one ``torch.bmm``: what there would be without kernels."""
    if launch.products_of_halves(g):
        return torch.bmm(g.mT, a, out_dtype=torch.float32)
    with launch.ieee(g.device):
        return torch.bmm(g.mT.float(), a.float())


def exact(g: Tensor, a: Tensor) -> Tensor:
    """The same in float64, none of them zero."""
    out = torch.bmm(g.double().mT, a.double())
    assert bool((out.flatten(1).norm(dim=1) > 0).all()), "zeros would be compared with zeros"
    return out


@contextlib.contextmanager
def interpreter(on: bool) -> Iterator[None]:
    """Run kernels on CPU tensors in Triton's interpreter, or (``on`` False) as plain PyTorch."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1" if on else "0"
    try:
        yield
    finally:
        del os.environ["TRITON_INTERPRET"]
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
