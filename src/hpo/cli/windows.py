"""Windows of the desktop, where there is one."""

from __future__ import annotations

import os
import sys


def open_browser(address: str) -> None:
    """Open a page where a browser has a window of its own; in a terminal it would take that over."""
    import webbrowser

    if sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(address)
