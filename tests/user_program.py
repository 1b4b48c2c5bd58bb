"""What a user writes with the types of the package: checked by mypy and pyright, and run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lib_lightning import InteractionGraph, LIBCallback, NodeLayer, compute_interaction_graph, estimate_cost
from lib_lightning.interventions import edit_features, feature_effects, scale
from lib_lightning.lineage.events import Event


def on_event(event: Event) -> None:
    step: int = event.step
    print(step, event.text)


def main(folder: Path) -> None:
    model: nn.Module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    batches: list[Tensor] = [torch.randn(50, 8) for _ in range(2)]
    graph: InteractionGraph = compute_interaction_graph(model, batches, ["input", NodeLayer("1"), "output"])
    importance: Tensor = graph.bases["1"].importance
    edges: Tensor = graph.edges["1", "output"]
    ids: list[str] = list(graph.feature_ids("1"))
    graph.plot(max_edges=10).savefig(folder / "graph.png")
    graph.save(folder / "graph.safetensors")
    loaded: InteractionGraph = InteractionGraph.load(folder / "graph.safetensors")
    with edit_features(model, loaded, {ids[0]: 0.0, ids[1]: scale(0.5)}):
        model(batches[0])
    effects = feature_effects(model, batches, graph, lambda output, batch: output[:, 0], features=ids[:2])
    print(importance.sum(), edges.shape, effects)
    print(estimate_cost(model, batches[0], ["input", "1", "output"]))
    callback: LIBCallback = LIBCallback(["input", "1", "output"], every_n_steps=10, on_event=on_event)
    print(callback.snapshots)


if __name__ == "__main__":
    import sys

    main(Path(sys.argv[1]))
