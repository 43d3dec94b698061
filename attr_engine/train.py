"""Training small models: for the demo, for retraining, for a first look at one's own music.

Step k depends on (seed, k) and on the weights before it, so a killed training goes on bit for bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attr_engine import kernels
from attr_engine.errors import UserError
from attr_engine.files import write_json
from attr_engine.latents.batch import Tracks, check_tracks
from attr_engine.models import checkpoint
from attr_engine.models.autoencoder import Autoencoder
from attr_engine.models.stable_audio import CONFIG_NAME, condition, create_model, quiet, save_model
from attr_engine.runs import key_of
from attr_engine.tensorfile import load_tensors, save_tensors

Progress = Callable[[int, int], None]
_STATE = "training-so-far.safetensors"
_SECONDS_BETWEEN_CHECKPOINTS = 60.0


def diffusion_config(
    autoencoder: Autoencoder,
    frames: int,
    conditioning: Mapping[str, Sequence[Any]],
    width: int = 128,
    depth: int = 4,
    patch: int = 4,
    objective: str = "v",
) -> dict[str, Any]:
    """A small DiT for an autoencoder's latents, as a stable-audio-tools model config.

    Args:
        autoencoder: gives latent channels, sample rate and the pretransform's block.
        frames: F, a multiple of ``patch``.
        conditioning: name to all values in the data; numbers become number conditioners over
            their range, strings become list conditioners.
        width: embedding width, a multiple of 32.
        depth: transformer layers.
        patch: latent frames a token.
        objective: ``"v"`` or ``"rectified_flow"``.
    """
    if min(frames, patch, width, depth) < 1 or width % 32:
        raise UserError(
            f"frames {frames}, patch {patch} and depth {depth} must be at least 1, and width {width} a multiple of 32"
        )
    if frames % patch:
        raise UserError(
            f"{frames} frames are not a multiple of the patch size {patch}: choose another length"
        )
    entries = []
    for name, values in conditioning.items():
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            low, high = float(min(values)), float(max(values))
            entries.append(
                {
                    "id": name,
                    "type": "number",
                    "config": {"min_val": low, "max_val": high if high > low else low + 1.0},
                }
            )
        elif all(isinstance(v, str) for v in values):
            entries.append({"id": name, "type": "list", "config": {"options": sorted(set(values))}})
        else:
            # A list conditioner takes whatever is not among its options for unknown, without a word.
            odd = next(v for v in values if isinstance(v, bool) or not isinstance(v, int | float))
            raise UserError(
                f"the conditioning {name!r} is neither all numbers nor all text, e.g. {odd!r}: make it one of them"
            )
    dit = {
        "io_channels": autoencoder.channels,
        "embed_dim": width,
        "depth": depth,
        "num_heads": max(1, width // 32),
        "patch_size": patch,
        "cond_token_dim": width,
        "project_cond_tokens": False,
        "transformer_type": "continuous_transformer",
    }
    return {
        "model_type": "diffusion_cond",
        "sample_size": frames * autoencoder.samples_per_frame,
        "sample_rate": autoencoder.sample_rate,
        "audio_channels": autoencoder.audio_channels,
        "model": {
            "pretransform": autoencoder.block,
            "io_channels": autoencoder.channels,
            "conditioning": {"cond_dim": width, "configs": entries},
            "diffusion": {
                "type": "dit",
                "diffusion_objective": objective,
                "cross_attention_cond_ids": list(conditioning),
                "config": dit,
            },
        },
    }


class _Loop:
    """AdamW with a warm-up and a cosine to zero; its state can be kept and taken up again."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], path: Path, key: str, steps: int, lr: float
    ) -> None:
        self.parameters, self.path, self.key = dict(parameters), path, key
        self.steps, self.lr = steps, lr
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0
        )

    def run(self, loss_of_step: Callable[[int], Tensor], progress: Progress | None) -> float:
        """Train to the last step; returns the mean loss of the last tenth."""
        (first, recent), saved = self._restore(), time.monotonic()
        for step in range(first, self.steps):
            for group in self.optimizer.param_groups:
                group["lr"] = (
                    self.lr * min(1.0, (step + 1) / 50) * 0.5 * (1.0 + math.cos(math.pi * step / self.steps))
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss = loss_of_step(step)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            if not math.isfinite(float(norm)):
                raise UserError(
                    f"training diverged at step {step} (the gradient is not finite): use a smaller --lr"
                )
            self.optimizer.step()
            if step >= self.steps * 0.9:
                recent.append(float(loss.detach()))
            if progress is not None:
                progress(step + 1, self.steps)
            if time.monotonic() - saved > _SECONDS_BETWEEN_CHECKPOINTS:
                self._keep(step + 1, recent)
                saved = time.monotonic()
        return float(np.mean(recent)) if recent else float("nan")

    def _keep(self, step: int, recent: list[float]) -> None:
        tensors = {f"p.{name}": p for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            # A parameter that nothing uses has no gradient and no state.
            for moment in ("exp_avg", "exp_avg_sq") if p in self.optimizer.state else ():
                tensors[f"{moment}.{name}"] = self.optimizer.state[p][moment]
        save_tensors(self.path, tensors, {"key": self.key, "step": step, "recent": recent})

    def _restore(self) -> tuple[int, list[float]]:
        """Steps done, and the losses of those of them that lie in the last tenth."""
        if not self.path.exists():
            return 0, []
        tensors, meta = load_tensors(self.path, self.key)
        step = int(meta["step"])
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[f"p.{name}"])
                if f"exp_avg.{name}" in tensors:
                    moments = {m: tensors[f"{m}.{name}"].clone() for m in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
        return step, [float(x) for x in meta["recent"]]


def fit_diffusion(
    config: Mapping[str, Any], tracks: Tracks, state: Path, steps: int, autoencoder: Autoencoder | None = None,
    batch: int = 16, lr: float = 1e-3, seed: int = 0, progress: Progress | None = None,
) -> tuple[Any, float]:  # fmt: skip
    """Train a stable-audio-tools diffusion model on latents, without masking.

    Args:
        config: model config.
        tracks: latents with conditioning.
        state: file of the training so far, which a killed training goes on from; the caller removes it once the model is kept.
        steps: optimiser steps.
        autoencoder: takes the place of the model's own.
        batch: tracks a step.
        lr: peak learning rate.
        seed: of order, draws and initial weights.
        progress: called with (steps done, steps).

    Returns:
        The ``ConditionedDiffusionModelWrapper``, and the mean loss of the last tenth of the steps.

    Raises:
        UserError: tracks that the model cannot take, or a training that diverges.
    """
    if steps < 1 or batch < 1 or seed < 0 or not 0 < lr < math.inf:
        raise UserError(
            f"steps {steps} and batch {batch} must be at least 1, seed {seed} at least 0, lr {lr} above 0"
        )
    torch.manual_seed(seed)
    wrapper = create_model(config)
    if autoencoder is not None:
        wrapper.pretransform = autoencoder.pretransform
    ratio = int(wrapper.pretransform.downsampling_ratio) if wrapper.pretransform is not None else 1
    frames = int(config["sample_size"]) // ratio
    check_tracks(tracks, int(wrapper.io_channels), frames, "training")
    wrapper.model.requires_grad_(True)
    per_epoch = math.ceil(len(tracks) / batch)

    def loss_of_step(step: int) -> Tensor:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(len(tracks))
        chosen = [int(i) for i in order[place * batch : (place + 1) * batch]]
        rows = tracks.batch(chosen, frames)
        torch.manual_seed(seed * 1_000_003 + step)
        x = rows.latents.float()
        e, t = torch.randn_like(x), torch.rand(len(x), dtype=torch.float64)
        tensors = condition(wrapper.conditioner, rows.conditioning, "cpu")
        predicted = wrapper.model(
            kernels.mix(x, e, t, wrapper.diffusion_objective), t, **wrapper.get_conditioning_inputs(tensors),
            cfg_dropout_prob=0.1, use_checkpointing=False,
        )  # fmt: skip
        return (predicted - kernels.v_target(x, e, t, wrapper.diffusion_objective)).square().mean()

    key = key_of(config, tracks.fingerprint, steps, batch, lr, seed)
    loop = _Loop(trained_parameters(wrapper), state, key, steps, lr)
    with quiet():
        return wrapper, loop.run(loss_of_step, progress)


def trained_parameters(wrapper: Any) -> dict[str, nn.Parameter]:
    """Denoiser and conditioners, by their names in the wrapper: everything but the autoencoder."""
    return {
        n: p for n, p in wrapper.named_parameters() if not n.startswith("pretransform.") and p.requires_grad
    }


def train_diffusion(
    config: Mapping[str, Any], tracks: Tracks, out: Path, steps: int, autoencoder: Autoencoder | None = None,
    batch: int = 16, lr: float = 1e-3, seed: int = 0, progress: Progress | None = None,
) -> float:  # fmt: skip
    """:func:`fit_diffusion`, and write the model's folder; the training resumes there.

    Args:
        config: as there, like the arguments that follow.
        tracks: likewise.
        out: model folder.
        steps: likewise.
        autoencoder: its weights go into the model folder.
        batch: likewise.
        lr: likewise.
        seed: likewise.
        progress: likewise.

    Returns:
        Mean loss of the last tenth of the steps.

    Raises:
        UserError: tracks that the model cannot take, or a training that diverges.
    """
    state = out / _STATE
    wrapper, loss = fit_diffusion(config, tracks, state, steps, autoencoder, batch, lr, seed, progress)
    save_model(wrapper, config, out)
    write_json(
        out / "training.json",
        {"steps": steps, "batch": batch, "lr": lr, "seed": seed, "loss": loss, "data": tracks.fingerprint},
    )
    state.unlink(missing_ok=True)  # the model is written
    return loss


def read_config(path: Path) -> dict[str, Any]:
    """A model config from a file, or from a model folder."""
    return checkpoint.read_json(path / CONFIG_NAME if path.is_dir() else path, "model config")


def conditioning_values(
    tracks: Tracks, names: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, list[Any]]:
    """All values of the named conditioning entries.

    Raises:
        UserError: a track lacks one of them.
    """
    out: dict[str, list[Any]] = {}
    for name in names:
        for track, row in zip(tracks.ids, rows, strict=True):
            if name not in row:
                raise UserError(
                    f"track {track!r} has no conditioning {name!r}: ingest with --condition {name}, it has {json.dumps(sorted(row))}"
                )
        out[name] = [row[name] for row in rows]
    return out
