"""Forgetting and attribution through one loss a track, here of a denoiser: against plain loops, to first order."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ToyDenoiser, make_tracks

from attr_engine.diffusion import DrawPlan, losses, noised_rows
from attr_engine.errors import UserError
from attr_engine.models.protocol import select_parameters
from attr_engine.track_loss import (
    ForgetSettings,
    Forgotten,
    TrackLoss,
    ascent,
    fit_track_fisher,
    forget,
    loss_changes,
    mean_gradient,
    norm,
    other_labels,
    relabel,
    track_losses,
)

DRAWS = 4


class DenoiserLoss:
    """A denoiser as a ``TrackLoss``: the mean over the draws of a step, tracks conditioned as the labels say."""

    ceiling = math.inf

    def __init__(self, model: ToyDenoiser, tracks: Any) -> None:
        self.model, self.tracks, self.ids = model, tracks, list(tracks.ids)
        self.parameters = select_parameters(model, ("all",))
        self.labels = [str(c) for c in tracks.conditioning]

    def losses(self, indices, step, labels=None):
        frames = self.model.frames
        batch = self.tracks.batch(list(indices), frames)
        if labels is not None:
            batch = copy.copy(batch)
            object.__setattr__(batch, "conditioning", self.tracks.batch(list(labels), frames).conditioning)
        pairs = [(i, step * DRAWS + d) for i in range(len(indices)) for d in range(DRAWS)]
        rows = noised_rows(self.model, batch, pairs, DrawPlan(3), "update", False)
        return losses(self.model, rows).unflatten(0, (-1, DRAWS)).mean(1)


@pytest.fixture
def loss(seed, rng) -> DenoiserLoss:
    model = ToyDenoiser(seed)
    return DenoiserLoss(model, make_tracks(rng, 6, model.channels, model.frames))


def weights(loss: TrackLoss) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in loss.parameters.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_gradient_is_that_of_the_mean_however_many_tracks_a_pass_has(loss):
    indices = [4, 0, 3]
    whole = torch.stack([loss.losses([i], 2)[0] for i in indices]).mean()
    plain = torch.autograd.grad(whole, list(loss.parameters.values()), allow_unused=True)
    for rows in (1, 2, 3):
        found = mean_gradient(loss, indices, 2, rows)
        for (name, p), g in zip(loss.parameters.items(), plain, strict=True):
            wanted = torch.zeros_like(p) if g is None else g
            torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-12)


def test_one_small_step_of_ascent_raises_the_forget_loss_by_the_squared_gradient(loss):
    indices, lr = [1, 2], 1e-6
    length = norm(mean_gradient(loss, indices, 1))
    before = torch.stack([loss.losses([i], 1)[0] for i in indices]).mean().item()
    ascent(loss, indices, ForgetSettings(steps=1, lr=lr, optimizer="sgd"))
    after = torch.stack([loss.losses([i], 1)[0] for i in indices]).mean().item()
    assert (after - before) / (lr * length**2) == pytest.approx(1.0, rel=1e-2)


def test_one_small_step_of_relabelling_lowers_the_loss_under_the_other_labels(loss):
    indices, settings = [0, 5], ForgetSettings("relabel", steps=1, lr=1e-6, optimizer="sgd", seed=4)
    labels = other_labels(loss, indices, settings.seed)
    length = norm(mean_gradient(loss, indices, 1, labels=labels))
    before = loss.losses(indices, 1, labels).mean().item()
    relabel(loss, indices, settings)
    after = loss.losses(indices, 1, labels).mean().item()
    assert (before - after) / (settings.lr * length**2) == pytest.approx(1.0, rel=1e-2)


def test_other_labels_are_of_tracks_conditioned_otherwise_and_all_of_them_come_up(loss):
    loss.labels = ["a", "b", "a", "c", "b", "a"]
    seen = {label for seed in range(60) for label in other_labels(loss, [0], seed)}
    assert seen == {1, 3, 4}
    loss.labels = ["a"] * 6
    with pytest.raises(UserError, match="every track has the text of 't2'"):
        other_labels(loss, [2], 0)


def test_tracks_at_the_ceiling_are_left_alone_and_the_others_move_as_if_these_were_flat(loss):
    start = weights(loss)
    # Of the very draws that the three steps have: on others a loss may be smaller by any factor.
    loss.ceiling = min(float(loss.losses([0, 1, 2], step).detach().min()) for step in (1, 2, 3)) / 2
    for optimizer in ("sgd", "adam"):
        ascent(loss, [0, 1, 2], ForgetSettings(steps=3, lr=1e-2, optimizer=optimizer))
        assert same(start, weights(loss))
    now = loss.losses(range(6), 1).detach()
    low, high = int(now.argmin()), int(now.argmax())
    loss.ceiling = float(now[[low, high]].mean())
    alone = mean_gradient(loss, [low], 1)
    ascent(loss, [low, high], ForgetSettings(steps=1, lr=1e-3, optimizer="sgd"))
    for name, p in loss.parameters.items():
        torch.testing.assert_close(p.detach(), start[name] + 1e-3 * alone[name] / 2, rtol=1e-9, atol=1e-12)


def test_steps_of_part_of_the_forget_set_take_every_track_once_a_round(loss):
    taken = []
    inner = loss.losses
    loss.losses = lambda indices, step, labels=None: (
        taken.append(list(indices)) or inner(indices, step, labels)
    )
    ascent(loss, [0, 1, 2, 4, 5], ForgetSettings(steps=6, lr=1e-9, optimizer="sgd", batch=2, rows=9))
    assert [len(some) for some in taken] == [2, 2, 1] * 2
    for rounds in (taken[:3], taken[3:]):
        assert sorted(i for some in rounds for i in some) == [0, 1, 2, 4, 5]


def test_forgetting_that_diverges_is_refused(loss):
    with pytest.raises(UserError, match="diverged|cannot take steps"):
        forget(loss, [1, 3], ForgetSettings(steps=1, lr=1e200, optimizer="adam"))


def test_forgetting_reports_the_losses_before_and_after_of_every_track(loss, seed):
    twin = DenoiserLoss(copy.deepcopy(loss.model), loss.tracks)
    settings = ForgetSettings(steps=4, lr=1e-3, batch=2, rows=2, seed=seed)
    ticks: list[tuple[int, int]] = []
    done = forget(loss, [1, 3, 4], settings, lambda *tick: ticks.append(tick))
    assert done.forget.tolist() == [False, True, False, True, True, False]
    np.testing.assert_allclose(done.before, [twin.losses([i], 0).item() for i in range(6)], rtol=1e-12)
    ascent(twin, [1, 3, 4], settings)
    np.testing.assert_array_equal(done.after, track_losses(twin, range(6), 2))
    assert ticks[-1] == (16, 16) and ticks == sorted(ticks)


def test_the_means_are_of_the_two_sets():
    done = Forgotten(["a", "b", "c"], np.array([True, False, False]), np.array([1.0, 2, 4]), np.array([5.0, 6, 8]))  # fmt: skip
    assert done.means() == {"forget": {"before": 1, "after": 5}, "remain": {"before": 3, "after": 7}}


@pytest.mark.parametrize("with_fisher", [False, True])
def test_loss_changes_are_those_of_a_copy_that_took_the_step(loss, rng, seed, with_fisher, measured):
    queries = DenoiserLoss(loss.model, make_tracks(rng, 2, loss.model.channels, loss.model.frames, "q"))
    fisher = fit_track_fisher(loss, steps=2) if with_fisher else None
    start = weights(loss)
    found = loss_changes(loss, queries, fisher, size=1e-2, damping=0.3, rows=4)
    assert same(start, weights(loss))

    other = copy.deepcopy(loss.model)
    total = math.sqrt(sum(float((p.detach() ** 2).sum()) for p in other.module.parameters()))
    mean = 0.0 if fisher is None else fisher.mean()
    for q in range(2):
        value = DenoiserLoss(other, queries.tracks).losses([q], 1).sum()
        gradients = dict(
            zip(start, torch.autograd.grad(value, list(other.module.parameters()), allow_unused=True),
                strict=True)
        )  # fmt: skip
        steps = {
            name: (torch.zeros_like(start[name]) if g is None else g)
            / (1.0 if fisher is None else fisher.values[name] + 0.3 * mean)
            for name, g in gradients.items()
        }
        length = math.sqrt(sum(float((s**2).sum()) for s in steps.values()))
        before = torch.stack([loss.losses([i], 0)[0] for i in range(6)]).detach()
        with torch.no_grad():
            for name, p in other.module.named_parameters():
                p += 1e-2 * total / length * steps[name]
            after = torch.stack([DenoiserLoss(other, loss.tracks).losses([i], 0)[0] for i in range(6)])
            for name, p in other.module.named_parameters():
                p.copy_(start[name])
        wanted = (after - before).numpy()
        measured(f"loss_changes {q}", float(np.abs(found[q] / wanted - 1).max()))
        np.testing.assert_allclose(found[q], wanted, rtol=1e-6, atol=1e-10)


def test_a_querys_row_does_not_know_the_other_queries(loss, rng):
    tracks = make_tracks(rng, 3, loss.model.channels, loss.model.frames, "q")
    both = loss_changes(loss, DenoiserLoss(loss.model, tracks), rows=2)
    for q in range(3):
        alone = loss_changes(loss, DenoiserLoss(loss.model, tracks.subset([q])), rows=2)
        np.testing.assert_array_equal(alone[0], both[q])


def test_the_fisher_squares_before_it_averages(loss):
    found = fit_track_fisher(loss, steps=2)
    wanted = {name: torch.zeros_like(p) for name, p in loss.parameters.items()}
    for i in range(6):
        for step in (1, 2):
            for name, g in mean_gradient(loss, [i], step).items():
                wanted[name] += g**2 / 12
    assert found.pairs == 12
    for name, value in wanted.items():
        torch.testing.assert_close(found.values[name], value, rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (ForgetSettings("shout"), "'shout' with 'adam'"),
        (ForgetSettings(optimizer="lion"), "'ascent' with 'lion'"),
        (ForgetSettings(steps=0), "0 steps"),
        (ForgetSettings(rows=0), "0 a pass"),
        (ForgetSettings(batch=-1), "-1 tracks"),
        (ForgetSettings(lr=math.nan), "learning rate nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(loss, settings, message):
    with pytest.raises(UserError, match=message):
        forget(loss, [0], settings)


@pytest.mark.parametrize("indices", [[], list(range(6))])
def test_there_has_to_be_something_to_forget_and_something_that_remains(loss, indices):
    with pytest.raises(UserError, match=f"{len(indices)} of 6 tracks to forget"):
        forget(loss, indices, ForgetSettings())


def test_a_step_that_is_not_finite_ends_the_forgetting_before_it_is_taken(loss):
    inner, start = loss.losses, weights(loss)
    loss.losses = lambda *args: inner(*args) * math.nan
    with pytest.raises(UserError, match="diverged at step 0"):
        ascent(loss, [0], ForgetSettings())
    assert same(start, weights(loss))
    with pytest.raises(UserError, match="gradient of query 't0' has norm nan"):
        loss_changes(loss, loss)


def test_queries_of_another_model_and_sizes_of_nothing_are_refused(loss, seed):
    other = DenoiserLoss(ToyDenoiser(seed + 1), loss.tracks)
    with pytest.raises(UserError, match="different models"):
        loss_changes(loss, other)
    with pytest.raises(UserError, match="relative size 0"):
        loss_changes(loss, loss, size=0)
