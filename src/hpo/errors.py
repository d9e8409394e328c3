"""What goes wrong on the user's side: one message with place, value and next step."""

from __future__ import annotations

import errno


class HpoError(Exception):
    """A mistake or a fault that its reader can mend.

    message says where and what (place and value), hint says what to do next.
    The command line prints both and exits with `exit_code`; Python users catch the class.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()

    def __reduce__(self) -> tuple[type[HpoError], tuple[str, str]]:
        # Errors cross process borders: the default would drop the hint.
        return type(self), (self.message, self.hint)


class SpecError(HpoError):
    """The study file, or an override of it, is not a valid study."""


class DataError(HpoError):
    """Images or labels are missing, damaged or of the wrong kind."""


class TrainingError(HpoError):
    """A training could not start or go on: its candidate fails, the study goes on."""


class NotFiniteError(TrainingError):
    """A loss is NaN or infinite: the training diverged."""


class StoreError(HpoError):
    """The study storage, the tracking store or the disk beneath them refuses."""


class StoreAwayError(StoreError):
    """The store does not answer, or has no room, at the moment: the same call may work later."""


class ModelError(HpoError):
    """A logged or registered model is missing, or not of the kind that was asked for."""


NO_SPACE = "Free some space there, then run the study again: it goes on where it stopped."


def disk_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, is that there is no space left where something was to be written."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # Native libraries and databases keep the system's words and lose its number.
    if any(words in str(error).lower() for words in ("no space left", "disk is full", "disk quota exceeded")):
        return True
    return error.__cause__ is not None and disk_full(error.__cause__)
