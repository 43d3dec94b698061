"""What a listening test asks, in settings; apart from the rest, so that the command line is there at once."""

from __future__ import annotations

from dataclasses import dataclass

from attr_engine.errors import UserError

PAGE, KEY = "listening.html", "key.json"
EXCERPTS = ("loudest", "start")
PAIR, CATCH = "pair", "catch"
_MAX_TRIALS = 500


@dataclass(frozen=True)
class Design:
    """What a listening test asks.

    Attributes:
        trials: pairs of a retrieved track and a control at most; each query is in one of them.
        catch: further trials in which A or B is X itself: who listens gets them right.
        repeats: trials that come again with A and B exchanged: who hears a difference says the same again.
        seconds: length of a clip at most; the three of a trial are equally long.
        excerpt: which part of a longer track: the ``loudest``, or its ``start``. By the same rule for X, A and B; the place of a
            track's effect is known for retrieved tracks only, and would tell them from controls.
        seed: of queries, controls, sides and order; None draws one, which the key keeps.
    """

    trials: int = 20
    catch: int = 3
    repeats: int = 3
    seconds: float = 10.0
    excerpt: str = "loudest"
    seed: int | None = None

    def check(self) -> None:
        """Refuse a test that cannot be made.

        Raises:
            UserError: a number or a name out of range.
        """
        if self.trials < 1 or min(self.catch, self.repeats) < 0 or self.repeats > self.trials:
            raise UserError(
                f"a listening test of {self.trials} trials, {self.catch} catch trials and {self.repeats} repeats: use at least 1 "
                "trial, no negative number, and at most as many repeats as trials"
            )
        if self.trials + self.catch + self.repeats > _MAX_TRIALS:
            raise UserError(f"a listening test has at most {_MAX_TRIALS} trials: ask for fewer")
        if not 1.0 <= self.seconds <= 120.0:
            raise UserError(f"clips of {self.seconds:g} seconds: use 1 to 120")
        if self.excerpt not in EXCERPTS:
            raise UserError(f"there is no excerpt {self.excerpt!r}: use one of {', '.join(EXCERPTS)}")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"the seed {self.seed} is negative: use 0 or more")
