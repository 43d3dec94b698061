"""Symbolic composition: songs made of harmony, bass, melody and drums, and transformations of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np

# fmt: off
# Every pitched instrument with the MIDI range in which it carries a melody; the order gives the index.
RANGES: dict[str, tuple[int, int]] = {
    "piano": (62, 86), "electric piano": (60, 84), "organ": (60, 84), "guitar": (57, 81),
    "flute": (69, 93), "clarinet": (58, 82), "brass": (55, 77), "strings": (62, 88),
    "choir": (57, 79), "bells": (67, 91), "marimba": (60, 86), "synth": (60, 84), "bass": (28, 50),
    "synth bass": (28, 50),
}
INSTRUMENTS: tuple[str, ...] = tuple(RANGES)
KEYS: tuple[str, ...] = ("C", "Db", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
DRUMS = "drums"
KICK, RIM, SNARE, HAT, TOM, OPEN_HAT, SHAKER = 36, 37, 38, 42, 45, 46, 70
DRUM_LETTERS = {"K": KICK, "R": RIM, "N": SNARE, "H": HAT, "T": TOM, "O": OPEN_HAT, "S": SHAKER}
ENDING = 2.0  # beats that the last chord is held
RING_SECONDS = 1.1  # after the last bar, for the last notes and the room to die away

MODES: dict[str, tuple[int, ...]] = {
    "ionian": (0, 2, 4, 5, 7, 9, 11), "dorian": (0, 2, 3, 5, 7, 9, 10), "phrygian": (0, 1, 3, 5, 7, 8, 10),
    "lydian": (0, 2, 4, 6, 7, 9, 11), "mixolydian": (0, 2, 4, 5, 7, 9, 10), "aeolian": (0, 2, 3, 5, 7, 8, 10),
}
# Chords are scale degrees: diatonic, or with M a major triad, d a dominant seventh, s a suspended fourth.
LOOPS: dict[str, tuple[str, ...]] = {
    "ionian": ("1 5 6 4", "1 6 4 5", "1 4 2 5", "1 3 4 5", "6 4 1 5", "1 2 4 5s", "4 5 3 6", "1 6 2 5d"),
    "dorian": ("1 4 1 4", "1 7 4 1", "1 2 4 1", "1 3 4 7", "1 6 3 7"),
    "phrygian": ("1 2 1 7", "1 2 3 2", "1 6 2 1", "4 1 2 1"),
    "lydian": ("1 2 1 2", "1 2 5 6", "1 5 2 1", "6 2 1 5"),
    "mixolydian": ("1 7 4 1", "1 4 7 4", "1 5 7 4", "1 7 1 4"),
    "aeolian": ("1 6 3 7", "1 4 7 3", "1 7 6 7", "1 6 4 5M", "1 4 6 5M", "6 7 1 1", "1 3 7 4"),
    "minor": ("1 4 5d 1", "1 6 4 5d", "1 7 6 5M", "4 1 5d 1", "1 2 5d 6"),
    "blues": ("1d 1d 1d 1d 4d 4d 1d 1d 5d 4d 1d 5d", "1d 4d 1d 1d 4d 4d 1d 5d", "1d 4d 1d 5d"),
}
BEFORE_LAST = {"ionian": "5", "dorian": "7", "phrygian": "2", "lydian": "2", "mixolydian": "7",
               "aeolian": "7", "minor": "5d", "blues": "5d"}
PHRASES = ((0, 1, 0, 2), (0, 0, 1, 2), (0, 1, 1, 2), (0, 1, 0, 1), (0, 0, 0, 2))
STEPS = (.04, .06, .12, .26, .04, .26, .12, .06, .04)  # how likely a melody moves by -4 to 4 scale steps
ROOMS = (0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75)  # from a dry studio at 0 to a hall at 1
FORMS = ("AABA", "ABAB", "AABB", "ABBA", "ABAC")  # of four-bar sections
RESCORED = {"comp": "piano,electric piano,organ,guitar,marimba,strings,synth", "bass": "bass,synth bass",
            "pad": "strings,choir,organ"}
# fmt: on
T = TypeVar("T")
Rng = np.random.Generator


class Note(NamedTuple):
    """One note: where it starts and how long it lasts in beats, its MIDI pitch, velocity and part."""

    start: float
    length: float
    pitch: int
    velocity: int
    part: str


@dataclass(frozen=True)
class Song:
    """A piece: its notes, who plays them, and its whole length in beats with the ring-out."""

    tempo: float
    tonic: int
    mode: str
    style: str
    metre: float
    beats: float
    notes: tuple[Note, ...]
    parts: tuple[tuple[str, str], ...]
    room: float

    @property
    def key(self) -> str:
        """The tonic and the mode in words."""
        return f"{KEYS[self.tonic]} {self.mode}"

    @property
    def lead(self) -> str:
        """The instrument that carries the melody."""
        return dict(self.parts)["lead"]

    @property
    def seconds(self) -> float:
        """The duration of the rendered audio."""
        return self.beats * 60.0 / self.tempo


@dataclass(frozen=True)
class Style:
    """What pieces of one style share. Choices are split by spaces (instruments and grooves by commas).

    Rhythms are grids over a bar: '-' holds, '.' rests. In `comp`, c is the chord and 1 to 5 its voices;
    in `bass`, r is the root, 3 and 5 chord members, o the octave, a the step below the next root.
    """

    loops: str  # names of LOOPS
    tempo: tuple[float, float]  # quarter notes a minute
    metre: float  # quarter notes a bar
    cells: str  # melody rhythms
    comp: str
    bass: str
    drums: str  # each groove is a list of DRUM_LETTERS and grids
    leads: str
    comps: str
    basses: str = "bass"
    pads: str = ""
    swing: float = 0.5  # where the second eighth of a beat falls
    per_bar: int = 1  # chords a bar
    seventh: bool = False


# fmt: off
STYLES: dict[str, Style] = {
    "ballad": Style("ionian aeolian", (66, 84), 4, "x---x-x- x-x-x--- x--xx-x- ..x-x-x- x-----xx",
        "12343432 1-3-2-3- 1-342343", "r------- r---5--- r-----5-", ", K x.....x. R ....x... H x.x.x.x.",
        "flute,piano,clarinet,choir", "piano,guitar", pads="strings"),
    "waltz": Style("ionian minor", (126, 164), 3, "x---x- x-x-x- x----x x-xxx- ..x-x-", "..c.c. ..c-c-",
        "r----- r-....", ", K x..... H ..x.x.", "clarinet,strings,bells,organ", "piano,guitar,organ"),
    "bossa": Style("ionian dorian", (116, 142), 4, "x-xx-x-- .x-xx-x- x--x--x- x-x-.xx- ..xx-x-x",
        "c..c..c...c..c.. c.c...c..c.c....", "r--55--r r--5r--5", "K x..xx..x R x..x..x...x..x.. S xxxxxxxx",
        "guitar,flute,electric piano,marimba", "guitar,electric piano", seventh=True),
    "march": Style("ionian mixolydian", (104, 124), 4, "x-x-x-x- x--xx-x- x-xxx-x- x---x--x x-x-x---",
        ".c.c.c.c ..c...c.", "r.5.r.5. r.5.r.3.", "K x...x... N ..x...xx..x..xx. H ....x.......x...",
        "brass,clarinet,flute", "brass,organ,clarinet"),
    "jig": Style("dorian mixolydian ionian", (156, 192), 3, "xxxxxx x-xxxx x-xx-x xxxx-- x--x-x",
        "c.cc.c 1.31.3", "r--r-- r--5--", "K x..x.. S xxxxxx,", "flute,strings,guitar,bells", "guitar,piano"),
    "house": Style("aeolian dorian", (119, 129), 4,
        "x.x.x..x..x.x... x..x..x.x..x..x. x-x.....x-x.x... ..x...x...x.x.x.",
        "..c...c...c...c. c..c..c...c.c...", "..r...r...r...r. ..r...o...r...o. r..r..r..r..o..r",
        "K x...x...x...x... N ....x.......x... O ..x...x...x...x. S xxxxxxxxxxxxxxxx",
        "synth,electric piano,bells,choir", "synth,electric piano,organ", "synth bass", "strings",
        seventh=True),
    "ambient": Style("lydian dorian ionian", (56, 72), 4, "x-x---x- ..x-x-x- x---x-xx x-x-x---",
        "1-3-2-4- 12345432 1-2-3-4-", "r------- r-----o-", "", "bells,choir,electric piano,flute",
        "electric piano,guitar,organ", "synth bass", "strings,choir", seventh=True),
    "lofi": Style("dorian aeolian ionian", (72, 90), 4, "x.xx..x- ..xx-xx. x--x.xx- .x-x-x--",
        "c---..c- c-.c-.c-", "r--r-.5- r-.5-.r-",
        "K x..x.x.. N ..x...x. H xxxxxxxx,K x....x.. R ..x...x. H x.xxx.xx",
        "electric piano,marimba,guitar,clarinet", "electric piano,piano", swing=0.6, seventh=True),
    "aksak": Style("phrygian minor", (150, 186), 3.5, "x-x-x-- xxx-x-x x-xxx-- x-x-xxx", "c.c.c.. 1.2.3.2",
        "r-5-r-- r-r-5--", "K x...x.. T ..x...x S xxxxxxx,K x.x.x.. R ......x",
        "clarinet,guitar,strings,brass", "guitar,piano,marimba"),
    "chorale": Style("ionian minor", (72, 94), 4, "x-x-x-x- x-xxx-x- x---x-x- x-x-x---", "c---c--- c-c-c-c-",
        "r---r--- r-3-r-5-", "", "organ,choir,brass,strings", "organ,choir,strings", per_bar=2),
    "minimal": Style("lydian ionian mixolydian", (112, 138), 4, "x-xx-xx- x.x.xx.x xx.xx.x. x-x-xxxx",
        "1324132413241324 1213141312131413 1.2.3.4.5.4.3.2.", "r------- r---o---", ", K x..x..x. S ..x...x.",
        "marimba,piano,bells,synth", "marimba,piano,electric piano", pads="strings,organ"),
    "shuffle": Style("blues", (98, 134), 4, "x-xx-xx- xxx-..xx .xxxx-.. x--xxxx-", "..c...c. c..c..c.",
        "r-3-5-a- rr55rr3a", "K x...x... N ..x...x. H xxxxxxxx", "organ,guitar,brass,piano",
        "piano,organ,guitar", swing=0.66),
    "tango": Style("minor phrygian", (108, 128), 4, "x--xx-x- x-x--xx- xx.xx.x- x---.xxx",
        "c..cc.c. c.c.c.cc", "r..r5.r. r--r5---", ", K x..x..x. R ......xx", "strings,clarinet,piano",
        "piano,strings,guitar"),
    "quintet": Style("dorian minor lydian", (138, 172), 5, "x--x--x-x- x-xx-xx--- x-x-x-x-xx ..xx-xx-x-",
        "c..c..c.c. 1.2.3.4.3.", "r--r--5-5- r-----5-o-", "K x.....x... R ...x....x. H xxxxxxxxxx",
        "piano,brass,synth,flute", "electric piano,piano", "bass,synth bass", seventh=True),
}
# fmt: on


class Chord(NamedTuple):
    """A chord's pitch classes from the root up, and the seven-note scale that fits it."""

    tones: tuple[int, ...]
    scale: frozenset[int]


