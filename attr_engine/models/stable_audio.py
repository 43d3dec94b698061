"""Adapter of stable-audio-tools' ``ConditionedDiffusionModelWrapper`` to the :class:`Denoiser` protocol."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attr_engine.errors import UserError, one_line
from attr_engine.files import whole_file, write_json
from attr_engine.latents.batch import stable_text
from attr_engine.models import checkpoint

LAYER_GROUPS: dict[str, tuple[str, ...]] = {
    "cross_attn.to_kv": ("*.cross_attn.to_kv.*",),
    "cross_attn": ("*.cross_attn.*",),
    "self_attn": ("*.self_attn.*",),
    "transformer": ("*transformer.layers.*",),
}

CONFIG_NAME, WEIGHTS_NAME = "model_config.json", "model.safetensors"
_MAX_CACHED_ITEMS = 65536


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow what stable-audio-tools prints (seeds, notes on optional packages)."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def create_model(config: Mapping[str, Any], source: str = "config") -> Any:
    """Build a stable-audio-tools model from its configuration.

    Raises:
        UserError: the package is missing, or the configuration is not one that it can build.
    """
    try:
        with quiet():
            from stable_audio_tools.models.factory import create_model_from_config
    except ImportError as error:
        raise UserError(
            f"stable-audio-tools cannot be imported ({error}): pip install 'attr-engine[stable-audio]' on Python 3.10 or 3.11"
        ) from error
    try:
        with quiet():
            return create_model_from_config(json.loads(json.dumps(config)))
    except Exception as error:  # the factory asserts, raises KeyError, TypeError, ... for a wrong config
        raise UserError(
            f"{source} is not a model that stable-audio-tools can build ({type(error).__name__}: {one_line(error)})"
        ) from error


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters and buffers, but leave the rotary frequencies as they are.

    stable-audio-tools computes rotary angles in float32 whatever the model's dtype; a cast
    ``inv_freq`` would change positions in bfloat16 and fail in float64.
    """
    kept = {name: b.clone() for name, b in module.named_buffers() if name.endswith("inv_freq")}
    module.to(dtype)
    for name, value in kept.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, value)


