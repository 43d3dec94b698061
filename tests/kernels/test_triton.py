"""The Triton kernels in Triton's interpreter, in processes of their own: it has to be chosen before the import."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("name", ["check_layers", "check_rows", "check_engine"])
def test_the_kernels_in_the_interpreter(name, record_property):
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-x",
            str(FOLDER / "interpreted" / f"{name}.py"),
        ],
        cwd=FOLDER.parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
    passed = re.search(r"(\d+) passed", process.stdout)
    assert passed and int(passed[1]) >= 10 and "skipped" not in process.stdout
    record_property("passed in the interpreter", int(passed[1]))


def test_the_operations_import_and_run_without_triton():
    script = """
import sys
sys.modules["triton"] = None
import torch
from attr_engine import kernels
kernels.squared_gradient_(torch.zeros(3, 4), torch.ones(2, 5, 3), torch.ones(2, 5, 4))
x = torch.zeros(1, 2, 3)
kernels.v_loss(x, x, torch.tensor([1]), torch.tensor([0.5]), torch.ones(1, 3, dtype=torch.bool), "v")
import attr_engine.kernels.gate
"""
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=FOLDER.parent.parent
    )
    assert process.returncode == 0, process.stderr[-2000:]


def test_importing_the_operations_does_not_import_triton():
    script = "import sys, attr_engine.kernels, attr_engine.kernels.gate; assert 'triton' not in sys.modules"
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=FOLDER.parent.parent
    )
    assert process.returncode == 0, process.stderr[-2000:]
