"""Removal: tracks are unlearned jointly, the unlearned model is written, and what it forgot and lost is measured.

What the text-to-music study of unlearning reports (arXiv 2509.06277; METHOD section 3): losses of what is forgotten and of what
remains, similarity of generations to what is forgotten, and their Frechet distance, here along a sweep of strengths.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from attr_engine.diffusion import DrawPlan
from attr_engine.embed import Embedding
from attr_engine.errors import UserError
from attr_engine.fidelity import embedded, nearest
from attr_engine.files import remove_leftovers, whole_file, write_json, writing_in
from attr_engine.fisher import Fisher, fit_fisher
from attr_engine.forget_judges import LabelShift, PromptScores
from attr_engine.forget_report import write_report
from attr_engine.forget_settings import DEFAULTS, Removal
from attr_engine.frechet import frechet_distance, pieces
from attr_engine.heard import any_embedding
from attr_engine.judge import bootstrap
from attr_engine.latents.batch import Chosen, Tracks, check_tracks
from attr_engine.methods.ascent import ascend, relabelled
from attr_engine.methods.base import model_key, no_progress
from attr_engine.methods.mucs import Mirroring, mirrored
from attr_engine.methods.unlearner import Outcome, null_loss, training_plan
from attr_engine.models.checkpoint import read_json
from attr_engine.models.protocol import Denoiser, select_parameters
from attr_engine.models.stable_audio import CONFIG_NAME, WEIGHTS_NAME
from attr_engine.retrain import query_losses
from attr_engine.runs import key_of
from attr_engine.units import held
from attr_engine.unlearn import unlearn_query
from attr_engine.updates import applied

ROWS, SETTINGS, FISHER, EMBEDDED = "rows", "settings.json", "fisher.safetensors", "embedded"
_CHUNK = 16  # tracks between two looks at the clock

Progress = Callable[[str, str], Callable[[int, int], None]]


def by_ids(tracks: Tracks, ids: Sequence[str]) -> list[int]:
    """Places of tracks by id.

    Raises:
        UserError: names an id that is no training track.
    """
    where = {name: i for i, name in enumerate(tracks.ids)}
    for name in ids:
        if name not in where:
            near = get_close_matches(name, tracks.ids, 1)
            raise UserError(
                f"there is no training track {name!r}: "
                + (f"did you mean {near[0]!r}?" if near else "check the ids to forget")
            )
    return sorted({where[name] for name in ids})


def by_value(tracks: Tracks, column: str, value: str) -> list[int]:
    """Places of the tracks whose metadata have a value in a column.

    Raises:
        UserError: no track has it; names what is there.
    """
    values = ["" if (x := info.get(column)) is None else str(x) for info in tracks.info]
    found = [i for i, x in enumerate(values) if x == value]
    if not found:
        known = sorted(set(filter(None, values)))
        near = get_close_matches(value, known, 1) or known[:3]
        there = f"there is {', '.join(map(repr, near))}" if known else f"no track has a column {column!r}"
        raise UserError(f"no training track has {column} = {value!r}: {there}")
    return found


class Forgetting:
    """A removal in its folder; finished strengths are kept, an interrupted call carries on.

    Args:
        model: theta_0.
        tracks: the training tracks.
        chosen: places of those to forget.
        out: folder.
        how: settings.
        held_out: further tracks whose loss is reported.
        progress: makes a progress callback from a title and a unit.

    Raises:
        UserError: anything unusable, by name, before anything is computed.
    """

    def __init__(
        self, model: Denoiser, tracks: Tracks, chosen: Sequence[int], out: str | Path, how: Removal | None = None,
        held_out: Tracks | None = None, progress: Progress = no_progress,
    ) -> None:  # fmt: skip
        self.model, self.tracks, self.out = model, tracks, Path(out)
        self.how, self.progress = how or Removal(), progress
        self.chosen = sorted(set(chosen))
        taken = set(self.chosen)
        self.kept = [i for i in range(len(tracks)) if i not in taken]
        self._check(held_out)
        h = self.how
        rng = np.random.default_rng([h.seed, 8])
        some = self.kept
        if 0 < h.remain < len(some):
            some = sorted(rng.choice(self.kept, h.remain, replace=False).tolist())
        self.sets: dict[str, Tracks] = {"forget": Chosen(tracks, self.chosen), "remain": Chosen(tracks, some)}
        if held_out is not None:
            self.sets["held_out"] = held_out
        self.embedding: Embedding | None = None
        self.labels: LabelShift | None = None
        self.clap: PromptScores | None = None
        if h.pieces:
            self.embedding = any_embedding(h.embedding, model, tracks, self.out / EMBEDDED, progress)
            if self.embedding.of_latents is None:
                raise UserError(
                    f"pieces cannot be embedded by {h.embedding}: use another --embedding, or no pieces (--pieces 0)"
                )
            both = {"forget": self.chosen, "remain": self.kept}
            self.labels = LabelShift.of(h.classifier, h.licence, model, self.out)
            self.prompts = {name: self._prompts(which, rng) for name, which in both.items()}
            self.clap = PromptScores(h.clap, self.prompts, h.text, model) if h.clap else None
        elif h.classifier or h.clap:
            raise UserError(
                "CLAP scores and labels are of generated pieces: ask for some (--pieces), or leave --clap and --classifier out"
            )
        judges = [x.fingerprint for x in (self.embedding, self.labels) if x is not None and x.fingerprint]
        unused = (*(() if h.clap else ("clap", "text")), *(() if h.classifier else ("classifier",)))
        self.key = key_of(
            model_key(model), tracks.fingerprint, self.chosen, None if held_out is None else held_out.fingerprint,
            {n: v for n, v in asdict(h).items() if n not in ("strengths", "checkpoints", "rows", "licence", *unused)}, *judges,
        )  # fmt: skip

    def _check(self, held_out: Tracks | None) -> None:
        h, model = self.how, self.model
        if h.method not in DEFAULTS:
            raise UserError(f"there is no way to forget called {h.method!r}: use {', '.join(DEFAULTS)}")
        if not self.chosen:
            raise UserError("there is nothing to forget: name at least one training track")
        if not self.kept:
            raise UserError(
                f"all {len(self.tracks)} training tracks are to be forgotten: a model that forgets everything is an untrained one"
            )
        check_tracks(self.tracks, model.channels, model.frames, "training")
        if held_out is not None:
            check_tracks(held_out, model.channels, model.frames, "held-out")
        self.parameters = select_parameters(model, h.layers)
        named = self.how.all_strengths()
        if not all(0 < x < math.inf for x in named) or len({f"{x:g}" for x in named}) < len(named):
            raise UserError(
                f"the strengths are {named}: each has to be above 0, and told from the others by six digits"
            )
        if h.method == "mucs" and max(named) > 1:
            raise UserError(
                f"the strengths of mucs are parts of the null loss, {max(named):g} is above 1: use at most 1"
            )
        if h.method == "relabel" and not all(x == int(x) for x in named):
            raise UserError(f"the strengths of relabel are steps, {named} are not whole numbers")
        if (
            h.draws < 2
            or min(h.pieces, h.remain, h.steps) < 0
            or min(h.rows, h.batch, h.sampler_steps) < 1
            or h.pieces == 1
        ):
            raise UserError(
                f"{h.draws} draws, {h.pieces} pieces of {h.sampler_steps} steps, {h.rows} rows: use at least 2 draws, 2 pieces or "
                "none, and 1 of the others"
            )  # fmt: skip
        if h.pieces and len(self.kept) < 2:
            raise UserError(
                "a Frechet distance needs at least 2 remaining tracks: ask for no pieces (--pieces 0)"
            )
        if h.checkpoints and not hasattr(model, "wrapper"):
            raise UserError(
                "only stable-audio-tools models can be written: ask for no checkpoints (--checkpoints off)"
            )
        if h.pieces and not hasattr(model, "sample"):
            raise UserError("the model has no sampler: ask for no pieces (--pieces 0)")

    def _prompts(self, which: Sequence[int], rng: np.random.Generator) -> list[Mapping[str, Any]]:
        count = self.how.pieces
        some = rng.choice(which, count, replace=count > len(which)).tolist()
        return list(self.tracks.batch(some, self.model.frames).conditioning)

    def run(self) -> list[dict[str, Any]]:
        """Compute the strengths that are missing, and write the report anew after each.

        Returns:
            One row a strength, that of the untouched model (strength 0) first; see docs/methods/forget.md.

        Raises:
            UserError: another process works in the folder, it is of another removal, or a model diverges.
        """
        h, strengths = self.how, self.how.all_strengths()
        with writing_in(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            with held(self.out / ".lock") as mine:
                if not mine:
                    raise UserError(f"another process works in {self.out}: wait for it, or use another --out")
                self._enter()
                rows = [self._row(0.0)]
                for x in strengths:
                    rows.append(self._row(x, rows[0]))
                    write_report(self.out, rows, self._about(len(rows) - 1, len(strengths)), h.method)
        return rows

    def _enter(self) -> None:
        """Refuse a folder of another removal."""
        path = self.out / SETTINGS
        if path.exists() and read_json(path, "settings of a removal").get("key") != self.key:
            raise UserError(
                f"{self.out} belongs to another removal (other tracks, model or settings): choose another --out"
            )
        remove_leftovers(self.out)
        write_json(path, {"key": self.key, "settings": asdict(self.how)})

    def _about(self, done: int, total: int) -> dict[str, Any]:
        return {
            "settings": asdict(self.how), "model": self.model.fingerprint, "data": self.tracks.fingerprint,
            "forgotten": [self.tracks.ids[i] for i in self.chosen], "done": done, "strengths": total,
            "tracks": {name: len(x) for name, x in self.sets.items()},
        }  # fmt: skip

    # -- a row --------------------------------------------------------------------------------------

    def _row(self, strength: float, before: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What is known of a strength (0: the untouched model): read, or measured and kept."""
        path = self.out / ROWS / f"{strength:g}.json"
        written = self.out / f"model-{strength:g}"
        if path.exists():
            row = read_json(path, "row of a removal")
            wanted = before is not None and self.how.checkpoints and not (written / CONFIG_NAME).exists()
            if row.get("key") == self.key and not wanted:
                return row
        began = time.monotonic()
        if before is None:
            null = null_loss(
                self.model, self.tracks, self.chosen, training_plan(self.how.seed), True, rows=self.how.rows
            )
            row = {
                "key": self.key,
                "strength": 0.0,
                "null_loss": null,
                **self._measure("untouched model", None),
            }
        else:
            found = self._unlearn(strength)
            size = found.size(self.parameters)  # of theta_0's
            with applied(self.model, found.delta):
                if self.how.checkpoints:
                    write_model(self.model, written)
                row = {
                    "key": self.key, "strength": strength, "steps": found.steps, "ended": found.ended,
                    "size": size, **self._measure(f"strength {strength:g}", before["losses"]),
                }  # fmt: skip
        row["seconds"] = round(time.monotonic() - began, 1)
        write_json(path, row)
        return row

    def _unlearn(self, strength: float) -> Outcome:
        h, model, tracks = self.how, self.model, self.tracks
        steps, plan = h.steps or DEFAULTS[h.method][1], DrawPlan(h.seed, "track", 4)
        if h.method == "fisher":
            update = unlearn_query(
                model, tracks, self.chosen, self._fisher(plan), plan, len(tracks), strength, "size", steps, h.update_draws,
                h.damping, True, h.rows,
            )  # fmt: skip
            return Outcome(dict(update.delta), steps)
        if h.method == "ascent":
            return ascend(
                model, self.parameters, tracks, self.chosen, plan, strength, steps, h.update_draws, True, rows=h.rows
            )  # fmt: skip
        if h.method == "relabel":
            return relabelled(
                model, self.parameters, tracks, self.chosen, tracks, int(strength), h.lr, h.batch, True, h.seed, h.rows
            )  # fmt: skip
        mirroring = Mirroring(h.weight, h.lr, strength, steps, h.batch, seed=h.seed, rows=h.rows)
        return mirrored(model, self.parameters, tracks, self.chosen, tracks, self.kept, mirroring)

    def _fisher(self, plan: DrawPlan) -> Fisher:
        path = self.out / FISHER
        if not path.exists():
            show = self.progress("Fisher", "track")
            fit_fisher(
                self.model, self.tracks, self.how.layers, plan, self.how.fisher_draws, progress=show, rows=self.how.rows
            ).save(path, self.key)  # fmt: skip
        return Fisher.load(path, self.key)

    def _measure(self, what: str, before: Mapping[str, Sequence[float]] | None) -> dict[str, Any]:
        """Losses of every set and what the pieces are like, of the model as it is now."""
        row: dict[str, Any] = {"losses": {}}
        total, done = sum(map(len, self.sets.values())), 0
        show = self.progress(f"losses, {what}", "track")
        for name, some in self.sets.items():
            means: list[float] = []
            for first in range(0, len(some), _CHUNK):
                show(done, total)
                part = Chosen(some, range(first, min(first + _CHUNK, len(some))))
                means += query_losses(self.model, part, self.how.draws, self.how.rows).mean(axis=1).tolist()
                done += len(part)
            if not np.isfinite(means).all():
                raise UserError(f"the losses at {what} are not finite: use a smaller strength or lr")
            row["losses"][name] = means
            row[name] = interval(np.array(means))
            if before is not None:
                row[f"{name}_change"] = interval(np.array(means) - np.array(before[name]))
        show(total, total)
        return {**row, **self._generated(what, before is None)}

    def _generated(self, what: str, untouched: bool) -> dict[str, Any]:
        """What is said of pieces: similarity to what is forgotten, CLAP score, shift of labels, the Frechet distance from what remains."""
        of, h = self.embedding, self.how
        if of is None:
            return {}
        show, row, values = self.progress(f"pieces, {what}", "set"), dict[str, Any](), {}
        for done, (name, prompts) in enumerate(self.prompts.items()):
            show(done, len(self.prompts))
            made = pieces(self.model, prompts, h.seed, h.sampler_steps, h.guidance)
            values[name] = embedded(made, of)
            shift = None if self.labels is None else self.labels.of_pieces(name, made, self.key, untouched)
            if shift is not None:
                row[f"kl_{name}"] = interval(shift)
            near = nearest(values[name], of.values[self.chosen])
            row[f"similarity_{name}"] = interval(near) if np.isfinite(near).all() else None
            if self.clap is not None:
                heard = self.clap(name, made)
                row[f"clap_{name}"] = None if heard is None else interval(heard)
        show(len(self.prompts), len(self.prompts))
        distance = frechet_distance(values["remain"], of.values[self.kept])
        return {**row, "frechet": distance if math.isfinite(distance) else None}