class StableAudioDenoiser:
    """A stable-audio-tools model as the engine sees it (:class:`attr_engine.models.protocol.Denoiser`).

    Args:
        wrapper: ``ConditionedDiffusionModelWrapper``.
        config: the configuration that built it (gives sample size and sample rate).
        dtype: float32, bfloat16 or float64, of the denoiser only.
        device: where it runs.
        autoencoder: whether the wrapper's pretransform has its weights; without them it is not used.
        checkpointing: compute activations again in backward passes: less memory, a third more arithmetic.
        compiled: ``"off"``, or forward passes without gradient through ``torch.compile``: ``"forward"``, and
            ``"graphs"`` with CUDA graphs, for small models whose launches take longer than their arithmetic.

    Raises:
        UserError: no conditional diffusion model, or an unknown objective.
    """

    layer_groups: Mapping[str, Sequence[str]] = LAYER_GROUPS

    def __init__(
        self,
        wrapper: Any,
        config: Mapping[str, Any],
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        autoencoder: bool = True,
        checkpointing: bool = False,
        compiled: str = "off",
    ) -> None:
        if config.get("model_type") != "diffusion_cond":
            raise UserError(f"model_type is {config.get('model_type')!r}, expected 'diffusion_cond'")
        if wrapper.diffusion_objective not in ("v", "rectified_flow"):
            raise UserError(
                f"objective {wrapper.diffusion_objective!r} is not supported; known: 'v', 'rectified_flow'"
            )
        for name, value in (
            ("sample_size", config.get("sample_size")),
            ("sample_rate", config.get("sample_rate")),
            ("io_channels", wrapper.io_channels),
        ):
            if type(value) is not int or value < 1:
                raise UserError(f"{name} is {value!r}, expected a positive whole number")
        self.wrapper, self.config = wrapper, dict(config)
        self.fingerprint = checkpoint.fingerprint(wrapper, config)
        wrapper.eval().requires_grad_(False)
        cast(wrapper.model, dtype)
        wrapper.to(device)
        self.module: nn.Module = wrapper.model
        self.module.requires_grad_(True)
        self.device = torch.device(device)
        self.objective: str = wrapper.diffusion_objective
        self.channels = int(wrapper.io_channels)
        self.sample_rate = int(config["sample_rate"])
        ratio = 1 if wrapper.pretransform is None else int(wrapper.pretransform.downsampling_ratio)
        self.samples_per_frame = ratio
        self.pretransform = wrapper.pretransform if autoencoder else None
        self.frames = int(config["sample_size"]) // ratio
        if self.frames < 1:
            raise UserError(
                f"sample_size {config['sample_size']} is less than a latent frame of {ratio} samples"
            )
        self._cache: dict[str, dict[str, Any]] = {}
        self._checkpointing = checkpointing
        # Backward passes are not compiled: per-sample gradients watch every call, and the gain was in forward passes.
        self._compiled: Any = None
        self.fixed_addresses = compiled == "graphs"  # which replay passes on the memory of the weights
        if compiled != "off":
            mode = "reduce-overhead" if compiled == "graphs" else None
            self._compiled = torch.compile(self.module, mode=mode)

    # -- conditioning -----------------------------------------------------------------------

    def _condition_one(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """Conditioning inputs of one row; run alone, so that they do not depend on the batch."""
        if self.wrapper.conditioner is None:
            return {}
        with torch.no_grad():
            tensors = condition(self.wrapper.conditioner, [item], self.device)
            inputs = self.wrapper.get_conditioning_inputs(tensors)
        if not all(x is None or bool(torch.isfinite(x).all()) for x in inputs.values()):
            raise UserError(
                f"the conditioning {_shown(item)} becomes NaN or infinity: correct the metadata and ingest again"
            )
        return inputs

    def conditioning(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | None]:
        """Conditioning inputs of the denoiser for one mapping a row, each ``[B, ...]`` or None."""
        rows = []
        for item in items:
            key = stable_text(item)
            if key not in self._cache:
                if len(self._cache) >= _MAX_CACHED_ITEMS:
                    self._cache.clear()
                self._cache[key] = self._condition_one(item)
            rows.append(self._cache[key])
        return {
            name: None if rows[0][name] is None else torch.cat([row[name] for row in rows])
            for name in (rows[0] if rows else {})
        }

    def predict(self, x_t: Tensor, t: Tensor, conditioning: dict[str, Tensor | None]) -> Tensor:
        """Predicted v or flow ``[B, C, F]``; no guidance, no dropout."""
        gradient = torch.is_grad_enabled()
        module = self.module if gradient or self._compiled is None else self._compiled
        out: Tensor = module(
            x_t,
            t,
            **conditioning,
            cfg_scale=1.0,
            cfg_dropout_prob=0.0,
            use_checkpointing=gradient and self._checkpointing,
        )
        # The next replay of a CUDA graph writes into the same memory.
        return out if module is self.module else out.clone()

    # -- audio ------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        """Latent mean ``[B, C, F']`` of audio ``[B, channels, samples]`` (samples a multiple of a frame).

        Raises:
            UserError: the model has no autoencoder, or one whose encoding is random.
        """
        return encode_mean(self.pretransform, audio.to(self.device))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Audio ``[B, channels, samples]`` of latents ``[B, C, F']``."""
        if self.pretransform is None:
            raise UserError("the model has no autoencoder: latents cannot be decoded")
        return self.pretransform.decode(latents.to(self.device, torch.float32))

    @property
    def audio_channels(self) -> int:
        """Channels of the audio that the autoencoder takes (1 or 2)."""
        if self.pretransform is None:
            raise UserError("the model has no autoencoder: it takes no audio")
        return int(self.pretransform.io_channels)

    @torch.no_grad()
    def sample(
        self, items: Sequence[Mapping[str, Any]], seed: int, steps: int = 50, guidance: float = 1.0
    ) -> Tensor:
        """Latents ``[B, C, F]`` from the model's own sampler (``wrapper.generate``)."""
        sampler = {"sampler_type": "dpmpp-2m-sde", "sigma_min": 0.3, "sigma_max": 50.0}
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), quiet(), contextlib.redirect_stderr(io.StringIO()):
            return self.wrapper.generate(
                conditioning=[dict(i) for i in items],
                batch_size=len(items),
                steps=steps,
                cfg_scale=guidance,
                sample_size=self.frames * self.samples_per_frame,
                sample_rate=self.sample_rate,
                seed=seed % 2**32,  # -1 would mean a random one
                device=str(self.device),
                return_latents=True,
                **(sampler if self.objective == "v" else {}),
            ).float()


