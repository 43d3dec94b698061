"""What a run has measured so far, unit by unit, while it goes on or after it was stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from attr_engine.effectfile import read_parts
from attr_engine.effects import Effects
from attr_engine.errors import UserError
from attr_engine.monitor import Cancel
from attr_engine.race import Part
from attr_engine.scoring import EFFECTS

_SECONDS_BETWEEN_LOOKS = 1.0


def _rest(part: Part, seen: set[tuple[int, int, int]]) -> Part | None:
    """What of a part was not seen yet: (track, update, draw) of the first update and draw stand for all."""
    new = np.array([(int(i), part.updates[0], part.draws.start) not in seen for i in part.tracks])
    if not new.any():
        return None
    e = part.effects
    influence = {name: value[:, new] for name, value in e.influence.items()}
    effects = Effects(e.base[new], e.unlearned[:, new], e.displacement[:, new], influence)
    return Part(part.tracks[new], part.updates, part.draws, effects)


def finished_units(run: str | Path, follow: bool = False, cancel: Cancel | None = None) -> Iterator[Part]:
    """Effects that a run has measured, each once.

    Nothing is locked: any process or thread may read while others work.

    Args:
        run: the run directory.
        follow: wait for what is still missing, until the run has all of it.
        cancel: ends the waiting.

    Yields:
        Some tracks, updates and draws, and what :func:`attr_engine.measure_effects` found of them. Units in their order as far as
        they are there, round by round where tracks race; once the run has put them together, what is left of it.

    Raises:
        UserError: a file cannot be read.
    """
    folder, seen = Path(run), set[tuple[int, int, int]]()
    names = set[str]()
    while True:
        whole = (folder / EFFECTS).exists()  # before the units are looked at: they go once it is there
        for path in sorted((folder / "units").glob("*.safetensors")):
            if path.name in names:
                continue
            try:
                (part,) = read_parts(path)
            except (UserError, FileNotFoundError):
                if path.exists():
                    raise
                break  # put together meanwhile, and removed
            names.add(path.name)
            seen.update((int(i), part.updates[0], part.draws.start) for i in part.tracks)
            yield part
        if whole:
            for part in read_parts(folder / EFFECTS):
                rest = _rest(part, seen)
                if rest is not None:
                    yield rest
            return
        if (folder / EFFECTS).exists():
            continue
        if not follow or (cancel is not None and cancel.is_set()):
            return
        time.sleep(_SECONDS_BETWEEN_LOOKS)
