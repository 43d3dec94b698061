"""The one exception for what a user can put right."""


class UserError(ValueError):
    """Bad input: one sentence that names the file or item and the way out (exit code 2)."""
