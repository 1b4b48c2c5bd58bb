"""Two processes compute the same scores and searches as one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.ablation import EdgesRequiredResult, accuracy, edges_required, node_ablation_curve
from lib_lightning.distributed.torch_group import TorchProcessGroup

Answers = tuple[dict[tuple[str, str], EdgesRequiredResult], dict[int, float]]
NODE_LAYERS = ["0:input", "1", "output"]


def model_and_data() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4)).double()
    x = torch.randn(80, 5).double()
    # One in five samples has a wrong label, so that the score is not 1.
    labels = torch.where(torch.arange(80) % 5 > 0, model(x).argmax(-1), 0)
    return model, list(zip(x.split(20), labels.split(20), strict=True))


def answers(
    graph: InteractionGraph, batches: list[tuple[torch.Tensor, torch.Tensor]], **options: TorchProcessGroup
) -> Answers:
    model, _ = model_and_data()
    required = edges_required(model, batches, graph, accuracy, 0.01, **options)
    return required, node_ablation_curve(model, batches, graph, accuracy, "1", "every", **options)


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    graph, batches = InteractionGraph.load(f"{folder}/graph.safetensors"), model_and_data()[1]
    for name, own in {"uneven": [batches[:3], batches[3:]], "one": [[], batches]}.items():
        torch.save(answers(graph, own[rank], process_group=TorchProcessGroup()), f"{folder}/{name}{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_score_as_one(tmp_path: Path) -> None:
    model, batches = model_and_data()
    graph = compute_interaction_graph(model, batches, NODE_LAYERS)
    graph.save(tmp_path / "graph.safetensors")
    multiprocessing.start_processes(work, (str(tmp_path),), nprocs=2, start_method="spawn")
    alone, curve = answers(graph, batches)
    for name in ("uneven0", "uneven1", "one0", "one1"):
        required, other = torch.load(tmp_path / f"{name}.pt", weights_only=False)
        assert other == curve
        for section, answer in alone.items():
            assert (required[section].count, required[section].curve) == (answer.count, answer.curve)
