"""Which method is right, judged by retraining, planted relations, ranks of themselves and refusals?

    python bench/evidence.py --demo demo-run --out evidence-run        everything (about three hours on two cores; carries on)
    python bench/evidence.py --only lds planted self collapse abstention        tables from what is there
    python bench/evidence.py --table bench/results/evidence.json

Parts: sets (queries), methods (scores of all of them), retrain (models on parts of the data), and the tables. Settings are chosen on the
queries whose ``part`` is "choose" (families with even numbers) and on other targets; the tables are of the others.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import evidence_judged as judged  # noqa: E402 - needs the path
import evidence_tables as report  # noqa: E402
import numpy as np  # noqa: E402
import stream_report  # noqa: E402
import torch  # noqa: E402
from evidence_kernels import Item, items_of, kernels  # noqa: E402
from evidence_sets import Sets, part_of  # noqa: E402
from evidence_timesteps import products  # noqa: E402
from evidence_updates import ByKernel, by_curvature, run  # noqa: E402

from attr_engine.files import whole_file  # noqa: E402

PARTS = ("sets", "methods", "curvature", "quarters", "retrain", "lds", "sweep", "timesteps", "projection", "relations", "removal",
         "groups", "planted", "self", "collapse", "abstention")  # fmt: skip
GRADIENTS = (("squared_norm", "shared", "none"), ("squared_norm", "shared", "both"), ("squared_norm", "shared", "mixed"),
             ("squared_norm", "track", "mixed"), ("loss", "shared", "none"), ("loss", "track", "mixed"))  # fmt: skip


def main() -> int:
    """Compute, write, print."""
    args = _arguments()
    if args.table:
        print(report.document(json.loads(args.table.read_text())))
        return 0
    import fisher_report

    torch.set_num_threads(args.threads)
    sets = Sets(args.demo, args.out)
    result: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    for part in args.only:
        started = time.perf_counter()
        if part in ("sets", "methods", "curvature", "quarters", "retrain"):
            globals()[f"make_{part}"](sets, args)
        else:
            result[part] = getattr(judged, part)(sets)
        result.setdefault("seconds", {})[part] = round(time.perf_counter() - started, 1)
        result.setdefault("environments", {})[part] = {**fisher_report.environment(), "threads": args.threads}
        stream_report.write(result, args.json)
        print(f"{part}: {result['seconds'][part]} s", file=sys.stderr)
    print(report.document(result))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=Path, default=ROOT / "demo-run", help="what attr-engine demo wrote")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "evidence-run", help="folder for everything that is made"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "bench" / "results" / "evidence.json")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, help="print the tables of a result")
    return parser.parse_args()


def make_sets(sets: Sets, args: argparse.Namespace) -> None:
    """Queries with known truth, and pieces of the model's own sampler."""
    from attr_engine.demo.evidence import write_query_sets
    from attr_engine.generate import generate
    from attr_engine.latents.manifest import MANIFEST

    write_query_sets(sets.demo, sets.out / "queries")
    if not (sets.out / "generated" / MANIFEST).exists():
        generate(sets.model, sets.tracks, 16, sets.out / "generated", seed=11)


def make_methods(sets: Sets, args: argparse.Namespace) -> None:
    """Scores by every method."""
    asked = [q for q in sets.queries("known", "generated") if part_of(q) == "judge"]
    common: dict[str, Any] = {"cache": str(sets.out / "cache")}
    run(sets.model, sets.tracks, sets.queries("known", "unknown", "generated", "targets"), sets.out / "runs" / "ridge",
        functions=("ridge",), **common)  # fmt: skip
    for name, how in judged.UNLEARNED.items():
        run(sets.model, sets.tracks, asked, sets.out / "runs" / name, **how, **common)
    run(sets.model, sets.tracks, sets.queries("choosing_targets"), sets.out / "runs" / judged.CHOICE,
        functions=("loss_change",), plan="shared", strengths=judged.SIZES, score_draws=8, **common)  # fmt: skip
    run(
        sets.model,
        sets.tracks,
        asked,
        sets.out / "runs" / "influence",
        functions=("influence", "norm_influence"),
        **common,
    )
    judged.write_cosine(sets, asked)
    items = items_of(sets.tracks, [sets.known, sets.generated], sets.choosing_targets)
    for function, plan, masks in GRADIENTS:
        path = sets.kernels(function, plan, masks)
        if not path.exists():
            found = kernels(sets.model, len(sets.tracks), items, function, judged.plan(plan), masks=masks)
            path.parent.mkdir(exist_ok=True)
            _save(path, sets, found)


