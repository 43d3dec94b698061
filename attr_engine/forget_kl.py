"""How far the labels of a model's pieces moved, prompt by prompt: the KL figure of text-to-music studies, for a removal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from attr_engine.fidelity import divergences
from attr_engine.models.protocol import Denoiser
from attr_engine.passt import Passt
from attr_engine.tensorfile import load_tensors, save_tensors


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
    def of(cls, checkpoint: str, model: Denoiser, out: Path) -> LabelShift | None:
        """None without a checkpoint.

        Raises:
            UserError: see :class:`attr_engine.passt.Passt`.
        """
        if not checkpoint:
            return None
        device = str(next(model.module.parameters()).device)
        return cls(Passt(Path(checkpoint), device), model, out)

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
