"""Fixtures for tests of the viewer."""

from tests.viewer.browser import browser, opened, watched

__all__ = ["browser", "opened", "watched"]
