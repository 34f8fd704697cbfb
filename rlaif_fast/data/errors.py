"""The error of a row that cannot be used."""


class RowError(ValueError):
    """A row that cannot be used; the message says why."""
