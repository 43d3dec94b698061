"""Safetensors files with a JSON header of our own, written as ``.part`` and renamed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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


class _Lazy(Mapping[str, Tensor]):
    """Tensors of an open file, in the order in which they were written; each is read whenever it is asked for."""

    def __init__(self, file: Any, order: Sequence[str]) -> None:
        self._file, self._order = file, dict.fromkeys(order)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._order:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)


def load_meta(path: Path) -> dict[str, Any]:
    """The metadata alone of what :func:`save_tensors` wrote.

    Raises:
        UserError: missing or damaged file.
    """
    return open_tensors(path)[1]


def load_tensors(path: Path, key: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote, tensors in the order in which they were given.

    Args:
        path: the file.
        key: if given, the ``key`` in its metadata has to be this one.

    Raises:
        UserError: missing or damaged file, or another key.
    """
    tensors, meta = open_tensors(path, key)
    return dict(tensors), meta


def open_tensors(path: Path, key: str | None = None) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """:func:`load_tensors`, but tensors are read one by one, when they are asked for; the file stays open as long as they are."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path} does not exist: run the stage that writes it first")
    try:
        file = safe_open(path, framework="pt")
        meta = json.loads((file.metadata() or {})["attr_engine"])
        tensors = _Lazy(file, meta.pop("order"))
        if set(tensors) != set(file.keys()):
            raise ValueError("its list of tensors is not what it holds")
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it, it will be made again") from error
    if key is not None and meta.get("key") != key:
        raise UserError(
            f"{path} belongs to other settings, another model or other data: delete it, or choose another --out"
        )
    return tensors, meta
