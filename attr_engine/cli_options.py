"""Flags of the command line; those of a run come from :class:`attr_engine.settings.Settings`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attr_engine import (
    cli_compare,
    cli_curves,
    cli_grid,
    cli_index,
    cli_listening,
    cli_robustness,
)
from attr_engine.cli_forget import add_forget
from attr_engine.cli_index import add_command
from attr_engine.cli_judge import add_judges
from attr_engine.cli_musicgen import add_musicgen
from attr_engine.cli_rollup import add_rollup
from attr_engine.errors import printable
from attr_engine.grid_settings import AXES, LEFT_OUT
from attr_engine.settings import Settings, field_types, from_json, read_settings, to_json

if TYPE_CHECKING:
    from attr_engine.abstain import Controls
    from attr_engine.jobs import Job
    from attr_engine.result import Attribution

_RUN_TEXTS = {
    "fisher": "fit the diagonal Fisher of a model and its training tracks",
    "unlearn": "unlearn every query (fits the Fisher first)",
    "score": "score every training track for every query (all stages, no report)",
    "attribute": "all of it: Fisher, unlearning, scores, report",
    "report": "write the report of a run again, e.g. with another --show or --shares",
}
_RUN_EXAMPLES = """examples:
  attr-engine {0} --model model --data latents --queries pieces/ --out run
  attr-engine {0} --model config.json --weights model.ckpt --data latents --self-influence song-17 --out run
  attr-engine {0} --config run/config.json --out run-again        # replays a run
  attr-engine {0} --out run                                       # carries on where it was stopped
  attr-engine {0} --config run/config.json --out run-again --profile       # and says where the time goes: run-again/profile.md
