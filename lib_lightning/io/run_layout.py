"""Names of all files in the folder of a run."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from lib_lightning.errors import SettingError, shortened

_STEP = re.compile(r"step-(\d+)")
# Beside it, a baseline appends "_neuron", and file systems allow 255 bytes.
_MAX_NAME_BYTES = 200
# Names of devices, which Windows allows for no file.
_RESERVED = frozenset({"CON", "PRN", "AUX", "NUL", *(f"{port}{i}" for port in ("COM", "LPT") for i in range(10))})
# Names that version 0.1 wrote, by present name. They are still read, never written.
OLD_NAMES = {"stale": "before", "reference": "probes"}


@dataclass(frozen=True, init=False)
class RunLayout:
    """Paths of the files in the folder of a run. Nothing is read or written.

    Args:
        path: The folder, such as ``lightning_logs/version_0/lib``.

    Example:
        >>> layout = RunLayout("logs/lib")
        >>> layout.basis_file(240).as_posix()
        'logs/lib/snapshots/step-00000240.safetensors'
        >>> layout.samples_file(0, 2, "reference").as_posix()
        'logs/lib/samples/reference-1-of-2.pt'
    """

    path: Path

    SNAPSHOTS = "snapshots"
    FIGURES = "figures"
    SPECTRA = "spectra"
    SAMPLES = "samples"
    STALE = "stale"
    # Within the run's folder: the snapshots of a standalone validation, a run with a folder of its own.
    VALIDATION = "validate"
    # Folders that are searched for no other runs.
    NO_RUNS = frozenset({SNAPSHOTS, FIGURES, SPECTRA, SAMPLES, STALE, OLD_NAMES[STALE]})
    # What is written for each snapshot, and the ending of its files.
    PER_SNAPSHOT = ((SNAPSHOTS, ".safetensors"), (FIGURES, ".png"), (SPECTRA, ".png"))

    def __init__(self, path: str | PathLike[str]) -> None:
        object.__setattr__(self, "path", Path(path))

    @property
    def snapshots(self) -> Path:
        """Folder of the basis files."""
        return self.path / self.SNAPSHOTS

    @property
    def figures(self) -> Path:
        """Folder of the figures of interaction graphs."""
        return self.path / self.FIGURES

    @property
    def spectra(self) -> Path:
        """Folder of the figures of importances."""
        return self.path / self.SPECTRA

    @property
    def final_file(self) -> Path:
        """Basis file of the last snapshot, once more."""
        return self.path / "final.safetensors"

    @property
    def events_file(self) -> Path:
        """Events of features and metrics, one JSON object a line."""
        return self.path / "events.jsonl"

    @property
    def notes_file(self) -> Path:
        """The user's notes on features, as JSON."""
        return self.path / "notes.json"

    @property
    def renderings_file(self) -> Path:
        """How the samples among the examples of features look, one JSON object a line."""
        return self.path / "samples.jsonl"

    @property
    def trace_file(self) -> Path:
        """How far the run is, if it was made from the checkpoints of a training."""
        return self.path / "trace.pt"

    @property
    def history_file(self) -> Path:
        """The step since which each final feature has been recognisable, as JSON."""
        return self.path / "retraced.json"

    @property
    def timeline(self) -> Path:
        """Figure of the lineages over training time."""
        return self.run_figure("timeline")

    @property
    def view_file(self) -> Path:
        """The run as one HTML page."""
        return self.path / "film.html"

    @property
    def comparison_page(self) -> Path:
        """Comparison of the run with others, as one HTML page."""
        return self.path / "comparison" / "comparison.html"

    def run_figure(self, name: str) -> Path:
        """Figure of the whole run, such as ``timeline``."""
        return self.path / f"{name}.png"

    def basis_file(self, step: int) -> Path:
        """Basis file of the snapshot at a step."""
        return self.snapshots / f"{_stem(step)}.safetensors"

    def figure_file(self, step: int) -> Path:
        """Figure of the interaction graph at a step."""
        return self.figures / f"{_stem(step)}.png"

    def spectrum_file(self, step: int) -> Path:
        """Figure of the importances at a step."""
        return self.spectra / f"{_stem(step)}.png"

    def basis_files(self) -> dict[int, Path]:
        """Existing basis files by step, in order of the steps."""
        found = ((self.step_of(file), file) for file in self.snapshots.glob("step-*.safetensors"))
        return dict(sorted((step, file) for step, file in found if step is not None))

    def snapshot_files(self) -> list[tuple[int, Path]]:
        """Step and path of every existing file of a single snapshot: basis files and figures."""
        found = (
            (self.step_of(file), file)
            for folder, ending in self.PER_SNAPSHOT
            for file in (self.path / folder).glob(f"step-*{ending}")
        )
        return [(step, file) for step, file in found if step is not None]

    def stale_file(self, file: Path) -> Path:
        """Where a file of a snapshot that does not belong to the run is moved."""
        return self.path / self.STALE / file.relative_to(self.path)

    def samples_file(self, rank: int, size: int, kind: str = "") -> Path:
        """Samples of one process.

        Args:
            rank: The process, from 0.
            size: Number of processes.
            kind: "" for those that snapshots are computed on, ``"reference"`` or ``"held-out"``.

        Returns:
            The path to write to.
        """
        return self.path / self.SAMPLES / f"{kind}{'-' * bool(kind)}{rank + 1}-of-{size}.pt"

    def existing_samples_file(self, rank: int, size: int, kind: str = "") -> Path:
        """The same for reading: the path that version 0.1 wrote to, if only that one exists."""
        path, old = (self.samples_file(rank, size, k) for k in (kind, OLD_NAMES.get(kind, kind)))
        return old if old.exists() and not path.exists() else path

    @staticmethod
    def step_of(file: str | PathLike[str]) -> int | None:
        """Step of the snapshot that a file belongs to, by its name; None for other files.

        Args:
            file: Path or name.

        Returns:
            The step.

        Example:
            >>> RunLayout.step_of("step-00000240.safetensors"), RunLayout.step_of("step-240.txt.safetensors")
            (240, None)
        """
        match = _STEP.fullmatch(Path(file).stem)
        return int(match[1]) if match else None


