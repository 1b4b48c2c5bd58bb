"""Basis files: atomic, exact, and verified when they are read."""

from __future__ import annotations

import dataclasses
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.algorithm.examples import FeatureExamples
from lib_lightning.graph import FeatureEffects, Lineages, OutputEffects
from lib_lightning.io.basis_file import BasisFileError, read_file, write_bytes, write_file


@pytest.fixture
def graph() -> InteractionGraph:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    graph = compute_interaction_graph(model, [torch.randn(20, 4)], ["input", "1", "output"], n_probes=2)
    graph.info |= {"step": 12, "epoch": 3}
    return graph


def test_round_trip_is_exact(graph: InteractionGraph, tmp_path: Path) -> None:
    graph.save(tmp_path / "deep" / "graph.safetensors")
    loaded = InteractionGraph.load(tmp_path / "deep" / "graph.safetensors")
    assert loaded.info == graph.info
    assert loaded.node_layers == graph.node_layers
    for name, basis in graph.bases.items():
        assert loaded.bases[name].kind == basis.kind
        for key in ("mean", "to_features", "from_features", "importance"):
            assert torch.equal(getattr(loaded.bases[name], key), getattr(basis, key))
    assert all(torch.equal(loaded.edges[pair], E) for pair, E in graph.edges.items())
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["graph.safetensors"]


def test_round_trip_of_errors_modules_and_labels(graph: InteractionGraph, tmp_path: Path) -> None:
    graph.modules = {"1": torch.arange(graph.bases["1"].n_features) % 2 - 1}
    graph.labels = {"output": ["cat", "", "dog"]}
    graph.save(tmp_path / "graph.safetensors")
    loaded = InteractionGraph.load(tmp_path / "graph.safetensors")
    assert list(loaded.edge_errors) == list(graph.edge_errors) == list(graph.edges)
    assert all(torch.equal(loaded.edge_errors[pair], error) for pair, error in graph.edge_errors.items())
    for name in ("input", "1"):
        for key in ("importance_error", "degenerate"):
            assert torch.equal(getattr(loaded.bases[name], key), getattr(graph.bases[name], key))
    assert torch.equal(loaded.bases["output"].importance_error, graph.bases["output"].importance_error)
    assert loaded.bases["output"].degenerate is None
    assert list(loaded.modules) == ["1"]
    assert torch.equal(loaded.modules["1"], graph.modules["1"])
    assert loaded.labels == graph.labels
    assert graph.replicates is not None
    assert loaded.replicates is None


