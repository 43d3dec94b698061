"""CLAP (Wu et al. 2023, arXiv 2211.06687): embeddings of audio by a checkpoint of laion_clap or a folder of transformers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attr_engine.errors import UserError, one_line
from attr_engine.methods.base import method
from attr_engine.methods.checkpoints import (
    SOURCES,
    build,
    check_state,
    fit_state,
    part,
    read_folder,
    read_state,
)
from attr_engine.methods.pretrained import Pretrained, TorchEmbedder, missing_package
from attr_engine.models.checkpoint import fingerprint

RATE, SAMPLES = 48000, 480000  # ten seconds, of all checkpoints
SOURCE = SOURCES["clap"]
_SIZES = {96: "tiny", 128: "base", 256: "large"}  # width of the patches of an HTSAT
# Of all HTSAT configurations of laion_clap.
_AUDIO = dict(
    audio_length=1024, clip_samples=SAMPLES, mel_bins=64, sample_rate=RATE, window_size=1024, hop_size=480, fmin=50, fmax=14000,
    class_num=527, model_type="HTSAT",
)  # fmt: skip


def _htsat() -> Any:
    """laion_clap's module of the audio network alone.

    Importing the package itself fetches tokenizers and a text encoder, so its ``__init__`` is left out.
    """
    name = "_attr_engine_laion_clap"
    if name not in sys.modules:
        spec = importlib.util.find_spec("laion_clap")
        if spec is None or spec.origin is None:
            raise ImportError("No module named 'laion_clap'")
        package = types.ModuleType(name)
        package.__path__ = [str(Path(spec.origin).parent / "clap_module")]
        sys.modules[name] = package
    return importlib.import_module(f"{name}.htsat")


class LaionAudio(nn.Module):
    """HTSAT and the projection into the joint space, under the names that checkpoints of laion_clap use.

    Args:
        size: ``tiny``, ``base`` or ``large``.
    """

    def __init__(self, size: str) -> None:
        super().__init__()
        self.audio_branch = _htsat().create_htsat_model(types.SimpleNamespace(**_AUDIO, model_name=size))
        width = self.audio_branch.num_features
        self.audio_projection = nn.Sequential(nn.Linear(width, 512), nn.ReLU(), nn.Linear(512, 512))

    def forward(self, audio: Tensor) -> Tensor:
        """Unit vectors ``[b, 512]`` of audio ``[b, 480000]``."""
        hidden = self.audio_branch({"waveform": audio}, device=audio.device)["embedding"]
        return F.normalize(self.audio_projection(hidden), dim=-1)


def quantised(audio: np.ndarray) -> np.ndarray:
    """Audio through 16-bit integers, rounded towards zero, as laion_clap does."""
    steps = np.trunc(np.clip(audio, -1.0, 1.0) * np.float32(32767))
    return np.asarray(steps.astype(np.float64) / 32767, dtype=np.float32)


def filled(audio: np.ndarray) -> np.ndarray:
    """Windows ``[b, n]`` with ten seconds: played again as often as fits whole, then silence."""
    whole = np.tile(audio, (1, max(1, SAMPLES // audio.shape[1])))
    return np.pad(whole, ((0, 0), (0, SAMPLES - whole.shape[1])))


def laion_embedder(path: Path, device: str = "cpu") -> TorchEmbedder:
    """CLAP from a checkpoint of laion_clap without fusion (``HTSAT-tiny``, ``-base`` or ``-large``).

    Raises:
        UserError: laion_clap is not installed, or the file is not such a checkpoint.
    """
    state = read_state(path, SOURCE)
    state = part(state, "module.") or state
    patch = state.get("audio_branch.patch_embed.proj.weight")
    width = len(patch) if patch is not None and patch.ndim else 0
    if any("fusion_model" in name or "mel_conv" in name for name in state):
        raise UserError(
            f"{path} is a checkpoint with fusion, which listens to random parts: use one without, such as {SOURCE.text}"
        )
    if width not in _SIZES:
        raise UserError(f"{path} holds no audio network of CLAP (HTSAT): expected {SOURCE.text}")
    try:
        module = LaionAudio(_SIZES[width])
    except ImportError as error:
        raise missing_package("clap", "laion-clap", error) from error
    fit_state(module, state, path, SOURCE)
    module.to(device)

    def forward(windows: np.ndarray) -> Tensor:
        return module(torch.from_numpy(filled(quantised(windows))).to(device))

    name = f"CLAP (laion_clap, HTSAT-{_SIZES[width]})"
    return TorchEmbedder(
        name, RATE, 10.0, 1.0, fingerprint(module, {"clap": "laion"}), forward, longest=SAMPLES
    )


class TransformersClap:
    """CLAP from a folder of transformers: config.json, weights, preprocessor_config.json, and a tokenizer for texts.

    Args:
        path: the folder, such as ``laion/larger_clap_music``.
        device: torch device.

    Raises:
        UserError: transformers is not installed, or the folder is not one of CLAP without fusion.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        try:
            from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, __version__
        except ImportError as error:
            raise missing_package("clap", "transformers", error) from error
        if int(__version__.split(".")[0]) < 5:
            # There the network cannot be laid out without taking its memory.
            raise UserError(
                f"CLAP from a folder needs transformers 5, and {__version__} is installed: pip install 'transformers>=5'"
            )
        config, preprocessing, state, file = read_folder(path, SOURCE)
        if config.get("model_type") != "clap" or not preprocessing:
            raise UserError(
                f"{path} is not a folder of CLAP: expected config.json of a ClapModel, and preprocessor_config.json"
            )
        made = build(lambda: ClapConfig.from_dict(config), path)
        self.extractor: Any = build(lambda: ClapFeatureExtractor.from_dict(preprocessing), path)
        if made.audio_config.enable_fusion or self.extractor.truncation == "fusion":
            raise UserError(
                f"{path} is CLAP with fusion, which listens to random parts: use one without, such as laion/larger_clap_music"
            )
        with torch.device("meta"):  # no memory before all shapes are known to fit
            check_state(build(lambda: ClapModel(made), path), state, file, SOURCE)
        self.module: Any = build(lambda: ClapModel(made), path)
        fit_state(self.module, state, file, SOURCE)
        self.module.to(device)
        self.path, self.device = path, device
        self.fingerprint = fingerprint(self.module, {"clap": "transformers", "preprocessing": preprocessing})

    def audio(self, windows: np.ndarray) -> Tensor:
        """Unit vectors ``[b, E]`` of audio ``[b, n]``, at most ten seconds at 48 kHz."""
        features = self.extractor(
            list(windows), sampling_rate=self.extractor.sampling_rate, return_tensors="pt"
        )
        return self.module.get_audio_features(features["input_features"].to(self.device)).pooler_output

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors ``[T, E]`` of texts, by the tokenizer in the folder.

        Raises:
            UserError: there is no tokenizer.
        """
        from transformers import AutoTokenizer

        if not any((self.path / name).exists() for name in ("tokenizer.json", "vocab.json")):
            # transformers would make one up, with a vocabulary of a few signs
            raise UserError(
                f"{self.path} holds no tokenizer: get tokenizer.json and tokenizer_config.json beside the weights"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(self.path), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # OSError, ValueError and others, by kind of tokenizer
            raise UserError(
                f"the tokenizer in {self.path} cannot be used ({one_line(error)}): get it again"
            ) from error
        # Length as in training: 77 tokens (Wu et al. 2023).
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=77, return_tensors="pt").to(self.device)  # fmt: skip
        found = self.module.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return found.pooler_output

    def sounds(self, audio: Sequence[np.ndarray]) -> np.ndarray:
        """Means ``[n, E]`` float64 of the unit vectors of each piece's windows.

        Args:
            audio: one channel each, float32 ``[n]`` at 48 kHz; longer ones are cut into windows of ten seconds, of which the last
                ends where the audio ends.
        """
        embedder, size, out = self.embedder, self.extractor.nb_max_samples, []
        for x in audio:
            starts = [*range(0, len(x) - size, size), max(0, len(x) - size)]
            vectors = embedder.embed(np.stack([x[s : s + size] for s in starts])).astype(np.float64)
            out.append(vectors.mean(axis=0))
        return np.stack(out)

    @property
    def embedder(self) -> TorchEmbedder:
        """Embeds windows."""
        extractor = self.extractor
        return TorchEmbedder(
            "CLAP (transformers)", extractor.sampling_rate, float(extractor.max_length_s), 1.0, self.fingerprint, self.audio,
            longest=extractor.nb_max_samples,
        )  # fmt: skip


def text_audio_scores(
    folder: str | Path, audio: Sequence[np.ndarray], texts: Sequence[str], device: str = "cpu"
) -> np.ndarray:
    """CLAP scores: the cosine of audio and text in the joint space.

    Args:
        folder: of a ClapModel of transformers, with its tokenizer; nothing is fetched.
        audio: one channel each, float32 ``[n]`` at 48 kHz; longer ones are cut into windows of ten seconds, of which the last
            ends where the audio ends, and the score is the mean over the windows.
        texts: T of them.
        device: torch device.

    Returns:
        Float64 ``[len(audio), T]``.

    Raises:
        UserError: see :class:`TransformersClap`; empty audio, or no text.
    """
    if not len(audio) or not len(texts) or any(x.ndim != 1 or not len(x) for x in audio):
        raise UserError("CLAP scores need at least one text, and audio [n] with at least one sample")
    clap = TransformersClap(SOURCE.path(str(folder)), device)
    with torch.inference_mode():
        wanted = clap.texts(texts).cpu().numpy().astype(np.float64)
    return np.asarray(clap.sounds(audio) @ wanted.T)


@method(
    "clap",
    "black box",
    "cosine of CLAP embeddings of windows, the largest (Wu et al. 2023; Choi et al. 2025)",
    "checkpoint=",
)
@dataclass(frozen=True)
class Clap(Pretrained):
    """CLAP; ``checkpoint`` is a file of laion_clap or a folder of transformers."""

    method: ClassVar[str] = "clap"

    def embedder(self, device: str = "cpu") -> TorchEmbedder:
        """See :func:`laion_embedder`, :class:`TransformersClap`."""
        path = SOURCE.path(self.checkpoint)
        return TransformersClap(path, device).embedder if path.is_dir() else laion_embedder(path, device)
