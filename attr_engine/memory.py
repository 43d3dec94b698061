"""How many rows a pass through the model may have: measured with one row and with two, before anything is computed.

Every row is padded to the model's frames, so a pass takes ``fixed + rows x slope`` bytes. Both are found from what passes
of one and of two rows really hold at their peak, on a CPU as on a GPU; nothing is found out by running out of memory.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from attr_engine.diffusion import DrawPlan, noised_rows, predict, work_dtype
from attr_engine.errors import UserError
from attr_engine.latents.batch import Batch
from attr_engine.models.protocol import Denoiser
from attr_engine.persample import SQUARES, summed_gradient

log = logging.getLogger(__name__)

MOST_ROWS = 256  # a pass of more rows is no faster
USUAL_ROWS = 16
# On a CPU a pass of a few long rows is no faster than one row after the other and takes more memory; many short rows gain
# from each other (docs/performance.md).
CPU_PASS_BYTES = 128e6


class _Held(TorchDispatchMode):
    """Bytes of the tensors that were made since it was entered and are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {
            id(x.untyped_storage()) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        }
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in before:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        self._seen.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size: int) -> None:
        self.now -= size


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors that some work holds at its peak, beyond those that were there before.

    On a CPU the scratch inside single operations is not seen; the engine's own take a few MiB.
    """
    if device.type != "cuda":
        with _Held() as held:
            work()
        return held.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def cpu_rows(work: Callable[[int], object]) -> int:
    """Rows a backward pass that is fast on a CPU: as many as hold :data:`CPU_PASS_BYTES`, 1 to :data:`USUAL_ROWS`.

    Found from what passes of one and of two rows hold, not from their time: the same rows, and bits, in every run.

    Args:
        work: runs a pass with a number of rows.
    """
    first, second = (peak_bytes(partial(work, n), torch.device("cpu")) for n in (1, 2))
    return max(1, min(USUAL_ROWS, 1 + int((CPU_PASS_BYTES - first) // max(second - first, 1))))


def weight_bytes(model: Denoiser) -> int:
    """Bytes of the model's own weights."""
    return sum(x.numel() * x.element_size() for x in model.module.state_dict().values())


@dataclass(frozen=True)
class Pass:
    """One kind of pass.

    Attributes:
        work: runs it with a number of rows.
        held: bytes that are held beside it.
    """

    work: Callable[[int], object]
    held: int


def passes(
    model: Denoiser, parameters: Mapping[str, nn.Parameter], batch: Batch, plan: DrawPlan, unit_rows: int,
    directions: int, gradients: str,
) -> dict[str, Pass]:  # fmt: skip
    """The kinds of passes of a run by their stage, and what is held beside each; arguments as of :func:`fit_rows`."""
    wide = work_dtype(model)
    group = sum(p.numel() for p in parameters.values()) * wide.itemsize
    latents = 4 * model.channels * model.frames * wide.itemsize  # clean, noised, target, prediction

    def make(pairs: Any) -> Any:
        return noised_rows(model, batch, pairs, plan, "fisher", False)

    def squares(rows: int) -> None:
        total = {name: torch.zeros_like(p, dtype=wide) for name, p in parameters.items()}
        SQUARES[gradients](model, parameters, make, [(0, d) for d in range(rows)], total)

    def gradient(rows: int) -> object:
        return summed_gradient(model, parameters, make([(0, d) for d in range(rows)]))

    @torch.no_grad()
    def forward(rows: int) -> object:
        return predict(model, make([(0, d) for d in range(rows)]))

    found = {
        "the Fisher": Pass(squares, group),  # the comparison with single rows holds two sums
        "unlearning": Pass(gradient, 5 * group),  # Fisher, mean gradient, direction, update, theta_0
        "scoring": Pass(forward, 2 * group + unit_rows * latents),  # update, theta_0
    }
    if directions:  # in place of the Fisher's sum
        found["influence"] = Pass(squares, (directions - 1) * group)
    return found


def fit_rows(
    model: Denoiser,
    parameters: Mapping[str, nn.Parameter],
    batch: Batch,
    plan: DrawPlan,
    gigabytes: float = 0.0,
    unit_rows: int = 0,
    directions: int = 0,
    gradients: str = "batch",
) -> int:
    """Choose how many rows a pass may have.

    Without a bound: what is fast on a CPU (:func:`cpu_rows`), :data:`USUAL_ROWS` elsewhere. With a bound: as many as let no stage's
    tensors take more than that, on a CPU still no more than are fast.

    Args:
        model: theta_0; its own weights count.
        parameters: the layer group.
        batch: some track, padded to the model's frames.
        plan: draw plan.
        gigabytes: of 10^9 bytes, on the model's device; 0 for no bound.
        unit_rows: (track, draw) pairs of a durable unit of scoring.
        directions: updates that one backward pass meets (influence); 0 for none.
        gradients: of the Fisher, ``"batch"`` or ``"loop"``.

    Returns:
        1 to :data:`MOST_ROWS`.

    Raises:
        UserError: not even one row fits; names the stage and what it needs.
    """
    device = next(model.module.parameters()).device
    kinds = passes(model, parameters, batch, plan, unit_rows, directions, gradients)
    rows = MOST_ROWS if gigabytes else USUAL_ROWS
    if device.type == "cpu":
        fisher = kinds["the Fisher"].work
        fisher(1)  # whatever is only made once, such as cached conditioning
        rows = cpu_rows(fisher)
    if not gigabytes:
        log.info("%d rows a pass: what is fast on this device", rows)
        return rows
    weights = weight_bytes(model)
    for name, one in kinds.items():
        one.work(1)
        first, second = (peak_bytes(partial(one.work, n), device) for n in (1, 2))
        room = gigabytes * 1e9 - weights - one.held - first
        if room < 0:
            need = (weights + one.held + first) / 1e9
            raise UserError(
                f"{name} takes {need:.3g} GB with one row, more than --memory {gigabytes:g}: allow more, or name fewer --layers"
            )
        rows = min(rows, 1 + int(room // max(second - first, 1)))
    log.info("%d rows a pass: what fits into %g GB", rows, gigabytes)
    return rows
