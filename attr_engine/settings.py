"""One run's settings: the command line, the config file and the library share this dataclass."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attr_engine.errors import UserError
from attr_engine.profiling import PASSES


def _option(default: Any, text: str, choices: tuple[str, ...] = (), bare: Any = None) -> Any:
    """A field; ``bare`` is the value of its flag where none follows it."""
    metadata = {"help": text, "choices": choices, "bare": bare}
    if isinstance(default, list | tuple):
        return field(default=tuple(default), metadata=metadata)
    return field(default=default, metadata=metadata)


UNLEARNING = ("loss_change", "skew", "displacement")
"""Score functions of one forward pass under an update."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of an attribution run."""

    model: str = _option(
        "", "model folder (model_config.json and model.safetensors), or the model's JSON config"
    )
    weights: str = _option("", "checkpoint (.safetensors or .ckpt) where --model is a JSON config")
    data: str = _option("", "training tracks: a folder made by attr-engine ingest")
    queries: tuple[str, ...] = _option(
        (), "queries: folders made by attr-engine ingest or generate, or audio (files or folders)"
    )
    self_influence: tuple[str, ...] = _option((), "ids of training tracks that are unlearned as queries too")
    groups: str = _option(
        "",
        "column of the training tracks' metadata, such as artist: tracks with the same value are unlearned jointly, and the groups "
        "are ranked for every query",
    )
    layers: tuple[str, ...] = _option(
        ("transformer",),
        "layer groups (cross_attn.to_kv, cross_attn, self_attn, transformer, all) or name patterns",
    )
    functions: tuple[str, ...] = _option(
        (),
        "score functions: ridge, without unlearning (the default); loss_change, skew, displacement (the default with --top, --index and "
        "--groups); to first order influence, norm_influence; the first one leads the report",
    )
    strengths: tuple[float, ...] = _option((1e-2,), "strengths of the update; the first one leads the report")
    strengths_by: str = _option(
        "auto",
        "effects at every strength by a forward pass each (passes); or, to first order in the prediction, one tangent (forward-mode "
        "differentiation) or one finite difference at the first strength for all of them; auto: passes, but tangents for a "
        "bfloat16 model and sizes below 1e-2, whose differences rounding would drown",
        ("auto", "passes", "tangent", "difference"),
    )
    unit: str = _option(
        "size",
        "what a strength is: norm of the update relative to the weights (size); the paper's learning rate (lr); or what every query "
        "reaches on the draws of its update, its size being looked for: that part of the way from its loss to that of predicting nothing "
        "(null_loss, at most 1), or that change of its prediction, relative to the prediction's power (displacement)",
        ("size", "lr", "null_loss", "displacement"),
    )
    steps: int = _option(1, "unlearning steps")
    damping: float = _option(0.1, "added to the Fisher, relative to its mean")
    ridge: float = _option(
        0.3,
        "of the score function ridge: lambda, relative to the mean squared length of the tracks' gradients",
    )
    projection_rank: int = _option(
        16,
        "of the score function ridge: every weight's gradient is projected to a square of so many rows; half as many take a quarter "
        "of the numbers",
    )
    mask_update: bool = _option(True, "M_U: only valid frames of the query are unlearned")
    mask_score: bool = _option(False, "M_L: only valid frames of the tracks are scored")
    mask_fisher: bool = _option(False, "only valid frames count in the Fisher, and in the gradients of ridge")
    fisher_draws: int = _option(4, "draws a track for the Fisher")
    update_draws: int = _option(64, "draws a step for the update")
    score_draws: int = _option(16, "draws a track for the scores")
    replicates: int = _option(
        4, "independently shifted replicates of the timestep sequence; draws are multiples of it"
    )
    plan: str = _option(
        "shared", "draws of its own for every track, or the same for all", ("track", "shared")
    )
    seed: int = _option(0, "seed of all draws")
    dtype: str = _option("float32", "dtype of the denoiser", ("float32", "bfloat16", "float64"))
    device: str = _option("cpu", "torch device, e.g. cpu or cuda")
    rows: int = _option(
        0,
        "(track, draw) pairs a pass through the model (0: what is fast on a CPU, 16 on a GPU, less within --memory)",
    )
    memory: float = _option(
        0.0,
        "GB that the tensors of a run, the model's included, may take: rows a pass are chosen to fit (0: no bound)",
    )
    gradients: str = _option(
        "batch",
        "per-sample gradients of the Fisher: a batch of rows in one backward pass, or one row after the other",
        ("batch", "loop"),
    )
    checkpointing: bool = _option(
        False,
        "compute activations again in backward passes: less memory, a third more arithmetic; needs --gradients loop",
    )
    compile: str = _option(
        "off",
        "forward passes of scoring through torch.compile (about a minute at first), or with CUDA graphs for small models",
        ("off", "forward", "graphs"),
    )
    unit_tracks: int = _option(16, "tracks in one durable unit of scoring")
    threads: int = _option(
        0, "CPU threads (0: torch's default); results are repeatable for one number of threads"
    )
    ema: bool = _option(True, "use the averaged weights of a training checkpoint where it has them")
    cache: str = _option(
        "",
        "folder for what other runs with the same model, tracks and draw plan can use: the Fisher, and losses and predictions "
        "under theta_0",
    )
    update_dtype: str = _option(
        "full",
        "dtype of the updates on disk and in memory: that of their arithmetic, or half of it",
        ("full", "bfloat16"),
    )
    resident: float = _option(
        -1.0,
        "GB of unlearned weights that stay in memory from unit to unit, the others are made anew (-1: a third of what is free, "
        "none with --memory)",
    )
    keep_updates: bool = _option(False, "keep the updates in the run directory after scoring")
    top: int = _option(
        0,
        "race for the k best tracks of every query by the first score function: few draws for all tracks, more where the place "
        "in the top k is not decided, --score-draws at most (0: all draws for all tracks)",
    )
    race_draws: int = _option(4, "draws a track in the first round of a race")
    confidence: float = _option(0.95, "of a race: that a track is on the right side of the top k")
    race_share: float = _option(0.05, "of the draws of exhaustive scoring that a race may take for an update")
    index: str = _option(
        "", "folder made by attr-engine index: only its best --rescore tracks of every query are measured"
    )
    rescore: int = _option(300, "candidates a query that are taken from the index")
    profile: int = _option(
        0,
        "trace so many passes of every stage (4 where no number follows), and write where the time went to profile.md in the run "
        "directory",
        bare=PASSES,
    )
    show: int = _option(10, "tracks a ranking shows in the report")
    shares: str = _option(
        "excess-over-median",
        "transform that turns scores into shares",
        ("excess-over-median", "softmax", "min-max"),
    )
    controls: str = _option(
        "",
        "finished run over pieces that no training track made: a track gets a share only where it stands out more than tracks do there",
    )
    false_accepts: float = _option(0.05, "part of such pieces that may be accepted")
    title: str = _option("", "title of the report")

    def __post_init__(self) -> None:
        if not self.functions:
            unlearning = bool(self.top or self.index or self.groups)  # these are about what unlearning does
            object.__setattr__(self, "functions", UNLEARNING if unlearning else ("ridge",))


