"""The layout is the architecture: modules import downwards only, Lightning is in one folder, and no import is circular.

`LAYERS` is the one place that says so. ``python -m tests.test_architecture`` writes it into CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lib_lightning

PACKAGE = Path(lib_lightning.__file__).parent
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"
ROOT = PACKAGE.name

# From the lowest layer to the highest: the folders and top-level modules of each, and what they contain. Those of one
# layer do not import each other.
LAYERS: list[dict[str, str]] = [
    {
        "errors": "exceptions, importable without torch",
        "_deprecated": "names of version 0.1, kept for one version",
    },
    {"distributed": "the interface of a process group, one process, and torch.distributed"},
    {
        "model": "running an unmodified `nn.Module`: node layers, capture, saved and restored state, discovery and "
        "validation of node layers, vector-Jacobian products; the internals of torch that are used",
    },
    {
        "dictionaries": "sparse autoencoders, transcoders and other objects with an encoder and a decoder, behind one "
        "interface; how sparse autoencoders are trained"
    },
    {"jacobian": "products with the Jacobian of a section, integrated gradients, closed forms"},
    {"algorithm": "the paper: `build.py` reads top to bottom as its steps"},
    {"io": "basis files and the files of a run, with the names that version 0.1 wrote"},
    {"metrics": "metrics of a graph: pure functions, and torchmetrics classes over them"},
    {"plots": "figures"},
    {"sample_graph": "what features contribute to each other on a single sample, and its file for circuit-tracer"},
    {"graph": "`InteractionGraph`, which users hold"},
    {"features": "values of features on samples, the samples on which they are largest, and how a sample looks"},
    {
        "lineage": "features over time: matching, tracking, events, change detection",
        "ablation": "ablation curves, and the smallest number of edges that keeps a score",
    },
    {"interventions": "features of a live model set to other values, and what each one alone does to a score"},
    {"labels": "names for features, from their values and the model's inputs, and how well these predict them"},
    {"api": "the functions that users call without a trainer"},
    {"controls": "metrics of a graph beside those of several random rotations and initialisations"},
    {"viewer": "runs on disk, TensorBoard's tab, and the same as one HTML file; importable without torch"},
    {"alignment": "how long before or after the steepest change of a scalar events come, over runs"},
    {"comparison": "which features and edges of one network are in another, against chance"},
    {"training": "everything that imports Lightning: callback, snapshots, schedule and budget, profile, command line"},
    {"__main__": "`python -m lib_lightning`"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str) -> Iterator[str]:
    """All modules that a module imports, at its top, inside functions, and for annotations only."""
    tree = ast.parse(MODULES[module].read_text())
    if module == ROOT:  # exports names of all layers, each imported on first access
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in MODULES else str(node.module)


def layer_of(module: str) -> str:
    """The folder or top-level module that a module of the package belongs to."""
    return module.split(".")[1]


IMPORTS = {module: set(imports(module)) for module in MODULES}
OWN = {module: {name for name in names if name.split(".")[0] == ROOT} for module, names in IMPORTS.items()}


def table() -> str:
    rows = [(name, text) for layer in LAYERS for name, text in layer.items()]
    paths = [f"`{name}/`" if (PACKAGE / name).is_dir() else f"`{name}.py`" for name, _ in rows]
    return "".join(["| | |\n|---|---|\n", *(f"| {p} | {text} |\n" for p, (_, text) in zip(paths, rows, strict=True))])


def contributing() -> str:
    """CONTRIBUTING.md with the table of this file."""
    before, _, rest = CONTRIBUTING.read_text().partition("<!-- layers -->\n")
    _, end, after = rest.partition("<!-- end of layers -->\n")
    return f"{before}<!-- layers -->\n{table()}{end}{after}"


def test_contributing_has_the_table_of_layers() -> None:
    assert CONTRIBUTING.read_text() == contributing(), "run: python -m tests.test_architecture"
    assert table() in contributing()


def test_every_module_belongs_to_a_layer() -> None:
    assert {layer_of(module) for module in MODULES if module != ROOT} == set(RANK)


def test_modules_import_only_from_lower_layers() -> None:
    for module in MODULES:
        for name in OWN[module] - {ROOT} if module != ROOT else ():
            own, other = layer_of(module), layer_of(name)
            assert own == other or RANK[other] < RANK[own], f"{module} imports {name}"


def test_no_import_is_circular() -> None:
    graphlib.TopologicalSorter(OWN).prepare()


def test_few_modules_are_outside_of_a_folder() -> None:
    outside = [path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"]
    assert len(outside) <= 7, outside


def test_mathematics_needs_only_torch_and_numpy() -> None:
    for module in MODULES:
        if module != ROOT and layer_of(module) in ("errors", "model", "jacobian", "algorithm"):
            foreign = (
                {name.split(".")[0] for name in IMPORTS[module]} - {"torch", "numpy", ROOT} - sys.stdlib_module_names
            )
            assert not foreign, f"{module} imports {foreign}"


def test_lightning_is_imported_in_training_only() -> None:
    others = {"lightning", "pytorch_lightning"}
    knowing = {layer_of(m) for m in MODULES if m != ROOT and any(n.split(".")[0] in others for n in IMPORTS[m])}
    assert knowing == {"training"}
    assert not IMPORTS[f"{ROOT}.training"], "so that importing one module of it imports no other"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("lib_lightning", {"torch", "lightning", "numpy"}),
        # Torchmetrics imports scipy, transformers and matplotlib, which takes twice as long as torch.
        ("lib_lightning.api", {"lightning", "pytorch_lightning", "torchmetrics", "matplotlib", "networkx", "scipy"}),
        ("lib_lightning.errors", {"torch", "lightning", "numpy"}),
        ("lib_lightning.viewer", {"torch", "lightning"}),
        ("lib_lightning.viewer.plugin", {"torch", "lightning"}),
    ],
)
def test_imports_stay_light(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*{absent!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_public_names_are_imported_lazily() -> None:
    assert {name: getattr(lib_lightning, name).__name__ for name in lib_lightning.__all__ if name != "__version__"} == {
        name: name for name in lib_lightning.__all__ if name != "__version__"
    }
    assert set(lib_lightning.__all__) <= set(dir(lib_lightning))
    with pytest.raises(AttributeError, match="module 'lib_lightning' has no attribute 'LIBCallbak'"):
        _ = lib_lightning.LIBCallbak


if __name__ == "__main__":
    CONTRIBUTING.write_text(contributing())


def definitions(path: Path, name: str) -> list[str]:
    """Classes in a file that define a method of a name."""
    classes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    return [c.name for c in classes for node in c.body if isinstance(node, ast.FunctionDef) and node.name == name]


def test_state_of_a_run_is_built_fresh_and_in_one_place() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert not [cls for path in files for cls in definitions(path, "reset")], "a new run gets new objects"
    of_training = [cls for path in (PACKAGE / "training").glob("*.py") for cls in definitions(path, "state_dict")]
    assert sorted(of_training) == ["LIBCallback", "RunState", "SAETrainer"], (
        "and what a checkpoint holds is collected once"
    )
