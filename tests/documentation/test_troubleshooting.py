"""The messages that docs/how_to/troubleshooting.md explains are those that the package has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.pages import ROOT

PAGE = (ROOT / "docs" / "how_to" / "troubleshooting.md").read_text("utf-8")


def _texts() -> Iterator[str]:
    """Every string of the package, as it is written after the parts in several lines are joined."""
    for path in (ROOT / "lib_lightning").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_messages_are_those_of_the_package() -> None:
    explained = [row.split("|")[1] for row in PAGE.splitlines() if re.match(r"\| `", row)]
    messages = [message for cell in explained for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 30
    texts = list(_texts())
    for message in messages:
        assert any(message in text for text in texts), message
