"""Errors that a user can act on."""


class UserError(RuntimeError):
    """Something the user can mend. The message is one line that says what is wrong and what to do about it."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