def _chord(token: str, tonic: int, mode: str, seventh: bool) -> Chord:
    """Spell a chord token; altered chord members replace the scale note they come from."""
    scale = MODES[{"minor": "aeolian", "blues": "mixolydian"}.get(mode, mode)]
    degree, root = int(token[0]) - 1, scale[int(token[0]) - 1]
    tones = [scale[(degree + step) % 7] for step in ((0, 2, 4, 6) if seventh else (0, 2, 4))]
    fixed = {"M": (0, 4, 7), "d": (0, 4, 7, 10), "s": (0, 5, 7)}.get(token[1:])
    fitting = set(scale)
    if fixed is not None:
        tones = [(root + tone) % 12 for tone in fixed]
        for place, tone in enumerate(tones):
            if tone not in fitting:
                fitting ^= {tone, (tone + (1 if place == 3 else -1)) % 12}
    return Chord(tuple((tonic + t) % 12 for t in tones), frozenset((tonic + t) % 12 for t in fitting))


def _one(rng: Rng, choices: Sequence[T]) -> T:
    """Draw one of the choices."""
    return choices[int(rng.integers(len(choices)))]


def _onsets(pattern: str, metre: float) -> list[tuple[float, float, str]]:
    """The (start, length, symbol) of every event of a bar's pattern, in beats."""
    slot = metre / len(pattern)
    events: list[tuple[float, float, str]] = []
    for place, symbol in enumerate(pattern):
        if symbol not in "-.":
            rest = pattern[place + 1 :]
            events.append((place * slot, (1 + len(rest) - len(rest.lstrip("-"))) * slot, symbol))
    return events


