"""One interface for every way to attribute: ``fit`` on a model and its training tracks, then ``score`` queries.

A method is a frozen dataclass whose fields are its options. :func:`method` puts it into :data:`METHODS`; a user names it as
``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE`` (:func:`parse`).
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from attr_engine.errors import UserError
from attr_engine.jobs import Query
from attr_engine.latents.batch import Tracks
from attr_engine.models.protocol import Denoiser
from attr_engine.runs import key_of
from attr_engine.settings import Settings

KINDS = ("black box", "representation", "gradient", "unlearning")
"""What a method looks at: audio alone; the model's hidden states; its gradients; or the model after unlearning."""


def _silent(done: int, total: int) -> None:
    pass


def no_progress(title: str, unit: str) -> Callable[[int, int], None]:
    """Progress that nobody sees; the same call as :func:`attr_engine.progress.bar`."""
    return _silent


@dataclass(frozen=True)
class Workspace:
    """Where a method works, and what is the same for all methods.

    Attributes:
        folder: of this method alone. It may keep there whatever a later call can use, under keys that say what it was made of;
            what it holds after ``fit`` counts as the method's bytes.
        settings: layers, seed, draw plan, numbers of draws, damping and so on, of all white-box methods.
        progress: makes a progress callback of (done, total) from a title and a unit.
    """

    folder: Path
    settings: Settings = field(default_factory=Settings)
    progress: Callable[[str, str], Callable[[int, int], None]] = no_progress


def model_key(model: Denoiser) -> str:
    """Of a model as it computes: its fingerprint, which is that of the checkpoint, and its dtype."""
    return key_of(model.fingerprint, str(next(model.module.parameters()).dtype))


class Method(Protocol):
    """A way to attribute; see :data:`METHODS`."""

    def fit(self, model: Denoiser, tracks: Tracks, work: Workspace) -> Fitted:
        """Do once what all queries share; what is in the workspace already is not done again.

        Raises:
            UserError: what the method needs is missing, by name, with the way out.
        """
        ...


class Fitted(Protocol):
    """A method that knows the training tracks.

    What depends on more than model, tracks, settings and options, such as a checkpoint's file, has a ``fingerprint`` too, a hex digest
    that changes with it: kept scores belong to it.
    """

    def score(self, queries: Sequence[Query]) -> np.ndarray:
        """Scores float64 ``[Q, N]``, larger = more responsible; a query's row does not depend on the other queries."""
        ...


@dataclass(frozen=True)
class Entry:
    """One method of :data:`METHODS`.

    Attributes:
        make: the dataclass.
        kind: one of :data:`KINDS`.
        text: one line: what it does and who described it.
        needs: what a user has to name first, such as a checkpoint; empty where the method works as it is.
    """

    make: Callable[..., Method]
    kind: str
    text: str
    needs: str = ""


METHODS: dict[str, Entry] = {}
"""Name to method; :func:`method` adds your own."""

_T = typing.TypeVar("_T", bound=type)


def method(name: str, kind: str, text: str, needs: str = "") -> Callable[[_T], _T]:
    """Register a frozen dataclass with ``fit`` as a method.

    Args:
        name: what users call it.
        kind: one of :data:`KINDS`.
        text: one line for lists: what it does, and its source.
        needs: what a user has to name first.
    """

    def register(cls: _T) -> _T:
        if kind not in KINDS or name in METHODS:
            raise ValueError(f"method {name!r} of kind {kind!r}: a name may stand once, kinds are {KINDS}")
        METHODS[name] = Entry(cls, kind, text, needs)
        return cls

    return register


def option(default: Any, text: str) -> Any:
    """A field of a method with its help; ``default`` is a str, int, float or bool."""
    return field(default=default, metadata={"help": text})


def parse(text: str) -> tuple[str, Method]:
    """A method from ``NAME`` or ``NAME:OPTION=VALUE,OPTION=VALUE``.

    Returns:
        The name as given, which tells methods with other options apart; and the method.

    Raises:
        UserError: unknown name or option, or a value that is not of the option's type.
    """
    name, _, rest = text.partition(":")
    if name not in METHODS:
        raise UserError(f"there is no method {name!r}: choose from {', '.join(sorted(METHODS))}")
    cls: Any = METHODS[name].make
    kinds, values = typing.get_type_hints(cls), dict[str, Any]()
    names = [f.name for f in dataclasses.fields(cls)]
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if key not in names or not equals:
            known = ", ".join(f"{n}={getattr(cls, n)}" for n in names) or "none"
            raise UserError(f"method {name!r} has no option {part!r}: write NAME=VALUE; its options: {known}")
        values[key] = _value(name, key, value, kinds[key])
    return text, cls(**values)


_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def _value(name: str, key: str, text: str, kind: Any) -> Any:
    try:
        value = _BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError) as error:
        raise UserError(f"option {key} of method {name!r} is {text!r}: expected {kind.__name__}") from error
    if kind is float and not math.isfinite(value):
        raise UserError(f"option {key} of method {name!r} is {text!r}: expected a finite number")
    return value
