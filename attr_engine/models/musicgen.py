"""Adapter of transformers' ``MusicgenForConditionalGeneration``: an autoregressive model of EnCodec codes, conditioned on text.

A track is its codes: a data set of latents whose C channels are the K codebooks and whose values are whole numbers, made by
``attr-engine ingest`` with the model's folder as the autoencoder. The text is the conditioning.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attr_engine.errors import UserError, one_line
from attr_engine.latents.batch import Batch
from attr_engine.models import checkpoint

CONFIG_NAME = "config.json"
LAYER_GROUPS: dict[str, tuple[str, ...]] = {
    "cross_attn.to_kv": ("*.encoder_attn.k_proj.*", "*.encoder_attn.v_proj.*"),
    "cross_attn": ("*.encoder_attn.*",),
    "self_attn": ("*.self_attn.*",),
    "transformer": ("*decoder.layers.*",),
}

_IGNORED = -100  # no label, in cross_entropy
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_BESIDE = (".json", ".model", ".txt")  # tokenizer and preprocessor
# A table of sines that older checkpoints hold and the model computes.
_COMPUTED = ".embed_positions.weights"
_MAX_CACHED_TEXTS = 4096


class CodeEncoder:
    """EnCodec as ingest sees an autoencoder (:class:`attr_engine.latents.ingest.Encoder`): codes in the place of latents.

    Args:
        audio_encoder: ``EncodecModel`` of one audio channel, which encodes without chunks.
        codebooks: K of the music model.
        audio_channels: of the music model. Left and right are encoded one by one; their codebooks take turns.

    Raises:
        UserError: the audio encoder works in chunks, or takes other audio.
    """

    def __init__(self, audio_encoder: Any, codebooks: int, audio_channels: int) -> None:
        config = audio_encoder.config
        if getattr(config, "chunk_length_s", None) is not None or config.audio_channels != 1:
            raise UserError(
                f"the audio encoder takes {config.audio_channels} channels in chunks of {config.chunk_length_s} s; "
                "MusicGen's takes one channel in one piece: use the model's own config"
            )
        self._encoder, self._codebooks, self.audio_channels = audio_encoder, codebooks, audio_channels
        self.sample_rate, self.samples_per_frame = int(config.sampling_rate), int(config.hop_length)
        shape = {"codebooks": codebooks, "channels": audio_channels}
        self.fingerprint = checkpoint.fingerprint(audio_encoder, {**config.to_dict(), **shape})

    @torch.no_grad()
    def encode(self, audio: Tensor) -> Tensor:
        """Codes ``[B, K, F]``, whole numbers in float32, of audio ``[B, channels, samples]``.

        Raises:
            UserError: the encoder gives another number of codebooks than the music model takes.
        """
        weight = next(self._encoder.parameters())
        mono = audio.flatten(0, 1)[:, None].to(weight.device, weight.dtype)  # [B * channels, 1, samples]
        codes = self._encoder.encode(mono).audio_codes[0]  # [B * channels, K / channels, F]
        sides = codes.unflatten(0, (len(audio), self.audio_channels))
        turns = sides.transpose(1, 2).flatten(1, 2)  # left, right, left, right, ...
        if turns.shape[1] != self._codebooks:
            raise UserError(
                f"the audio encoder gives {turns.shape[1]} codebooks and the model takes {self._codebooks}: "
                "they are not of one model"
            )
        return turns.float()


class MusicGen:
    """A MusicGen as the engine sees it: a loss a track, no draws.

    Only the decoder, and the projection of the text where there is one, is trained or attributed; text encoder and audio
    encoder stay as they are. Everything runs without dropout.

    Args:
        model: ``MusicgenForConditionalGeneration``.
        tokenizer: of its text encoder.
        folder: where they came from; :func:`save_musicgen` takes the tokenizer's files from there.

    Attributes:
        module: what is trained, by the parameters' names in the whole model.
        channels: K, codebooks.
        frames: longest track in frames of codes.
        vocabulary: V, codes of a codebook.
        layer_groups: as of a :class:`~attr_engine.models.protocol.Denoiser`.

    Raises:
        UserError: the special tokens of the configuration cannot be what the codes need.
    """

    layer_groups: Mapping[str, Sequence[str]] = LAYER_GROUPS

    def __init__(self, model: Any, tokenizer: Any, folder: Path) -> None:
        self.model, self.tokenizer, self.folder = model.eval().requires_grad_(False), tokenizer, folder
        parts = {"decoder": model.decoder}
        if hasattr(model, "enc_to_dec_proj"):
            parts["enc_to_dec_proj"] = model.enc_to_dec_proj
        self.module: nn.Module = nn.ModuleDict(parts).requires_grad_(True)
        config = model.config.decoder
        self.channels, self.vocabulary = int(config.num_codebooks), int(config.vocab_size)
        self.delays = delays(self.channels, config.audio_channels)
        self.frames = int(config.max_position_embeddings) - max(self.delays)
        starts = (getattr(config, "decoder_start_token_id", None),
                  getattr(model.generation_config, "decoder_start_token_id", None), config.bos_token_id)  # fmt: skip
        self._start = next((token for token in starts if token is not None), -1)
        self._pad = config.pad_token_id
        # transformers takes a label that is the padding for none: were it a code, that code would never count.
        if self._pad != self.vocabulary or not 0 <= self._start <= self.vocabulary:
            raise UserError(
                f"the model config {folder / CONFIG_NAME} has the padding {self._pad} and the first token {self._start}, and codes "
                f"from 0 to {self.vocabulary - 1}: the padding has to be {self.vocabulary}, the first token at most that"
            )
        self._texts: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return next(self.module.parameters()).device

    @cached_property
    def encoder(self) -> CodeEncoder:
        """What makes codes of audio."""
        return CodeEncoder(self.model.audio_encoder, self.channels, self.model.config.decoder.audio_channels)

    def losses(self, batch: Batch, texts: Sequence[str]) -> Tensor:
        """Mean cross-entropy over the codes of each track under its text, in nats, float64 ``[B]``, differentiable.

        A track's loss depends neither on the other tracks of the batch nor on its padding, up to rounding; that of a single
        track is what transformers calls the loss (the mean over codebooks of the mean over frames).

        Args:
            batch: codes ``[B, K, F]``.
            texts: one a track.

        Raises:
            UserError: a value is not a code.
        """
        labels = self._labels(batch)  # [B, K, S]
        inputs = torch.full_like(labels, self._start)
        inputs[..., 1:] = labels[..., :-1].masked_fill(labels[..., :-1] == _IGNORED, self._pad)
        states, mask = self._conditioning(texts)
        out = self.model.decoder(
            input_ids=inputs.flatten(0, 1),
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            use_cache=False,
        )
        logits = out.logits  # [B * K, S, V]
        wide = torch.promote_types(logits.dtype, torch.float32)
        each = F.cross_entropy(
            logits.flatten(0, 1).to(wide), labels.flatten(), ignore_index=_IGNORED, reduction="none"
        )
        total = each.unflatten(0, (len(labels), -1)).double().sum(1)
        return total / (labels != _IGNORED).flatten(1).sum(1)

    def _labels(self, batch: Batch) -> Tensor:
        """What is predicted, int64 ``[B, K, S]``: codebook k is ``delays[k]`` steps late, nothing elsewhere."""
        valid = [int(n) for n in batch.valid]
        shape = (len(valid), self.channels, max(valid) + max(self.delays))
        labels = torch.full(shape, _IGNORED, device=self.device)
        for row, latent, n, name in zip(labels, batch.latents, valid, batch.ids, strict=True):
            codes = latent[:, :n].round().long()
            if not torch.equal(codes.to(latent.dtype), latent[:, :n]) or not bool(
                ((codes >= 0) & (codes < self.vocabulary)).all()
            ):
                raise UserError(
                    f"track {name!r} holds values that are no codes from 0 to {self.vocabulary - 1}: ingest it with "
                    "--autoencoder MUSICGEN_FOLDER, stored as float32 or float16"
                )
            for k, delay in enumerate(self.delays):
                row[k, delay : delay + n] = codes[k]
        return labels

    def _conditioning(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States of the texts ``[B, L, D]`` as the decoder takes them, zero where there is no token; mask ``[B, L]``."""
        rows = [self._states(text) for text in texts]
        states = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        mask = (torch.arange(states.shape[1], device=self.device)[None] < lengths[:, None]).long()
        projection = getattr(self.model, "enc_to_dec_proj", None)
        if projection is not None:
            states = projection(states)
        return states * mask[..., None], mask

    def _states(self, text: str) -> Tensor:
        """Last states of the text encoder ``[L, D]``; each text alone, so that they do not depend on the batch."""
        if text not in self._texts:
            if len(self._texts) >= _MAX_CACHED_TEXTS:
                self._texts.clear()
            tokens = torch.tensor([self.tokenizer(text).input_ids], device=self.device)
            with torch.no_grad():
                self._texts[text] = self.model.text_encoder(input_ids=tokens)[0][0]
        return self._texts[text]


