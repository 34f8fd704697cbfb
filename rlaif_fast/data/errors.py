"""What is wrong with a row."""


class RowError(ValueError):
    """A row that cannot be used; the message says why."""