"""


def _bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither on nor off")


def _level(text: str) -> int:
    level = logging.getLevelName(text.upper())
    if not isinstance(level, int):
        raise argparse.ArgumentTypeError(f"{text!r} is no level: use debug, info, warning or error")
    return level


def _add_settings(
    parser: argparse.ArgumentParser, several: Sequence[str] = (), left_out: Sequence[str] = ()
) -> None:
    defaults, kinds = Settings(), field_types()
    group = parser.add_argument_group("settings (all of them can stand in --config)")
    for spec in (x for x in dataclasses.fields(Settings) if x.name not in left_out):
        kind, options = kinds[spec.name], {}
        default = getattr(defaults, spec.name)
        shown = default if default != () else ""
        if isinstance(default, bool):
            shown = "on" if default else "off"
        elif isinstance(default, tuple):
            shown = " ".join(map(str, default))
        text = spec.metadata["help"] + (f" (default: {shown})" if shown != "" else "")
        if typing.get_origin(kind) is tuple:
            options = {"nargs": "+", "type": typing.get_args(kind)[0], "metavar": "X"}
        elif kind is bool:
            options = {"type": _bool, "metavar": "on|off"}
        else:
            options = {"type": kind, "metavar": kind.__name__.upper()}
        if spec.metadata["choices"]:
            options.pop("metavar")
            options["choices"] = spec.metadata["choices"]
        if spec.metadata["bare"] is not None:
            options |= {"nargs": "?", "const": spec.metadata["bare"]}
        if spec.name in several:
            options["nargs"] = "+"
        group.add_argument(
            f"--{spec.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
            **options,
        )


def settings_of(args: argparse.Namespace) -> Settings:
    """Settings of a call: the config file (or the run's own), then the flags."""
    names = {spec.name for spec in dataclasses.fields(Settings)}
    flags = {name: value for name, value in vars(args).items() if name in names}
    for name in (
        "model",
        "weights",
        "data",
        "cache",
        "index",
        "controls",
    ):  # a config has to mean the same from any folder
        if flags.get(name):
            flags[name] = str(Path(flags[name]).resolve())
    if "queries" in flags:
        flags["queries"] = [str(Path(path).resolve()) for path in flags["queries"]]
    base: dict[str, Any] = {}
    if args.config:
        base = to_json(read_settings(Path(args.config)))
    elif (Path(args.out) / "config.json").exists():
        base = to_json(read_settings(Path(args.out) / "config.json"))
    return from_json({**base, **flags}, "the command line")


def _add_ingest(commands: Any) -> None:
    p = add_command(commands, "ingest", "turn audio, pre-encoded latents, webdataset tars or arrays into a data set",
                 """examples:
  attr-engine ingest music/ --autoencoder model --seconds 24 --out latents
  attr-engine ingest music/ --autoencoder model --metadata tracks.csv --condition artist --out latents
  attr-engine ingest pre_encoded/ --scale 1.7 --condition prompt --out latents
  attr-engine ingest tars/ --scale 1.7 --condition prompt --out latents
  attr-engine ingest arrays.npz --metadata tracks.csv --store-dtype float16 --out latents
  attr-engine ingest music/ --autoencoder model --append --out latents       # what has come to music/ since

Stopped at any moment, the same command carries on and gives the same data set. Samples of a tar are KEY.npy, KEY.json
and KEY.txt, as webdataset groups them; the JSON is that of a pre-encoded folder.
""")  # fmt: skip
    p.add_argument(
        "source",
        help="folder or file of audio, a stable-audio-tools pre-encoded folder, a webdataset tar or a folder of them, "
        "a folder of .npy or .safetensors, or one .npz, .npy or .safetensors",
    )
    p.add_argument("--out", required=True, help="folder of the data set")
    p.add_argument(
        "--kind",
        choices=("auto", "audio", "pre-encoded", "webdataset", "arrays"),
        default="auto",
        help="what the source is (default: by what lies there)",
    )
    p.add_argument(
        "--autoencoder",
        default="",
        help="model folder (also of a MusicGen), model config (with --weights) or autoencoder folder; encodes audio",
    )
    p.add_argument("--weights", default="", help="checkpoint where --autoencoder is a model config")
    p.add_argument(
        "--seconds",
        type=float,
        default=24.0,
        help="longest track; longer recordings are cut into windows (default: 24)",
    )
    p.add_argument(
        "--long",
        choices=("window", "error"),
        default="window",
        help="what to do with longer recordings (default: window)",
    )
    p.add_argument(
        "--hop",
        type=float,
        default=0.0,
        help="seconds from window to window (default: --seconds, no overlap)",
    )
    p.add_argument(
        "--metadata",
        default="",
        help="CSV or JSON with a 'path' for each file or array; title, artist, licence and id are used",
    )
    p.add_argument(
        "--condition", nargs="+", default=[], metavar="NAME", help="metadata that the model is conditioned on"
    )
    p.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="the pretransform's scale, by which latents that exist are divided (default: 1)",
    )
    p.add_argument(
        "--store-dtype",
        choices=("float32", "float16", "bfloat16"),
        default="",
        help="dtype on disk (default: float32 for audio, else that of the source)",
    )
    p.add_argument(
        "--workers",
        type=int,
        default=None,
        help="threads that read ahead; the result is the same for any number (default: the cores, at most 4)",
    )
    p.add_argument(
        "--append",
        action="store_true",
        help="add to a whole data set what of the same source is not in it yet",
    )


def _add_shards(commands: Any) -> None:
    p = add_command(commands, "shards", "inspect, check and repair a data set", """examples:
  attr-engine shards info latents
  attr-engine shards verify latents                 # reads every byte; exit code 2 where something is wrong
  attr-engine shards repair latents                 # makes the manifest again from the shards
  attr-engine shards repair latents --drop          # leaves out what is damaged, by name
""")  # fmt: skip
    p.add_argument("action", choices=("info", "verify", "repair"), help="what to do")
    p.add_argument("data", help="folder of the data set")
    p.add_argument("--json", action="store_true", help="print JSON (info and verify)")
    p.add_argument("--drop", action="store_true", help="repair: leave out damaged shards and tracks")