def _stem(step: int) -> str:
    return f"step-{step:08d}"


def check_run_name(name: object) -> None:
    """Check that the name of a callback can be the name of its folder, within the log directory of any system.

    Args:
        name: The name.

    Raises:
        SettingError: If it cannot, with the reason.

    Example:
        >>> check_run_name("lib"), check_run_name("probes/wide lib")
        (None, None)
        >>> check_run_name("../lib")
        Traceback (most recent call last):
        lib_lightning.errors.SettingError: name='../lib' cannot be the name of a folder in the log directory: '..' ...
    """
    if problem := _problem_of(name):
        shown = shortened(repr(name), 80)
        raise SettingError(f"name={shown} cannot be the name of a folder in the log directory: {problem}.")


def _problem_of(name: object) -> str:
    if not isinstance(name, str):
        return "it is not a string"
    if len(name.encode(errors="replace")) > _MAX_NAME_BYTES:
        return f"it is longer than {_MAX_NAME_BYTES} bytes"
    for part in name.split("/"):
        if not part:
            return "it is empty" if not name else "it is an absolute path, or has an empty part"
        if part in (".", ".."):
            return f"'{part}' is another folder"
        if part != part.strip() or part.endswith("."):
            return "it starts with a space, or ends with a space or a full stop"
        if not part.isprintable() or set(part) & set('<>:"|?*\\'):
            return 'it has one of the characters < > : " | ? * \\, or one that cannot be printed'
        if part.split(".")[0].rstrip().upper() in _RESERVED:
            return f"Windows reserves '{part}' for a device"
    return ""


def overlapping_names(names: Sequence[str]) -> tuple[str, str] | None:
    """Two names of folders that are the same on some system, or of which one contains the other.

    Args:
        names: Names of folders in the log directory.

    Returns:
        The first such pair; None if there is none.

    Example:
        >>> overlapping_names(["lib", "pca", "Lib"]), overlapping_names(["lib", "probes/lib"])
        (('lib', 'Lib'), None)
    """
    # TensorBoard, too, writes other characters as "_".
    paths = [re.sub(r"[^-/\w.]", "_", unicodedata.normalize("NFC", name).casefold()) for name in names]
    for (i, a), (j, b) in itertools.combinations(enumerate(paths), 2):
        if f"{a}/".startswith(f"{b}/") or f"{b}/".startswith(f"{a}/"):
            return names[i], names[j]
    return None
