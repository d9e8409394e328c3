"""The digits as trials see them."""

from digits_fixtures import digits, digits_card, few  # noqa: F401
