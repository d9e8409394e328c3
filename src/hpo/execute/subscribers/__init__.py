"""Subscribers to the events of a run: tracking, model retention, profile, clean-up. A run needs none of them."""
