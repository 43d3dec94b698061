"""Makes ``.venv`` with everything that the demo and the tests need; only the standard library is used.

Run by ``make``, with the Python that the environment is to have::

    python3.11 tools/setup_venv.py

What is up to date is skipped: the large pinned packages while their pins are the same, the other dependencies
while pyproject.toml is, the package while setup.py, csrc/ and the compiler are. After a failure the next call
carries on where this one stopped. The output of pip is in ``.venv/install.log``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, TextIO

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG = VENV / "install.log"
STAMP = VENV / "attr-engine-stamp.json"
SUPPORTED = ((3, 10), (3, 11))  # what numpy 1.23.5, and with it stable-audio-tools 0.0.19, has wheels for
BUILD_TOOLS = ("setuptools>=77,<82", "wheel", "pybind11>=2.12")  # torch 2.11 wants setuptools below 82
EXTRAS = "stable-audio,test"
LOG_LINES = 30
CHATTER = (
    "WARNING:",
    "Requirement already satisfied",
    "warning: no files",
    "warning: no previously",
    "writing ",
)


class Step(NamedTuple):
    """One step of the installation; ``keys`` are the entries of the stamp that it brings up to date."""

    what: str
    seconds: int  # about, on two cores and a fast line
    keys: tuple[str, ...]
    commands: list[list[str]]


def main() -> int:
    """Bring ``.venv`` up to date; return the exit status."""
    if sys.version_info[:2] not in SUPPORTED:
        found = ".".join(map(str, sys.version_info[:2]))
        print(f"setup: this is Python {found}, but stable-audio-tools needs 3.10 or 3.11.")
        print("setup: name one of them: make PYTHON=/path/to/python3.11")
        return 1
    with (ROOT / "pyproject.toml").open() as lock:
        wait_for(lock)
        wanted, stamp = wanted_stamp(), read_stamp()
        steps = missing_steps(wanted, stamp)
        for number, step in enumerate(steps, start=1):
            left = span(sum(later.seconds for later in steps[number - 1 :]))
            print(
                f"[{number}/{len(steps)}] {step.what} (about {span(step.seconds)}; about {left} left)",
                flush=True,
            )
            if "package" in step.keys:
                for path in native_files():  # a failed build must not leave an old extension behind
                    path.unlink()
            if not all(run(command) for command in step.commands):
                return 1
            stamp = ({} if "python" in step.keys else stamp) | {key: wanted[key] for key in step.keys}
            if "package" in step.keys:
                stamp["native"] = bool(native_files())
                if not stamp["native"]:
                    print(why_not_native())
            STAMP.write_text(json.dumps(stamp, indent=1) + "\n")
    return 0


def wait_for(lock: TextIO) -> None:
    """Let one installation run at a time; the lock goes when the file is closed."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("setup: waiting for another make to finish its installation", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks


def missing_steps(wanted: dict[str, object], stamp: dict[str, object]) -> list[Step]:
    """Return what has to be done to get from ``stamp`` to ``wanted``."""
    steps = []
    if stamp.get("python") != wanted["python"] or not PYTHON.exists():
        stamp = {}
        commands = [venv_command(), pip("-q", *BUILD_TOOLS)]
        steps.append(Step("making .venv with the build tools", 15, ("python",), commands))
    pinned = pinned_requirements()
    if stamp.get("pinned") != wanted["pinned"]:
        steps.append(Step(f"installing {names_of(pinned)}", 240, ("pinned",), [pip("-q", *pinned)]))
    if stamp.get("dependencies") != wanted["dependencies"]:
        command = package_command(with_extras=True)
        keys = ("dependencies", "package")
        steps.append(Step("installing attr_engine and the test tools", 30, keys, [command]))
    elif stamp.get("package") != wanted["package"] or (stamp.get("native") and not native_files()):
        steps.append(Step("rebuilding attr_engine", 15, ("package",), [package_command(with_extras=False)]))
    return steps


def wanted_stamp() -> dict[str, object]:
    """Return what the environment depends on, as the stamp records it."""
    compiler = os.environ.get("CXX") or "c++"
    package = digest([ROOT / "setup.py", *sorted((ROOT / "csrc").glob("*.*"))])
    return {
        "python": f"{sys.version} {sys.base_prefix}",
        "pinned": pinned_requirements(),
        "dependencies": digest([ROOT / "pyproject.toml", Path(__file__)]),
        "package": f"{package} {shutil.which(compiler.split()[0])}",
    }


