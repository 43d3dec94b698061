"""The exceptions: what a user can put right, and what a user wanted."""


class UserError(ValueError):
    """Bad input: one sentence that names the file or item and the way out (exit code 2)."""


class Cancelled(Exception):
    """The work was told to stop. What was finished is durable; the same call carries on."""


def printable(text: str) -> str:
    """Text for a terminal: whatever could move the cursor or hide something stands there as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(error: BaseException) -> str:
    """What an exception says, in one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
