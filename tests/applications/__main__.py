"""Installs and trains the applications, and writes what came out to ``results.json`` and ``docs/applications.md``.

``tox -e applications`` runs all of them, ``tox -e applications -- NAME ...`` some, by the beginning of their names.
Each group of packages has an environment of its own in the folder of tox's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from tests.applications.environments import GROUPS
from tests.applications.hugging_face import CONFIGURATIONS
from tests.applications.running import load
from tests.applications.table import page

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = Path(__file__).with_name("results.json"), ROOT / "docs" / "applications.md"
TRANSFORMERS = "transformers"
SECONDS = 600


def environment(group: str, folder: Path) -> tuple[Path, str]:
    """Make the environment of a group, with the version of torch that `constraints.txt` has.

    Returns:
        Its Python, and the reason if something could not be installed.
    """
    python = folder / group / "bin" / "python"
    if not python.exists():
        subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, str(folder / group)], check=True)
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    command = ["uv", "pip", "install", "--quiet", "--python", str(python), torch, str(ROOT), *GROUPS[group]]
    done = subprocess.run(command, capture_output=True, text=True)
    return python, "" if done.returncode == 0 else " ".join(done.stderr.split())[:600]


def results_of(python: Path, *words: str) -> list[dict[str, Any]]:
    """Run a module of this folder and read the results that it prints."""
    settings = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    command = [str(python), "-m", *words]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **settings}, capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return [{"status": "not run", "reason": f"took more than {SECONDS} s"}]
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return [{"status": "not run", "reason": done.stderr.strip().split("\n")[-1][:600]}]
    return [json.loads(line) for line in lines]


def record(name: str, result: dict[str, Any]) -> None:
    """Write a result in place of the one before, and the page."""
    print(f"{name}: {result['status']}", flush=True)
    found = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else {}
    interpreter = f"Python {platform.python_version()} on {platform.system()}, {platform.machine()}"
    every = {"interpreter": interpreter, "results": dict(sorted({**found, name: result}.items()))}
    RESULTS.write_text(json.dumps(every, indent=1) + "\n")
    PAGE.write_text(page(every))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=Path, required=True, help="folder of the environments")
    parser.add_argument("names", nargs="*", help="beginnings of the names of applications; all by default")
    options = parser.parse_args()
    chosen = tuple(options.names) or ("",)
    today = date.today().isoformat()
    applications = {name: group for name, (_, group, _, _) in load().items() if name.startswith(chosen)}
    types = [row[0] for row in CONFIGURATIONS if f"{TRANSFORMERS} {row[0]}".startswith(chosen)]
    for group in GROUPS:
        names = [name for name, of in applications.items() if of == group]
        is_oracle = group == TRANSFORMERS and bool(types)
        if not names and not is_oracle:
            continue
        python, reason = environment(group, options.environments)
        for name in names:
            (result,) = (
                [{"status": "not installed", "reason": reason}]
                if reason
                else results_of(python, "tests.applications.one", name)
            )
            record(name, {"name": name, "group": group, **result, "date": today})
        if is_oracle:
            for result in results_of(python, "tests.applications.hugging_face", *types):
                record(f"{TRANSFORMERS} {result.get('name', '')}".strip(), {**result, "date": today})


if __name__ == "__main__":
    main()
