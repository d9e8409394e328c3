"""A home with an empty MLflow database."""

from tracking_fixtures import exported, folder, home, server, template, tracker  # noqa: F401
