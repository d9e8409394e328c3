"""Real SQLite storage in an empty folder, and studies to run on it."""

from search_fixtures import bare_home, home, make_spec  # noqa: F401
from tracked_store import register, store, tracked  # noqa: F401 - fixtures
from tracking_fixtures import exported, folder, template  # noqa: F401 - fixtures
