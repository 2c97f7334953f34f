"""Errors that say what was wrong, where, and what to do about it."""

from __future__ import annotations


class MonaiAdvError(Exception):
    """Base class of every error this package raises on purpose; the command line prints it without a traceback."""


class DataError(MonaiAdvError, ValueError):
    """A file or a folder of images is not what it should be."""


class WriteError(DataError):
    """A file cannot be written: the folder is read-only or the disk is full. A run cannot go on."""


class ConfigError(MonaiAdvError, ValueError):
    """A study, an option or a combination of options cannot work."""


class CheckpointError(MonaiAdvError, ValueError):
    """A checkpoint cannot be read or does not fit its network."""


class NonFiniteError(MonaiAdvError, ArithmeticError):
    """An input, a logit, a loss or a gradient is NaN or infinite."""


class RankError(MonaiAdvError, RuntimeError):
    """One process of a ``torch.distributed`` group failed; raised in all of them, so that none waits for it."""
