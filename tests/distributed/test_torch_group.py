"""A group of two processes, without a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch import distributed as dist

from lib_lightning import compute_interaction_graph
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup, Reducible, all_reduce
from lib_lightning.distributed.torch_group import (
    PeerProcessError,
    PeerProcessMemoryError,
    ReplicatedGroup,
    TorchProcessGroup,
    broadcast_text,
)
from lib_lightning.errors import LIBError
from lib_lightning.model.batch import hash_batches

NODE_LAYERS = ["0:input", "1", "output"]


class Total(Reducible):
    """A sum and a value that is not summed."""

    sums = ("total",)

    def __init__(self, rank: int) -> None:
        self.total, self.other = torch.tensor([1.0, rank]), torch.tensor(rank)


def model_and_data() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double(), torch.randn(50, 5).double()


def error_of(process_group: ProcessGroup, error: Exception | None) -> str:
    """Name of the error that leaves two nested blocks, if one process raises an error inside."""
    try:
        with process_group.sync_errors(), process_group.sync_errors():
            if error is not None:
                raise error
    except Exception as raised:
        return type(raised).__name__
    return ""


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group, replicated = TorchProcessGroup(), ReplicatedGroup()
    part = Total(rank)
    all_reduce([part], group)
    model, x = model_and_data()
    own = [x[:30], x[30:]][rank]
    first = rank == 0
    found: dict[str, Any] = {
        "rank and size": (group.rank, group.size),
        "sum": group.sum([torch.tensor([rank + 1, 2]), torch.full((2, 1), 0.5)]),
        "reduced": (part.total, int(part.other)),
        "gather": group.gather(torch.full((rank + 1, 2), rank)),
        "broadcast": group.broadcast([torch.full((3 - rank, 2 + rank), rank + 0.5), torch.tensor(rank)]),
        "replicated": (replicated.sum([own.sum()]), replicated.gather(own), replicated.broadcast([torch.tensor(rank)])),
        "text": (broadcast_text(group, "" if first else "second"), broadcast_text(group, "")),
        "hash": hash_batches([own], group),
        "errors": [
            error_of(group, None),
            error_of(group, ValueError() if first else None),
            error_of(group, MemoryError() if first else None),
            error_of(group, MemoryError() if first else ValueError()),
        ],
        "edges": list(compute_interaction_graph(model, [own], NODE_LAYERS, process_group=group).edges.values()),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("group")
    multiprocessing.start_processes(work, (str(folder),), nprocs=2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_sums_are_the_same_on_both_processes(found: list[dict[str, Any]]) -> None:
    for rank, of_process in enumerate(found):
        assert of_process["rank and size"] == (rank, 2)
        integers, halves = of_process["sum"]
        assert (integers.tolist(), integers.dtype) == ([3, 4], torch.int64)
        assert (halves.tolist(), halves.dtype) == ([[1.0], [1.0]], torch.float32)
        total, other = of_process["reduced"]
        assert (total.tolist(), other) == ([2.0, 1.0], rank)


def test_gathered_tensors_may_differ_in_size(found: list[dict[str, Any]]) -> None:
    for of_process in found:
        assert [t.tolist() for t in of_process["gather"]] == [[[0, 0]], [[1, 1], [1, 1]]]


def test_broadcast_takes_shapes_from_process_0(found: list[dict[str, Any]]) -> None:
    for of_process in found:
        matrix, scalar = of_process["broadcast"]
        assert matrix.tolist() == [[0.5, 0.5]] * 3
        assert int(scalar) == 0


def test_a_replicated_group_broadcasts_and_does_not_sum(found: list[dict[str, Any]]) -> None:
    _, x = model_and_data()
    for own, of_process in zip((x[:30], x[30:]), found, strict=True):
        (total,), (gathered,), (broadcast,) = of_process["replicated"]
        assert torch.equal(total, own.sum())
        assert torch.equal(gathered, own)
        assert int(broadcast) == 0


def test_the_first_process_with_a_text_sends_it(found: list[dict[str, Any]]) -> None:
    assert [of_process["text"] for of_process in found] == [("second", "")] * 2


def test_an_error_on_one_process_ends_the_block_on_both(found: list[dict[str, Any]]) -> None:
    peer, memory = PeerProcessError.__name__, PeerProcessMemoryError.__name__
    assert found[0]["errors"] == ["", "ValueError", "MemoryError", peer], "out of memory, and the other has failed"
    assert found[1]["errors"] == ["", peer, memory, "ValueError"]


def test_two_processes_compute_the_graph_of_one(found: list[dict[str, Any]]) -> None:
    model, x = model_and_data()
    expected = compute_interaction_graph(model, [x], NODE_LAYERS)
    for of_process in found:
        torch.testing.assert_close(of_process["edges"], list(expected.edges.values()), rtol=1e-8, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(found[0]["edges"], found[1]["edges"], strict=True))
    assert found[0]["hash"] == found[1]["hash"] != hash_batches([x])


def test_without_an_initialized_group() -> None:
    with pytest.raises(LIBError, match="init_process_group"):
        TorchProcessGroup()


def test_a_single_process() -> None:
    part, x = Total(1), torch.ones(2)
    all_reduce([part], SINGLE_PROCESS)
    assert part.total.tolist() == [1, 1]
    assert SINGLE_PROCESS.sum([x])[0] is SINGLE_PROCESS.gather(x)[0] is SINGLE_PROCESS.broadcast([x])[0] is x
    assert error_of(SINGLE_PROCESS, ValueError()) == "ValueError"
