"""The one exception that is shown without a traceback."""


class UserError(ValueError):
    """Bad input from outside: its message is one plain sentence that says what is wrong and what to do."""
