"""Paths in the folder of a run, and the files that are found there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lib_lightning.io.run_layout import RunLayout


def test_files_of_snapshots_are_found_by_step(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path)
    files = [f(step) for step in (100, 20) for f in (layout.basis_file, layout.figure_file, layout.spectrum_file)]
    others = [
        layout.snapshots / name for name in ("step-20.txt", "step-x.safetensors", ".step-00000020.safetensors.1.tmp")
    ]
    for file in (*files, *others, layout.final_file, layout.events_file):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert layout.basis_files() == {20: layout.basis_file(20), 100: layout.basis_file(100)}
    assert list(layout.basis_files()) == [20, 100]
    assert sorted(layout.snapshot_files()) == sorted(
        (step, f) for f in files if (step := layout.step_of(f)) is not None
    )
    assert {layout.step_of(file) for file in files} == {20, 100}
    assert layout.stale_file(files[0]) == tmp_path / "stale" / "snapshots" / "step-00000100.safetensors"


def test_a_missing_folder_has_no_files(tmp_path: Path) -> None:
    layout = RunLayout(tmp_path / "none")
    assert (layout.basis_files(), layout.snapshot_files()) == ({}, [])


@pytest.mark.parametrize("name", ["final.safetensors", "step-.safetensors", "step-3-4.png", "xstep-3.png"])
def test_other_files_belong_to_no_step(name: str) -> None:
    assert RunLayout.step_of(name) is None


@pytest.mark.parametrize("module", ["basis_file", "basis_format", "run_layout"])
def test_imports_without_torch(module: str) -> None:
    code = f"import sys, lib_lightning.io.{module}; assert not {{'torch', 'lightning'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
