"""The extension builds, installs without a compiler, and is clean under the sanitizers."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from attr_engine.latents import native

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CXX = shutil.which(os.environ.get("CXX", "g++"))
PYTHON_H = Path(sysconfig.get_paths()["include"], "Python.h")


@pytest.mark.skipif(CXX is None, reason="there is no C++ compiler here")
@pytest.mark.skipif(not PYTHON_H.exists(), reason="there is no Python.h here")
def test_the_extension_is_there_where_it_can_be_built():
    assert native.available(), "rebuild it: pip install -e . --no-deps --no-build-isolation -v"


def test_a_missing_compiler_costs_one_line_and_no_failure(tmp_path):
    if not all(importlib.util.find_spec(name) for name in ("setuptools", "pybind11")):
        pytest.skip("setuptools and pybind11 are not installed")
    for mode, status in (("auto", 0), ("require", 1)):
        result = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "-b", tmp_path / "lib", "-t", tmp_path / "temp"],
            cwd=ROOT,
            env=os.environ | {"CC": "/nonexistent", "CXX": "/nonexistent", "ATTR_ENGINE_NATIVE": mode},
            capture_output=True,
            text=True,
        )
        assert result.returncode == status, result.stderr
        said = [line for line in result.stderr.splitlines() if line.startswith("attr-engine: ")]
        if mode == "auto":
            assert len(said) == 1 and "no C++ compiler: '/nonexistent' not found" in said[0]
        assert not list(tmp_path.rglob("_native*"))


@pytest.mark.parametrize(
    ("target", "sanitizer", "says"),
    [
        ("asan", "address,undefined", ["ok (seed {}, ", "ok (seed {}: 100000 inputs, "]),
        ("tsan", "thread", ["ok (seed {}, "]),
    ],
)
def test_the_checks_of_csrc_are_clean_under_sanitizers(target, sanitizer, says, tmp_path, seed):
    """The driver under both sanitizers, and 100,000 mutated shards and plans under the first."""
    if CXX is None or shutil.which("make") is None:
        pytest.skip("there is no C++ compiler or no make here")
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}\n")
    # Older sanitizers fit into some layouts of the addresses and not into others, where a kernel draws one of many.
    fixed = [shutil.which("setarch") or "setarch", platform.machine(), "-R"]
    if shutil.which("setarch") is None or subprocess.run([*fixed, "true"], capture_output=True).returncode:
        fixed = []  # a container may forbid it
    trial = subprocess.run(
        [CXX, f"-fsanitize={sanitizer}", empty, "-o", tmp_path / "empty"], capture_output=True, text=True
    )
    if trial.returncode == 0:
        trial = subprocess.run([*fixed, tmp_path / "empty"], capture_output=True, text=True)
    if trial.returncode != 0:
        pytest.skip(f"-fsanitize={sanitizer} does not work here: {trial.stderr.strip().splitlines()[-1:]}")

    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))
    }
    command = [*fixed, "make", target, f"CXX={CXX}", f"SEEDS={seed}"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
    lines = result.stdout.splitlines()
    assert len(lines) == len(says)
    assert all(line.startswith(start.format(seed)) for line, start in zip(lines, says, strict=True))


def test_csrc_is_formatted():
    if importlib.util.find_spec("clang_format") is None:
        pytest.skip("clang-format is not installed: pip install clang-format")
    program = shutil.which("clang-format", path=str(Path(sys.executable).parent)) or "clang-format"
    files = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cpp")]
    result = subprocess.run(
        [program, "--dry-run", "-Werror", *files], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, f"run `make format`\n{result.stderr}"
