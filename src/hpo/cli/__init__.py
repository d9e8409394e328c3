"""The terminal: commands parse, call and print; all they call is there for Python users, too."""