def delays(codebooks: int, audio_channels: int) -> list[int]:
    """Steps by which each codebook comes later than the first one (MusicGen's delay pattern, arXiv 2306.05284, section 2.2).

    Of a stereo model left and right of a codebook come together.
    """
    return [k // audio_channels for k in range(codebooks)]


def is_musicgen(folder: Path) -> bool:
    """Whether a folder says that it holds a MusicGen."""
    path = folder / CONFIG_NAME
    return path.is_file() and checkpoint.read_json(path, "model config").get("model_type") == "musicgen"


def load_musicgen(folder: str | Path, dtype: str = "float32", device: str = "cpu") -> MusicGen:
    """Load a MusicGen from a folder as ``save_pretrained`` writes it; nothing is downloaded, no pickle is read.

    Args:
        folder: with ``config.json``, ``model.safetensors`` (or its shards) and the tokenizer's files.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float64"``.
        device: a torch device.

    Raises:
        UserError: transformers or a file is missing, damaged or does not fit, it is a model of another class, or dtype or device
            cannot be used.
    """
    folder = Path(folder)
    if dtype not in ("float32", "bfloat16", "float64"):
        raise UserError(f"unknown dtype {dtype!r}; known: float32, bfloat16, float64")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device!r} cannot be used ({reason}): use --device cpu") from error
    kind = checkpoint.read_json(folder / CONFIG_NAME, "model config").get("model_type")
    if kind != "musicgen":
        raise UserError(
            f"{folder} holds a model of kind {kind!r}, not a MusicGen: name the folder of one (model_type 'musicgen')"
        )
    if not any((folder / name).is_file() for name in _WEIGHTS):
        pickled = sorted(path.name for ending in ("*.bin", "*.pt") for path in folder.glob(ending))
        raise UserError(
            f"{folder} has its weights only in {pickled[0]}, a pickle, which could run code and is not loaded: save them as "
            "safetensors where you trust it (save_pretrained)"
            if pickled
            else f"{folder} has no {_WEIGHTS[0]}: it is not a whole model folder"
        )
    try:
        from transformers import AutoTokenizer, MusicgenForConditionalGeneration
    except ImportError as error:
        raise UserError(
            f"MusicGen needs transformers ({error}): pip install 'attr-engine[musicgen]'"
        ) from error
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet():
            loaded: Any = MusicgenForConditionalGeneration.from_pretrained(
                folder, use_safetensors=True, dtype=getattr(torch, dtype), output_loading_info=True, **local
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except Exception as error:  # transformers raises a dozen kinds; all mean the same here
        raise UserError(
            f"{folder} cannot be loaded as a MusicGen ({type(error).__name__}: {one_line(error).split('. ')[0]}): "
            "a file is missing or damaged"
        ) from error
    model, found = loaded
    _check_loaded(folder, model, found)
    return MusicGen(model.to(device), tokenizer, folder)


def _check_loaded(folder: Path, model: nn.Module, found: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit: transformers makes up what is missing."""
    extra = [name for name in found["unexpected_keys"] if not name.endswith(_COMPUTED)]
    odd = sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"], *extra]))
    if odd:
        raise UserError(
            f"the weights in {folder} do not fit its config.json: {odd[0]} is missing, left over or of another shape "
            f"({len(odd)} in all); use the config that they were trained with"
        )
    for name, value in model.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise UserError(
                f"{folder} holds NaN or infinity in {name}: the training diverged, or a file is damaged"
            )


def save_musicgen(model: MusicGen, out: Path, more: Callable[[Path], None] = lambda folder: None) -> None:
    """Write a folder that :func:`load_musicgen` reads, whole or not at all.

    Args:
        model: as its weights are now.
        out: the folder; it must not exist, or be empty.
        more: writes what else is to lie there into the folder that it is given.

    Raises:
        UserError: ``out`` holds something, or what a killed call left is beside it.
        OSError: it cannot be written.
    """
    part = check_free(out)
    part.mkdir(parents=True)
    try:
        with _quiet():
            model.model.save_pretrained(part)
        more(part)
        for path in sorted(model.folder.iterdir()):
            beside = path.suffix in _BESIDE and not path.name.endswith(".index.json")
            if beside and path.is_file() and not (part / path.name).exists():
                shutil.copyfile(path, part / path.name)
        readable = part.stat().st_mode & 0o666
        for path in part.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            path.chmod(readable)  # safetensors makes files that only their owner can read
        os.replace(part, out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def check_free(out: Path) -> Path:
    """Refuse a folder that :func:`save_musicgen` could not make; returns the name that it writes to first.

    Raises:
        UserError: see there.
    """
    out = out.resolve()  # "." has no name of its own
    part = out.with_name(out.name + ".part")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: choose another --out")
    if part.exists():
        raise UserError(f"{part} is there, which a killed call left: delete it")
    return part


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let transformers show neither bars nor notes; its switches are as before afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
