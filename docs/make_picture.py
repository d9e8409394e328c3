"""Draw docs/pictures/live.png, the terminal in the middle of a study: python docs/make_picture.py (needs Chromium)."""

from __future__ import annotations

import io
import re
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI

from hpo.cli.live import LiveDisplay
from hpo.cli.run_summary import NextCommands
from hpo.events import EpochEnded, Event
from hpo.execute.run_study import run_study
from hpo.spec.load import load_study

PICTURE = Path(__file__).with_name("pictures") / "live.png"
STUDY = "digits-cnn"
_COLUMNS, _AFTER = 104, 12  # the moment: so many trials are over, and all workers are at work


class _Moment(LiveDisplay):
    """A display that is drawn once, when enough trials are over and the others are in their middle."""

    drawn: str | None = None

    def show(self, event: Event) -> None:
        super().show(event)
        running = self.tally.running.values()
        halfway = len(running) > 1 and all(trial.epochs > 2 * (trial.epochs - trial.epoch) > 4 for trial in running)
        if not self.drawn and isinstance(event, EpochEnded) and self.tally.finished >= _AFTER and halfway:
            self.console.print(self.frame())
            self.drawn = self.console.export_svg(title=f"hpo run {STUDY}", theme=MONOKAI, clear=False)


def main() -> None:
    """Run the study in a folder of its own and take the picture."""
    console = Console(record=True, file=io.StringIO(), width=_COLUMNS, height=32, force_terminal=True)
    with tempfile.TemporaryDirectory() as folder:
        moment = _Moment(NextCommands(f"hpo run {STUDY}", f"hpo run {STUDY}"), console=console)
        run_study(load_study(STUDY), trials=40, workers=2, home=Path(folder), watch=moment)
    if moment.drawn is None:
        raise SystemExit("The moment never came: run it again.")
    # The fonts that rich names come from the network; those of this machine do as well.
    drawing = re.sub(r"@font-face\s*{[^}]*}", "", moment.drawn).replace("Fira Code", "DejaVu Sans Mono")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 700})
        page.set_content(f"<body style='margin:0;background:transparent'>{drawing}</body>")
        page.locator("svg").first.screenshot(path=PICTURE, omit_background=True)
        browser.close()


if __name__ == "__main__":
    main()