def _add_train(commands: Any) -> None:
    p = add_command(commands, "train", "make a small autoencoder or train a small diffusion model", """examples:
  attr-engine train autoencoder music/ --out autoencoder
  attr-engine train diffusion latents --autoencoder autoencoder --condition seconds_total --out model

The autoencoder is a channel vocoder whose weights are written down rather than trained: it keeps pitch, rhythm and
loudness, at 64 channels, and loses most of the timbre. The diffusion model is a stable-audio-tools DiT, trained
without masking.
""")  # fmt: skip
    p.add_argument("what", choices=("autoencoder", "diffusion"))
    p.add_argument("source", help="folder of audio (autoencoder) or data set (diffusion)")
    p.add_argument("--out", required=True, help="folder of the model; a stopped training carries on there")
    g = p.add_argument_group("autoencoder")
    g.add_argument("--sample-rate", type=int, default=16000, help="Hz (default: 16000)")
    g.add_argument("--hop", type=int, default=2048, help="samples a latent frame (default: 2048)")
    g = p.add_argument_group("diffusion")
    g.add_argument(
        "--autoencoder", default="", help="its latents are the data; it goes into the model folder"
    )
    g.add_argument("--config", default="", help="a stable-audio-tools model config instead of one made here")
    g.add_argument("--condition", nargs="+", default=["seconds_total"], metavar="NAME",
                   help="conditioning of the model (default: seconds_total)")  # fmt: skip
    g.add_argument("--width", type=int, default=128, help="embedding width, a multiple of 32 (default: 128)")
    g.add_argument("--depth", type=int, default=4, help="transformer layers (default: 4)")
    g.add_argument("--patch", type=int, default=4, help="latent frames a token (default: 4)")
    g.add_argument(
        "--frames", type=int, default=0, help="padded length in frames (default: the longest track)"
    )
    g.add_argument("--objective", choices=("v", "rectified_flow"), default="v", help="default: v")
    g.add_argument("--steps", type=int, default=2000, help="optimiser steps (default: 2000)")
    g.add_argument("--batch", type=int, default=16, help="tracks a step (default: 16)")
    g.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: 1e-3)")
    g.add_argument("--seed", type=int, default=0, help="of order, noise and initial weights (default: 0)")


def _add_generate(commands: Any) -> None:
    p = add_command(commands, "generate", "sample pieces from a model, as queries", """examples:
  attr-engine generate --model model --data latents --count 8 --out generated
""")  # fmt: skip
    p.add_argument("--model", required=True, help="model folder, or the model's JSON config")
    p.add_argument("--weights", default="", help="checkpoint where --model is a JSON config")
    p.add_argument(
        "--data", required=True, help="training tracks: pieces get the conditioning of some of them"
    )
    p.add_argument("--count", type=int, default=4, help="how many pieces (default: 4)")
    p.add_argument("--out", required=True, help="folder of the data set; out/audio gets FLAC files")
    p.add_argument("--seed", type=int, default=0, help="of the choice and the sampler (default: 0)")
    p.add_argument("--steps", type=int, default=60, help="sampler steps (default: 60)")
    p.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance (default: 3)")
    p.add_argument("--device", default="cpu", help="torch device (default: cpu)")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="attr-engine",
        description="Which training tracks made this generated piece of music, how sure are we, and what did it cost to find out?",
        epilog="examples:\n  attr-engine demo --out demo-run        # no network, no files needed\n  attr-engine attribute --help\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--log-level", type=_level, default=None, metavar="LEVEL",
                     help="write log messages from this level on (debug, info, warning) to standard error")  # fmt: skip
    commands = top.add_subparsers(dest="command", required=True, metavar="command")
    _add_ingest(commands)
    _add_shards(commands)
    _add_train(commands)
    _add_generate(commands)
    cli_index.add_commands(commands)
    for name, text in _RUN_TEXTS.items():
        p = add_command(commands, name, text, _RUN_EXAMPLES.format(name))
        p.add_argument("--out", required=True, help="run directory; the same command carries on there")
        p.add_argument(
            "--config", default="", help="JSON of settings, e.g. the config.json of a run; flags override it"
        )
        if name != "report":
            p.add_argument("--dry-run", nargs="?", const="text", choices=("text", "json"),
                           help="measure a few passes, say how long, how much memory and disk it would take, and leave nothing "
                                "behind; as text or JSON")  # fmt: skip
        else:
            cli_listening.add_flags(p)
        _add_settings(p)
    add_rollup(commands, add_command)
    add_judges(commands, add_command)
    cli_listening.add_listening(commands)
    add_forget(commands, add_command)
    _add_settings(cli_grid.add_grid(commands), AXES, LEFT_OUT)
    cli_grid.add_figures(commands)
    add_musicgen(commands, add_command)
    _add_settings(cli_robustness.add_robustness(commands), left_out=cli_robustness.NOT_USED)
    _add_settings(cli_compare.add_compare(commands), left_out=cli_compare.NOT_USED)
    _add_settings(cli_curves.add_curves(commands), left_out=cli_curves.NOT_USED)
    p = add_command(
        commands,
        "demo",
        "compose a corpus, train a model on it, attribute, report",
        "examples:\n  attr-engine demo --out demo-run\n",
    )
    p.add_argument("--out", default="demo-run", help="folder for everything it makes (default: demo-run)")
    p.add_argument(
        "--full",
        action="store_true",
        help="40 self-influence targets and all strengths (under 45 minutes on two cores)",
    )
    add_command(
        commands,
        "doctor",
        "what is installed, what is missing and what that costs",
        "examples:\n  attr-engine doctor\n",
    )
    return top


