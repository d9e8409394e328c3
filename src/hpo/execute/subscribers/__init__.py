"""Subscribers to the events of a running study."""
