"""What does a Fisher pass cost next to a plain forward + backward pass, and next to other ways?

One batch of rows through a stable-audio-tools DiT, in one run, alternating: a plain forward + backward pass of the
summed loss, the engine's per-sample squares in one backward pass, the loop over single rows, and ``torch.func.vmap`` of
``torch.func.grad``. Every way is first compared with the loop in the same precision. Writes
``bench/results/fisher.json`` and prints a table::

    python bench/fisher.py --tokens 128 512 1024 --width 512
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from attr_engine.persample import add_squares, per_sample_backward

ROOT = Path(__file__).resolve().parent.parent
CHANNELS = 64
WAYS = ("backward", "engine", "loop", "vmap")


class Case:
    """A DiT with random weights, none of them zero, and a batch of random rows."""

    def __init__(self, tokens: int, width: int, depth: int, batch: int) -> None:
        from attr_engine.models.stable_audio import quiet

        with quiet():
            from stable_audio_tools.models.dit import DiffusionTransformer

        torch.manual_seed(0)
        self.module = DiffusionTransformer(
            io_channels=CHANNELS, embed_dim=width, depth=depth, num_heads=width // 64, cond_token_dim=64,
            global_cond_dim=64, project_cond_tokens=False, transformer_type="continuous_transformer",
        ).eval()  # fmt: skip
        with torch.no_grad():
            for p in self.module.parameters():
                if not p.any():
                    p.normal_(std=0.02)
        self.parameters: dict[str, nn.Parameter] = dict(self.module.named_parameters())
        shape = (batch, CHANNELS, tokens)
        self.rows = (torch.randn(shape), torch.rand(batch), torch.randn(batch, 4, 64), torch.randn(batch, 64),
                     torch.randn(shape))  # fmt: skip

    def loss(self, rows: tuple[Tensor, ...], weights: dict[str, Tensor] | None = None) -> Tensor:
        """Mean squared error of each row, ``[B]``."""
        x, t, cross, glob, target = rows
        options = {"cross_attn_cond": cross, "global_embed": glob, "use_checkpointing": False}
        if weights is None:
            out = self.module._forward(x, t, **options)
        else:
            out = torch.func.functional_call(
                _Forward(self.module), {f"m.{k}": v for k, v in weights.items()}, (x, t), options
            )
        return (out - target).square().mean(dim=(1, 2))

    def zeros(self) -> dict[str, Tensor]:
        return {name: torch.zeros_like(p) for name, p in self.parameters.items()}

    # -- the ways: each returns the sum over rows of squared gradients -----------------------------

    def backward(self) -> dict[str, Tensor]:
        """A plain pass: what training costs. Its result is not the Fisher."""
        grads = torch.autograd.grad(self.loss(self.rows).sum(), list(self.parameters.values()))
        return dict(zip(self.parameters, grads, strict=True))

    def engine(self) -> dict[str, Tensor]:
        total = self.zeros()
        per_sample_backward(
            SimpleNamespace(module=self.module), self.parameters, SimpleNamespace(t=self.rows[1]),  # type: ignore[arg-type]
            lambda name, gradient: add_squares(total[name], gradient), lambda *_: self.loss(self.rows),
        )  # fmt: skip
        return total

    def loop(self) -> dict[str, Tensor]:
        total = self.zeros()
        for b in range(len(self.rows[1])):
            row = tuple(x[b : b + 1] for x in self.rows)
            grads = torch.autograd.grad(self.loss(row).sum(), list(self.parameters.values()))
            for value, g in zip(total.values(), grads, strict=True):
                value.addcmul_(g, g)
        return total

    def vmap(self) -> dict[str, Tensor]:
        weights = {name: p.detach() for name, p in self.parameters.items()}

        def one(w: dict[str, Tensor], *row: Tensor) -> Tensor:
            return self.loss(tuple(x[None] for x in row), w).sum()

        grads = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0, 0, 0, 0))(weights, *self.rows)
        return {name: g.square().sum(dim=0) for name, g in grads.items()}


class _Forward(nn.Module):
    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.m._forward(*args, **kwargs)


def error(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest relative error of a parameter's sum of squares."""
    return max(float((found[n] - want[n]).double().norm() / want[n].double().norm()) for n in want)


def measure(args: argparse.Namespace, tokens: int) -> dict[str, Any]:
    """All ways at one length."""
    case = Case(tokens, args.width, args.depth, args.batch)
    ways: dict[str, Callable[[], dict[str, Tensor]]] = {name: getattr(case, name) for name in args.ways}
    want = case.loop()
    out: dict[str, Any] = {
        "tokens": tokens,
        "parameters": sum(p.numel() for p in case.parameters.values()),
        "ways": {},
    }
    for name, way in list(ways.items()):
        row: dict[str, Any] = {"error": None if name == "backward" else error(way(), want), "seconds": []}
        row["right"] = name == "backward" or row["error"] < 1e-4
        out["ways"][name] = row
    for _ in range(args.repeat):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            out["ways"][name]["seconds"].append(time.perf_counter() - start)
    for name, row in out["ways"].items():
        row["median"] = statistics.median(row["seconds"])
        row["peak_mb"] = peak(args, tokens, name)
    return out


def peak(args: argparse.Namespace, tokens: int, way: str) -> float:
    """Peak resident megabytes of a process that runs one way once, above those of one that only builds the model."""

    def run(which: str) -> float:
        command = [sys.executable, __file__, "--one", which, "--tokens", str(tokens), "--width", str(args.width),
                   "--depth", str(args.depth), "--batch", str(args.batch), "--threads", str(args.threads)]  # fmt: skip
        return float(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        )

    return run(way) - run("none")


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--out", default=str(ROOT / "bench" / "results" / "fisher.json"))
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        case = Case(args.tokens[0], args.width, args.depth, args.batch)
        if args.one != "none":
            getattr(case, args.one)()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    results = [measure(args, tokens) for tokens in args.tokens]
    print("| tokens | way | time / backward | time / loop | peak MB | error |\n|---|---|---|---|---|---|")
    for result in results:
        ways = result["ways"]
        for name, row in ways.items():
            ratios = [row["median"] / ways[base]["median"] for base in ("backward", "loop") if base in ways]
            shown = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            wrong = "" if row["right"] else " WRONG"
            fault = "" if row["error"] is None else f"{row['error']:.1e}"
            print(f"| {result['tokens']} | {name}{wrong} | {shown} | {row['peak_mb']:.0f} | {fault} |")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    system = f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}"
    environment = {"commit": commit, "torch": torch.__version__, "python": platform.python_version(), "system": system,
                   "cpus": os.cpu_count(), "settings": vars(args)}  # fmt: skip
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out).write_text(json.dumps({"environment": environment, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
