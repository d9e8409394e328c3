"""Engines: where workers live."""
