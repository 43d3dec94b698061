"""The machine as it was found, and its two ceilings: bytes moved and matrix products a second."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from gpu_tools import DTYPES, Bench, Row, alternate
from record import command

from attr_engine.kernels import launch

ROOT = Path(__file__).resolve().parent.parent
_VERSIONS = ("torch", "triton", "numpy", "einops", "safetensors", "stable-audio-tools")
_STATE = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
)


def environment(bench: Bench, commit: str) -> dict[str, Any]:
    """What the figures depend on; nothing that names the machine."""
    versions = {}
    for name in _VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not known"
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.M) if info.exists() else []
    out: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit or _said("git", "rev-parse", "HEAD") or "not known",
        "command": command(),
        "python": platform.python_version(),
        "versions": versions,
        "cuda": torch.version.cuda,
        "cpu": names[0] if names else platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "gpu": None,
    }
    if bench.cuda:
        card = torch.cuda.get_device_properties(bench.device)
        out["gpu"] = {
            "name": card.name,
            "memory_gb": round(card.total_memory / 1e9, 1),
            "processors": card.multi_processor_count,
            "architecture": launch.architecture(bench.device),
            "as_found": _state(),
        }
    return out


def _state() -> dict[str, str]:
    """Driver, clocks and temperature as they are; nothing is set."""
    answer = _said("nvidia-smi", f"--query-gpu={','.join(_STATE)}", "--format=csv,noheader", "--id=0")
    values = [value.strip() for value in answer.split(",")]
    return dict(zip(_STATE, values, strict=True)) if len(values) == len(_STATE) else {}


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def ceilings(bench: Bench) -> dict[str, Any]:
    """Copy bandwidth (bytes read and written) and the rate of an 8192-cube by dtype, on random numbers."""
    size = 2**16 if bench.tiny else 2**31  # bytes: far more than any cache
    copy = _copy(bench, size)
    out: dict[str, Any] = {"copy_gb_per_s": 2 * size / copy["median"] / 1e9, "copy": copy, "products": {}}
    cube = 64 if bench.tiny else 8192
    for name, dtype in DTYPES.items():
        left, right = bench.normal(cube, cube, dtype=dtype), bench.normal(cube, cube, dtype=dtype)
        with launch.ieee(bench.device):
            row: Row = alternate({"product": lambda x=left, y=right: x @ y}, bench, cold=False)["product"]  # type: ignore[misc]
        out["products"][name] = {"tflops": 2 * cube**3 / row["median"] / 1e12, "cube": cube, **row}
    out["as_found_after"] = _state() if bench.cuda else {}
    bench.state["ceilings"] = out
    return out


def _copy(bench: Bench, size: int) -> Row:
    source = bench.normal(size // 4)
    target = torch.empty_like(source)
    return alternate({"copy": lambda: target.copy_(source)}, bench, cold=False)["copy"]


def share(bench: Bench, median: float, flops: float, moved: float, dtype: str) -> Row:
    """What was reached of the card's ceilings: arithmetic of this dtype, or bytes; None where they were not measured."""
    found = bench.state.get("ceilings")
    out: Row = {"tflops": flops / median / 1e12, "gb_per_s": moved / median / 1e9}
    if found is None:
        return {**out, "share_of_matrix_rate": None, "share_of_copy": None}
    rate = found["products"][dtype]["tflops"]
    return {
        **out,
        "share_of_matrix_rate": out["tflops"] / rate,
        "share_of_copy": out["gb_per_s"] / found["copy_gb_per_s"],
    }