def _print_verdict(controls: Controls, result: Attribution, query: str, s: Settings) -> None:
    scores = result.values[s.functions[0]][result.row(query, s.strengths[0])]
    count = int(controls.responsible(scores).sum())
    if count == 0:
        print(
            f"  refused: no track stands out more than for pieces that no track made ({controls.count} controls)"
        )
    else:
        print(f"  {count} of the tracks stand out more than for pieces that no track made")


def print_sizes(updates: Sequence[Mapping[str, Any]]) -> None:
    """Print how large updates are, strength by strength, given what :func:`attr_engine.pipeline.sizes` says of them."""
    from attr_engine.strength import spread

    for line in spread(updates):
        print(line)


def _reaction(update: Mapping[str, Any]) -> str:
    """What an update did to its query, where that was measured."""
    if "loss_after" not in update:
        return ""
    return (
        f", its loss {update['loss_before']:.4g} to {update['loss_after']:.4g} (predicting nothing: {update['null_loss']:.4g}), "
        f"relative displacement {update['displacement']:.3g}"
    )


def print_top(job: Job, result: Attribution, k: int = 3) -> None:
    """Print the top tracks of every query by the leading function and strength, with relation hits."""
    from attr_engine.abstain import controls_of_run
    from attr_engine.report.tables import relatives

    s = job.run.settings
    what = f"groups by {s.groups}" if s.groups else "tracks"
    print(
        f"top {k} of {len(result.tracks)} {what} by {s.functions[0]} at {s.unit} {s.strengths[0]:g} (score, standard error, known relation)"
    )
    if job.pieces is None:
        queries = [(q.id, q.kind, relatives(job.tracks, q)) for q in job.queries]
    else:
        queries = [(name, "query", {}) for name in job.pieces.ids]
    updates = result.meta.get("updates", [])
    print_sizes(updates)
    controls = controls_of_run(s, result)
    for name, kind, hits in queries:
        print(printable(f"{name} ({kind})"))
        for row in updates:
            if (row["query"], row["strength"], row["of"]) == (name, s.strengths[0], "loss"):
                print(f"  its update: relative size {row['size']:.3g}{_reaction(row)}")
        if controls is not None:
            _print_verdict(controls, result, name, s)
        for row in result.top(k, name, s.functions[0], s.strengths[0]):
            hit = f"  [{hits[row.track]}]" if row.track in hits else ""
            print(
                printable(f"  {row.rank:2d}. {row.track}  {row.score:.4g} +- {row.standard_error:.2g}{hit}")
            )
