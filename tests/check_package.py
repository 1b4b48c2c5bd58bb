"""Builds wheel and sdist, and uses the wheel where there is no source: ``tox -e package``.

In the working directory, which must be empty: the packages are built and checked there, and a training is run and
looked at with TensorBoard.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Where nothing but the package, its licence and what describes them belongs.
ALLOWED = ("lib_lightning/", "lib_lightning-")
FORBIDDEN = (".hypothesis", "__pycache__", ".tox", ".venv", "/runs/", ".ckpt", ".safetensors")
FIT = [
    "lib-lightning", "fit", "--config", "recipes/modular_addition.yaml", "--data.modulus=7", "--data.steps_per_epoch=4",
    "--trainer.val_check_interval=2",
]  # fmt: skip


def run(*words: str) -> str:
    print("+", *words, flush=True)
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout


def check_contents(wheel: Path, sdist: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB")
    assert all(name.startswith(ALLOWED) for name in names), names
    package = {str(f.relative_to(ROOT)) for f in (ROOT / "lib_lightning").rglob("*") if f.is_file()}
    package = {name.replace("\\", "/") for name in package if "__pycache__" not in name}
    assert package <= set(names), sorted(package - set(names))
    for needed in ("py.typed", "viewer/static/index.js", "_recipes/modular_addition.yaml", "_recipes/mlp.py"):
        assert f"lib_lightning/{needed}" in names, needed
    with tarfile.open(sdist) as archive:
        in_sdist = ["/".join(name.split("/")[1:]) for name in archive.getnames()]
    print(f"{sdist.name}: {len(in_sdist)} files, {sdist.stat().st_size / 1e6:.1f} MB")
    for needed in ("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "tests/conftest.py", "recipes/mlp.py"):
        assert needed in in_sdist, needed
    (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
    description = zipfile.ZipFile(wheel).read(metadata).decode()
    links = re.findall(r"\]\(([^)]+)\)", description)
    assert any("/docs/images/" in link for link in links), "the README is not in the metadata"
    assert all(link.startswith(("https://", "#")) for link in links), "a link leads nowhere on PyPI"
    for name in (*names, *in_sdist):
        assert name.startswith("tests/data/") or not any(part in name for part in FORBIDDEN), name


def check_tab() -> None:
    """TensorBoard finds the plugin by its entry point, and serves the script of the tab and the run."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = subprocess.Popen(
        ["tensorboard", "--logdir", ".", "--port", str(port), "--load_fast=false"], stderr=subprocess.DEVNULL
    )
    try:
        url = f"http://127.0.0.1:{port}/data"
        for _ in range(120):
            try:
                plugins = json.load(urllib.request.urlopen(f"{url}/plugins_listing"))
                break
            except OSError:
                time.sleep(0.5)
        assert plugins["lib"]["enabled"], plugins["lib"]
        assert urllib.request.urlopen(f"{url}/plugin/lib/index.js").read()
        runs = json.load(urllib.request.urlopen(f"{url}/plugin/lib/runs"))
        assert runs, "no run in the tab"
        print("tab:", [one["name"] for one in runs])
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    assert not list(Path().iterdir()), "the working directory is not empty"
    run(sys.executable, "-m", "build", "--outdir", "dist", str(ROOT))
    (wheel,), (sdist,) = Path("dist").glob("*.whl"), Path("dist").glob("*.tar.gz")
    print(run("twine", "check", "--strict", str(wheel), str(sdist)))
    check_contents(wheel, sdist)
    where = run(sys.executable, "-c", "import lib_lightning; print(lib_lightning.__file__)").strip()
    assert not Path(where).is_relative_to(ROOT / "lib_lightning"), f"imported from the source tree: {where}"
    print(run("lib-lightning", "recipe", "list"))
    print(run("lib-lightning", "recipe", "copy", "modular_addition"))
    print(run(*FIT)[-600:])
    assert list(Path().rglob("final.safetensors"))
    check_tab()
    print("The package is complete.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dist", type=Path, help="folder to copy wheel and sdist to, below the repository")
    kept = parser.parse_args().dist
    main()
    if kept is not None:
        shutil.copytree("dist", ROOT / kept, dirs_exist_ok=True)
