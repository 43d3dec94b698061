"""Lists the packages and builds the C++ extension ``attr_engine._native``; the rest is in pyproject.toml.

The extension is optional: where it cannot be built the package installs without it, falls back to numpy, and
says so in one line. ``ATTR_ENGINE_NATIVE=require`` makes that an error, ``ATTR_ENGINE_NATIVE=off`` skips it.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError:
    Pybind11Extension = None

MODE = os.environ.get("ATTR_ENGINE_NATIVE", "auto")
OPTIMIZE = ["-O3", "-Wall", "-Wextra"]
LINK = ["-pthread"]


class OptionalBuildExt(build_ext):
    """Builds the extension, or says in one line why the package goes without it."""

    def build_extension(self, ext: Extension) -> None:
        """Build ``ext``; a failure is reported and is fatal only where the extension is required."""
        try:
            super().build_extension(ext)
        except Exception as error:
            if MODE == "require":
                raise
            say_without(reason(self.compiler, error))


def reason(compiler: object, error: Exception) -> str:
    """Say what keeps the extension from being built, most likely cause first."""
    command = (getattr(compiler, "compiler_cxx", None) or getattr(compiler, "compiler", None) or ["c++"])[0]
    if not any(Path(folder, command).exists() for folder in os.get_exec_path()):
        return f"no C++ compiler: {command!r} not found"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "no Python.h: install the development package of this Python, such as python3-dev"
    return f"the compiler failed: {str(error).splitlines()[0]}"


def say_without(why: str) -> None:
    """Print the one line about a missing extension."""
    print(
        f"attr-engine: installed WITHOUT its C++ reader ({why}). Results are the same, reading latents is "
        "slower; `attr-engine doctor` shows what it costs.",
        file=sys.stderr,
    )


def extensions() -> list[Extension]:
    """Return the extension, or nothing where it is switched off or cannot be described."""
    if MODE == "off":
        say_without("ATTR_ENGINE_NATIVE=off")
        return []
    if Pybind11Extension is None:
        if MODE == "require":
            raise SystemExit("attr-engine: pybind11 is needed to build the C++ reader: pip install pybind11")
        say_without("pybind11 is not installed")
        return []
    return [
        Pybind11Extension(
            "attr_engine._native",
            sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=[*OPTIMIZE, *LINK],
            extra_link_args=LINK,
            optional=MODE != "require",
        )
    ]


# attr_engine/kernels is a link to kernels/ for use without an installation; the files are packaged once.
packages = find_packages(include=["attr_engine", "attr_engine.*"], exclude=["attr_engine.kernels*"])
packages += ["attr_engine.kernels", *(f"attr_engine.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=packages,
    package_dir={"attr_engine.kernels": "kernels"},
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuildExt},
)
