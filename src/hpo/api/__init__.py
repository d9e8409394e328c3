"""The Python interface: run a study with data and networks at hand, open one that has run, show it in notebooks."""
