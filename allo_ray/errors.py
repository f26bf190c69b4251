"""The one error that is meant for the user."""


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and what to change."""
