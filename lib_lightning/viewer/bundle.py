"""The viewer's style sheet and JavaScript: separate files for TensorBoard, one script for the HTML export."""

from __future__ import annotations

import base64
import hashlib
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


def comparison_script() -> str:
    """The script of the page of a comparison."""
    return static_files()["comparison.js"]


def script_hash(script: str) -> str:
    """Hash by which a content security policy allows a script.

    Args:
        script: Text of the script element.

    Returns:
        SHA-256, in base64.

    Example:
        >>> script_hash("")
        '47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='
    """
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def bundle(modules: Mapping[str, str], entry_points: Mapping[str, str]) -> str:
    """Combine JavaScript modules into one script without imports.

    Each module becomes a function with its own scope, so that names cannot clash.

    Args:
        modules: Text of the modules by file name. They may import names in braces from files in the same folder,
            without cycles.
        entry_points: Name to export, by file name. Other modules are included as needed.

    Returns:
        The script, in which an entry point is ``modules["FILE"].NAME``.

    Raises:
        KeyError: If a module imports from a missing file.

    Example:
        >>> a, b = 'import {one as x} from "./b.js";' + chr(10) + "export const two = x + x;", "export const one = 1;"
        >>> print(bundle({"a.js": a, "b.js": b}, {"a.js": "two"}))
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
    exports = {name: {symbol} for name, symbol in entry_points.items()}
    dependencies: dict[str, list[str]] = {}
    pending = list(entry_points)
    while pending:
        name = pending.pop()
        if name not in dependencies:
            imports = _IMPORT.findall(modules[name])
            dependencies[name] = [other for _, other in imports]
            for symbols, other in imports:
                exports.setdefault(other, set()).update(symbol for symbol, _ in _symbols(symbols))
            pending += dependencies[name]
    blocks = [_block(name, modules[name], exports[name]) for name in TopologicalSorter(dependencies).static_order()]
    return "\n".join(["const modules = {};", *blocks])


def _block(name: str, code: str, exports: set[str]) -> str:
    code = _IMPORT.sub(lambda match: f'const {{{_destructuring(match[1])}}} = modules["{match[2]}"];', code)
    body = _EXPORT.sub("", code).strip()
    return f'modules["{name}"] = (() => {{\n{body}\nreturn {{{", ".join(sorted(exports))}}};\n}})();'


def _destructuring(symbols: str) -> str:
    return ", ".join(symbol if symbol == alias else f"{symbol}: {alias}" for symbol, alias in _symbols(symbols))


def _symbols(symbols: str) -> list[tuple[str, str]]:
    """Pairs of an imported name and its local alias."""
    parts = [part.split(" as ") for part in symbols.split(",") if part.strip()]
    return [(part[0].strip(), part[-1].strip()) for part in parts]
