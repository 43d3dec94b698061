"""MERT and MuQ: the mean over time of a transformer's hidden state. Their weights may not be used commercially."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from attr_engine.errors import UserError
from attr_engine.methods.base import method, option
from attr_engine.methods.checkpoints import SOURCES, build, check_state, fit_state, read_folder
from attr_engine.methods.pretrained import Restricted, TorchEmbedder, missing_package
from attr_engine.models.checkpoint import fingerprint

LAYER = "hidden state that is averaged: 0 goes into the first layer, -1 is the last"


def _mean(hidden: tuple[Tensor, ...], layer: int, name: str) -> Tensor:
    """``[b, E]`` of hidden states ``[b, frames, E]``."""
    if not -len(hidden) <= layer < len(hidden):
        raise UserError(
            f"{name} has {len(hidden)} hidden states: use layer={-len(hidden)} to {len(hidden) - 1}"
        )
    return hidden[layer].mean(dim=1)


def _with_new_names(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The two parts of a normalised weight under the names of today's torch, where the module has them."""
    new = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    wanted, out = module.state_dict(), {}
    for name, value in state.items():
        stem, _, leaf = name.rpartition(".")
        other = f"{stem}.{new.get(leaf, leaf)}"
        out[other if name not in wanted and other in wanted else name] = value
    return out


def mert_embedder(path: Path, layer: int = -1, device: str = "cpu") -> TorchEmbedder:
    """MERT (Li et al. 2023) as the HuBERT of transformers, which it is without CQT input and DeepNorm.

    The folder's own Python files are not run.

    Raises:
        UserError: transformers is not installed, or the folder is not one of such a MERT.
    """
    source = SOURCES["mert"]
    try:
        from transformers import HubertConfig, HubertModel
    except ImportError as error:
        raise missing_package("mert", "transformers", error) from error
    config, preprocessing, state, file = read_folder(path, source)
    for name in ("feature_extractor_cqt", "deepnorm"):
        if config.get(name):
            raise UserError(
                f"{path}/config.json sets {name}, which only the code in that folder computes, and that is not run: use {source.text}"
            )
    if config.get("model_type") not in ("mert_model", "music_hubert", "hubert"):
        raise UserError(f"{path} holds a {config.get('model_type')!r}, not MERT: expected {source.text}")

    def make() -> Any:
        return HubertModel(HubertConfig.from_dict({**config, "model_type": "hubert"}))

    with torch.device("meta"):  # no memory before all shapes are known to fit
        empty = build(make, path)
    renamed = _with_new_names(state, empty)
    check_state(empty, renamed, file, source)
    module = build(make, path)
    fit_state(module, renamed, file, source)
    module.to(device)
    rate, normalise = int(preprocessing.get("sampling_rate", 24000)), bool(preprocessing.get("do_normalize", True))  # fmt: skip

    def forward(windows: np.ndarray) -> Tensor:
        audio = torch.from_numpy(windows).to(device)
        if normalise:  # as Wav2Vec2FeatureExtractor does
            mean, spread = audio.mean(dim=1, keepdim=True), audio.var(dim=1, keepdim=True, unbiased=False)
            audio = (audio - mean) / (spread + 1e-7).sqrt()
        return _mean(module(audio, output_hidden_states=True).hidden_states, layer, "MERT")

    options = {
        "mert": 1,
        "layer": layer,
        "rate": rate,
        "normalise": normalise,
        "stable": module.config.do_stable_layer_norm,
    }
    return TorchEmbedder("MERT", rate, 5.0, 1.0, fingerprint(module, options), forward)


@method(
    "mert",
    "black box",
    "cosine of MERT embeddings of windows, the largest (Li et al. 2023); not for commercial use",
    "checkpoint= and licence=",
)
@dataclass(frozen=True)
class Mert(Restricted):
    """:func:`mert_embedder`."""

    method: ClassVar[str] = "mert"
    layer: int = option(-1, LAYER)

    def embedder(self, device: str = "cpu") -> TorchEmbedder:
        """See :func:`mert_embedder`."""
        return mert_embedder(SOURCES["mert"].path(self.checkpoint, self.licence), self.layer, device)


def muq_embedder(path: Path, layer: int = -1, device: str = "cpu") -> TorchEmbedder:
    """MuQ (Zhu et al. 2025) by the package ``muq``, from a folder with its config.json and weights.

    Raises:
        UserError: the package is not installed, transformers is too new for it, or the folder is not one of MuQ.
    """
    source = SOURCES["muq"]
    try:
        from muq import MuQ
        from transformers import __version__ as version
    except ImportError as error:
        raise missing_package("muq", "muq", error) from error
    if int(version.split(".")[0]) > 4:
        # The encoder that muq 0.1.0 calls gives no hidden states there.
        raise UserError(f"muq needs transformers 4, and {version} is installed: pip install 'transformers<5'")
    config, _, state, file = read_folder(path, source)
    if "w2v2_config" not in config or "encoder_dim" not in config:
        raise UserError(f"{path}/config.json is not one of MuQ: expected {source.text}")
    # A path in a config would be opened; of two encoders the plain one.
    plain = {**config, "rvq_ckpt_path": None, "is_flash": False}
    module = build(lambda: MuQ(plain), path)
    fit_state(module, _with_new_names(state, module), file, source)
    module.to(device)

    def forward(windows: np.ndarray) -> Tensor:
        found = module(torch.from_numpy(windows).to(device), output_hidden_states=True)
        return _mean(found.hidden_states, layer, "MuQ")

    options = {"muq": 1, "layer": layer, "config": plain}
    return TorchEmbedder("MuQ", 24000, 10.0, 1.0, fingerprint(module, options), forward)


@method(
    "muq",
    "black box",
    "cosine of MuQ embeddings of windows, the largest (Zhu et al. 2025); not for commercial use",
    "checkpoint= and licence=",
)
@dataclass(frozen=True)
class Muq(Restricted):
    """:func:`muq_embedder`."""

    method: ClassVar[str] = "muq"
    layer: int = option(-1, LAYER)

    def embedder(self, device: str = "cpu") -> TorchEmbedder:
        """See :func:`muq_embedder`."""
        return muq_embedder(SOURCES["muq"].path(self.checkpoint, self.licence), self.layer, device)
