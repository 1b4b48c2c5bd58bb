"""Fixtures for tests of the view."""

from tests.viewer.browser import browser, opened, watched

__all__ = ["browser", "opened", "watched"]
