"""``attr-engine forget``: tracks taken out of a model."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attr_engine.errors import UserError, printable
from attr_engine.forget_settings import DEFAULTS, Removal

if TYPE_CHECKING:
    from attr_engine.latents import LatentDataset


def add_forget(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the flags of the command."""
    p = command(commands, "forget", "unlearn training tracks jointly, write the model without them, and measure what it lost",
                """examples:
  attr-engine forget --model model --data latents --where artist="The Salt Moths" --out forgotten
  attr-engine forget --model model --data latents --forget ids.txt --method mucs --held-out held-out --out forgotten
  attr-engine forget --model model --data latents --forget ids.txt --method ascent --strengths 3e-3 1e-2 3e-2 --out sweep
  attr-engine attribute --model forgotten/model-0.01 --data latents --queries pieces --out run   # an unlearned model is a model

Writes model-STRENGTH/ (a model folder), forget.md, forget.csv, forget.json and forget.png, all anew after every strength. Stopped
at any moment, the same command carries on; with more strengths it adds to what is there. That a loss rose does not prove that a
model holds nothing of a track any more: the truth is a model that was trained without it (attr-engine retrain).
""")  # fmt: skip
    p.add_argument("--model", required=True, help="model folder, or the model's JSON config")
    p.add_argument("--weights", default="", help="checkpoint where --model is a JSON config")
    p.add_argument("--data", required=True, help="training tracks: a folder made by attr-engine ingest")
    p.add_argument("--out", required=True, help="folder; the same command carries on there")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--forget", default="", metavar="FILE", help="text file of ids to forget, one a line")
    what.add_argument(
        "--where",
        default="",
        metavar="COLUMN=VALUE",
        help="forget the tracks with this value in their metadata",
    )
    p.add_argument("--held-out", default="", help="data set of further tracks whose loss is reported")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"),
                   help="dtype of the denoiser (default: float32)")  # fmt: skip
    p.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    defaults = Removal()
    for spec in dataclasses.fields(Removal):
        value, flag = getattr(defaults, spec.name), f"--{spec.name.replace('_', '-')}"
        options: dict[str, Any] = {"default": value, "help": spec.metadata["help"].replace("%", "%%")}
        if isinstance(value, bool):
            options |= {"choices": ("on", "off"), "default": "on" if value else "off"}
        elif isinstance(value, tuple):
            options |= {"nargs": "+", "metavar": "X", "type": float if spec.name == "strengths" else str}
        else:
            options |= {"type": type(value)}
        if spec.name == "method":
            options["choices"] = tuple(DEFAULTS)
        if value not in ((), ""):
            shown = " ".join(value) if isinstance(value, tuple) else options["default"]
            options["help"] += f" (default: {shown})"
        p.add_argument(flag, **options)


def forget(args: argparse.Namespace) -> None:
    """Forget, and print the table."""
    from attr_engine import progress
    from attr_engine.forget import Forgetting
    from attr_engine.latents import LatentDataset
    from attr_engine.load import open_model

    values: dict[str, Any] = {spec.name: getattr(args, spec.name) for spec in dataclasses.fields(Removal)}
    values["checkpoints"] = args.checkpoints == "on"
    values.update({n: tuple(v) for n, v in values.items() if isinstance(v, list)})
    how = Removal(**values)
    tracks = LatentDataset(args.data)
    chosen = chosen_tracks(args, tracks)
    held_out = LatentDataset(args.held_out) if args.held_out else None
    model = open_model(args.model, args.weights, args.dtype, args.device)
    rows = Forgetting(model, tracks, chosen, args.out, how, held_out, progress.bar).run()
    print((Path(args.out) / "forget.md").read_text(encoding="utf-8"))
    print(printable(f"report: {Path(args.out) / 'forget.md'}, .csv and .json"))
    if how.checkpoints:
        folders = (str(Path(args.out) / f"model-{row['strength']:g}") for row in rows[1:])
        print(printable(f"models: {', '.join(folders)}"))


def chosen_tracks(args: argparse.Namespace, tracks: LatentDataset) -> list[int]:
    """Places of the tracks that ``--forget`` or ``--where`` names.

    Raises:
        UserError: an unreadable file, an id or a value that no track has, or a ``--where`` that is no COLUMN=VALUE.
    """
    from attr_engine.files import read_ids
    from attr_engine.forget import by_ids, by_value

    if args.where:
        column, equals, value = args.where.partition("=")
        if not column or not equals:
            raise UserError(f"--where is {args.where!r}: write COLUMN=VALUE, such as artist=NAME")
        return by_value(tracks, column, value)
    return by_ids(tracks, read_ids(Path(args.forget)))
