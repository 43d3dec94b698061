"""Flags of ``attr-engine index`` and ``attr-engine search``."""

from __future__ import annotations

import argparse
from typing import Any


def add_command(commands: Any, name: str, text: str, examples: str) -> argparse.ArgumentParser:
    """A command with its examples below its flags."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_commands(commands: Any) -> None:
    """Add both commands."""
    _add_index(commands)
    _add_search(commands)


def _add_index(commands: Any) -> None:
    p = add_command(commands, "index", "projected gradients of every training track, for queries in milliseconds",
                    """examples:
  attr-engine index --model model --data latents --out index
  attr-engine index --model model --data latents --numbers int8 --width 256 --out index    # 256 bytes a track
  attr-engine search --index index --model model --queries pieces

At the end it prints how much of the exhaustive answer the index gives back, measured on some of its tracks.
""")  # fmt: skip
    p.add_argument("--model", required=True, help="model folder, or the model's JSON config")
    p.add_argument("--weights", default="", help="checkpoint where --model is a JSON config")
    p.add_argument("--data", required=True, help="training tracks: a folder made by attr-engine ingest")
    p.add_argument("--out", required=True, help="folder of the index; the same command carries on there")
    p.add_argument("--layers", nargs="+", default=["transformer"], metavar="X",
                   help="layer groups or name patterns (default: transformer)")  # fmt: skip
    p.add_argument("--function", default="squared_norm", choices=("squared_norm", "loss"),
                   help="whose gradients: of the prediction's squared norm, or of the loss (default: squared_norm)")  # fmt: skip
    p.add_argument("--draws", type=int, default=8, help="draws a track (default: 8)")
    p.add_argument("--averaging", default="unit", choices=("unit", "plain"),
                   help="gradients of draws at length 1, or as they are (default: unit)")  # fmt: skip
    p.add_argument("--projection", default="coordinates", choices=("coordinates", "gaussian", "rademacher", "identity"),
                   help="kind of projection (default: coordinates, chosen by the seed)")  # fmt: skip
    p.add_argument("--rank", type=int, default=8, help="a weight becomes rank x rank numbers (default: 8)")
    p.add_argument("--width", type=int, default=1024,
                   help="most numbers stored a track, the leading directions; 0: all (default: 1024)")  # fmt: skip
    p.add_argument("--ridge", type=float, default=0.1,
                   help="lambda, relative to the mean squared norm of a track's gradient (default: 0.1)")  # fmt: skip
    p.add_argument("--normalised", action="store_true", help="compare directions of gradients only")
    p.add_argument("--numbers", default="float16", choices=("float16", "int8", "float32"),
                   help="on disk (default: float16)")  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="of draws, projections and probes (default: 0)")
    p.add_argument("--rows", type=int, default=16, help="(track, draw) pairs a pass (default: 16)")
    _add_device(p)


def _add_search(commands: Any) -> None:
    p = add_command(commands, "search", "rank the training tracks of an index for some queries", """examples:
  attr-engine search --index index --model model --queries pieces --top 10
  attr-engine search --index index --model model --queries pieces --out scores.parquet
  attr-engine search --index index --model model --queries pieces --against run --within 100
""")  # fmt: skip
    p.add_argument("--index", required=True, help="folder made by attr-engine index")
    p.add_argument("--model", required=True, help="the model that it was made with")
    p.add_argument("--weights", default="", help="checkpoint where --model is a JSON config")
    p.add_argument(
        "--queries", required=True, help="queries: a folder made by attr-engine ingest or generate"
    )
    p.add_argument("--top", type=int, default=10, help="tracks to print a query (default: 10)")
    p.add_argument("--out", default="", help="Parquet file for all scores")
    p.add_argument("--against", default="", metavar="RUN",
                   help="an exhaustive run with these queries: prints how many of its best tracks are among the index's best")  # fmt: skip
    p.add_argument("--within", type=int, default=300, help="with --against: of how many (default: 300)")
    _add_device(p)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float64"),
                        help="dtype of the denoiser (default: float32)")  # fmt: skip
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
