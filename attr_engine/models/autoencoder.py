"""A stable-audio-tools autoencoder on its own: a folder with ``pretransform.json`` and its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attr_engine.errors import UserError, one_line
from attr_engine.models import checkpoint
from attr_engine.models.stable_audio import encode_mean, load_model, quiet

BLOCK_NAME, WEIGHTS_NAME = "pretransform.json", "autoencoder.safetensors"


class Autoencoder:
    """Encodes audio to latent means and decodes latents.

    Args:
        pretransform: a stable-audio-tools pretransform.
        sample_rate: Hz of the audio that it takes.
        block: its configuration, as it stands in a model config under ``pretransform``.
        fingerprint: hex digest of configuration and weights.
    """

    def __init__(
        self, pretransform: Any, sample_rate: int, block: Mapping[str, Any], fingerprint: str
    ) -> None:
        self.pretransform, self.sample_rate, self.block, self.fingerprint = (
            pretransform,
            sample_rate,
            dict(block),
            fingerprint,
        )
        self.samples_per_frame = int(pretransform.downsampling_ratio)
        self.audio_channels = int(pretransform.io_channels)
        self.channels = int(pretransform.encoded_channels)

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        """Latent means ``[B, C, F]`` of audio ``[B, channels, samples]``, samples a multiple of a frame."""
        return encode_mean(self.pretransform, audio)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Audio ``[B, channels, samples]`` of latents ``[B, C, F]``."""
        return self.pretransform.decode(latents.float())


def create_pretransform(block: Mapping[str, Any], sample_rate: int, source: str) -> Any:
    """Build a pretransform from its configuration.

    Raises:
        UserError: stable-audio-tools cannot build it.
    """
    try:
        with quiet():
            from stable_audio_tools.models.factory import create_pretransform_from_config

            return create_pretransform_from_config(json.loads(json.dumps(block)), sample_rate)
    except ImportError as error:
        raise UserError(
            f"stable-audio-tools cannot be imported ({error}): pip install 'attr-engine[stable-audio]'"
        ) from error
    except Exception as error:  # the factory asserts, raises KeyError, TypeError, ... for a wrong config
        raise UserError(
            f"{source} is not an autoencoder that stable-audio-tools can build ({type(error).__name__}: {one_line(error)})"
        ) from error


def load_autoencoder(path: str | Path, weights: str | Path | None = None) -> Autoencoder:
    """Load the autoencoder of an autoencoder folder, a model folder, or a model config with weights.

    Raises:
        UserError: a file is missing, damaged, or does not fit, or the model has no autoencoder.
    """
    folder = Path(path)
    if not (folder / BLOCK_NAME).exists():
        model = load_model(folder, weights)
        if model.pretransform is None:
            raise UserError(
                f"the model {folder} has no autoencoder, or its weights lack it: ingest pre-encoded latents instead"
            )
        return Autoencoder(
            model.pretransform,
            model.sample_rate,
            model.config["model"]["pretransform"],
            model.fingerprint,
        )
    settings = checkpoint.read_json(folder / BLOCK_NAME, "autoencoder config")
    rate = settings.get("sample_rate")
    if not isinstance(settings.get("pretransform"), dict) or type(rate) is not int or rate < 1:
        raise UserError(
            f"autoencoder config {folder / BLOCK_NAME} lacks 'pretransform' or 'sample_rate': make it with attr-engine train autoencoder"
        )
    pretransform = create_pretransform(
        settings["pretransform"], settings["sample_rate"], str(folder / BLOCK_NAME)
    )
    target = getattr(pretransform, "model", pretransform)
    if any(True for _ in target.parameters()):
        state = {
            name: value.float() for name, value in checkpoint.read_weights(folder / WEIGHTS_NAME).items()
        }
        checkpoint.load_into(target, state, folder / WEIGHTS_NAME)
    pretransform.eval().requires_grad_(False)
    return Autoencoder(
        pretransform,
        settings["sample_rate"],
        settings["pretransform"],
        checkpoint.fingerprint(target, settings),
    )
