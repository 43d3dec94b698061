"""The shapes of the 2.0 text-to-audio model, and inputs of them."""

from __future__ import annotations

from dataclasses import dataclass

TOKENS = 2585  # 2584 latent frames and one token for timestep and timing
CONTEXT = 79  # 77 of the text encoder, start and length
CHANNELS = 64
RANK = 64  # of projections and of low-rank directions


@dataclass(frozen=True)
class Layer:
    """A weight ``[out, columns]`` and how many tokens pass through it."""

    name: str
    out: int
    columns: int
    tokens: int

    def small(self) -> Layer:
        """The same ratios at a size that Triton's interpreter can do."""
        tokens = {TOKENS: 23, CONTEXT: 13}.get(self.tokens, self.tokens)
        return Layer(self.name, max(2, self.out // 64), max(2, self.columns // 64), tokens)

    @property
    def shape(self) -> str:
        """As tables show it."""
        return f"{self.out}x{self.columns}, T={self.tokens}"


MODEL = (
    Layer("self_attn.to_qkv", 4608, 1536, TOKENS),
    Layer("to_out, cross_attn.to_q", 1536, 1536, TOKENS),
    Layer("cross_attn.to_kv", 1536, 768, CONTEXT),
    Layer("ff.ff.0.proj", 12288, 1536, TOKENS),
    Layer("ff.ff.2", 1536, 6144, TOKENS),
)
# Checked too: the narrow output, and what sees one token.
OTHERS = (
    Layer("transformer.project_out", 64, 1536, TOKENS),
    Layer("to_timestep_embed.0", 1536, 256, 1),
    Layer("to_global_embed.0", 1536, 1536, 1),
)


def layers(tiny: bool, others: bool = False) -> list[Layer]:
    """The weights of the model; with ``others`` those that are small, too."""
    found = [*MODEL, *(OTHERS if others else ())]
    return [layer.small() for layer in found] if tiny else found