def _harmony(rng: Rng, style: Style, mode: str, tonic: int, form: str, bars: int) -> list[list[Chord]]:
    """The chords of every bar: each section letter has its own loop, and the piece ends at home."""
    order = rng.permutation(len(LOOPS[mode]))
    loops = {letter: LOOPS[mode][order[place % len(order)]].split() for place, letter in enumerate("ABC")}
    tokens: list[list[str]] = []
    for bar in range(bars):
        loop, at = loops[form[bar // 4]], bar if mode == "blues" else bar % 4
        tokens.append([loop[(at * style.per_bar + i) % len(loop)] for i in range(style.per_bar)])
    tokens[-1] = ["1d" if mode == "blues" else "1"]
    if bars > 2:
        tokens[-2][-1] = BEFORE_LAST[mode]
    return [[_chord(token, tonic, mode, style.seventh) for token in bar] for bar in tokens]


def _nearest(pitch: float, classes: Collection[int], low: int, high: int) -> int:
    """The pitch nearest to `pitch` with a wanted pitch class, within a range."""
    return min((p for p in range(low, high + 1) if p % 12 in classes), key=lambda p: (abs(p - pitch), p))


class Theme(NamedTuple):
    """What a section's melody is made of: two rhythms and a cadence's contour too, and how bars use them."""

    cells: list[str]
    contours: np.ndarray  # scale steps from note to note, for either motif and the cadence
    phrase: tuple[int, ...]  # the motif of each of four bars
    starts: np.ndarray  # the pitch each of four bars aims at first


def _theme(rng: Rng, style: Style, centre: float) -> Theme:
    """Invent the material of a section."""
    cells = style.cells.split()
    cells = [cells[place] for place in rng.choice(len(cells), 2, replace=False)]
    contours = rng.choice(len(STEPS), size=(3, 16), p=STEPS) - len(STEPS) // 2
    starts = centre + rng.uniform(-3, 3) + rng.integers(-2, 5, size=4)
    return Theme(cells, contours, _one(rng, PHRASES), starts)


def _melody(rng: Rng, style: Style, chords: list[list[Chord]], form: str, low: int, high: int) -> list[Note]:
    """A melody of phrases: each section repeats and varies its theme over its chords, and cadences."""
    heights = {"A": 0.35, "B": 0.6, "C": 0.5}
    themes = {name: _theme(rng, style, low + (high - low) * heights[name]) for name in heights}
    notes: list[Note] = []
    for bar, harmony in enumerate(chords):
        theme, last = themes[form[bar // 4]], bar == len(chords) - 1
        motif, pitch, at = theme.phrase[bar % 4], 0, bar * style.metre
        rhythm = _onsets("x", ENDING) if last else _onsets(theme.cells[motif % 2], style.metre)
        if motif == 2 and not last:
            kept = rhythm[: max(1, len(rhythm) // 2)]
            rhythm = [*kept[:-1], (kept[-1][0], style.metre * 7 / 8 - kept[-1][0], "x")]
        for i, (start, length, _) in enumerate(rhythm):
            chord = harmony[int(start * len(harmony) / style.metre)]
            if i == 0:
                pitch = _nearest(theme.starts[bar % 4], chord.tones[:1] if last else chord.tones, low, high)
            else:
                strong = length >= 1 and (start % 1 == 0 or motif == 2)
                pitch = _step(pitch, int(theme.contours[motif][i]), chord, low, high, strong)
            velocity = 100 if i == 0 else 88 if start % 1 == 0 else 78
            # A section that comes back is ornamented: its long notes turn through a neighbour.
            turns = form[bar // 4] in form[: bar // 4] and motif == 1 and length >= 1 and not last
            length = length / 2 if turns else length
            notes.append(Note(at + start, length, pitch, velocity, "lead"))
            if turns:
                pitch = _step(pitch, 1, chord, low, high, strong=False)
                notes.append(Note(at + start + length, length, pitch, velocity, "lead"))
    return notes


def _step(pitch: float, steps: int, chord: Chord, low: int, high: int, strong: bool) -> int:
    """Move along the chord's scale, turning back at the range's ends; strong notes are chord tones."""
    ladder = [p for p in range(low, high + 1) if p % 12 in chord.scale]
    at = min(range(len(ladder)), key=lambda i: abs(ladder[i] - pitch)) + steps
    if not 0 <= at < len(ladder):
        at -= 2 * steps
    landed = ladder[min(max(at, 0), len(ladder) - 1)]
    return _nearest(landed, chord.tones, low, high) if strong else landed


def _voicing(chord: Chord, previous: tuple[int, ...]) -> tuple[int, ...]:
    """The close position of a chord that moves least from the voicing before it."""
    bottoms = [pitch for pitch in range(50, 64) if pitch % 12 in chord.tones]
    options = [tuple(sorted(low + (tone - low) % 12 for tone in chord.tones)) for low in bottoms]
    return min(options, key=lambda v: (sum(min(abs(p - q) for q in previous) for p in v), v))


def _backing(rng: Rng, style: Style, chords: list[list[Chord]], pad: bool) -> list[Note]:
    """The chords, the bass and the pad under the melody."""
    comp, bass = _one(rng, style.comp.split()), _one(rng, style.bass.split())
    notes: list[Note] = []
    voices: tuple[int, ...] = (55, 60, 64)
    for bar, harmony in enumerate(chords):
        at, last = bar * style.metre, bar == len(chords) - 1
        length = ENDING if last else style.metre
        span, follows = length / len(harmony), chords[min(bar + 1, len(chords) - 1)][0]
        voicings = []
        for chord in harmony:
            voices = _voicing(chord, voices)
            voicings.append(voices)
        if pad:
            notes += [Note(at + i * span, span, v, 72, "pad") for i, vs in enumerate(voicings) for v in vs]
        for start, held, symbol in _onsets("c" if last else comp, length):
            sounding = voicings[int(start / span)]
            if symbol != "c":
                sounding = ((*sounding, *(v + 12 for v in sounding))[int(symbol) - 1],)
            notes += [Note(at + start, held, v, 84 if start == 0 else 72, "comp") for v in sounding]
        for start, held, symbol in _onsets("r" if last else bass, length):
            tones = harmony[int(start / span)].tones
            root = _nearest(38, tones[:1], 33, 44)
            third, fifth = (root + (tone - tones[0]) % 12 for tone in tones[1:3])
            below = _nearest(38, follows.tones[:1], 33, 44) - 1
            pitch = {"r": root, "o": root + 12, "a": below, "3": third, "5": fifth}[symbol]
            notes.append(Note(at + start, held * 0.95, pitch, 92 if start == 0 else 80, "bass"))
    return notes


def _drumming(rng: Rng, style: Style, bars: int) -> list[Note]:
    """The style's groove, with a fill before each new section and a last hit to end on."""
    words = _one(rng, style.drums.split(",")).split()
    groove = [(DRUM_LETTERS[words[i]], words[i + 1]) for i in range(0, len(words), 2)]
    silent = 2 if bars >= 8 and rng.random() < 0.35 else 0  # some pieces let the band in late
    notes: list[Note] = []
    for bar in range(silent, bars - 1 if groove else 0):
        at, fill = bar * style.metre, style.metre - 1 if bar % 4 == 3 and rng.random() < 0.6 else style.metre
        for pitch, pattern in groove:
            starts = [start for start, _, _ in _onsets(pattern, style.metre) if start < fill]
            notes += [Note(at + b, 0.25, pitch, 74 if b % 1 else 96, DRUMS) for b in starts]
        if fill < style.metre:
            roll = enumerate((SNARE, SNARE, TOM, TOM))
            notes += [Note(at + fill + i / 4, 0.25, pitch, 76 + 6 * i, DRUMS) for i, pitch in roll]
    return notes + ([Note((bars - 1) * style.metre, 0.25, KICK, 100, DRUMS)] if groove else [])


def _swung(note: Note, swing: float) -> Note:
    """Move what falls inside a beat so that its second half starts late."""

    def warp(beat: float) -> float:
        return beat // 1 + min(2 * swing * (beat % 1), 1 - 2 * (1 - swing) * (1 - beat % 1))

    start = warp(note.start)
    return note._replace(start=start, length=warp(note.start + note.length) - start)


def compose(rng: Rng, style: str, seconds: float, lead: str | None = None) -> Song:
    """Compose a piece of a style that lasts `seconds` with its ring-out."""
    manner = STYLES[style]
    mode = _one(rng, manner.loops.split())
    tonic, tempo, sounding = int(rng.integers(12)), rng.uniform(*manner.tempo), seconds - RING_SECONDS
    bars = max(2, 1 + round((sounding * tempo / 60 - ENDING) / manner.metre))
    # The tempo gives way a little so that whole bars and the ring-out fill the time exactly.
    tempo = round(60 * ((bars - 1) * manner.metre + ENDING) / sounding, 2)
    form = _one(rng, FORMS) * (bars // 16 + 1)
    chords = _harmony(rng, manner, mode, tonic, form, bars)
    lead = lead or _one(rng, manner.leads.split(","))
    comp = _one(rng, [name for name in manner.comps.split(",") if name != lead])
    parts = [("lead", lead), ("comp", comp), ("bass", _one(rng, manner.basses.split(",")))]
    pads = [name for name in manner.pads.split(",") if name not in ("", lead)]
    if pads and rng.random() < 0.7:
        parts.append(("pad", _one(rng, pads)))
    notes = _melody(rng, manner, chords, form, *RANGES[lead])
    notes += _backing(rng, manner, chords, pad=len(parts) > 3) + _drumming(rng, manner, bars)
    played = tuple(sorted(_swung(note, manner.swing) for note in notes))
    mode, beats = "harmonic minor" if mode == "minor" else mode, seconds * tempo / 60
    return Song(tempo, tonic, mode, style, manner.metre, beats, played, tuple(parts), _one(rng, ROOMS))


def transpose(song: Song, semitones: int) -> Song:
    """The same song in another key; drums have none."""
    notes = tuple(n if n.part == DRUMS else n._replace(pitch=n.pitch + semitones) for n in song.notes)
    return replace(song, tonic=(song.tonic + semitones) % 12, notes=notes)


def stretch(song: Song, factor: float) -> Song:
    """The same song played `factor` times as long at its own pitch."""
    return replace(song, tempo=song.tempo / factor)


def reorchestrate(song: Song, rng: Rng, avoid: Collection[str] = ()) -> Song:
    """The same notes on other instruments in another room; the lead is none of `avoid` nor the old one."""
    old = dict(song.parts)
    new = {"lead": _one(rng, [n for n in INSTRUMENTS if "bass" not in n and n not in (*avoid, old["lead"])])}
    for part, names in RESCORED.items():
        new[part] = _one(rng, [n for n in names.split(",") if n not in (new["lead"], old.get(part))])
    pitches = [note.pitch for note in song.notes if note.part == "lead"]
    shift = 12 * round((sum(RANGES[new["lead"]]) / 2 - sum(pitches) / len(pitches)) / 12)
    notes = tuple(n._replace(pitch=n.pitch + shift) if n.part == "lead" else n for n in song.notes)
    parts = tuple((part, new[part]) for part in old)
    return replace(song, notes=notes, parts=parts, room=_one(rng, ROOMS))


def crop(song: Song, start: float, stop: float, ring: float = 0.0) -> Song:
    """The beats from `start` up to `stop` of a song, and `ring` beats in which they die away."""
    inside = [n for n in song.notes if start <= n.start < stop]
    notes = tuple(n._replace(start=n.start - start, length=min(n.length, stop - n.start)) for n in inside)
    return replace(song, notes=notes, beats=stop - start + ring)
