"""Errors that say what was wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def did_you_mean(name: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The nearest known name as the end of a message, ``"; did you mean 'fgsm'?"``; empty if none is near.

    Args:
        name: what was given; case does not matter.
        known: the names there are.
        cutoff: how near, in (0, 1); 1 is equal.

    Example:
        >>> did_you_mean("fgms", ["fgsm", "pgd"])
        "; did you mean 'fgsm'?"
        >>> did_you_mean("xyz", ["fgsm", "pgd"])
        ''
    """
    names = {str(one).casefold(): str(one) for one in known}
    near = difflib.get_close_matches(str(name).casefold(), names, n=1, cutoff=cutoff)
    return f"; did you mean {names[near[0]]!r}?" if near else ""
