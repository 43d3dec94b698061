"""Compiles every shipped Triton kernel for sm_80, sm_90 and sm_100 without a GPU and reads the machine code.

``python -m attr_engine.kernels.gate`` prints a table and exits with 1 where a kernel spills registers to memory (LDL,
STL), has no tensor-core instruction where a 16-bit matrix product is meant, passes its register budget, uses an
atomic operation, or adds a 32-bit offset to a pointer. ``--arch sm_90`` takes one architecture. Nothing is
cached outside a temporary folder.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from attr_engine.kernels import launch

MODULES = ("squared_gradient", "query_dot", "noised", "v_loss", "precondition")
# What a matrix product becomes: synchronous warps (Ampere), warp groups (Hopper), tensor memory (Blackwell).
MATRIX = {"sm_80": r"\bHMMA\b", "sm_90": r"\bHGMMA\b", "sm_100": r"\bUTC\w*MMA\b"}
SPILL = re.compile(r"\b(?:LDL|STL)\b")
ATOMIC = re.compile(r"\b(?:ATOM|RED)[GS]?\.\S*(?:F16|F32|F64|BF16)")
NARROW = re.compile(r"tt\.addptr .*, (?:tensor<[0-9x]*xi32\b|i32$)")


@dataclass(frozen=True)
class Verdict:
    """What the machine code of one kernel on one architecture shows."""

    name: str
    arch: str
    registers: int
    spills: int
    matrix: int
    shared: int
    seconds: float
    complaints: tuple[str, ...]


def _source(configuration: launch.Configuration) -> Any:
    import triton.language as tl
    from triton.compiler import ASTSource

    function = launch.lazy(configuration.kernel)
    constants = {
        name: {"fp32": tl.float32, "fp64": tl.float64}[value] if isinstance(value, str) else value
        for name, value in configuration.constants.items()
    }
    signature = {
        name: "constexpr" if name in constants else configuration.types[name] for name in function.arg_names
    }
    places = {name: (place,) for place, name in enumerate(function.arg_names)}
    aligned = {places[name]: [["tt.divisibility", 16]] for name in configuration.aligned if name in places}
    return ASTSource(function, signature, {places[name]: value for name, value in constants.items()}, aligned)


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def judge(configuration: launch.Configuration, arch: str, folder: Path) -> Verdict:
    """Compile one configuration for one architecture and look at what came out."""
    import triton
    from triton.backends.compiler import GPUTarget

    started = time.monotonic()
    target = GPUTarget("cuda", int(arch[3:]), 32)
    compiled = triton.compile(_source(configuration), target=target, options=dict(configuration.options))
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    dump = subprocess.run(
        [_tool("cuobjdump"), "-sass", "-res-usage", str(cubin)], check=True, capture_output=True, text=True
    ).stdout
    instructions = dump.splitlines()
    spills = sum(bool(SPILL.search(line)) for line in instructions)
    matrix = sum(bool(re.search(MATRIX[arch], line)) for line in instructions)
    usage = re.search(r"REG:(\d+)", dump)
    registers = int(usage[1]) if usage else 999
    complaints = []
    if not usage or not any("EXIT" in line for line in instructions):
        complaints.append("the machine code could not be read")
    if spills:
        complaints.append(f"{spills} spills")
    if configuration.matrix and not matrix:
        complaints.append("no tensor-core instruction")
    if "descriptor" in configuration.name and "UTMALDG" not in dump:
        complaints.append("no bulk copy")
    if registers > configuration.registers:
        complaints.append(f"more than {configuration.registers} registers")
    if ATOMIC.search(dump) or "atomic" in compiled.asm["ttir"]:
        complaints.append("atomics")
    if any(NARROW.search(line.split(" loc(")[0].rstrip()) for line in compiled.asm["ttir"].splitlines()):
        complaints.append("32-bit offsets")
    return Verdict(
        configuration.name,
        arch,
        registers,
        spills,
        matrix,
        int(compiled.metadata.shared),
        time.monotonic() - started,
        tuple(complaints),
    )


def shipped() -> list[launch.Configuration]:
    """Every configuration of every operation."""
    return [c for module in MODULES for c in import_module(f"attr_engine.kernels.{module}").configurations()]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 where a kernel fails, 2 where Triton is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--arch", choices=launch.ARCHITECTURES, action="append", help="only this architecture"
    )
    parser.add_argument("--only", default="", help="only names that contain this")
    options = parser.parse_args(arguments)
    if not launch.have_triton() or launch.interpreting():
        print("the gate needs Triton, and TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    import triton

    failed = count = 0
    print(f"{'kernel':52} {'arch':6} {'regs':>4} {'spills':>6} {'matrix':>6} {'shared':>7} {'s':>5}  verdict")
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        for configuration in shipped():
            if options.only not in configuration.name:
                continue
            for arch in configuration.architectures:
                if options.arch and arch not in options.arch:
                    continue
                v = judge(configuration, arch, Path(folder))
                verdict = "; ".join(v.complaints) or "ok"
                print(
                    f"{v.name:52} {arch:6} {v.registers:4} {v.spills:6} {v.matrix:6} {v.shared:7} {v.seconds:5.1f}  {verdict}",
                    flush=True,
                )
                count, failed = count + 1, failed + bool(v.complaints)
    print(f"{count} kernels, {failed} failed")
    return 1 if failed or not count else 0


if __name__ == "__main__":
    sys.exit(main())
