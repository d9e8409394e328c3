"""What goes wrong on the user's side: one message with place, value and next step."""

from __future__ import annotations

import errno
import os
import re
from urllib.parse import unquote

_SECRET_NAME = re.compile(
    r"PASSWORD|PASSWD|PASSPHRASE|SECRET|TOKEN|CREDENTIAL|API_?KEY|ACCESS_KEY|PRIVATE_KEY|(?:^|[_-])(?:PASS|KEY)$|[_-]PWD$",
    re.IGNORECASE,
)
_STORE_URLS = ("HPO_STORAGE", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "MLFLOW_BACKEND_STORE_URI")
_LOGIN = re.compile(r"(?<=://)([^\s:/@\"']*):([^\s\"']*)@")
_OPTION = re.compile(r"([?&]([\w.%-]+)=)([^&\s\"']*)")
# What a terminal obeys, and what turns the direction of writing; not the ends of lines and tabs.
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_LONGEST = 2000
_SHORTEST = 6  # shorter values are words such as "true", and hiding them would garble every text
_known: set[str] = set()


def clean(text: str) -> str:
    """text that a terminal, a page or a table can show safely: without control characters."""
    return _STEERING.sub("", text)


def redact(text: str) -> str:
    """text without the passwords of any address in it and without the secrets that the environment holds.

    Those are the values of variables named like a password, a secret, a token or a key, and what the addresses of the
    stores hold. A secret that is given in no such place is not known here.
    """
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "***")
    return _OPTION.sub(_hidden, _LOGIN.sub(r"\1:***@", text))


def shown_address(url: str) -> str:
    """An address as any output shows it: without its password, whatever signs that has, and without secret options."""
    kind, there, rest = url.partition("://")
    login, _, place = rest.rpartition("@")
    user, password, _ = login.partition(":")
    return redact(f"{kind}{there}{user}:***@{place}" if password else url)


def hide_secrets_of(url: str) -> str:
    """The address, whose secrets no error shows from now on: for those that no variable of the environment holds."""
    _known.add(url)
    return url


def _hidden(option: re.Match[str]) -> str:
    return f"{option[1]}***" if _SECRET_NAME.search(unquote(option[2])) else option[0]


def _secrets() -> set[str]:
    found = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and "://" not in value}
    for url in {*filter(None, map(os.environ.get, _STORE_URLS)), *_known}:
        _, there, rest = url.partition("://")
        if not there and not url.startswith("sqlite:"):
            found.add(url)  # not an address, so any part of it may be the password
        password = rest.rpartition("@")[0].partition(":")[2]
        options = [option[3] for option in _OPTION.finditer(rest) if _SECRET_NAME.search(unquote(option[2]))]
        found |= {each for secret in (password, *options) for each in (secret, unquote(secret))}
    return {secret for secret in found if len(secret) >= _SHORTEST}


def _line(text: str) -> str:
    """text as a terminal may show it: without secrets, and what a file has put into it neither steers nor floods it."""
    cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    return redact("".join(letter if letter.isprintable() else " " for letter in cut))


class HpoError(Exception):
    """A mistake or a fault that its reader can mend.

    message says where and what (place and value), hint says what to do next.
    The command line prints both and exits with `exit_code`; Python users catch the class. Secrets in them are hidden:
    see redact.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = _line(message)
        self.hint = _line(hint)
        super().__init__(self.message)

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
    """A training could not start or continue: its candidate fails, the study continues."""


class NotFiniteError(TrainingError):
    """A loss is NaN or infinite: the training diverged."""


class StoreError(HpoError):
    """The study storage, the tracking store or the disk beneath them refuses."""


class StoreAwayError(StoreError):
    """The store does not answer, or has no room, at the moment: the same call may work later."""


class ModelError(HpoError):
    """A logged or registered model is missing, or not of the kind that was asked for."""


NO_SPACE = "Free some space there, then run the study again: it resumes where it stopped."
_FULL = (
    "no space left",
    "disk is full",
    "disk quota exceeded",
    "enforce fail at inline_container",
    "pytorchstreamwriter failed",
)


def disk_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, is that there is no space left where something was to be written."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # Native libraries and databases keep the system's words and lose its number; torch has words of its own.
    if any(words in str(error).lower() for words in _FULL):
        return True
    return error.__cause__ is not None and disk_full(error.__cause__)
