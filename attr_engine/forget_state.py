"""What a forgetting (:func:`attr_engine.track_loss.forget`) has come to, in a folder: a killed one goes on from there to the same bits."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attr_engine.files import remove_leftovers
from attr_engine.tensorfile import load_tensors, save_tensors

_SECONDS_BETWEEN_CHECKPOINTS = 60.0
_STEPS = "steps"


class SoFar:
    """Losses that were measured, and weights with the optimizer's state, each a whole file.

    Args:
        folder: where they lie; nobody else may be writing there. None: nothing is kept.
        key: of model, tracks and settings; what has another one is refused.
    """

    def __init__(self, folder: Path | None = None, key: str = "") -> None:
        self.folder, self._key, self._saved = folder, key, time.monotonic()
        if folder is not None and folder.exists():
            remove_leftovers(folder)

    def due(self) -> bool:
        """Whether it is time to write again."""
        return self.folder is not None and time.monotonic() - self._saved > _SECONDS_BETWEEN_CHECKPOINTS

    def losses(self, name: str) -> Tensor | None:
        """Losses that were kept under a name.

        Raises:
            UserError: a damaged file, or one of another key.
        """
        found = self._read(name)
        return None if found is None else found[0][name]

    def keep_losses(self, name: str, values: Tensor) -> None:
        """Keep losses, those of the first tracks at least."""
        self._write(name, {name: values}, {})

    def steps(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
        """Put weights and optimizer where they were; returns the steps that were done, 0 where nothing was kept.

        Raises:
            UserError: a damaged file, or one of another key.
        """
        found = self._read(_STEPS)
        if found is None:
            return 0
        tensors, meta = found
        places, state = {name: i for i, name in enumerate(parameters)}, dict[int, dict[str, Tensor]]()
        with torch.no_grad():
            for label, value in tensors.items():
                what, _, name = label.partition(".")
                if what == "p":
                    parameters[name].copy_(value)
                else:
                    state.setdefault(places[name], {})[what] = value.clone()
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        return int(meta["step"])

    def keep_steps(
        self, step: int, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep weights and optimizer as they are after ``step`` steps."""
        tensors = {f"p.{name}": p.detach() for name, p in parameters.items()}
        for name, p in parameters.items():
            # A step without any gradient leaves no state, and sgd never has one.
            tensors |= {f"{what}.{name}": value for what, value in optimizer.state.get(p, {}).items()
                        if isinstance(value, Tensor)}  # fmt: skip
        self._write(_STEPS, tensors, {"step": step})

    def drop(self) -> None:
        """Forget all of it."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        return load_tensors(path, self._key) if path is not None and path.exists() else None

    def _write(self, name: str, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        if self.folder is not None:
            save_tensors(self.folder / f"{name}.safetensors", tensors, {**meta, "key": self._key})
            self._saved = time.monotonic()
