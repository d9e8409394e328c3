"""Candidates of a study for a program that trains them itself, under the names of the Python interface."""

from __future__ import annotations

from hpo.jobs.ask_tell import Asked, AskTell, ask_tell

__all__ = ["AskTell", "Asked", "ask_tell"]
