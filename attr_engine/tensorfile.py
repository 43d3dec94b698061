"""Safetensors files with a JSON header of our own, written as ``.part`` and renamed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from attr_engine.errors import UserError
from attr_engine.files import whole_file


def save_tensors(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and JSON metadata; the final name appears only once the bytes are on disk."""
    from safetensors.torch import save_file

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # safetensors sorts by name; sums over tensors are the same bits only in the same order. One entry
    # of metadata, because it writes several in a random order.
    header = json.dumps({**meta, "order": list(plain)})
    with whole_file(path) as part:
        save_file(plain, part, metadata={"attr_engine": header})


def load_tensors(path: Path, key: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote, tensors in the order in which they were given.

    Args:
        path: the file.
        key: if given, the ``key`` in its metadata has to be this one.

    Raises:
        UserError: missing or damaged file, or another key.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path} does not exist: run the stage that writes it first")
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {})["attr_engine"])
            tensors = {name: file.get_tensor(name) for name in meta.pop("order")}
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, it will be made again") from error
    if key is not None and meta.get("key") != key:
        raise UserError(
            f"{path} belongs to other settings, another model or other data: delete it, or choose another --out"
        )
    return tensors, meta
