"""Errors that a user can act on."""


class UserError(RuntimeError):
    """Something the user can mend. The message is one line that says what is wrong and what to do about it."""
