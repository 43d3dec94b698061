"""A tiny stable-audio-tools model with a VAE, in memory and in files."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("stable_audio_tools")

torch.set_num_threads(1)


def _config(objective: str = "v", autoencoder: bool = True, **conditioners: Any) -> dict[str, Any]:
    layers = {"channels": 8, "c_mults": [1], "strides": [4], "use_snake": True}
    block = {
        "type": "autoencoder",
        "scale": 1.5,
        "config": {
            "encoder": {"type": "oobleck", "config": {"in_channels": 64, "latent_dim": 8, **layers}},
            "decoder": {
                "type": "oobleck",
                "config": {"out_channels": 64, "latent_dim": 4, "final_tanh": False, **layers},
            },
            "bottleneck": {"type": "vae"},
            "latent_dim": 4,
            "downsampling_ratio": 256,
            "io_channels": 1,
            "pretransform": {"type": "patched", "config": {"channels": 1, "patch_size": 64}},
        },
    }
    known = {
        "seconds_total": {"type": "number", "config": {"min_val": 0, "max_val": 24}},
        "lead": {"type": "int", "config": {"min_val": 0, "max_val": 8}},
        "style": {"type": "list", "config": {"options": ["house", "waltz"]}},
    }
    configs = [{"id": name, **entry} for name, entry in {**known, **conditioners}.items()]
    model = {
        "io_channels": 4,
        "conditioning": {"cond_dim": 32, "configs": configs},
        "diffusion": {
            "type": "dit",
            "diffusion_objective": objective,
            "cross_attention_cond_ids": [entry["id"] for entry in configs],
            "global_cond_ids": ["seconds_total"],
            "config": {
                "io_channels": 4,
                "embed_dim": 64,
                "depth": 1,
                "num_heads": 2,
                "patch_size": 2,
                "cond_token_dim": 32,
                "project_cond_tokens": False,
                "global_cond_dim": 32,
                "transformer_type": "continuous_transformer",
            },
        },
    }
    return {
        "model_type": "diffusion_cond",
        "sample_size": 24 * (256 if autoencoder else 1),
        "sample_rate": 16000,
        "audio_channels": 1,
        "model": {**({"pretransform": block} if autoencoder else {}), **model},
    }


@pytest.fixture(scope="session")
def config() -> Callable[..., dict[str, Any]]:
    """Maker of model configurations of 4 channels and 24 frames."""
    return _config


@pytest.fixture(scope="session")
def build() -> Callable[..., Any]:
    """Build a wrapper with random weights, none of them zero."""
    from attr_engine.models.stable_audio import create_model

    def make(config: dict[str, Any], seed: int = 0) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wrapper = create_model(config)
            with torch.no_grad():
                for p in wrapper.model.parameters():
                    if not p.any():
                        p.normal_(std=0.1)
        return wrapper.eval()

    return make


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Conditioning of three tracks."""
    return [
        {"seconds_total": 3.5, "lead": 1, "style": "waltz"},
        {"seconds_total": 20, "lead": 7, "style": "house"},
        {"seconds_total": 0.25, "lead": 0, "style": "neither"},
    ]
