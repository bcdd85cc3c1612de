"""The one exception that is shown without a traceback."""


class UserError(ValueError):
    """Bad input from outside: its message is one plain sentence that says what is wrong and what to do."""


def first_line(error: Exception) -> str:
    """What somebody else's error says, shortened to a line; to two where the first only announces the second."""
    first, *rest = [line.strip() for line in str(error).split("\n") if line.strip()] or [type(error).__name__]
    return f"{first} {rest[0]}" if first.endswith(":") and rest else first
