"""Comparison of runs on disk: by the feature values in their files, or by models and samples of their configuration."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lib_lightning.comparison import Comparison, UniversalFeatures, compare, universal_features
from lib_lightning.comparison.comparison import paired_layers
from lib_lightning.errors import LIBError, MissingFileError
from lib_lightning.graph import InteractionGraph
from lib_lightning.io.basis_file import write_bytes
from lib_lightning.io.basis_format import REFERENCE_SAMPLES, STEP, WEIGHTS_HASH
from lib_lightning.io.run_layout import RunLayout
from lib_lightning.model.weights_hash import weights_hash
from lib_lightning.training.weights_files import read_checkpoint
from lib_lightning.training.weights_names import load_weights
from lib_lightning.viewer.run import Run, runs_below

# What LightningCLI calls the configuration that it writes beside a run.
_CONFIG = "config.yaml"
_STEP_IN_NAME = re.compile(r"step=?(\d+)")


@dataclass(frozen=True)
class Network:
    """A network that is compared with others.

    Attributes:
        name: What it is called.
        graph: Its graph.
        folder: Folder of its run; None for a basis file outside of a run.
    """

    name: str
    graph: InteractionGraph
    folder: Path | None

    @property
    def log_dir(self) -> Path | None:
        """Log directory of its run, with configuration and checkpoints."""
        return None if self.folder is None else self.folder.parent


# From options of fit to a model, batches, and how the model is called with them.
ModelAndSamples = Callable[[Sequence[str]], tuple[nn.Module, list[Any], dict[str, Any]]]


def read_networks(paths: Sequence[Path], step: int | None = None) -> list[Network]:
    """Read the graphs of runs and basis files.

    Args:
        paths: Folders of runs, or basis files.
        step: Which snapshot of a run; None for the last.

    Returns:
        The networks, with different names.

    Raises:
        LIBError: If a path is neither.
    """
    found = []
    for path in paths:
        if path.is_dir():
            run = Run(path)
            found.append(Network(run.name, run.graph(step), run.folder))
        elif path.exists():
            found.append(Network(path.stem, InteractionGraph.load(path), _run_folder(path.resolve().parent)))
        else:
            raise MissingFileError(f"'{path}' is neither the folder of a run nor a basis file.")
    names = [network.name for network in found]
    if len(set(names)) == len(names):
        return found
    return [Network(str(path), network.graph, network.folder) for path, network in zip(paths, found, strict=True)]


def _run_folder(folder: Path) -> Path | None:
    """Folder of the run of a basis file in this folder; None if it is outside of a run."""
    run = folder.parent if folder.name == RunLayout.SNAPSHOTS else folder
    return run if RunLayout(run).snapshots.is_dir() else None


def compare_networks(
    networks: Sequence[Network],
    model_and_samples: ModelAndSamples,
    layers: Mapping[str, str] | None = None,
    level: float | None = None,
) -> list[Comparison]:
    """Compare the first network with each of the others.

    Where all graphs have the values of their features on the same samples, as snapshots of runs with the same
    validation data have, nothing else is needed. Otherwise models and samples are those of the configuration that
    LightningCLI wrote into the log directories, with the weights of a checkpoint in it: the one with the hash that is
    in the graph.

    Args:
        networks: The networks.
        model_and_samples: Builds a model and collects its samples from options of fit.
        layers: As for `lib_lightning.compare`.
        level: As for `lib_lightning.compare`; None for its default.

    Returns:
        A comparison for each but the first network.

    Raises:
        LIBError: If neither is possible, with what is missing.
    """
    first, *others = networks
    for other in others:
        paired_layers(first.graph, other.graph, layers)
    settings: dict[str, Any] = {"layers": layers} | ({} if level is None else {"level": level})
    if _have_same_samples(networks):
        return [compare(first.graph, other.graph, names=(first.name, other.name), **settings) for other in others]
    model, batches, spec = _with_weights(first, model_and_samples)
    return [
        compare(
            first.graph,
            other.graph,
            model,
            _with_weights(other, model_and_samples)[0],
            batches,
            names=(first.name, other.name),
            **settings,
            **spec,
        )
        for other in others
    ]


def networks_below(paths: Sequence[Path], step: int | None = None) -> tuple[list[Network], Path]:
    """Read the graphs of all runs in folders.

    Args:
        paths: Folders that are runs or contain them.
        step: Which snapshot of each run; None for the last.

    Returns:
        The networks, called by their folders relative to the one that contains all of them; and that folder.

    Raises:
        LIBError: If a folder contains no run, or there is only one run in all of them.
    """
    runs = list({run.folder: run for path in paths for run in runs_below(path)}.values())
    if len(runs) < 2:
        raise LIBError(f"universal needs at least two runs; there is only one: {runs[0].folder}.")
    common = Path(os.path.commonpath([run.folder for run in runs]))
    return [Network(run.folder.relative_to(common).as_posix(), run.graph(step), run.folder) for run in runs], common


def universal_in_networks(
    networks: Sequence[Network], model_and_samples: ModelAndSamples, level: float | None = None
) -> UniversalFeatures:
    """Find which features how many of the networks have.

    Values of features, or models and samples, are found as `compare_networks` does.

    Args:
        networks: The networks.
        model_and_samples: Builds a model and collects its samples from options of fit.
        level: As for `lib_lightning.universal_features`; None for its default.

    Returns:
        The features.

    Raises:
        LIBError: If neither is possible, with what is missing.
    """
    graphs, names = [network.graph for network in networks], [network.name for network in networks]
    settings: dict[str, Any] = {"names": names} | ({} if level is None else {"level": level})
    if _have_same_samples(networks):
        return universal_features(graphs, **settings)
    instead = "universal_features(graphs, models, batches)"
    model, batches, spec = _with_weights(networks[0], model_and_samples, instead)
    others = [_with_weights(other, model_and_samples, instead)[0] for other in networks[1:]]
    return universal_features(graphs, [model, *others], batches, **settings, **spec)


def write_universal(found: UniversalFeatures, networks: Sequence[Network], path: Path) -> None:
    """Write the features that many runs have, as the tab and the film read them.

    Args:
        found: The features.
        networks: The networks.
        path: The file; the tab and the film find ``universal.json`` in the folder that contains all runs.
    """
    content = found.to_dict() | {
        "runs": [network.name for network in networks],
        "steps": [network.graph.info.get(STEP) for network in networks],
    }
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def _have_same_samples(networks: Sequence[Network]) -> bool:
    graphs = [network.graph for network in networks]
    hashes = {graph.info.get(REFERENCE_SAMPLES) for graph in graphs}
    return len(hashes) == 1 and None not in hashes and all(graph.reference_features for graph in graphs)


def _with_weights(
    network: Network,
    model_and_samples: ModelAndSamples,
    instead: str = "compare(graph_a, graph_b, model_a, model_b, batches)",
) -> tuple[nn.Module, list[Any], dict[str, Any]]:
    """Model and samples of a run, with the weights that its graph was computed with."""
    config = network.log_dir / _CONFIG if network.log_dir is not None else None
    wanted = network.graph.info.get(WEIGHTS_HASH)
    what = (
        "The graphs have no values of their features on the same samples, so models and samples are needed. "
        f"For {network.name},"
    )
    instead = f"In Python: lib_lightning.{instead}."
    if config is None or not config.exists():
        raise LIBError(f"{what} there is no {config or _CONFIG}: lib-lightning fit writes. {instead}")
    if wanted is None:
        raise LIBError(f"{what} the graph does not say which weights it was computed with. {instead}")
    model, batches, spec = model_and_samples(["--config", str(config)])
    if weights_hash(model) == wanted:
        return model, batches, spec
    checkpoints = sorted(config.parent.rglob("*.ckpt"), key=lambda path: _distance(path, network.graph.info.get(STEP)))
    for path in checkpoints:
        try:
            load_weights(model, read_checkpoint(path).weights)
        except (LIBError, OSError):
            continue  # not a checkpoint of this model, or one that contains code
        if weights_hash(model) == wanted:
            return model, batches, spec
    step = network.graph.info.get(STEP)
    raise LIBError(
        f"{what} none of the {len(checkpoints)} checkpoints below {config.parent} has the weights of "
        f"{'the graph' if step is None else f'step {step:,}'}. {instead}"
    )


def _distance(path: Path, step: int | None) -> tuple[int, str]:
    found = _STEP_IN_NAME.search(path.stem)
    return (abs(int(found[1]) - step) if found and step is not None else 1 << 60, str(path))
