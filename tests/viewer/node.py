"""Runs the viewer's JavaScript without a browser, in the Node.js that playwright brings along."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from playwright._impl._driver import compute_driver_executable

from lib_lightning.viewer.bundle import static_files

NODE = str(compute_driver_executable()[0])


def write_modules(folder: Path) -> Path:
    """Write the viewer's JavaScript modules to a folder from which Node.js can import them."""
    for name, text in static_files().items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "package.json").write_text('{"type": "module"}')
    return folder


def evaluate(folder: Path, imports: dict[str, str], expression: str, data: Any) -> Any:
    """Evaluate an expression of ``data`` that uses names imported from the viewer's modules.

    Args:
        folder: Folder of `write_modules`.
        imports: Names in each module, separated by commas.
        expression: JavaScript.
        data: A JSON value.

    Returns:
        The value, by way of JSON.
    """
    lines = [f'import {{{names}}} from "./{module}";' for module, names in imports.items()]
    read = 'import {readFileSync} from "node:fs"; const data = JSON.parse(readFileSync(0, "utf8"));'
    code = "\n".join([*lines, read, f"console.log(JSON.stringify({expression}));"])
    done = subprocess.run(
        [NODE, "--input-type=module", "-e", code], cwd=folder, input=json.dumps(data), capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
