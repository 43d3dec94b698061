"""Embeddings of the user's own: vectors in a file, a Python function, or an ONNX model."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine.embed import IDS, vectors_of
from attr_engine.errors import UserError, one_line
from attr_engine.jobs import Query
from attr_engine.latents.batch import Tracks
from attr_engine.latents.ingest import file_hash
from attr_engine.methods.base import Fitted, Workspace, method, option
from attr_engine.methods.similarity import HOP, SHORT, WINDOW, fit_similarity
from attr_engine.methods.windows import unit
from attr_engine.models.protocol import Denoiser
from attr_engine.runs import key_of

_WINDOW = 5.0  # seconds, where the user says nothing


@dataclass(frozen=True)
class FunctionEmbedder:
    """Windows through a function of (windows float32 ``[n, samples]``, rate) that gives ``[n, E]``.

    It satisfies :class:`attr_engine.methods.embedder.Embedder`.
    """

    name: str
    rate: int
    fingerprint: str
    function: Callable[[np.ndarray, int], Any]
    window: float = _WINDOW
    hop: float = _WINDOW / 2

    def embed(self, windows: np.ndarray) -> np.ndarray:
        """What the function gives.

        Raises:
            UserError: the function failed; the message says with what.
        """
        try:
            return np.asarray(self.function(windows, self.rate))
        except UserError:
            raise
        except Exception as error:  # somebody else's code
            raise UserError(
                f"{self.name} failed on {len(windows)} windows of {windows.shape[1]} samples ({one_line(error)}): repair it"
            ) from error


def function_embedder(text: str, rate: int, version: str) -> FunctionEmbedder:
    """The function that ``package.module:function`` names.

    Args:
        text: as a user wrote it. Importing a module runs it.
        rate: Hz that the function takes.
        version: goes into the fingerprint beside the function's source file; weights that it loads do not.

    Raises:
        UserError: no such module or function, or the module cannot be imported.
    """
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise UserError(f"callable is {text!r}: write package.module:function")
    try:
        function = getattr(importlib.import_module(module), name)
        source = file_hash(Path(inspect.getsourcefile(function) or ""))
    except Exception as error:  # somebody else's code
        raise UserError(
            f"{text} cannot be imported ({one_line(error)}): install the module, or name its folder in PYTHONPATH"
        ) from error
    return FunctionEmbedder(text, rate, key_of("function", text, source, rate, version), function)


def onnx_embedder(path: Path, rate: int) -> FunctionEmbedder:
    """An ONNX model of one input float32 ``[n, samples]``, n of any size, whose first output is ``[n, E]``; on the CPU.

    Raises:
        UserError: onnxruntime is missing, the file cannot be read, or the model takes something else.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"an ONNX model needs {error.name}: pip install 'attr-engine[onnx]'") from error
    if not path.is_file():
        raise UserError(f"there is no ONNX model {path}: check the path")
    try:
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    except Exception as error:  # of the library's own kinds
        raise UserError(
            f"{path} cannot be read as an ONNX model ({one_line(error)}): export it again"
        ) from error
    given = session.get_inputs()
    shape = given[0].shape if len(given) == 1 else []
    if len(shape) != 2 or given[0].type != "tensor(float)" or isinstance(shape[0], int):
        found = "; ".join(f"{x.name} {x.type} {x.shape}" for x in given)
        raise UserError(
            f"{path} takes {found}: export it with one input of float [n, samples], n of any size"
        )
    name, samples = given[0].name, shape[1]

    def run(windows: np.ndarray, rate: int) -> np.ndarray:
        if isinstance(samples, int) and windows.shape[1] != samples:
            raise UserError(
                f"{path} takes windows of {samples} samples, these have {windows.shape[1]}: use window={samples / rate:g}"
            )
        return np.asarray(session.run(None, {name: windows})[0])

    window = samples / rate if isinstance(samples, int) else _WINDOW
    return FunctionEmbedder(str(path), rate, key_of("onnx", file_hash(path), rate), run, window, window / 2)


@method(
    "embedding",
    "black box",
    "cosine of embeddings of your own: a .npy of tracks, a Python function, or an ONNX model",
    "path=, callable= or onnx=",
)
@dataclass(frozen=True)
class EmbeddingSimilarity:
    """One of ``path``, ``callable`` and ``onnx``."""

    path: str = option("", "a .npy with a row a track and query, ids.json beside it")
    callable: str = option("", "package.module:function of (windows, rate)")
    onnx: str = option("", "an ONNX model of windows [n, samples]")
    rate: int = option(16000, "Hz that the function or model takes")
    window: float = option(0.0, f"{WINDOW}, or {_WINDOW:g}")
    hop: float = option(0.0, f"{HOP}; half a window where it has none")
    short: str = option("", SHORT)
    standardised: bool = option(
        False, "every dimension at mean 0 and standard deviation 1 over the windows of the tracks"
    )
    version: str = option("", "of the function's weights: another one embeds anew")

    def embedder(self, device: str = "cpu") -> FunctionEmbedder:
        """The function or the ONNX model, which knows no device.

        Raises:
            UserError: none or several of the three are given, ``path`` is, or what is given cannot be used.
        """
        self._check()
        if self.path:
            raise UserError(f"{self.path} holds vectors, and cannot embed audio: give callable= or onnx=")
        if self.rate < 1:
            raise UserError(f"a rate of {self.rate} Hz cannot be: give what the embedding takes")
        if self.callable:
            return function_embedder(self.callable, self.rate, self.version)
        return onnx_embedder(Path(self.onnx), self.rate)

    def fit(self, model: Denoiser, tracks: Tracks, work: Workspace) -> Fitted:
        """Read the vectors, or embed all windows of the tracks.

        Raises:
            UserError: none or several of the three are given, or the one that is cannot be used.
        """
        self._check()
        if self.path:
            path = Path(self.path)
            return FittedVectors(path, unit(vectors_of(path, tracks.ids)))
        how = self.window, self.hop, self.short, self.standardised
        return fit_similarity(self.embedder(), tracks, work, *how)

    def _check(self) -> None:
        if sum(map(bool, (self.path, self.callable, self.onnx))) != 1:
            raise UserError(
                "the method embedding needs one of path=FILE.npy, callable=package.module:function and onnx=FILE.onnx"
            )


@dataclass(frozen=True)
class FittedVectors:
    """Vectors of tracks from a file.

    Attributes:
        path: of the file, which holds the queries' too.
        vectors: of the tracks, float32 ``[N, E]``, rows of length 1.
    """

    path: Path
    vectors: np.ndarray

    @property
    def fingerprint(self) -> str:
        """Of both files."""
        return key_of(file_hash(self.path), file_hash(self.path.with_name(IDS)))

    def score(self, queries: Sequence[Query]) -> np.ndarray:
        """Cosines float64 ``[Q, N]``; of a group of tracks, the largest of any of them."""
        ids = [q.tracks.ids[i] for q in queries for i in q.indices]
        rows = unit(vectors_of(self.path, ids))
        first = np.cumsum([0] + [len(q.indices) for q in queries])[:-1]
        # One query at a time: in a product of several the rounding of one depends on how many there are.
        cosines = np.stack([self.vectors @ row for row in rows]).astype(np.float64)
        return np.asarray(np.maximum.reduceat(cosines, first))
