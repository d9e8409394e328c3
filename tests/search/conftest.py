"""Real SQLite storage in an empty folder, and studies to run on it."""

from search_fixtures import bare_home, home, make_spec  # noqa: F401
