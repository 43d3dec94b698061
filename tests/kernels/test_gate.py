"""The compile gate passes over everything shipped, and fails what it has to fail."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from attr_engine.kernels import gate, launch, table

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_every_shipped_kernel_passes(record_property):
    process = run("-m", "attr_engine.kernels.gate")
    assert process.returncode == 0, process.stdout + process.stderr
    lines = process.stdout.splitlines()
    assert lines[-1] == f"{sum(len(c.architectures) for c in gate.shipped())} kernels, 0 failed"
    for arch in launch.ARCHITECTURES:
        for name in ("squared_gradient", "query_dot", "v_loss", "noised", "precondition", "add_parts"):
            assert any(line.startswith(name) and arch in line for line in lines), (name, arch)
    registers = [int(match[1]) for line in lines if (match := re.search(r" sm_\d+ +(\d+) ", line))]
    record_property("registers, most", max(registers))


def test_it_judges_what_is_launched():
    """What the table leads to is what the gate compiles."""
    for operation in ("squared_gradient", "query_dot"):
        listed = {(f.arch, f.row, f.dtype, f.read) for f in table.forms(operation)}
        for arch in launch.ARCHITECTURES:
            for dtype in ("float32", "float16", "bfloat16"):
                size = 4 if dtype == "float32" else 2
                rows = [row for key, row in table.TABLE.items() if key[0] == arch and key[3] == dtype]
                rows += [row for key, row in table.DEFAULTS.items() if key[:2] == (arch, str(8 * size))]
                for row in rows:
                    for read in ("descriptor", "pointer", "strided"):
                        if read == "descriptor" and (size == 4 or arch == "sm_80"):
                            continue
                        fitted = table.fit(row, operation, read, size)
                        fitted = table.Row("triton", *list(vars(fitted).values())[1:])
                        assert (arch, fitted, dtype, read) in listed


BAD = """
import sys, tempfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path
import triton
import triton.language as tl
from attr_engine.kernels import gate, launch, table

module = import_module("attr_engine.kernels.squared_gradient")
good = module.configurations()
half = next(c for c in good if "bfloat16 128x128x64 pointer" in c.name and c.architectures == ("sm_90",))
single = next(c for c in good if "float32" in c.name and "pointer" in c.name and c.architectures == ("sm_90",))
with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
    triton.knobs.cache.dir = folder
    for configuration in (
        replace(half, constants={**half.constants, "BLOCK_I": 256}, options={"num_warps": 4, "num_stages": 3}),
        replace(single, matrix=True),
        replace(single, registers=20),
        launch.Configuration("atomic", ATOMIC, {"out": "*fp32", "x": "*fp32"}, {}, options={"num_warps": 1}),
    ):
        print(gate.judge(configuration, "sm_90", Path(folder)).complaints)
"""

ATOMIC = """
from __future__ import annotations
from typing import TYPE_CHECKING
from attr_engine.kernels.launch import jit

@jit
def kernel(out, x):
    place = tl.arange(0, 32)
    tl.atomic_add(out + place % 2, tl.load(x + place))
"""


def test_it_fails_what_spills_or_is_slow_or_not_repeatable(tmp_path):
    (tmp_path / "atomic.py").write_text(ATOMIC)
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from atomic import kernel as ATOMIC\n" + BAD
    process = run("-c", script)
    assert process.returncode == 0, process.stderr
    spilling, scalar, greedy, atomic = process.stdout.splitlines()
    assert "spills" in spilling
    assert "no tensor-core instruction" in scalar
    assert "more than 20 registers" in greedy
    assert "atomics" in atomic and "32-bit offsets" in atomic


SPECIAL = """
import tempfile
from dataclasses import replace
from pathlib import Path
import triton
from attr_engine.kernels import gate

# Triton makes a constant of every integer argument that is 1, and takes 64 bits for those that need them.
ONES = ("samples", "each", "tokens", "rows", "columns", "queries", "add", "stride_w", "channels", "frames", "size", "count")
seen = set()
with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
    triton.knobs.cache.dir = folder
    for c in gate.shipped():
        kind = (c.name.split()[0], "descriptor" in c.name)
        if kind in seen or "sm_90" not in c.architectures or "strided" in c.name:
            continue
        seen.add(kind)
        ones = {name: 1 for name in ONES if name in c.types}
        large = {name: "i64" if kind == "i32" and name.startswith("stride") else kind for name, kind in c.types.items()}
        for variant in (replace(c, constants={**c.constants, **ones}), replace(c, types=large)):
            verdict = gate.judge(variant, "sm_90", Path(folder))
            print(verdict.name, verdict.spills, verdict.complaints)
"""


def test_sizes_of_one_and_strides_of_64_bits_compile():
    process = run("-c", SPECIAL)
    assert process.returncode == 0, process.stderr[-4000:]
    lines = process.stdout.splitlines()
    assert len(lines) >= 14 and all(line.endswith(" 0 ()") for line in lines), process.stdout


def test_it_says_what_it_needs():
    process = subprocess.run(
        [sys.executable, "-m", "attr_engine.kernels.gate"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2 and "TRITON_INTERPRET" in process.stderr


def test_the_instructions_are_told_apart():
    assert gate.SPILL.search("  STL.64 [R1+0x8], R2") and not gate.SPILL.search("STG.E [R2], R4; LDS R1")
    for line in ("RED.E.ADD.F32.FTZ.RN", "ATOMG.E.ADD.F16x2", "ATOMS.ADD.F32", "REDG.E.ADD.F32"):
        assert gate.ATOMIC.search(line), line
    assert not gate.ATOMIC.search("ATOMS.OR RZ, [UR4], R3") and not gate.ATOMIC.search("REDUX.SUM UR4, R2")
    assert gate.NARROW.search("%5 = tt.addptr %3, %4 : tensor<32x!tt.ptr<f32>>, tensor<32xi32>")
    assert gate.NARROW.search("%5 = tt.addptr %3, %4 : !tt.ptr<f32>, i32")
    assert not gate.NARROW.search("%5 = tt.addptr %3, %4 : tensor<4x8x!tt.ptr<f32>, #b>, tensor<4x8xi64, #b>")