def _save(path: Path, sets: Sets, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays whole, and what they were made of."""
    with whole_file(path) as part, part.open("wb") as file:
        np.savez(file, of=np.array(sets.made_of), **arrays)


def make_curvature(sets: Sets, args: argparse.Namespace) -> None:
    """Updates by three curvatures, for every other query of the choosing part."""
    from attr_engine.ekfac import fit_ekfac
    from attr_engine.fisher import fit_fisher
    from attr_engine.models.protocol import select_parameters

    path = sets.out / "curvature.npz"
    if path.exists():
        return
    asked = [q for q in sets.queries("known", "generated") if part_of(q) == "choose"][::2]
    parameters, plan, found = select_parameters(sets.model, ["transformer"]), judged.plan("track", 4), {}
    items = items_of(sets.tracks, [], [])
    gradients = sets.out / "gradients.npy"
    kernels(sets.model, len(sets.tracks), items, "loss", judged.plan("track"), masks="mixed", keep=gradients)
    whole = torch.from_numpy(np.load(gradients))
    made: dict[str, Any] = {
        "diagonal Fisher": lambda: fit_fisher(sets.model, sets.tracks, ["transformer"], plan, 4),
        "EK-FAC": lambda: fit_ekfac(sets.model, sets.tracks, ["transformer"], plan, 4),
        "kernel over tracks": lambda: ByKernel(whole, parameters),
    }
    for name, make in made.items():
        curvature = make()
        for damping in (0.1, 1.0) if name == "kernel over tracks" else (0.1,):
            for function, scores in by_curvature(
                sets.model, sets.tracks, asked, curvature, damping, 1e-2, 4
            ).items():
                found[f"{name}, damping {damping:g}: {function}"] = scores
    _save(path, sets, {"ids": np.array([q.id for q in asked]), **found})
    gradients.unlink()


def make_quarters(sets: Sets, args: argparse.Namespace) -> None:
    """Products of gradients by quarters of the timesteps, for the choosing part."""
    asked = [q for q in sets.queries("known", "generated") if part_of(q) == "choose"]
    items = [*items_of(sets.tracks, [], []), *(Item(q.tracks, q.index, "update") for q in asked)]
    if not sets.quarters.exists():
        found = products(sets.model, len(sets.tracks), items, judged.plan("shared"))
        _save(sets.quarters, sets, {"ids": np.array([q.id for q in asked]), "products": found})


def make_retrain(sets: Sets, args: argparse.Namespace) -> None:
    """Halves, removals and groups left out, by the command that users have."""
    runs = sets.out / "runs"
    subprocess.run(
        [sys.executable, "-m", "attr_engine.cli", "retrain", "--model", sets.demo / "model", "--data", sets.demo / "latents",
         "--queries", sets.out / "queries" / "known", sets.out / "generated", "--subsets", "24", "--draws", "16", "--removals", "3",
         "--groups", "2", "--remove",
         f"ridge={runs / 'ridge' / 'scores.parquet'}", f"loss_change={runs / 'unlearning' / 'scores.parquet'}",
         f"cosine={runs / 'cosine' / 'scores.parquet'}", "--leave-out", "family", "artist", "--out", sets.out / "retrained"],
        check=True, cwd=ROOT,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
