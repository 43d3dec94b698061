"""The GPU benchmark's own code, on small shapes without a GPU: ``bench/gpu.py --tiny``."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "bench" / "gpu.py")
PARTS = ["ceilings", "checks", "agreement", "passes", "unlearning", "scoring", "kernels", "tiles"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment
    )


@pytest.mark.slow
@pytest.mark.skipif(find_spec("stable_audio_tools") is None, reason="needs stable-audio-tools")
def test_all_parts_run_and_claim_nothing(tmp_path, seed):
    out = tmp_path / "tiny.json"
    done = run("--tiny", "--seed", str(seed), "--out", str(out))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["tiny"] and result["device"] == "cpu" and result["finished"]
    assert list(result["parts"]) == PARTS
    assert {part["status"] for part in result["parts"].values()} == {"done"}
    assert all(check["green"] for check in result["checks"])
    compared = {(check["kernel"], check["dtype"]) for check in result["checks"]}
    assert compared >= {(f"K{k}", d) for k in range(1, 6) for d in ("float32", "bfloat16", "float16")}
    assert {c["passed"] for c in result["criteria"]} == {None} == {c["found"] for c in result["criteria"]}
    assert result["derived"] == {}
    passes = result["parts"]["passes"]["result"]["passes"]
    assert {"forward", "forward + backward", "Fisher pass", "loop over single rows"} <= set(passes)
    assert all(row["seconds"] and "peak_bytes" in row for row in passes.values())
    scoring = result["parts"]["scoring"]["result"]
    assert [[row["queries"] for row in rows] for rows in scoring.values()] == [[1, 4, 16]] * 2
    rows = result["parts"]["kernels"]["result"]["rows"]
    assert {row["kernel"] for row in rows} == {f"K{k}" for k in range(1, 6)}
    shapes = result["parts"]["tiles"]["result"]["shapes"]
    assert len(shapes) == 5 * 3 * 2 and all(shape["line"] for shape in shapes)
    assert str(tmp_path) not in out.read_text() and str(ROOT) not in out.read_text()

    table = run("--table", str(out))
    assert table.returncode == 0 and "not measured" in table.stdout and "**met**" not in table.stdout


def test_without_a_gpu_it_says_what_to_do(tmp_path):
    done = run("--out", str(tmp_path / "x.json"))
    assert done.returncode != 0 and "--tiny" in done.stderr and not list(tmp_path.iterdir())
