"""OpenL3 (Cramer et al. 2019) by the package torchopenl3, from a checkpoint file; nothing is fetched."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from attr_engine.errors import UserError
from attr_engine.methods.base import method, option
from attr_engine.methods.checkpoints import SOURCES, fit_state, read_state
from attr_engine.methods.pretrained import Pretrained, TorchEmbedder, missing_package
from attr_engine.models.checkpoint import fingerprint

RATE = 48000  # and a frame is one second
SIZES = (512, 6144)


def _input_of(state: Mapping[str, Tensor], path: Path) -> str:
    """``mel256``, ``mel128`` or ``linear``: what spectrogram a checkpoint takes, by the filters in it."""
    filters, kernels = state.get("speclayer.mel_basis"), state.get("speclayer.dft_real_kernels")
    if kernels is None:
        raise UserError(
            f"{path} holds the weights of another model: it lacks speclayer.dft_real_kernels; expected {SOURCES['openl3'].text}"
        )
    if filters is None:
        return "linear"
    return "mel128" if filters.ndim and len(filters) == 128 else "mel256"


def openl3_embedder(path: Path, size: int = 512, device: str = "cpu") -> TorchEmbedder:
    """OpenL3 from a checkpoint of torchopenl3.

    The package's own function to load one downloads it; here its network takes the numbers of the file. A window that is longer than
    a second is cut into seconds, of which the last ends where the window ends: its embedding is the mean of theirs. A shorter one
    ends in silence, as in the package.

    Args:
        path: the file; the spectrogram (256 or 128 mel bands, or linear) is seen from it.
        size: E, 512 or 6144, which differ in the last pooling alone, so that the file does not say.
        device: torch device.

    Raises:
        UserError: the package is not installed, another size, or not such a checkpoint.
    """
    source = SOURCES["openl3"]
    if size not in SIZES:
        raise UserError(
            f"an embedding of OpenL3 has 512 or 6144 numbers, not {size}: use the one in the file's name"
        )
    state = read_state(path, source)
    representation = _input_of(state, path)
    try:
        from torchopenl3.models import PytorchOpenl3
    except ImportError as error:
        raise missing_package("openl3", "torchopenl3", error) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of filters without a bin, which OpenL3 has
        module: Any = PytorchOpenl3("music", representation, size)  # the kind of content is not looked at
    fit_state(module, state, path, source)
    module.to(device)

    def forward(windows: np.ndarray) -> Tensor:
        audio = torch.from_numpy(windows).to(device)
        audio = F.pad(audio, (0, max(0, RATE - audio.shape[1])))
        last = audio.shape[1] - RATE
        seconds = [module(audio[:, None, s : s + RATE]) for s in [*range(0, last, RATE), last]]
        return torch.stack(seconds).mean(dim=0)

    return TorchEmbedder(
        f"OpenL3 ({representation}, {size})", RATE, 1.0, 0.5, fingerprint(module, {"openl3": 1, "size": size}), forward
    )  # fmt: skip


@method(
    "openl3",
    "black box",
    "cosine of OpenL3 embeddings of windows, the largest (Cramer et al. 2019)",
    "checkpoint=",
)
@dataclass(frozen=True)
class OpenL3(Pretrained):
    """:func:`openl3_embedder`."""

    method: ClassVar[str] = "openl3"
    size: int = option(512, "numbers of an embedding, 512 or 6144, as the file's name says")

    def embedder(self, device: str = "cpu") -> TorchEmbedder:
        """See :func:`openl3_embedder`."""
        return openl3_embedder(SOURCES["openl3"].path(self.checkpoint), self.size, device)