def same(a: Any, b: Any) -> bool:
    """Whether two values consist of equal tensors and plain values; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a.nan_to_num(-7), b.nan_to_num(-7))
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and same(vars(a), vars(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def test_every_part_of_a_graph_is_saved(graph: InteractionGraph, tmp_path: Path) -> None:
    r = graph.bases["1"].n_features
    numbers = torch.arange(2 * r, dtype=torch.int32).view(r, 2)
    graph.reference_features = {"1": torch.randn(7, r).half()}
    graph.lineages = {"1": Lineages(torch.arange(r), torch.rand(r).double(), torch.full((r,), -1))}
    graph.modules, graph.labels = {"1": torch.arange(r)}, {"output": ["cat", "", "dog"]}
    graph.label_scores = {"1": torch.rand(r)}
    graph.attributions = {pair: torch.randn_like(E) for pair, E in graph.edges.items()}
    graph.attribution_errors = {pair: torch.rand_like(E) for pair, E in graph.edges.items()}
    examples = FeatureExamples(
        numbers, numbers, torch.randn(r, 2), (1, 1, 0), (4, 5), torch.randn(r, 2, 0).half(), 0,
        torch.ones(r, 64).long(), torch.rand(r),
    )  # fmt: skip
    graph.examples = {"1": examples, "output": dataclasses.replace(examples, shape=())}
    graph.output_effects = {"1": OutputEffects(numbers, torch.randn(r, 2), torch.full((r, 2), torch.nan))}
    graph.effects = {"input": FeatureEffects(torch.rand(4).double(), torch.rand(4).double(), torch.rand(4) > 0.5)}
    graph.save(tmp_path / "graph.safetensors")
    loaded = InteractionGraph.load(tmp_path / "graph.safetensors")
    for field in dataclasses.fields(graph):
        if field.name not in ("replicates", "notes"):  # notes belong to the run
            assert getattr(graph, field.name), f"{field.name} has nothing to save"
            assert same(getattr(loaded, field.name), getattr(graph, field.name)), field.name


def test_files_without_errors_load(graph: InteractionGraph, tmp_path: Path) -> None:
    graph.save(tmp_path / "graph.safetensors")
    tensors, header = read_file(tmp_path / "graph.safetensors")
    bare = {
        name: t
        for name, t in tensors.items()
        if not name.endswith(("_error", "degenerate"))
        and "errors" not in name
        and not name.startswith(("examples", "output_effects"))
    }
    assert len(bare) < len(tensors)
    header = {key: header[key] for key in ("layers", "kinds", "info")}
    write_file(tmp_path / "bare.safetensors", bare, header)
    loaded = InteractionGraph.load(tmp_path / "bare.safetensors")
    assert (loaded.edge_errors, loaded.modules, loaded.labels, loaded.examples) == ({}, {}, {}, {})
    assert [(b.importance_error, b.degenerate) for b in loaded.bases.values()] == [(None, None)] * 3
    loaded.save(tmp_path / "again.safetensors")
    assert set(read_file(tmp_path / "again.safetensors")[0]) == set(bare)
    assert loaded.bases["1"].to("cpu").degenerate is None


def test_header_has_settings_and_versions(graph: InteractionGraph, tmp_path: Path) -> None:
    graph.save(tmp_path / "graph.safetensors")
    _, header = read_file(tmp_path / "graph.safetensors")
    assert (header["format"], header["format_version"]) == ("lib-lightning", 1)
    assert header["layers"] == ["input", "1", "output"]
    assert header["kinds"] == ["lib", "lib", "neuron"]
    info = header["info"]
    assert (info["step"], info["epoch"], info["n_samples"]) == (12, 3, 20)
    assert set(info["versions"]) == {"lib_lightning", "torch"}
    assert info["settings"]["n_probes"] == 2
    assert info["node_layers"][1] == {"name": "1", "taps": ["1"], "positions": None, "feature_dim": None}


def test_truncated_files_are_refused(graph: InteractionGraph, tmp_path: Path) -> None:
    path = tmp_path / "graph.safetensors"
    graph.save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        with pytest.raises(BasisFileError, match="truncated or not a basis file"):
            InteractionGraph.load(path)


def test_altered_files_are_refused(graph: InteractionGraph, tmp_path: Path) -> None:
    path = tmp_path / "graph.safetensors"
    graph.save(path)
    whole = bytearray(path.read_bytes())
    whole[-5] ^= 1
    path.write_bytes(whole)
    with pytest.raises(BasisFileError, match="altered after it was written"):
        InteractionGraph.load(path)


def test_foreign_and_newer_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(BasisFileError, match="not a basis file of lib-lightning"):
        InteractionGraph.load(path)
    newer = {"format": "lib-lightning", "format_version": 2}
    save_file({"weight": torch.zeros(2)}, path, metadata={"lib_lightning": json.dumps(newer)})
    with pytest.raises(BasisFileError, match=r"format version 2; this lib-lightning reads up to 1\. Update it"):
        InteractionGraph.load(path)
    write_file(path, {}, {"layers": ["a"], "kinds": ["lib"], "info": {}})
    with pytest.raises(BasisFileError, match=r"a part of it is missing: 'basis\.0\.mean'"):
        InteractionGraph.load(path)
    with pytest.raises(BasisFileError, match=r"is a folder\. A run has its basis files in lib/snapshots"):
        InteractionGraph.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        InteractionGraph.load(tmp_path / "nothing.safetensors")


def test_files_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "sprung",)  # type: ignore[return-value]

    (tmp_path / "trap.safetensors").write_bytes(pickle.dumps(Trap()))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "torch.safetensors")
    for name in ("trap", "torch"):
        with pytest.raises(BasisFileError, match="truncated or not a basis file"):
            InteractionGraph.load(tmp_path / f"{name}.safetensors")
    assert not (tmp_path / "sprung").exists()


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("after", [0.0, 0.02, 0.05])
def test_killed_processes_leave_only_complete_files(tmp_path: Path, after: float) -> None:
    script = (
        "import sys, torch; from pathlib import Path; from lib_lightning.io.basis_file import write_file\n"
        "for i in range(10**6):\n"
        "    write_file(Path(sys.argv[1]) / f'{i}.safetensors', {'x': torch.randn(2**18)}, {'i': i})\n"
        "    print(i, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(after)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    files = list(tmp_path.glob("*.safetensors"))
    assert files
    assert all(read_file(path)[1]["i"] == int(path.stem) for path in files)
