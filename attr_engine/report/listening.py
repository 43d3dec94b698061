"""The page of a blind listening test: one HTML file that says nothing of which clip is which.

It holds no text of any track or query: clips are told apart by trial and letter alone. The three clips of a trial are equally
long, equally loud, cut by the same rule, from the same kind of source, and files of the same format and size.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

from attr_engine.controls import raw_latent_cosine
from attr_engine.errors import UserError
from attr_engine.evaluate import clusters
from attr_engine.files import whole_file
from attr_engine.jobs import Job
from attr_engine.listening import Draws, Key, Pair, Trial, arranged, leading_scores, seeded
from attr_engine.listening_settings import KEY, PAGE, PAIR, Design
from attr_engine.report.audio import encode_clip
from attr_engine.report.markup import esc, json_block
from attr_engine.report.sound import Sound
from attr_engine.result import Attribution

RANDOM, COSINE = "random", "cosine"
#: Level of a clip: root mean square, full scale 1 (-20 dBFS), or lower for a whole trial where a peak would not fit.
LEVEL, PEAK = 0.1, 0.98
_SHORTEST = 1.0  # seconds; a trial with less of any of its three sounds is not asked
_SILENCE = 1e-4  # root mean square
_FADE, _HOP = (
    0.02,
    0.1,
)  # seconds: at both ends of a clip; between the places that the loudest one is looked for at


class Clips(NamedTuple):
    """Encoded clips of a trial."""

    mime: str
    x: bytes
    target: bytes
    other: bytes


def excerpt(audio: np.ndarray, length: int, how: str, hop: int) -> np.ndarray:
    """A stretch of a sound.

    Args:
        audio: ``[samples]``, at least ``length``.
        length: in samples.
        how: ``start``, or ``loudest``: that with the largest energy, the earliest of several, looked for every ``hop`` samples.
        hop: in samples, at least 1.

    Returns:
        ``[length]``.
    """
    if how == "start":
        return audio[:length]
    energy = np.concatenate([[0.0], np.cumsum(audio.astype(np.float64) ** 2)])
    starts = np.arange(0, len(audio) - length + 1, hop)
    first = int(starts[np.argmax(energy[starts + length] - energy[starts])])
    return audio[first : first + length]


def levelled(clips: Sequence[np.ndarray], fade: int) -> list[np.ndarray] | None:
    """Clips ``[n]`` faded at both ends, all with the same root mean square and no sample beyond :data:`PEAK`; None where one is silent.

    There is no limiter, which would change the sound: where the peak of one clip would not fit, all are made quieter.
    """
    ramp = np.minimum(1.0, (np.arange(len(clips[0])) + 0.5) / max(fade, 1))
    faded = [clip.astype(np.float64) * ramp * ramp[::-1] for clip in clips]
    levels = [float(np.sqrt(np.mean(clip**2))) for clip in faded]
    if min(levels) < _SILENCE:
        return None
    level = min([LEVEL, *(PEAK * r / float(np.abs(c).max()) for r, c in zip(levels, faded, strict=True))])
    return [np.asarray(c * (level / r), dtype=np.float32) for r, c in zip(levels, faded, strict=True)]


class _Cutter:
    """The clips of pairs; those of a pair that cannot be heard are None."""

    def __init__(self, job: Job, design: Design) -> None:
        self._job, self._design, self._sound = job, design, Sound(job.model)
        self.made: dict[Pair, Clips | None] = {}

    def usable(self, pair: Pair) -> bool:
        """Whether the three sounds of a pair are there, long enough and not silent."""
        if pair not in self.made:
            self.made[pair] = self._cut(pair)
        return self.made[pair] is not None

    def _cut(self, pair: Pair) -> Clips | None:
        query, tracks, sound = self._job.queries[pair.query], self._job.tracks, self._sound
        itself = (query.tracks, query.index)
        places = [itself if pair.target is None else (tracks, pair.target), (tracks, pair.other)]
        # Both from files or both decoded: otherwise what an autoencoder leaves would tell them apart.
        both = [sound.from_file(*place) for place in places]
        if any(audio is None for audio in both):
            both = [sound.from_latent(*place) for place in places]
        x = sound.from_file(*itself)
        found = [sound.from_latent(*itself) if x is None else x, *both]
        audio = [a[0] for a in found if a is not None]
        length = min([round(self._design.seconds * sound.rate), *map(len, audio)])
        if len(audio) < 3 or length < _SHORTEST * sound.rate:
            return None
        hop = max(1, round(_HOP * sound.rate))
        clips = levelled(
            [excerpt(a, length, self._design.excerpt, hop) for a in audio], round(_FADE * sound.rate)
        )
        if clips is None:
            return None
        encoded = [encode_clip(clip[None], sound.rate, constant=True) for clip in clips]
        return Clips(encoded[0][0], *(data for _, data in encoded))


def control_scores(
    job: Job, against: Mapping[str, Attribution | None], rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Scores ``[Q, N]`` of every control: ``random``, ``cosine``, or the leading ones of a table over the same tracks.

    Raises:
        UserError: no control, or a table that is of other tracks or lacks a query.
    """
    found: dict[str, np.ndarray] = {}
    for name, table in against.items():
        if table is not None:
            if list(table.tracks) != list(job.tracks.ids):
                raise UserError(f"{name} is of other tracks than the run: score the same data")
            found[name] = leading_scores(table, [q.id for q in job.queries])
        elif name == RANDOM:
            found[name] = rng.random((len(job.queries), len(job.tracks)))
        else:
            found[name] = raw_latent_cosine(
                job.tracks, [(q.tracks, q.index) for q in job.queries], job.model.frames
            )
    if not found:
        raise UserError(
            "a listening test needs a control: give --against random, cosine or a table of scores"
        )
    return found


