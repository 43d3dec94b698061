"""``attr-engine curves``: how far the true source of a piece falls when the piece is perturbed, by every method."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from attr_engine.cli_index import add_command
from attr_engine.errors import UserError, printable

# Settings that mean nothing here: methods have options of their own for some.
NOT_USED = (
    "queries", "self_influence", "groups", "functions", "strengths", "strengths_by", "unit", "damping", "ridge", "projection_rank",
    "top", "race_draws", "confidence", "race_share", "index", "rescore", "show", "shares", "controls", "false_accepts", "title",
    "keep_updates", "cache",
)  # fmt: skip


def add_curves(commands: Any) -> argparse.ArgumentParser:
    """Add the command; its settings are the caller's to add."""
    p = add_command(commands, "curves", "perturb training tracks and see how far every method lets the true source fall",
                    """examples:
  attr-engine curves --model model --data latents --out curves
  attr-engine curves --methods ridge displacement:strength=0.001 --model model --data latents --count 8 --out curves
  attr-engine curves --only pitch tempo mixing --others held-out --model model --data latents --out curves
  attr-engine curves --sources song-17 song-40 --model model --data latents --autoencoder autoencoder --out curves

The sources need their audio, where the data set says that it lies. Stopped at any moment, the same command carries on; with more
methods or perturbations it measures those alone. Written are curves.parquet and .csv (every rank), curves.md and .json (tables),
curves.png, and the perturbed pieces with their audio under versions/.
""")  # fmt: skip
    p.add_argument("--out", required=True, help="folder of it all; the same command carries on there")
    p.add_argument(
        "--config", default="", help="JSON of settings, e.g. the config.json of a run; flags override it"
    )
    p.add_argument("--methods", nargs="+", default=["ridge"], metavar="NAME[:OPTION=VALUE,...]",
                   help="methods with their options (default: ridge)")  # fmt: skip
    p.add_argument("--count", type=int, default=16,
                   help="training tracks that are sources, drawn by --seed among those without exact copies (default: 16)")  # fmt: skip
    p.add_argument("--sources", nargs="+", default=[], metavar="ID", help="training tracks that are sources instead")  # fmt: skip
    p.add_argument("--only", nargs="+", default=[], metavar="NAME",
                   help="perturbations (pitch, tempo, noise, low-pass, high-pass, lossy, crop, gain, mixing; default: all)")  # fmt: skip
    p.add_argument("--others", default="", metavar="FOLDER",
                   help="data set with audio, pieces of which are mixed in (default: unrelated training tracks)")  # fmt: skip
    p.add_argument(
        "--autoencoder", default="", metavar="FOLDER", help="that encoded the tracks (default: the model's)"
    )
    return p


def curves(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    from attr_engine import curves as c
    from attr_engine.cli_options import settings_of
    from attr_engine.files import write_json, write_text, writing_in
    from attr_engine.latents import LatentDataset
    from attr_engine.load import load_base
    from attr_engine.methods import parse
    from attr_engine.models.autoencoder import load_autoencoder
    from attr_engine.report.tables import markdown
    from attr_engine.settings import to_json

    out, s = Path(args.out), settings_of(args)
    c.check_perturbations(args.only)
    for text in args.methods:
        parse(text)
    model, tracks = load_base(s)
    sources = c.choose_sources(tracks, args.count, s.seed, args.sources)
    encoder = (
        load_autoencoder(args.autoencoder)
        if args.autoencoder
        else load_autoencoder(s.model, s.weights or None)
    )
    others = LatentDataset(args.others) if args.others else None
    found = c.curves(model, tracks, encoder, args.methods, s, out, sources, args.only, others, bars=True)
    made, what = c.tables(found), {"settings": to_json(s), "methods": args.methods, "sources": found.sources}
    text = markdown(made)
    with writing_in(out):
        c.write_points(found, out / "curves.parquet")
        write_json(out / "curves.json", {**what, "failed": found.failed, "tables": [vars(t) for t in made]})
        write_text(out / "curves.md", text)
        figure = _figure(found, out / "curves.png")
    print(text)
    print(f"written: {out / 'curves.parquet'}, .csv, .md and .json{figure}")
    if found.failed:
        reasons = "; ".join(f"method {name!r}: {why}" for name, why in found.failed.items())
        raise UserError(
            f"{len(found.failed)} of {len(args.methods)} methods could not be measured: {reasons}"
        )


def _figure(found: Any, path: Path) -> str:
    """Draw the figure where it can be drawn; how it is called where it was."""
    from attr_engine.curves import draw

    try:
        draw(found, path)
    except UserError as error:
        print(f"note: {printable(str(error))}", file=sys.stderr)
        return ""
    return ", .png"
