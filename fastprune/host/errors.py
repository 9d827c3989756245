"""Errors whose messages tell users all that they need: the command line prints them without a traceback."""

from __future__ import annotations


class UserError(RuntimeError):
    """An error that a user can put right: a wrong file, or data that no training can follow."""


class Interrupted(RuntimeError):  # noqa: N818 - not an error of anybody's
    """The run was asked to stop, and stopped where it can be resumed."""
