"""The kernels and the whole model on a GPU: right first, then time, memory and shares of what the card can do.

One command, under eight minutes on an H100 or H200. It needs torch, triton, einops, numpy, safetensors and the
package stable-audio-tools, no network and nothing that is built. Every kernel is compared with float64 first; what is
not known to be right is not timed. The result is JSON, written again after every part, and tables on stdout. The exit code
is 1 only where a comparison is red.

    python bench/gpu.py                              everything, into bench/results/gpu.json
    python bench/gpu.py --only kernels tiles         the kernels, and rows for kernels/table.py
    python bench/gpu.py --minutes 4 --rows 4         less of it, four rows a pass
    python bench/gpu.py --tiny                       the same code on a CPU: does it run?
    python bench/gpu.py --cpu-errors                 the plain CPU path at the model's real shapes
    python bench/gpu.py --table bench/results/gpu.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import gpu_report as report  # noqa: E402 - needs the path; imports no torch
from stream_report import plain  # noqa: E402

# What is measured, in this order, the share of the time it may take, and where it is. The kernels come last: the compile
# gate, the tests and the first part say what there is to know of them where the time is short.
PARTS = {
    "ceilings": (0.10, "gpu_card", "ceilings"),
    "checks": (0.30, "gpu_checks", "run"),
    "agreement": (0.10, "gpu_agreement", "agreement"),
    "passes": (0.20, "gpu_passes", "passes"),
    "unlearning": (0.30, "gpu_passes", "unlearning"),
    "scoring": (0.20, "gpu_scoring", "scoring"),
    "kernels": (0.15, "gpu_kernels", "run"),
    "tiles": (0.20, "gpu_kernels", "tiles"),
}
ALWAYS = ("ceilings", "checks")  # the others are measured against the one and depend on the other
MODEL = ("agreement", "passes", "unlearning", "scoring")


def main() -> int:
    """Measure, write, print; 1 where a comparison is red."""
    args = _arguments()
    if args.table:
        print(report.markdown(json.loads(args.table.read_text())))
        return 0
    os.environ["TRITON_INTERPRET"] = "0"  # the first part of --tiny turns it on for itself
    result = measure(args)
    print(report.markdown(result))
    return 1 if any(not check["green"] for check in result["checks"]) else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="budget on a GPU: later parts are cut short or skipped (8)"
    )
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART",
                        help=f"parts ({', '.join(PARTS)}); {' and '.join(ALWAYS)} are always made")  # fmt: skip
    parser.add_argument(
        "--rows", type=int, default=0, help="rows a pass of the model (as many as fit, at most 8)"
    )
    parser.add_argument("--seed", type=int, help="of all inputs (a new one)")
    parser.add_argument("--commit", default="", help="what the checkout is, where git cannot say")
    parser.add_argument(
        "--out", type=Path, help="JSON to write (bench/results/gpu.json; gpu-tiny.json, gpu-cpu.json)"
    )
    parser.add_argument(
        "--table", type=Path, metavar="JSON", help="print the tables of an earlier run, and no more"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--tiny",
        action="store_true",
        help="small shapes on the CPU, all of them: timings mean nothing (a minute)",
    )
    how.add_argument(
        "--cpu-errors", action="store_true", help="only the checks, on the CPU, at the real shapes (some minutes)"
    )  # fmt: skip
    args = parser.parse_args()
    if args.minutes <= 0 or args.rows < 0:
        parser.error("--minutes must be more than 0, --rows not negative")
    if args.out is None:
        name = "gpu-tiny" if args.tiny else "gpu-cpu" if args.cpu_errors else "gpu"
        args.out = ROOT / "bench" / "results" / f"{name}.json"
    if args.seed is None:
        args.seed = int.from_bytes(os.urandom(3), "little")
    return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All parts in their order; the result is written after each."""
    import attr_engine

    if not (ROOT / "attr_engine" / "kernels").is_dir():  # a copy of the checkout that lost the link
        attr_engine.__path__.append(str(ROOT))
    import torch
    from gpu_card import environment
    from gpu_tools import Bench, Budget
    from gpu_work import finish

    on_cpu = args.tiny or args.cpu_errors
    if not on_cpu and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: use --tiny to see that everything runs, or --cpu-errors")
    device = torch.device("cpu") if on_cpu else torch.device("cuda", 0)
    bench = Bench(device, args.tiny, Budget(math.inf if on_cpu else args.minutes), args.seed, args.rows)
    wanted = ["checks"] if args.cpu_errors else [p for p in PARTS if p in {*args.only, *ALWAYS}]
    result: dict[str, Any] = {
        "tiny": args.tiny,
        "device": device.type,
        "settings": {
            "minutes": None if on_cpu else args.minutes,
            "seed": args.seed,
            "rows": args.rows,
            "parts": wanted,
        },
        "environment": environment(bench, args.commit),
        "parts": {},
        "checks": bench.checks,
        "finished": False,
    }
    for name in wanted:
        if name not in MODEL:
            finish(bench)
        _say(name if on_cpu else f"{name} ({bench.budget.whole():.0f} s left)")
        result["parts"][name] = _part(bench, name, PARTS[name][0])
        result["criteria"] = report.criteria(result)
        result["derived"] = report.derived(result)
        result["finished"] = name == wanted[-1]
        write(result, args.out)
    return result


def _part(bench: Any, name: str, share: float) -> dict[str, Any]:
    """One part: done, skipped or failed, with the reason."""
    _, module, function = PARTS[name]
    if bench.budget.whole() < 5:
        return {"status": "skipped", "reason": "the budget is used up", "seconds": 0.0, "skipped": []}
    bench.budget.start(share)
    bench.skipped = []
    started = time.monotonic()
    entry: dict[str, Any] = {"status": "done"}
    try:
        entry["result"] = getattr(importlib.import_module(module), function)(bench)
    except Exception as error:
        traceback.print_exc()
        entry = {"status": "failed", "reason": plain(f"{type(error).__name__}: {error}")}
        if name in ("checks", "agreement"):
            bench.check(name, "the part itself", "", "", False, reason=entry["reason"])
    return {**entry, "seconds": round(time.monotonic() - started, 2), "skipped": bench.skipped}


def write(result: dict[str, Any], path: Path) -> None:
    """Write the result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(_finite(result), indent=1, allow_nan=False) + "\n")
    part.replace(path)


def _finite(value: Any) -> Any:
    """The same with NaN and infinity as text, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
