"""Starts the processes that the ways run in, and makes the environment of the peers when it is asked for."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import stream_client
from peers_env import Environment

HERE = Path(__file__).resolve().parent
PEERS = Environment(
    HERE / ".venv-fisher-peers", HERE / "requirements-fisher.txt",
    ("opacus", "opt_einsum", "backpack-for-pytorch", "unfoldnd", "kronfluence", "einconv",
     "stable-audio-tools", "accelerate", "torch", "numpy"),
    dependencies=False,
)  # fmt: skip


class Worker(stream_client.Running):
    """The process of one way.

    Args:
        script: that serves it, ``fisher_worker.py`` or another one of this folder.
        python: that it runs in.
        way: its name among the script's, or ``reference``.
        threads: of torch.
        work: folder of the reference and of logs.
        exact: whether memory that is freed goes back at once, so that the resident size is what is in use; glibc
            otherwise keeps more or less of it by chance.
    """

    def __init__(
        self, script: str, python: str, way: str, threads: int, work: Path, exact: bool = False
    ) -> None:
        work.joinpath("logs").mkdir(parents=True, exist_ok=True)
        self._log = work / "logs" / f"{''.join(c if c.isalnum() else '-' for c in way)}.txt"
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        if exact:
            environment["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [python, "-u", str(HERE / script), way, str(threads), str(work)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1, cwd=HERE,
                env=environment, start_new_session=True,
            )  # fmt: skip

    def do(self, what: str, size: dict[str, int], only: Sequence[str] = (), times: int = 1) -> dict[str, Any]:
        """The answer of the script to ``check``, ``run`` or ``peak``, or the reason under ``missing`` or ``failed``."""
        return self.ask(json.dumps({"do": what, "size": size, "only": list(only), "times": times}))