def condition(conditioner: Any, items: Sequence[Mapping[str, Any]], device: Any) -> dict[str, Any]:
    """What a ``MultiConditioner`` makes of rows.

    Raises:
        UserError: a row lacks a value, or has one that its conditioner cannot take.
    """
    keys, defaults = conditioner.conditioners.keys(), conditioner.default_keys
    for item in items:
        for key in keys:
            if key not in item and defaults.get(key) not in item:
                raise UserError(
                    f"a track has no value for the conditioning {key!r}: add it to the metadata and ingest again"
                )
    try:
        return conditioner([dict(item) for item in items], device)
    except Exception as error:  # conditioners raise whatever their arithmetic raises
        read = {*keys, *defaults.values()}
        shown = _shown({k: v for k, v in items[0].items() if k in read})
        raise UserError(
            f"the model's conditioners cannot take {shown}{' or what follows' if len(items) > 1 else ''} "
            f"({one_line(error)}): correct the metadata and ingest again"
        ) from error


def _shown(values: Mapping[str, Any]) -> str:
    """Conditioning values in one short line."""
    text = ", ".join(f"{name} = {value!r}" for name, value in values.items())
    return text if len(text) <= 200 else text[:197] + "..."


def encode_mean(pretransform: Any, audio: Tensor) -> Tensor:
    """Mean of the encoder's distribution, divided by the pretransform's scale as in training.

    Raises:
        UserError: there is no pretransform, or its encoding is random and no mean is known.
    """
    if pretransform is None:
        raise UserError("the model has no autoencoder: ingest pre-encoded latents instead of audio")
    autoencoder = getattr(pretransform, "model", None)
    bottleneck = getattr(autoencoder, "bottleneck", None)
    if type(bottleneck).__name__ == "VAEBottleneck":
        assert autoencoder is not None
        # A pretransform with model_half has its weights in float16.
        both = autoencoder.encode(audio.to(next(autoencoder.parameters()).dtype), skip_bottleneck=True)
        return both.chunk(2, dim=1)[0].float() / pretransform.scale
    first = pretransform.encode(audio)
    if bottleneck is not None and not torch.equal(first, pretransform.encode(audio)):
        raise UserError(
            f"the autoencoder's {type(bottleneck).__name__} encodes at random and its mean is not known"
        )
    return first


def load_model(
    config: str | Path,
    weights: str | Path | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    ema: bool = True,
    checkpointing: bool = False,
    compiled: str = "off",
) -> StableAudioDenoiser:
    """Load a stable-audio-tools model.

    Args:
        config: the model's JSON, or a folder with ``model_config.json`` and ``model.safetensors``.
        weights: ``.safetensors`` or ``.ckpt`` (read with ``weights_only=True``; Lightning prefixes
            are stripped); not needed for a folder.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float64"``.
        device: a torch device.
        ema: use the averaged weights of a training checkpoint where it has them.
        checkpointing: as in :class:`StableAudioDenoiser`.
        compiled: likewise.

    Raises:
        UserError: a file is missing, damaged, or does not fit.
    """
    if dtype not in ("float32", "bfloat16", "float64"):
        raise UserError(f"unknown dtype {dtype!r}; known: float32, bfloat16, float64")
    path = Path(config)
    if path.is_dir():
        path, weights = path / CONFIG_NAME, weights or path / WEIGHTS_NAME
    settings = checkpoint.read_json(path, "model config")
    if weights is None:
        raise UserError(
            f"no weights were named for the model config {path}: give a .safetensors or .ckpt file"
        )
    state = checkpoint.unwrap(checkpoint.read_weights(Path(weights)), ema)
    wrapper = create_model(settings, f"model config {path}")
    whole = checkpoint.load_into(wrapper, state, Path(weights), optional="pretransform.")
    logging.getLogger(__name__).debug("loaded %s with %s", path, weights)
    try:
        return StableAudioDenoiser(
            wrapper, settings, getattr(torch, dtype), device, whole, checkpointing, compiled
        )
    except UserError as error:
        raise UserError(f"model config {path} cannot be used: {error}") from error


def save_model(wrapper: nn.Module, config: Mapping[str, Any], out: Path) -> None:
    """Write a model folder that :func:`load_model` reads; the configuration comes last."""
    from safetensors.torch import save_file

    tensors = {name: value.detach().contiguous().clone() for name, value in wrapper.state_dict().items()}
    with whole_file(out / WEIGHTS_NAME) as part:
        save_file(tensors, part)
    write_json(out / CONFIG_NAME, config)
