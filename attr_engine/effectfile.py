"""Per-draw numbers on disk, in safetensors: what every score and standard error of a run is made of.

The tensors and the header are described in docs/results.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attr_engine.effects import Effects
from attr_engine.errors import UserError
from attr_engine.race import Part
from attr_engine.tensorfile import load_tensors, save_tensors

FORMAT = "attr_engine.effects/1"
_INFLUENCE = "influence."


def to_tensors(effects: Effects) -> dict[str, torch.Tensor]:
    """Effects as named tensors, ``influence.<function>`` for those to first order."""
    arrays = {name: value for name, value in vars(effects).items() if name != "influence"}
    arrays |= {_INFLUENCE + name: value for name, value in effects.influence.items()}
    return {name: torch.as_tensor(np.ascontiguousarray(value)) for name, value in arrays.items()}


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> Effects:
    """What :func:`to_tensors` made tensors of."""
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    influence = {n.removeprefix(_INFLUENCE): x for n, x in arrays.items() if n.startswith(_INFLUENCE)}
    return Effects(arrays["base"], arrays["unlearned"], arrays["displacement"], influence)


def save_parts(path: Path, parts: Sequence[Part], header: Mapping[str, Any]) -> None:
    """Write parts as one file; the names of tensors of those after the first begin with ``part.<n>.``.

    Args:
        path: the file.
        parts: of one run.
        header: the ``key`` that :func:`read_parts` checks; ``tracks`` (ids), ``updates`` (query and strength) and ``replicates``.
    """
    tensors: dict[str, torch.Tensor] = {}
    listed = []
    for n, part in enumerate(parts):
        prefix = f"part.{n}." if n else ""
        tensors |= {prefix + name: value for name, value in to_tensors(part.effects).items()}
        tensors[prefix + "tracks"] = torch.as_tensor(np.asarray(part.tracks, dtype=np.int64))
        listed.append(
            {"updates": list(part.updates), "first_draw": part.draws.start, "draws": len(part.draws)}
        )
    save_tensors(path, tensors, {"format": FORMAT, **header, "parts": listed})


def read_parts(path: str | Path, key: str | None = None) -> list[Part]:
    """Read what :func:`save_parts` wrote.

    Raises:
        UserError: missing or damaged file, another key or another format.
    """
    return _read(Path(path), key)[0]


def _read(path: Path, key: str | None) -> tuple[list[Part], dict[str, Any]]:
    tensors, header = load_tensors(path, key)
    found = header.get("format")
    if found != FORMAT:
        raise UserError(f"{path} is of format {found!r}, this version reads {FORMAT!r}: score again")
    try:
        return [_part(n, row, tensors) for n, row in enumerate(header["parts"])], header
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} does not hold the effects of a run ({error}): score again") from error


def _part(n: int, row: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Part:
    prefix = f"part.{n}." if n else ""
    some = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and (n or not name.startswith("part."))
    }
    tracks, effects = some.pop("tracks").numpy(), from_tensors(some)
    draws = range(row["first_draw"], row["first_draw"] + row["draws"])
    for values in (effects.unlearned, effects.displacement, *effects.influence.values()):
        if values.shape[1:] != effects.base.shape or len(values) not in (0, len(row["updates"])):
            raise ValueError(f"arrays of shape {list(values.shape)} and {list(effects.base.shape)}")
    if effects.base.shape != (len(tracks), len(draws)):
        raise ValueError(
            f"losses of shape {list(effects.base.shape)} of {len(tracks)} tracks on {len(draws)} draws"
        )
    return Part(tracks, row["updates"], draws, effects)


def read_effects(path: str | Path, key: str | None = None) -> Effects:
    """Read per-draw losses, displacements and influences, such as the ``effects.safetensors`` of a run.

    Args:
        path: the file.
        key: if given, the ``key`` in its header has to be this one.

    Returns:
        Effects of all tracks under all updates; where not every one of them was measured on all draws (a race, a cascade)
        NaN stands for what was not.

    Raises:
        UserError: missing or damaged file, another key or another format.
    """
    parts, header = _read(Path(path), key)
    tracks, updates = len(header.get("tracks", ())), len(header.get("updates", ()))
    if len(parts) == 1 and len(parts[0].tracks) >= tracks:
        return parts[0].effects
    draws = max(part.draws.stop for part in parts)
    base = np.full((tracks, draws), np.nan)

    def whole(values: Sequence[np.ndarray]) -> np.ndarray:
        if not any(map(len, values)):
            return np.empty((0, *base.shape))
        out = np.full((updates, *base.shape), np.nan)
        for part, some in zip(parts, values, strict=True):
            out[np.ix_(np.asarray(part.updates), part.tracks, np.asarray(part.draws))] = some
        return out

    for part in parts:
        base[np.ix_(part.tracks, np.asarray(part.draws))] = part.effects.base
    influence = {
        name: whole([part.effects.influence[name] for part in parts]) for name in parts[0].effects.influence
    }
    return Effects(
        base,
        whole([part.effects.unlearned for part in parts]),
        whole([part.effects.displacement for part in parts]),
        influence,
    )