# These change what a report shows, how memory is used or what is told, not what is computed.
_PRESENTATION = (
    "show", "shares", "controls", "false_accepts", "title", "keep_updates", "cache", "resident", "profile",
)  # fmt: skip


def to_json(settings: Settings) -> dict[str, Any]:
    """Settings as JSON values, tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def decisive(settings: Settings) -> dict[str, Any]:
    """The settings that decide what is computed, as JSON values."""
    return {name: value for name, value in to_json(settings).items() if name not in _PRESENTATION}


def _convert(name: str, value: Any, kind: Any) -> Any:
    """Check a JSON value against a field's type."""
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"setting {name!r} is {value!r}, expected a list")
        return tuple(_convert(name, v, typing.get_args(kind)[0]) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 1e300 else math.inf
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"setting {name!r} is {value!r}, expected {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"setting {name!r} is {value!r}, expected a finite number")
    return value


def field_types() -> dict[str, Any]:
    """Field name to resolved type."""
    return typing.get_type_hints(Settings)


def from_json(values: Mapping[str, Any], source: str) -> Settings:
    """Settings from JSON values.

    Args:
        values: any subset of the fields.
        source: named in messages.

    Raises:
        UserError: unknown name or wrong type.
    """
    kinds = field_types()
    for name in values:
        if name not in kinds:
            raise UserError(f"{source} has an unknown setting {name!r}; known: {', '.join(kinds)}")
    settings = Settings(**{name: _convert(name, value, kinds[name]) for name, value in values.items()})
    for spec in dataclasses.fields(Settings):
        choices, value = spec.metadata["choices"], getattr(settings, spec.name)
        if choices and value not in choices:
            raise UserError(f"setting {spec.name!r} is {value!r}; known: {', '.join(choices)}")
    return settings


def read_settings(path: Path) -> Settings:
    """Settings from a JSON file, such as the ``config.json`` of a run."""
    from attr_engine.models.checkpoint import read_json

    return from_json(read_json(path, "config file"), f"config file {path}")


def differences(old: Settings, new: Settings) -> list[str]:
    """Settings that decide the result and differ, as ``name: old -> new``."""
    out = []
    for spec in dataclasses.fields(Settings):
        a, b = getattr(old, spec.name), getattr(new, spec.name)
        if a != b and spec.name not in _PRESENTATION:
            out.append(f"{spec.name}: {a!r} -> {b!r}")
    return out
