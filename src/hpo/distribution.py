"""The name and version under which this package is published. `hpo` on the package index belongs to someone else."""

from __future__ import annotations

NAME = "hpo-studies"  # of the distribution: the command and the import are hpo; pyproject.toml has the same name
VERSION = "0.1.0"  # pyproject.toml reads it here, so that a folder of source code knows it without being installed


def install_command(*extras: str) -> str:
    """The command that installs this package with some of its extras."""
    return f'pip install "{NAME}[{",".join(extras)}]"' if extras else f"pip install {NAME}"
