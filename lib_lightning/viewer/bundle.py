"""The view's own files: style sheet and JavaScript, as they are served, and as one script for a file of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from graphlib import TopologicalSorter
from importlib.resources import files

_IMPORT = re.compile(r"^import\s*\{([^}]*)\}\s*from\s*\"\./([\w.]+)\";?[ \t]*$", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=async |function|class|const|let)", re.MULTILINE)


def static_files() -> dict[str, str]:
    """Read the viewer's style sheet and JavaScript modules.

    Returns:
        Their text by file name. The module ``theme.js`` is made from the JSON file that the figures read, so that both
        have the same colours, names and sizes.

    Example:
        >>> {"index.js", "view.js", "view.css", "embedded.js", "theme.js"} <= set(static_files())
        True
    """
    folder = files("lib_lightning.viewer") / "static"
    theme = (files("lib_lightning.plots") / "theme.json").read_text("utf-8").strip()
    return {
        "theme.js": f"export const THEME = {theme};\n",
        **{file.name: file.read_text("utf-8") for file in folder.iterdir() if file.name.endswith((".js", ".css"))},
    }


def joined(modules: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """Join modules to one script without imports: each becomes a function of its own, so that names cannot clash.

    Args:
        modules: Their text by file name. They import names in braces from files beside them, never in a circle.
        wanted: What the script is about, name by file. Other modules are taken as they need each other.

    Returns:
        The script, in which ``modules["FILE"].NAME`` stands for what is wanted.

    Raises:
        KeyError: If a module imports from one that is not there.

    Example:
        >>> a, b = 'import {one as x} from "./b.js";' + chr(10) + "export const two = x + x;", "export const one = 1;"
        >>> print(joined({"a.js": a, "b.js": b}, {"a.js": "two"}))
        const modules = {};
        modules["b.js"] = (() => {
        const one = 1;
        return {one};
        })();
        modules["a.js"] = (() => {
        const {one: x} = modules["b.js"];
        const two = x + x;
        return {two};
        })();
    """
    given = {name: {symbol} for name, symbol in wanted.items()}
    needs: dict[str, list[str]] = {}
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        if name not in needs:
            imports = _IMPORT.findall(modules[name])
            needs[name] = [other for _, other in imports]
            for symbols, other in imports:
                given.setdefault(other, set()).update(symbol for symbol, _ in _symbols(symbols))
            waiting += needs[name]
    blocks = [_block(name, modules[name], given[name]) for name in TopologicalSorter(needs).static_order()]
    return "\n".join(["const modules = {};", *blocks])


def _block(name: str, code: str, given: set[str]) -> str:
    code = _IMPORT.sub(lambda found: f'const {{{_taken(found[1])}}} = modules["{found[2]}"];', code)
    body = _EXPORT.sub("", code).strip()
    return f'modules["{name}"] = (() => {{\n{body}\nreturn {{{", ".join(sorted(given))}}};\n}})();'


def _taken(symbols: str) -> str:
    return ", ".join(symbol if symbol == own else f"{symbol}: {own}" for symbol, own in _symbols(symbols))


def _symbols(symbols: str) -> list[tuple[str, str]]:
    """Names as they are imported, and as they are called here."""
    parts = [part.split(" as ") for part in symbols.split(",") if part.strip()]
    return [(part[0].strip(), part[-1].strip()) for part in parts]
