"""Small random checkpoints of CLAP in the real format."""

import pytest
import torch

SMALL = dict(depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2], num_classes=3, projection_dim=16)


def clap_folder(folder, seed, fusion=False, tokenizer=False):
    """A folder as transformers saves it, of a small ClapModel with random weights."""
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(seed)
    audio = dict(SMALL, hidden_size=32, patch_embeds_hidden_size=4, enable_fusion=fusion)
    text = dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, projection_dim=16,
                max_position_embeddings=90)  # fmt: skip
    config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=16)
    module = transformers.ClapModel(config).eval()
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn_like(p)
    module.save_pretrained(folder)
    extractor = transformers.ClapFeatureExtractor(truncation="rand_trunc", padding="repeatpad")
    extractor.save_pretrained(folder)
    if tokenizer:
        from tokenizers import Tokenizer, models, pre_tokenizers

        words = {
            w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", "slow", "piano", "drums", "loud"])
        }
        made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        ).save_pretrained(folder)
    return module, extractor
