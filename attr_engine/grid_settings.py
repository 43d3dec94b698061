"""What a grid is of: settings with several values, and how its cells are judged; the command line and the library share them."""

from __future__ import annotations

import itertools
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from attr_engine.errors import UserError
from attr_engine.settings import Settings, from_json

CONFIG = "grid.json"
AXES = (
    "layers", "mask_update", "mask_score", "steps", "damping", "unit", "mask_fisher", "fisher_draws", "update_draws",
    "score_draws", "replicates", "plan", "seed", "strengths_by", "update_dtype",
)  # fmt: skip
"""Settings that may have several values in a grid, a run each; ``strengths`` and ``functions`` share a run."""

LEFT_OUT = (
    "queries", "groups", "index", "rescore", "top", "race_draws", "confidence", "race_share", "show", "shares", "title",
)  # fmt: skip
"""Settings that mean nothing to a grid, which unlearns single training tracks and scores all of them."""


@dataclass(frozen=True)
class Judging:
    """How cells are judged.

    Attributes:
        targets: how many training tracks are unlearned, chosen by k-means; ``Settings.self_influence`` names others.
        similar: tracks at either end of a ranking whose similarity is looked at; 0: 100, or a quarter of fewer than 400 tracks.
        embedding: see :func:`attr_engine.heard.any_embedding`.
        pieces: generated pieces a model for the Frechet distance; 0 for none.
        piece_targets: after the unlearning of how many targets pieces are generated, in each cell.
        sampler_steps: of the generated pieces.
        guidance: classifier-free guidance of the generated pieces.
    """

    targets: int = 40
    similar: int = 0
    embedding: str = "latent-statistics"
    pieces: int = 8
    piece_targets: int = 4
    sampler_steps: int = 25
    guidance: float = 3.0


def settings_of_runs(base: Settings, axes: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """The settings of every run, the last axis changing fastest.

    Args:
        base: whatever is the same in all of them.
        axes: name of a setting (:data:`AXES`) to its values.

    Raises:
        UserError: a setting that has one value in a grid, no value, or a value twice.
    """
    for name, values in axes.items():
        if name not in AXES:
            raise UserError(f"{name!r} has one value in a grid: several may be given for {', '.join(AXES)}")
        if not values or any(list(values).count(v) > 1 for v in values):
            raise UserError(f"the values of {name!r} are {list(values)}: give at least one, each once")
    for name in ("queries", "groups", "index", "top"):
        if getattr(base, name):
            raise UserError(
                f"a grid unlearns single training tracks and scores all of them: leave out {name!r}"
            )
    return [
        replace(base, **dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values())
    ]


def plan_of(config: Path | None, flags: Mapping[str, Any]) -> tuple[Settings, dict[str, list[Any]], Judging]:
    """A grid by its config file, then by flags.

    Args:
        config: the ``grid.json`` of a grid, or the ``config.json`` of a run, of which :data:`LEFT_OUT` is not taken.
        flags: any of ``Settings``' and :class:`Judging`'s fields; those of :data:`AXES` as lists of values.

    Returns:
        Settings of all runs, settings with several values, and how cells are judged.

    Raises:
        UserError: an unknown name, or a value of the wrong type.
    """
    from attr_engine.models.checkpoint import read_json

    known = (
        {"settings": {}, "axes": {}, "judging": {}} if config is None else read_json(config, "config file")
    )
    if "settings" not in known:
        own = {name: value for name, value in known.items() if name not in LEFT_OUT}
        known = {"settings": own, "axes": {}, "judging": {}}
    source = "the command line" if config is None else f"config file {config}"
    if set(known) != {"settings", "axes", "judging"} or not all(isinstance(x, dict) for x in known.values()):
        raise UserError(
            f"{source} is neither of a grid nor of a run: give the {CONFIG} or config.json of one"
        )
    axes = {**known["axes"], **{name: values for name, values in flags.items() if name in AXES}}
    axes = {name: _values(name, values, source) for name, values in axes.items()}
    single = {name: values[0] for name, values in axes.items() if len(values) == 1}
    names = set(asdict(Judging()))
    given = {name: value for name, value in flags.items() if name not in names and name not in AXES}
    if "targets" in flags and "self_influence" in flags:
        raise UserError("targets are either chosen or named: leave out --targets or --self-influence")
    if "targets" in flags:
        given["self_influence"] = []
    base = from_json({**known["settings"], **single, **given}, source)
    judging = {**known["judging"], **{name: value for name, value in flags.items() if name in names}}
    kinds = typing.get_type_hints(Judging)
    for name, value in judging.items():
        if name not in kinds or type(value) is not kinds[name]:
            raise UserError(f"{source} has {name!r} = {value!r} for how cells are judged: leave it out")
    return base, {name: values for name, values in axes.items() if len(values) > 1}, Judging(**judging)


def _values(name: str, values: Any, source: str) -> list[Any]:
    """Values of an axis, each checked as the setting that it is."""
    if name not in AXES or not isinstance(values, list) or not values:
        raise UserError(
            f"{source} has {name!r} = {values!r}: several values may be given for {', '.join(AXES)}"
        )
    return [getattr(from_json({name: value}, source), name) for value in values]
