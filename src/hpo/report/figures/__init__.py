"""Pictures as matplotlib figures."""
