"""``attr-engine musicgen-forget``: a MusicGen that has forgotten some of its tracks."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attr_engine.errors import UserError, printable

if TYPE_CHECKING:
    from attr_engine.models.musicgen import MusicGen
    from attr_engine.musicgen_loss import MusicGenLoss
    from attr_engine.track_loss import ForgetSettings

REPORT_NAME = "forget.json"


def add_musicgen(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the flags of the command."""
    p = command(commands, "musicgen-forget", "make a MusicGen forget tracks: gradient ascent or random labelling", """examples:
  attr-engine ingest music/ --autoencoder musicgen/ --metadata tracks.csv --condition prompt --out codes
  attr-engine musicgen-forget --model musicgen/ --data codes --where artist="The Salt Moths" --out forgotten
  attr-engine musicgen-forget --model musicgen/ --data codes --forget ids.txt --method relabel --steps 50 --out forgotten

--model and --out are folders as transformers' save_pretrained writes them, with safetensors weights. What it did to the loss of
every track is in forget.json beside the weights. Stopped at any moment, the same command carries on: while it works, OUT.so-far holds
what there is, once a minute (of what is trained one copy with sgd, three with adam).
""")  # fmt: skip
    p.add_argument("--model", required=True, help="folder of a MusicGen (transformers)")
    p.add_argument(
        "--data", required=True, help="data set of codes, with the tracks to forget and those that remain"
    )
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--forget", default="", metavar="FILE", help="text file of ids to forget, one a line")
    what.add_argument("--where", default="", metavar="COLUMN=VALUE",
                      help="forget the tracks with this value in their metadata, such as parent=ID: a recording's windows")  # fmt: skip
    p.add_argument("--out", required=True, help="folder of the new model; must not exist")
    p.add_argument("--method", choices=("ascent", "relabel"), default="ascent",
                   help="raise the loss of the forget set, or train it under the texts of other tracks (default: ascent)")  # fmt: skip
    p.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
    p.add_argument("--lr", type=float, default=1e-5, help="learning rate (default: 1e-5)")
    p.add_argument("--optimizer", choices=("adam", "sgd"), default="adam", help="default: adam")
    p.add_argument("--batch", type=int, default=0, help="tracks a step (default: 0, the whole forget set)")
    p.add_argument("--rows", type=int, default=1, help="tracks a pass: memory, not results (default: 1)")
    p.add_argument("--layers", nargs="+", default=["all"], metavar="X",
                   help="cross_attn.to_kv, cross_attn, self_attn, transformer, all, or name patterns (default: all)")  # fmt: skip
    p.add_argument("--text", default="prompt", help="conditioning that holds the text (default: prompt)")
    p.add_argument("--seed", type=int, default=0, help="of the order and the texts (default: 0)")
    p.add_argument("--device", default="cpu", help="torch device (default: cpu)")


def musicgen_forget(args: argparse.Namespace) -> None:
    """Forget, save and print."""
    from attr_engine.cli_forget import chosen_tracks
    from attr_engine.files import writing_in
    from attr_engine.latents import LatentDataset
    from attr_engine.models import musicgen
    from attr_engine.musicgen_loss import MusicGenLoss
    from attr_engine.track_loss import ForgetSettings
    from attr_engine.units import held

    settings = ForgetSettings(**{f.name: getattr(args, f.name) for f in fields(ForgetSettings)})
    settings.check()
    out, tracks = Path(args.out), LatentDataset(args.data)
    musicgen.check_free(out)
    chosen = chosen_tracks(args, tracks)
    model = musicgen.load_musicgen(args.model, device=args.device)
    loss = MusicGenLoss(model, tracks, args.layers, args.text)
    folder = out.resolve().with_name(f"{out.resolve().name}.so-far")
    with writing_in(folder), held(folder / "lock") as mine:
        if not mine:
            raise UserError(f"another process works in {folder}: wait for it, or use another --out")
        means = _forget(loss, model, tracks.fingerprint, chosen, settings, args, folder)
    print(f"mean loss in nats a code; a predictor that knows nothing has {loss.ceiling:.4f}")
    for name, count in (("forget", len(chosen)), ("remain", len(tracks) - len(chosen))):
        before, after = means[name]["before"], means[name]["after"]
        print(f"  {name} set, {count} tracks: {before:.4f} before, {after:.4f} after ({after - before:+.4f})")
    print(printable(f"written to {out}; every track's loss: {out / REPORT_NAME}"))


def _forget(
    loss: MusicGenLoss, model: MusicGen, tracks: str, chosen: list[int], settings: ForgetSettings, args: argparse.Namespace,
    folder: Path,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Forget, going on from ``folder``, and write the model and its report; ``tracks`` is their fingerprint. Returns the mean losses."""
    from attr_engine import progress
    from attr_engine.files import write_json
    from attr_engine.forget_state import SoFar
    from attr_engine.models import checkpoint, musicgen
    from attr_engine.runs import key_of
    from attr_engine.track_loss import Diverged, forget

    how = {**asdict(settings), "layers": args.layers, "text": args.text}
    decisive = {name: value for name, value in how.items() if name != "rows"}
    so_far = SoFar(folder, key_of(checkpoint.fingerprint(model.model, {}), tracks, chosen, decisive))
    try:
        done = forget(loss, chosen, settings, progress.bar("forgetting", "pass"), so_far)
    except UserError as error:
        if isinstance(error, Diverged) or not any(folder.glob("*.safetensors")):
            so_far.drop()  # the way out is other settings, which what is there would refuse
        raise
    means = done.means()
    rows = zip(done.ids, done.forget.tolist(), done.before.tolist(), done.after.tolist(), strict=True)
    report = {
        "settings": how,
        "tracks": tracks,
        "uniform": loss.ceiling,
        "mean loss": means,
        "losses": [dict(zip(("id", "forget", "before", "after"), row, strict=True)) for row in rows],
    }
    made = folder / "model"
    for left in (made, made.with_name("model.part")):
        shutil.rmtree(left, ignore_errors=True)  # of a call that was killed while it wrote
    musicgen.save_musicgen(model, made, lambda new: write_json(new / REPORT_NAME, report))
    out = Path(args.out).resolve()
    musicgen.check_free(out)
    os.replace(made, out)
    so_far.drop()
    return means
