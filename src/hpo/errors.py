"""What goes wrong on the user's side: one message with place, value and next step."""

from __future__ import annotations


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


class ModelError(HpoError):
    """A logged or registered model is missing, or not of the kind that was asked for."""