def digest(paths: list[Path]) -> str:
    """Return one hash of the names and contents of files."""
    hasher = hashlib.sha256()
    for path in paths:
        hasher.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return hasher.hexdigest()


def read_stamp() -> dict[str, object]:
    """Return what the last complete run wrote, or nothing."""
    try:
        stamp = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def pinned_requirements() -> list[str]:
    """Return the requirements of the ``stable-audio`` extra; read without tomllib, which 3.10 has not."""
    text = (ROOT / "pyproject.toml").read_text()
    block = re.search(r"^stable-audio = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    if block is None:
        raise SystemExit("setup: pyproject.toml has no extra `stable-audio`")
    return re.findall(r'"([^"]+)"', block[1])


def names_of(requirements: list[str]) -> str:
    """Return the large pinned packages as ``torch 2.11.0, ...``, for the reader."""
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", "\n".join(requirements), re.MULTILINE))
    return ", ".join(f"{n} {pins[n]}" for n in ("torch", "torchaudio", "stable-audio-tools") if n in pins)


def venv_command() -> list[str]:
    """Return the command that makes an empty environment."""
    base = (
        getattr(sys, "_base_executable", None) or sys.executable
    )  # not .venv's own Python, if that runs this
    return [base, "-m", "venv", "--clear", str(VENV)]


def pip(*arguments: str) -> list[str]:
    """Return a pip install command in the environment."""
    return [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]


def package_command(*, with_extras: bool) -> list[str]:
    """Return the command that builds the extension and installs the package for editing."""
    target = f"{ROOT}[{EXTRAS}]" if with_extras else str(ROOT)
    return pip("-v", *([] if with_extras else ["--no-deps"]), "-e", target, "--no-build-isolation")


def native_files() -> list[Path]:
    """Return the built extension of this Python, if it is there."""
    tag = f"cpython-{sys.version_info[0]}{sys.version_info[1]}"
    return sorted((ROOT / "attr_engine").glob(f"_native.{tag}*.so"))


def run(command: list[str]) -> bool:
    """Run a command with its output in the log; on failure show the end of it and what to do."""
    VENV.mkdir(exist_ok=True)
    started = time.strftime("%H:%M:%S")
    previous = LOG.read_bytes() if LOG.exists() else b""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, check=False)
    VENV.mkdir(exist_ok=True)  # `venv --clear` empties it, the log included
    LOG.write_bytes(previous + f"\n{started} {' '.join(command)}\n".encode() + result.stdout)
    if result.returncode == 0:
        return True
    lines = [line for line in result.stdout.decode(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if not line.lstrip().startswith(CHATTER)] or lines
    print("\n".join(telling[-LOG_LINES:]))
    print(f"setup: this failed: {' '.join(command)}")
    print(f"setup: the whole output is in {LOG.relative_to(ROOT)}. {advice(lines)}")
    return False


def advice(lines: list[str]) -> str:
    """Say what to do about a failed command, judged by its output."""
    text = "\n".join(lines)
    if "ensurepip" in text:
        return "This Python comes without venv: on Debian, apt install python3.11-venv; then run make again."
    if re.search(r"No space left|Errno 28", text):
        return "The disk is full: the environment needs about 8 GB."
    if re.search(r"ConnectionError|NewConnectionError|Temporary failure|timed out|ProxyError", text):
        return "PyPI could not be reached: check the network or set PIP_INDEX_URL, then run make again."
    if "No matching distribution" in text:
        return "The package index lacks a version: check PIP_INDEX_URL and that this is Python 3.10 or 3.11."
    return "Run make again to carry on; `make distclean` starts over."


def why_not_native() -> str:
    """Return the line that setup.py printed about the missing extension."""
    found = re.findall(r"attr-engine: installed WITHOUT.*", LOG.read_text(errors="replace"))
    return found[-1] if found else "attr-engine: installed WITHOUT its C++ reader, see .venv/install.log"


def span(seconds: int) -> str:
    """Return a duration for the reader."""
    return f"{seconds} s" if seconds < 60 else f"{round(seconds / 60)} min"


if __name__ == "__main__":
    sys.exit(main())
