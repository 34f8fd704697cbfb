"""Errors that a user can act on: commands print them as one line and exit with `exit_code`."""


class RlaifFastError(Exception):
    """A failure with a message that says what happened and what to do. Commands exit with 1."""

    exit_code = 1


class UsageError(RlaifFastError):
    """The command, the configuration or the input data is wrong. Commands exit with 2."""

    exit_code = 2
