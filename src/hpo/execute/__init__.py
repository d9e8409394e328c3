"""Joins search, learn and track: one supervisor asks, tells and records; workers only train."""
