"""What models of audio say of generated pieces, for the report of a removal: CLAP scores, and how far a classifier's labels moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attr_engine.errors import UserError
from attr_engine.fidelity import divergences
from attr_engine.heard import decoder, device_of
from attr_engine.methods.clap import SOURCE, TransformersClap
from attr_engine.models.protocol import Denoiser
from attr_engine.passt import Passt
from attr_engine.tensorfile import load_tensors, save_tensors


class PromptScores:
    """The CLAP score of generated pieces: the cosine of each one's audio and the text that it was generated from.

    Args:
        folder: as of :func:`attr_engine.methods.clap.text_audio_scores`.
        prompts: sets of conditioning, by name.
        text: the entry of a conditioning that holds the text.
        model: decodes the pieces.

    Raises:
        UserError: a prompt without text, nothing at ``folder``; see also :func:`attr_engine.heard.decoder` and
            :class:`attr_engine.methods.clap.TransformersClap`.
    """

    def __init__(
        self,
        folder: str | Path,
        prompts: Mapping[str, Sequence[Mapping[str, Any]]],
        text: str,
        model: Denoiser,
    ) -> None:
        for row in (row for rows in prompts.values() for row in rows):
            if not isinstance(row.get(text), str) or not row[text].strip():
                raise UserError(
                    f"a CLAP score compares pieces with the texts that they were generated from, and a track has no text {text!r} in its "
                    f"conditioning (there is {', '.join(map(repr, row)) or 'nothing'}): name another --text, or leave --clap out"
                )
        path = SOURCE.path(str(folder))
        if not path.is_dir():
            raise UserError(
                f"{path} is no folder: a CLAP score needs the text encoder and the tokenizer of a folder of transformers, such as "
                "laion/larger_clap_music"
            )
        self._clap = TransformersClap(path, device_of(model))
        self._sound = decoder(model, self._clap.extractor.sampling_rate)
        with torch.inference_mode():
            self._texts = {
                name: self._clap.texts([row[text] for row in rows]).cpu().numpy().astype(np.float64)
                for name, rows in prompts.items()
            }

    def __call__(self, name: str, made: Sequence[np.ndarray]) -> np.ndarray | None:
        """Scores ``[n]`` float64 of latents ``[C, n]``, one a prompt of the set; None where some audio is not finite."""
        audio = [self._sound(x) for x in made]
        if not all(np.isfinite(x).all() for x in audio):
            return None
        return np.asarray((self._clap.sounds(audio) * self._texts[name]).sum(axis=1))


class LabelShift:
    """Posteriors of the untouched model's pieces, kept in a folder, and the divergences of other models' pieces from them.

    Args:
        classifier: gives posteriors.
        model: decodes the pieces.
        out: folder.
    """

    def __init__(self, classifier: Passt, model: Denoiser, out: Path) -> None:
        self.classifier, self.model, self.out = classifier, model, out
        self.fingerprint = classifier.fingerprint

    @classmethod
    def of(cls, checkpoint: str, licence: str, model: Denoiser, out: Path) -> LabelShift | None:
        """None without a checkpoint.

        Raises:
            UserError: see :class:`attr_engine.passt.Passt`.
        """
        if not checkpoint:
            return None
        return cls(Passt(Path(checkpoint), device_of(model), licence), model, out)

    def of_pieces(
        self, name: str, made: Sequence[np.ndarray], key: str, untouched: bool
    ) -> np.ndarray | None:
        """``KL(p_i || q_i)`` of the untouched model's pieces (p) and these (q), ``[n]`` in nats.

        Args:
            name: of the set of prompts.
            made: latents ``[C, n]``, in the order of the prompts.
            key: of the removal; what is kept belongs to it.
            untouched: these are the untouched model's: their posteriors are kept.

        Returns:
            None of the untouched model's own, and where a piece is not finite.

        Raises:
            UserError: the model cannot decode, or what was kept is gone or of another removal.
        """
        if not all(np.isfinite(x).all() for x in made):
            return None
        path = self.out / f"labels-{name}.safetensors"
        found = self.classifier.of_latents(self.model, made)
        if untouched:
            save_tensors(path, {"posteriors": torch.from_numpy(found)}, {"key": key})
            return None
        return divergences(load_tensors(path, key)[0]["posteriors"].numpy(), found)
