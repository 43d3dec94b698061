"""``attr-engine robustness``: what becomes of a ranking when the query, the draws or the checkpoint change."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from attr_engine.cli_index import add_command
from attr_engine.errors import UserError

# Settings that mean nothing here.
NOT_USED = (
    "self_influence", "groups", "top", "race_draws", "confidence", "race_share", "index", "rescore", "show", "shares", "controls",
    "false_accepts", "title", "keep_updates",
)  # fmt: skip


def add_robustness(commands: Any) -> argparse.ArgumentParser:
    """Add the command; its settings are the caller's to add."""
    p = add_command(commands, "robustness", "perturb queries (pitch, tempo, noise, ...) and see whether their rankings stay",
                    """examples:
  attr-engine robustness --model model --data latents --queries held-out --out robustness
  attr-engine robustness --model model --data latents --queries held-out --only pitch tempo --cache cache --out robustness
  attr-engine robustness --config run/config.json --queries held-out --checkpoint earlier-model --out robustness

Queries need their audio, where the data set says that it lies. Stopped at any moment, the same command carries on. Written are
robustness.md and robustness.json, and a run directory for every perturbation.
""")  # fmt: skip
    p.add_argument("--out", required=True, help="folder of it all; the same command carries on there")
    p.add_argument(
        "--config", default="", help="JSON of settings, e.g. the config.json of a run; flags override it"
    )
    p.add_argument("--only", nargs="+", default=[], metavar="NAME",
                   help="perturbations (pitch, tempo, noise, low-pass, high-pass, lossy, crop, gain; default: all)")  # fmt: skip
    p.add_argument(
        "--checkpoint",
        default="",
        metavar="MODEL",
        help="another model folder that the same queries are asked of",
    )
    p.add_argument(
        "--autoencoder", default="", metavar="FOLDER", help="that encoded the queries (default: the model's)"
    )
    return p


def robustness(args: argparse.Namespace) -> None:
    """Perturb, score, print and write."""
    from attr_engine.cli_options import settings_of
    from attr_engine.files import write_json, write_text, writing_in
    from attr_engine.latents import LatentDataset
    from attr_engine.load import load_base, open_model
    from attr_engine.models.autoencoder import load_autoencoder
    from attr_engine.report.tables import markdown
    from attr_engine.robustness import check_robustness
    from attr_engine.robustness import robustness as measure

    out, s = Path(args.out), settings_of(args)
    check_robustness(s, args.only)
    if not s.queries:
        raise UserError("there is no query: give --queries, data sets with audio")
    queries = [LatentDataset(path) for path in s.queries]
    model, tracks = load_base(s)
    encoder = (
        load_autoencoder(args.autoencoder)
        if args.autoencoder
        else load_autoencoder(s.model, s.weights or None)
    )
    other = (
        open_model(args.checkpoint, "", s.dtype, s.device, s.ema, s.checkpointing, s.compile)
        if args.checkpoint
        else None
    )
    table = measure(model, tracks, queries, encoder, s, out, args.only or None, other, bars=True)
    text = markdown([table])
    with writing_in(out):
        write_json(out / "robustness.json", [vars(table)])
        write_text(out / "robustness.md", text)
    print(text)
    print(f"written: {out / 'robustness.md'} and .json")
