"""Updates, and the model under them: ``theta_0 + Delta_q`` in the place of theta_0, without copying the model.

While the model runs unlearned its parameters point at other memory, and at theta_0's again afterwards: nothing is copied back
and forth. Unlearned weights stay between units of work while there is room for them (resident); the others are made anew
from their update whenever they are needed (paged).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from attr_engine.models.protocol import Denoiser
from attr_engine.tensorfile import open_tensors, save_tensors


@dataclass(frozen=True)
class Update:
    """``theta_unlearned - theta_0`` of one query at one strength.

    Attributes:
        query: id of the query.
        strength: as asked for, in its unit.
        unit: what that is, one of :data:`attr_engine.unlearn.UNITS`.
        delta: parameter name to tensor (float32; float64 for a float64 model; as :meth:`save` wrote it where it was loaded).
        lr: the learning rate of the paper's formula that this strength meant, of the first step.
        size: norm of the update relative to the norm of the parameters.
        reaction: what it does to its own query, where its size was looked for (:func:`attr_engine.strength.find_size`); else empty.
    """

    query: str
    strength: float
    unit: str
    delta: Mapping[str, Tensor]
    lr: float
    size: float
    reaction: Mapping[str, float] = field(default_factory=dict)

    def save(self, path: Path, key: str, dtype: torch.dtype | None = None) -> None:
        """Write to safetensors, under a key that :meth:`load` checks.

        Args:
            path: the file.
            key: whatever names its inputs.
            dtype: of the tensors on disk; default as they are. bfloat16 rounds every element by at most 2^-9 of itself.
        """
        meta = {
            "key": key,
            "query": self.query,
            "strength": self.strength,
            "unit": self.unit,
            "lr": self.lr,
            "size": self.size,
            "reaction": dict(self.reaction),
        }
        save_tensors(path, {name: value.to(dtype or value.dtype) for name, value in self.delta.items()}, meta)

    @staticmethod
    def load(path: Path, key: str | None = None) -> Update:
        """Open what :meth:`save` wrote; tensors are read one by one, when they are asked for.

        Raises:
            UserError: missing or damaged file, or another key than the one asked for.
        """
        delta, meta = open_tensors(path, key)
        reaction = meta.get("reaction", {})  # which an earlier version did not write
        return Update(
            meta["query"], meta["strength"], meta["unit"], delta, meta["lr"], meta["size"], reaction
        )


def unlearned_weights(model: Denoiser, delta: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``theta_0 + delta``, by name of the parameter, in the parameters' dtype and where they are.

    The sum is taken in the wider dtype of the two and rounded: of a bfloat16 model, elements that change by less than about 2^-9
    of themselves mostly do not change (docs/performance.md says what that costs).
    """
    parameters = dict(model.module.named_parameters())
    with torch.no_grad():
        return {
            name: (parameters[name] + value.to(parameters[name].device)).to(parameters[name].dtype)
            for name, value in delta.items()
        }


@contextlib.contextmanager
def swapped(model: Denoiser, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the model with other weights; afterwards its parameters are theta_0, bit for bit.

    A model whose passes were recorded with the addresses of its weights (``fixed_addresses``, such as CUDA graphs) gets their
    values copied instead.
    """
    parameters = dict(model.module.named_parameters())
    in_place = getattr(model, "fixed_addresses", False)
    kept = {name: parameters[name].data.clone() if in_place else parameters[name].data for name in weights}

    def put(values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            if in_place:
                parameters[name].data.copy_(value)
            else:
                parameters[name].data = value

    try:
        put(weights)
        yield
    finally:
        put(kept)


@contextlib.contextmanager
def applied(model: Denoiser, delta: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the model at ``theta_0 + delta`` (:func:`unlearned_weights`, :func:`swapped`)."""
    with swapped(model, unlearned_weights(model, delta)):
        yield


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Euclidean norm of all elements together."""
    return float(torch.stack([t.detach().double().norm().cpu() for t in tensors.values()]).norm())


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, in bytes; on a CPU what the system could give."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


class Unlearned:
    """Unlearned models of several updates, in one place.

    Args:
        model: theta_0.
        updates: one function an update that returns it.
        room: bytes of unlearned weights that may stay resident.
    """

    def __init__(self, model: Denoiser, updates: Sequence[Callable[[], Update]], room: float = 0.0) -> None:
        self._model, self._updates, self._room = model, updates, room
        self._resident: dict[int, tuple[dict[str, Tensor], float]] = {}

    def __len__(self) -> int:
        return len(self._updates)

    @contextlib.contextmanager
    def under(self, index: int) -> Iterator[float]:
        """Run the model under an update; yields its strength."""
        if index in self._resident:
            weights, strength = self._resident[index]
        else:
            update = self._updates[index]()
            weights, strength = unlearned_weights(self._model, update.delta), update.strength
            if _bytes(weights) <= self._room:
                self._room -= _bytes(weights)
                self._resident[index] = weights, strength
        with swapped(self._model, weights):
            yield strength


class Directions:
    """Updates stacked, as many at a time as there is room for: what inner products with gradients are taken of.

    Args:
        parameters: the layer group.
        updates: one function an update that returns it.
        room: bytes of stacked updates; one at least is held. If all fit, they are read once and stay.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], updates: Sequence[Callable[[], Update]], room: float
    ) -> None:
        self._parameters, self._updates, self._room = parameters, updates, room
        self._all: dict[str, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._updates)

    def chunks(self) -> Iterator[dict[str, Tensor]]:
        """Parameter name to ``[K, *shape]``, where the parameter is; together all updates in their order."""
        if self._all is not None:
            yield self._all
            return
        first = 0
        while first < len(self._updates):
            some = self._updates[first]()
            count = max(1, int(self._room // max(_bytes(some.delta), 1)))
            loaded = [some, *(load() for load in self._updates[first + 1 : first + count])]
            stacked = {
                name: torch.stack([update.delta[name].to(p.device) for update in loaded])
                for name, p in self._parameters.items()
            }
            if len(loaded) == len(self._updates):
                self._all = stacked
            yield stacked
            first += len(loaded)
