"""Tiny random MusicGens in folders, and codes for them."""

import json
from pathlib import Path

import numpy as np
import torch

from attr_engine import MemoryTracks

CODES, HOP, RATE, LONGEST = 16, 8, 1600, 24
WORDS = ["slow", "fast", "jazz", "noise", "waltz", "choir"]


def make_folder(folder: Path, seed: int, stereo: bool = False, width: int = 12) -> Path:
    """A tiny random MusicGen of 3 codebooks (stereo: 2 times 3), as ``save_pretrained`` writes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        EncodecConfig,
        MusicgenConfig,
        MusicgenDecoderConfig,
        MusicgenForConditionalGeneration,
        PreTrainedTokenizerFast,
        T5Config,
    )

    from attr_engine.models.musicgen import _quiet

    audio = EncodecConfig(
        sampling_rate=RATE, target_bandwidths=[2.4], upsampling_ratios=[4, 2], codebook_size=CODES, hidden_size=8,
        num_filters=2, num_lstm_layers=1, kernel_size=3, last_kernel_size=3, use_causal_conv=False,
    )  # fmt: skip
    books = audio.num_quantizers * (2 if stereo else 1)
    decoder = MusicgenDecoderConfig(
        vocab_size=CODES, hidden_size=16, num_hidden_layers=2, ffn_dim=24, num_attention_heads=2, num_codebooks=books,
        pad_token_id=CODES, bos_token_id=CODES, max_position_embeddings=LONGEST + 2, audio_channels=2 if stereo else 1,
    )  # fmt: skip
    text = T5Config(vocab_size=20, d_model=width, d_kv=6, d_ff=16, num_layers=1, num_heads=2)
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        model = MusicgenForConditionalGeneration(
            MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=decoder)
        )
        with torch.no_grad():
            for p in model.decoder.parameters():
                p += 0.1 * torch.randn_like(p)
            # Codebooks are zero in a new model, and every code 0: the first one gets states that do come up.
            states = model.audio_encoder.encoder(torch.rand(1, 1, CODES * HOP) - 0.5)[0].T  # [CODES, hidden]
            for layer in model.audio_encoder.quantizer.layers:
                layer.codebook.embed.copy_(states)
                states = states.std() * torch.randn_like(states)
        model.save_pretrained(folder)
    vocabulary = {name: i for i, name in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": RATE}))
    return folder


def make_codes(rng: np.random.Generator, n: int, books: int = 3, prefix: str = "t") -> MemoryTracks:
    """Random codes of different lengths; the first track is as long as the model takes, the second has two frames."""
    lengths = [LONGEST, 2, *rng.integers(3, LONGEST, n)][:n]
    texts = [" ".join(rng.choice(WORDS, 1 + i % 4)) + f" {WORDS[i % 6]}" for i in range(n)]
    return MemoryTracks(
        [f"{prefix}{i}" for i in range(n)],
        [rng.integers(0, CODES, (books, length)).astype(np.float32) for length in lengths],
        [{"prompt": text} for text in texts],
        padding=np.full(books, 7.0),
    )
