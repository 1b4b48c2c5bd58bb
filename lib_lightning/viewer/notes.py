"""Notes on features of a run: which ids there are to write them on."""

from __future__ import annotations

import difflib
from pathlib import Path

from lib_lightning.algorithm.basis_kinds import FIXED_ORDER
from lib_lightning.errors import LIBError, quoted
from lib_lightning.io import basis_format
from lib_lightning.io.basis_file import read_parts
from lib_lightning.io.notes import read_notes, write_note
from lib_lightning.io.run_layout import RunLayout
from lib_lightning.viewer.run_discovery import FileStamp, snapshot_files
from lib_lightning.viewer.snapshot import UNREADABLE


def annotate(folder: Path, feature_id: str, text: str) -> None:
    """Write a note on a feature, in place of the one that it had.

    Args:
        folder: Folder of the run, without symbolic links in its path.
        feature_id: The feature's id, such as ``"resid_post/17"``.
        text: The note; "" to remove it.

    Raises:
        LIBError: If no snapshot has this feature, with similar ids; if ids are those of other features in each
            snapshot; or as for `lib_lightning.io.notes.write_note`.
    """
    path, files = RunLayout(folder).notes_file, snapshot_files(folder)
    if text == "" and feature_id in read_notes(path):  # also if its snapshots are no longer there
        write_note(path, feature_id, text)
        return
    known: dict[str, bool] = {}
    for file in reversed(files.values()):  # the newest has most of the features that anybody writes about
        known |= _ids(file)
        if feature_id in known:
            break
    if feature_id not in known:
        near = difflib.get_close_matches(str(feature_id), known, n=3, cutoff=0.4) or list(known)[:3]
        raise LIBError(f"No snapshot of run '{folder}' has a feature '{feature_id}'. Near matches: {quoted(near)}.")
    if not known[feature_id] and len(files) > 1:
        raise LIBError(
            f"The features of run '{folder}' are not tracked (follow=False), so '{feature_id}' is another feature in "
            "each snapshot, which a note would not stay with."
        )
    write_note(path, feature_id, text)


def _ids(file: FileStamp) -> dict[str, bool]:
    """Ids of the features of a snapshot, and whether they are the same in all; none if it cannot be read."""
    ids_key, importance_key = basis_format.LINEAGES["ids"], basis_format.BASIS["importance"]
    found: dict[str, bool] = {}
    try:
        endings = (ids_key.rpartition("{}")[2], importance_key.rpartition("{}")[2])
        tensors, header = read_parts(file.path, lambda name: name.endswith(endings))
        for i, (layer, kind) in enumerate(zip(header[basis_format.LAYERS], header[basis_format.KINDS], strict=True)):
            lineages = tensors.get(ids_key.format(i))
            numbers = range(len(tensors[importance_key.format(i)])) if lineages is None else lineages.tolist()
            found |= {f"{layer}/{number}": lineages is not None or kind in FIXED_ORDER for number in numbers}
    except UNREADABLE:
        return {}
    return found
