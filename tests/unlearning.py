"""What the tests of unlearning share: Adam from its formula, and steps of a ``naive.Loop``."""

from __future__ import annotations

import numpy as np
import torch


class Adam:
    """Kingma and Ba 2015, with the betas of the training."""

    def __init__(self, lr: float) -> None:
        self.lr, self.steps, self.state = lr, 0, {}

    def step(self, gradients: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.steps += 1
        out = {}
        for name, g in gradients.items():
            m, v = self.state.get(name, (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
            self.state[name] = m, v
            first, second = m / (1 - 0.9**self.steps), v / (1 - 0.98**self.steps)
            out[name] = -self.lr * first / (np.sqrt(second) + 1e-8)
        return out


def gradient(loop, losses) -> dict[str, np.ndarray]:
    """Of a scalar in the parameters of a ``naive.Loop``."""
    for p in loop.theta.values():
        p.grad = None
    losses.backward()
    return {n: np.zeros(p.shape) if p.grad is None else p.grad.numpy().copy() for n, p in loop.theta.items()}


def move(loop, step: dict[str, np.ndarray], names) -> None:
    with torch.no_grad():
        for name in names:
            loop.theta[name] += torch.from_numpy(step[name])


def moved(loop, delta) -> object:
    """A copy of a ``naive.Loop`` with an update added."""
    other = type(loop)(loop.model, loop.plan)
    move(other, {n: d.numpy() for n, d in delta.items()}, delta)
    return other