def write_test(
    folder: Path, job: Job, result: Attribution, against: Mapping[str, Attribution | None], design: Design, title: str = ""
) -> Key:  # fmt: skip
    """Write ``listening.html`` and ``key.json`` of a finished run.

    Args:
        folder: of both files; neither may be there, because answers to an earlier page need its key.
        job: the run: model, tracks and queries.
        result: its scores; the retrieved track is the first by the leading function and strength, the query and its exact copies left
            out.
        against: controls: name to a table of scores, None for ``random`` and ``cosine``.
        design: what is asked.
        title: of the page; "" for "Listening test".

    Returns:
        The key.

    Raises:
        UserError: a folder that holds a test, scores that are not of this run, a design out of range, or no trial that can be heard.
    """
    design.check()
    for name in (KEY, PAGE):
        if (folder / name).exists():
            raise UserError(
                f"{folder} holds a listening test, whose key its answers need: choose another folder"
            )
    for what, mine in (("model", job.model.fingerprint), ("data", job.tracks.fingerprint)):
        if result.meta.get(what) != mine:
            raise UserError(f"the scores are of another {what} than {job.run.path} names: score again")
    design, rng = seeded(design)
    ids, tracks = [q.id for q in job.queries], job.tracks.ids
    copies = clusters(tracks, job.tracks.info)
    cutter = _Cutter(job, design)
    draws = Draws(ids, tracks, leading_scores(result, ids), control_scores(job, against, rng), copies, rng)
    pairs = draws.pairs(design.trials, cutter.usable)
    if not pairs:
        raise UserError(
            f"{job.run.path} gives no trial: every control names the retrieved track itself, or there is no sound of at least "
            f"{_SHORTEST:g} s of a query and both tracks (a model with a decoder, or the audio where ingest found it)"
        )
    trials, asked = arranged(
        pairs, draws.catches(design.catch, cutter.usable), design.repeats, ids, tracks, rng
    )
    unheard = sum(1 for pair, clips in cutter.made.items() if clips is None and pair.target is not None)
    function, (_, strength) = next(iter(result.values)), result.updates[0]
    settings = {"trials": sum(1 for t in trials if t.kind == PAIR and not t.repeat_of), "seconds": design.seconds,
                "excerpt": design.excerpt, "function": function, "strength": strength, "queries": len(ids),
                "without_sound": unheard, **{k: result.meta.get(k) for k in ("model", "data", "config")}}  # fmt: skip
    key = Key(tuple(trials), int(design.seed or 0), settings, draws.same)
    sounds = [cutter.made[pair] for pair in asked]
    with whole_file(folder / PAGE) as part, part.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(page_parts(key, sounds, title or "Listening test"))
    key.write(folder / KEY)  # last: a folder with a key is a finished test
    return key


def page_parts(key: Key, sounds: Sequence[Clips | None], title: str) -> Iterator[str]:
    """Yield the page piece by piece; ``sounds`` are in the order of the trials."""
    script = _asset("listening.js")
    mime = next(clips.mime for clips in sounds if clips is not None)
    config = {"test": key.test, "key": key.digest, "trials": len(key.trials), "mime": mime}
    page = Template(_asset("listening.html")).substitute(
        title=esc(title), style=_asset("page.css") + _asset("listening.css"), config=json_block(config), key=key.digest,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )  # fmt: skip
    yield page
    for trial, clips in zip(key.trials, sounds, strict=True):
        if clips is not None:
            yield from _blocks(trial, clips)
    yield f"<script>{script}</script>\n</body></html>\n"


def _asset(name: str) -> str:
    return resources.files("attr_engine.report").joinpath(name).read_text(encoding="utf-8")


def _blocks(trial: Trial, clips: Clips) -> Iterator[str]:
    """A block a clip, named by trial and letter, always X, A, B."""
    a, b = (clips.target, clips.other) if trial.target == "A" else (clips.other, clips.target)
    for letter, data in (("x", clips.x), ("a", a), ("b", b)):
        text = base64.b64encode(data).decode("ascii")
        yield f'<script type="text/plain" id="clip-{trial.number}-{letter}">{text}</script>\n'
