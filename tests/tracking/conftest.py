"""A home with an empty MLflow database."""

from tracking_fixtures import exported, folder, home, registered, server, template, tracker  # noqa: F401
