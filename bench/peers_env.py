"""An environment of their own for the peers of a benchmark, made when it is asked for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

# A second copy of one of these would not be the one that attr_engine is measured with.
SHARED = ("torch", "torchvision", "torchaudio", "numpy", "pandas", "pyarrow", "safetensors")


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees the packages of the environment that runs the script.

    Attributes:
        folder: where it is.
        requirements: file with its pinned packages.
        packages: whose versions are reported.
        dependencies: whether what the packages depend on is installed too.
    """

    folder: Path
    requirements: Path
    packages: tuple[str, ...]
    dependencies: bool = True

    def python(self) -> Path:
        """The Python that the peers run in."""
        path = self.folder / "bin" / "python"
        return path if path.exists() else Path(sys.executable)

    def install(self) -> dict[str, str]:
        """Make the environment and bring it up to date; torch is not installed again.

        Returns:
            The reason for every requirement that could not be installed.
        """
        outer = sysconfig.get_path("purelib")
        lines = [line.strip() for line in self.requirements.read_text().splitlines()]
        wanted = [line for line in lines if line and not line.startswith("#")]
        stamp = self.folder / "stamp.json"
        key = hashlib.sha256(
            json.dumps([wanted, self.dependencies, outer, sys.version, sys.executable]).encode()
        ).hexdigest()
        if stamp.exists() and json.loads(stamp.read_text())["key"] == key:
            return {}
        print(f"making bench/{self.folder.name} (about two minutes)", file=sys.stderr, flush=True)
        venv.create(self.folder, clear=True, with_pip=False)
        inner = str(self.folder / "bin" / "python")
        paths = subprocess.run(
            [inner, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        # addsitedir, and not the bare path, so that editable installs out there are found too.
        (Path(paths.stdout.strip()) / "outer.pth").write_text(f"import site; site.addsitedir({outer!r})\n")
        if subprocess.run([inner, "-m", "pip", "--version"], capture_output=True).returncode:
            subprocess.run([inner, "-m", "ensurepip"], check=True, capture_output=True)
        pins = []
        for name in SHARED:
            with contextlib.suppress(metadata.PackageNotFoundError):
                # A local part such as +cu130 is no version that an index has, and pip matches without it.
                pins.append(f"{name}=={metadata.version(name).split('+')[0]}")
        constraints = self.folder / "constraints.txt"
        constraints.write_text("\n".join(pins) + "\n")
        options = ["--disable-pip-version-check", *([] if self.dependencies else ["--no-deps"])]
        failed = {}
        for requirement in wanted:
            done = subprocess.run(
                [inner, "-m", "pip", "install", *options, "-c", str(constraints), requirement],
                capture_output=True, text=True,
            )  # fmt: skip
            if done.returncode:
                errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
                failed[requirement.split("==")[0]] = (errors or ["pip failed"])[-1].removeprefix("ERROR: ")[
                    :200
                ]
        if not failed:
            stamp.write_text(json.dumps({"key": key}))
        return failed

    def versions(self) -> dict[str, str]:
        """Versions of the peers' packages, as their own Python sees them."""
        code = (
            "import json, importlib.metadata as m\n"
            "found = {d.metadata['Name'].lower(): d.version for d in reversed(list(m.distributions()))}\n"
            f"print(json.dumps({{n: found[n.lower()] for n in {self.packages!r} if n.lower() in found}}))"
        )
        return json.loads(
            subprocess.run([str(self.python()), "-c", code], capture_output=True, text=True).stdout
        )
