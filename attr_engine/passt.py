"""Label posteriors by PaSST (Koutini et al. 2022, arXiv 2110.05069), from a checkpoint file; nothing is fetched."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attr_engine.errors import UserError
from attr_engine.heard import decoder
from attr_engine.methods.checkpoints import Source, fit_state, part, read_state
from attr_engine.methods.windows import Cut
from attr_engine.models.checkpoint import fingerprint
from attr_engine.models.protocol import Denoiser

RATE, SECONDS = 32000, 10.0
_HEADS, _FRAMES, _BANDS, _PATCH = 12, 998, 128, 16  # of all published ones of ten seconds
SOURCE = Source(
    "passt", "passt-s-f128-p16-s10-ap.476-swa.pt", "github.com/kkoutini/PaSST, releases",
    "see that repository; the code of hear21passt is Apache-2.0", unknown=True,
)  # fmt: skip
# As hear21passt.base sets it up.
_MEL = dict(
    n_mels=_BANDS, sr=RATE, win_length=800, hopsize=320, n_fft=1024, freqm=48, timem=192, htk=False, fmin=0.0, fmax=15000,
    norm=1, fmin_aug_range=10, fmax_aug_range=2000,
)  # fmt: skip


class Passt:
    """Posteriors over a classifier's labels of audio.

    Args:
        path: a checkpoint of PaSST for ten seconds (STFT hop 320), on any set of labels.
        device: torch device.
        licence: of the checkpoint, as whoever uses it has read it.

    Attributes:
        fingerprint: of the weights.

    Raises:
        UserError: no licence, hear21passt is not installed, or the file is not such a checkpoint.
    """

    def __init__(self, path: Path, device: str = "cpu", licence: str = "") -> None:
        path = SOURCE.path(str(path), licence)
        state = read_state(path, SOURCE)
        state = part(state, "net.") or state
        shape = _shape(state, path)
        try:
            from hear21passt.models.passt import PaSST
            from hear21passt.models.preprocess import AugmentMelSTFT
        except ImportError as error:
            raise UserError(
                f"a classifier needs the package hear21passt ({error}): pip install hear21passt; its weights are {SOURCE.text}"
            ) from error
        with _quiet():
            self._net: Any = PaSST(**shape)
        fit_state(self._net, state, path, SOURCE)
        self._net.to(device)
        with _quiet():
            self._mel: Any = AugmentMelSTFT(**_MEL).eval().to(device)
        self._device, self.fingerprint = device, fingerprint(self._net, {"passt": 1})

    def posteriors(self, windows: np.ndarray) -> np.ndarray:
        """Float64 ``[n, K]``, rows of sum 1, of audio float32 ``[n, samples]`` at 32 kHz, ten seconds at most.

        The softmax of the logits, as in AudioCraft's metric, though the labels of AudioSet do not exclude each other.
        """
        with torch.inference_mode(), _quiet():
            spectra = self._mel(torch.from_numpy(windows).to(self._device))[:, None]
            logits = torch.cat([self._net(x[None])[0] for x in spectra])
        return np.asarray(logits.double().softmax(dim=-1).cpu().numpy())

    def of_latents(self, model: Denoiser, latents: Sequence[np.ndarray]) -> np.ndarray:
        """Posteriors float64 ``[M, K]`` of pieces, latents ``[C, n]``, as they sound.

        A piece of more than ten seconds has the mean over windows of ten, of which the last ends where the piece ends; a shorter one
        is played again until they are full.

        Raises:
            UserError: the model cannot decode (:func:`attr_engine.heard.decoder`), or a piece is not finite.
        """
        sound, cut, rows = decoder(model, RATE), Cut(SECONDS, SECONDS), []
        for latent in latents:
            audio = sound(latent)
            if not np.isfinite(audio).all():
                raise UserError("a piece is not finite, and has no labels: use a smaller strength or lr")
            found = [
                self.posteriors(x) for some in cut.windows(audio, RATE, "a piece") for x in some[:, None]
            ]
            rows.append(np.concatenate(found).mean(axis=0))
        return np.stack(rows)


def _shape(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Arguments of the network, of the shapes in a checkpoint.

    Raises:
        UserError: they are not those of a PaSST for ten seconds.
    """
    names = {"cls_token": 3, "freq_new_pos_embed": 4, "time_new_pos_embed": 4, "head.1.weight": 2}
    lacking = [n for n in names if n not in state]
    if lacking:
        raise UserError(
            f"{path} holds the weights of another model: it lacks {lacking[0]}; expected {SOURCE.text}"
        )
    grids = {10: (12, 99), 16: (8, 62)}  # stride of the patches to their numbers over bands and frames
    fits = all(state[n].ndim == k for n, k in names.items())
    grid = (state["freq_new_pos_embed"].shape[2], state["time_new_pos_embed"].shape[3]) if fits else None
    stride = next((s for s, known in grids.items() if known == grid), 0)
    width = state["cls_token"].shape[-1]
    if not stride or width % _HEADS or state["head.1.weight"].shape[1] != width:
        raise UserError(f"{path} is no PaSST for ten seconds at a hop of 320 samples: expected {SOURCE.text}")
    # Weights as large as these are in the file, so that the network takes little more memory than it does.
    depth = 0
    while (qkv := state.get(f"blocks.{depth}.attn.qkv.weight")) is not None and qkv.shape == (
        3 * width,
        width,
    ):
        depth += 1
    return dict(
        img_size=(_BANDS, _FRAMES), patch_size=_PATCH, stride=(stride, stride), in_chans=1, num_classes=len(state["head.1.weight"]),
        embed_dim=width, depth=depth, num_heads=_HEADS, distilled="dist_token" in state,
    )  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Any:
    """Without what the package prints and warns of."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
