"""How the pages are built: sphinx-build -W -n docs site. Nothing is fetched, neither to build nor to read them."""

project = "hpo"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "hpo"
html_copy_source = False
html_show_sphinx = False
myst_heading_anchors = 3
# Shortened terminal output need not be a program.
suppress_warnings = ["misc.highlighting_failure"]
