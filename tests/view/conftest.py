"""Fixtures for tests of the view."""

from tests.view.browser import browser, opened, watched

__all__ = ["browser", "opened", "watched"]