def interval(values: np.ndarray) -> list[float]:
    """Mean of items with its 95 % bootstrap interval: ``[mean, low, high]``."""
    found = bootstrap(values)
    return [found.value, found.low, found.high]


def write_model(model: Any, out: Path) -> None:
    """Write a model as it is now as a folder that ``load_model`` reads; the configuration comes last.

    An autoencoder whose weights the model lacks is left out again.
    """
    from safetensors.torch import save_file

    lacks = model.pretransform is None
    tensors = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in model.wrapper.state_dict().items()
        if not (lacks and name.startswith("pretransform."))
    }
    with whole_file(out / WEIGHTS_NAME) as part:
        save_file(tensors, part)
    write_json(out / CONFIG_NAME, model.config)


def forget(
    model: Denoiser, tracks: Tracks, chosen: Sequence[int], out: str | Path, how: Removal | None = None,
    held_out: Tracks | None = None, progress: Progress = no_progress,
) -> list[dict[str, Any]]:  # fmt: skip
    """:class:`Forgetting`, run; the arguments are its own.

    Args:
        model: theta_0; unchanged on return.
        tracks: the training tracks.
        chosen: places of those to forget.
        out: folder.
        how: settings.
        held_out: further tracks whose loss is reported.
        progress: makes a progress callback from a title and a unit.

    Returns:
        As :meth:`Forgetting.run`.
    """
    return Forgetting(model, tracks, chosen, out, how, held_out, progress).run()
