"""The extension builds, installs without a compiler, and is clean under the sanitizers."""

from __future__ import annotations

import importlib.util
import os
import secrets
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


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_driver_is_clean_under_sanitizers(sanitizer, tmp_path):
    if CXX is None:
        pytest.skip("there is no C++ compiler here")
    flags = ["-std=c++17", "-g", "-O1", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-pthread"]
    flags += ["-D_GLIBCXX_ASSERTIONS"]  # checks the bounds of vectors
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}\n")
    trial = subprocess.run([CXX, *flags, empty, "-o", tmp_path / "empty"], capture_output=True, text=True)
    if trial.returncode == 0:
        trial = subprocess.run([tmp_path / "empty"], capture_output=True, text=True)
    if trial.returncode != 0:
        pytest.skip(f"-fsanitize={sanitizer} does not work here: {trial.stderr.strip().splitlines()[-1:]}")

    sources = [CSRC / "crc32c.cpp", CSRC / "gather.cpp", CSRC / "test" / "driver.cpp"]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [CXX, *flags, *warnings, f"-I{CSRC}", *sources, "-o", tmp_path / "driver"]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    seed = str(secrets.randbits(63))
    result = subprocess.run([tmp_path / "driver", seed], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"seed {seed}\n{result.stdout}{result.stderr}"
    assert result.stdout.startswith(f"ok (seed {seed}")


def test_csrc_is_formatted():
    if importlib.util.find_spec("clang_format") is None:
        pytest.skip("clang-format is not installed: pip install clang-format")
    program = shutil.which("clang-format", path=str(Path(sys.executable).parent)) or "clang-format"
    files = [*CSRC.rglob("*.h"), *CSRC.rglob("*.cpp")]
    result = subprocess.run(
        [program, "--dry-run", "-Werror", *files], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, f"run `make format`\n{result.stderr}"
