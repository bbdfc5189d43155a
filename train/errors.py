"""Errors that the command line tells apart."""


class CommandFailedError(RuntimeError):
    """Something went wrong in the middle of the work, after the request was found to be in order."""
