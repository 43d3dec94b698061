"""A denoiser that samples and decodes, for what listens to pieces, and embeddings and a classifier of its own."""

import helpers
import numpy as np
import torch

RATE, PER_FRAME = 8000, 400


def loud(windows, rate):
    """Mean, deviation and share above zero of windows: an embedding."""
    return np.stack([windows.mean(1), windows.std(1), (windows > 0).mean(1)], axis=1)


class Singer(helpers.ToyDenoiser):
    """Its latents sound: a fixed linear map of a frame to 400 samples of two channels."""

    sample_rate, samples_per_frame = RATE, PER_FRAME

    def decode(self, latents):
        out = torch.linspace(-1, 1, self.channels * 2 * PER_FRAME).sin().view(self.channels, 2, PER_FRAME)
        return torch.einsum("bcf,cds->bdfs", latents, out.to(latents)).flatten(2)

    def sample(self, items, seed, steps, guidance):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(items), self.channels, self.frames, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            return self.predict(noise, torch.full((len(items),), 0.5), self.conditioning(items)).float()


class Labels:
    """A classifier: the softmax of three numbers."""

    fingerprint = "labels"

    def of_latents(self, model, latents):
        rows = [
            loud(model.decode(torch.from_numpy(x)[None])[0].mean(0)[None].numpy(), RATE)[0] for x in latents
        ]
        return torch.tensor(np.stack(rows)).softmax(dim=-1).numpy()
