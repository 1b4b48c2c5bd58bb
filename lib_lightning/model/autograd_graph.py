"""All ways through a computation, as autograd keeps them, and the results that every one of them passes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

# Operations that mix features or positions, by what autograd calls them; all others only reshape, scale or bend.
_MIXING = re.compile(r"mm|Mm|Mv|Dot|Conv|Linear|Rnn|Attention|MatMul|Matmul")
# Operations that leave every number where it is, as long as the shape is the same in the end.
_IDLE = re.compile(r"^(AccumulateGrad|Clone|Alias|Slice|Squeeze|Unsqueeze|View|UnsafeView|ReshapeAlias)")
# Writes to a tensor without a change of its version counter.
_VERSION_KEPT: Any = getattr(torch.autograd, "_unsafe_preserve_version_counter", None)
# Operations that only change the layout of a tensor.
_LAYOUT = re.compile(
    r"AccumulateGrad|Copy|Clone|Alias|View|Reshape|Squeeze|Unsqueeze|Permute|Transpose|Slice|Select|Index"
)
_ADD = re.compile(r"^(Add|Sub)Backward")
# Linear operations that are fully described by their name and the tensors they save.
_FULLY_DESCRIBED = re.compile(
    r"::(AccumulateGrad|CopyBackwards)$"
    r"|^(Mm|Addmm|T|Transpose|Permute|View|UnsafeView|ReshapeAlias|Clone|Alias|Add|Sub)Backward\d$"
)
# Operations whose derivative is part of torch; custom functions have other names.
_BUILT_IN = re.compile(r"Backward\d$")
# Operations that autograd describes: where it names nothing that they have saved, there is nothing.
_SHOWN = re.compile(r"Backward\d$|::(AccumulateGrad|CopyBackwards)$")


class Edge(NamedTuple):
    """A result, as autograd knows it.

    Attributes:
        node: The operation that made it.
        output: Which of the operation's results it is.
    """

    node: Node
    output: int


class PathNode(NamedTuple):
    """A result on the way from the sources to the output.

    Attributes:
        edge: Which.
        is_dominator: Whether every path from the sources to the output goes through it.
        mixing_depth: Number of operations before it that mix features or positions.
        op_depth: Number of operations before it that change more than the layout.
        uses: Operations on the way that use it.
    """

    edge: Edge
    is_dominator: bool
    mixing_depth: int
    op_depth: int
    uses: int


def edge_of(t: Tensor) -> Edge:
    """The result that a tensor holds.

    Args:
        t: A tensor that requires a gradient.

    Returns:
        The result as autograd knows it at the moment; writing to the tensor in place makes it another one.
    """
    edge = get_gradient_edge(t)
    return Edge(edge.node, edge.output_nr)


def shape_of(edge: Edge) -> torch.Size:
    """The shape of a result that only autograd knows.

    Args:
        edge: The result.

    Returns:
        Its shape.

    Example:
        >>> shape_of(edge_of(torch.ones(2, 3, requires_grad=True)))
        torch.Size([2, 3])
    """
    # Not public, but where torch.autograd.grad itself looks.
    return torch.Size(edge.node._input_metadata[edge.output].shape)


def is_view(t: Tensor) -> bool:
    """Whether a tensor is a view of another one, which autograd does not allow to be detached in place.

    Args:
        t: The tensor.

    Returns:
        True if so, or if this version of torch does not say.
    """
    try:
        return t._is_view()
    except AttributeError:
        return getattr(t, "_base", t) is not None


def overwrite(t: Tensor, value: Tensor, new_memory: bool) -> None:
    """Give a tensor another value in place and another history: the graph of that value.

    Tensors that autograd has saved of the old history remain valid; see `saved_tensors_kept`.

    Args:
        t: The tensor; not a view.
        value: The value, in the same shape.
        new_memory: Whether to move the tensor to new memory first. Needed if it has a history and the value differs.
    """
    t.detach_()
    if new_memory:  # what autograd has saved keeps the old memory
        t.data = torch.empty_like(value)
    with _VERSION_KEPT(t) if _VERSION_KEPT else nullcontext():
        t.copy_(value)


@contextmanager
def saved_tensors_kept() -> Iterator[None]:
    """A block around a forward pass in which `overwrite` is used.

    Autograd refuses to use a saved tensor whose version counter has increased since. `overwrite` sets the counter back;
    in a version of torch where this is not possible, autograd saves copies in this block, which takes more memory.
    """
    with nullcontext() if _VERSION_KEPT else torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        yield


def path_nodes(sources: Sequence[Edge], output: Edge) -> list[PathNode]:
    """All results that lie on some path from the sources to the output, in an order in which paths only lead forwards.

    What no step leads across, in such an order, is passed by every path. (Had a step led across, it could be extended
    to a path that avoids it.)

    Args:
        sources: Where paths begin.
        output: Where they end.

    Returns:
        The results, in forward order.
    """
    begin = {source.node for source in sources}
    inputs: dict[Node, list[Edge]] = {}
    for node in topological_order(output.node):
        edges = [Edge(before, k) for before, k in node.next_functions if before in inputs]
        if edges or node in begin:
            inputs[node] = edges
    if output.node not in inputs:
        return []
    users: dict[Edge, set[Node]] = defaultdict(set)
    for node, edges in inputs.items():
        for edge in edges:
            users[edge].add(node)
    users[output] |= set()
    results: dict[Node, list[Edge]] = defaultdict(list)
    for edge in users:
        results[edge.node].append(edge)
    place: dict[Node | Edge, int] = {}
    for node in inputs:
        place[node] = len(place)
        for edge in results[node]:
            place[edge] = len(place)
    parts = []
    mixing_depth = op_depth = 0
    furthest = max(place[node] for node in begin if node in place)
    for node in inputs:
        mixing_depth += bool(_MIXING.search(node.name()))
        op_depth += not _IDLE.search(node.name())
        furthest = max([furthest, *(place[edge] for edge in results[node])])
        for edge in results[node]:
            parts.append(PathNode(edge, furthest <= place[edge], mixing_depth, op_depth, len(users[edge])))
            furthest = max([furthest, *(place[user] for user in users[edge])])
    return parts


@cache
def saved_names(operation: type[Node]) -> list[str]:
    """Names under which autograd shows what an operation has saved for its derivative.

    Args:
        operation: The type of a node in autograd's graph.

    Returns:
        Names of the node's attributes.

    Example:
        >>> saved_names(type(torch.ones(2, requires_grad=True).exp().grad_fn))
        ['_saved_result']
    """
    return [name for name in dir(operation) if name.startswith("_saved_") or name == "saved_tensors"]


def saved_tensors_intact(output: Tensor) -> bool:
    """Tell whether a computation can still be differentiated, by what autograd shows of it, without doing so.

    Args:
        output: Its result.

    Returns:
        True if nothing has been written to what its operations have saved; False if so, or if one does not show it.

    Example:
        >>> x, weight = torch.ones(2, requires_grad=True), torch.ones(2)
        >>> y = x * weight
        >>> saved_tensors_intact(y), weight.add_(1), saved_tensors_intact(y)
        (True, tensor([2., 2.]), False)
    """
    if output.grad_fn is None:
        return True
    for node in topological_order(output.grad_fn):
        names = saved_names(type(node))
        if not names and _SHOWN.search(node.name()) is None:
            return False
        try:
            for name in names:
                getattr(node, name)
        except RuntimeError:  # as a derivative would raise
            return False
    return True


def topological_order(last: Node) -> list[Node]:
    """All operations that lead to one, each after those it uses.

    Args:
        last: The operation that they lead to.

    Returns:
        The operations, ``last`` at the end.
    """
    order: dict[Node, None] = {}
    stack = [(last, False)]
    while stack:
        node, complete = stack.pop()
        if complete:
            order[node] = None
        elif node not in order:
            stack.append((node, True))
            stack += [
                (before, False) for before, _ in node.next_functions if before is not None and before not in order
            ]
    return list(order)


def gradient_edge(edge: Edge) -> GradientEdge:
    """An intermediate result in the form in which `torch.autograd.grad` accepts it.

    Args:
        edge: The result.

    Returns:
        The same result.
    """
    return GradientEdge(*edge)


def input_edges(node: Node) -> list[Edge]:
    """The results that an operation was computed from, of those that require a gradient.

    Args:
        node: The operation.

    Returns:
        One edge for each use, in the operation's order.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> len(input_edges((x * x).grad_fn))
        2
    """
    return [Edge(before, output) for before, output in node.next_functions if before is not None]


def is_layout(node: Node) -> bool:
    """Whether an operation only changes the layout of a tensor (a view, a copy, a permutation)."""
    return _LAYOUT.search(node.name()) is not None


def is_addition(node: Node) -> bool:
    """Whether an operation is an addition or a subtraction."""
    return _ADD.search(node.name()) is not None


def is_built_in(node: Node) -> bool:
    """Whether the derivative of an operation is part of torch, so that it does what its name says."""
    return _BUILT_IN.search(node.name()) is not None


def is_fully_described(node: Node) -> bool:
    """Whether an operation is a linear one that its name and the tensors it saves describe completely."""
    return _FULLY_DESCRIBED.search(node.name()) is not None


def has_custom_function(outputs: Sequence[Tensor]) -> bool:
    """Whether a custom `torch.autograd.Function` led to some tensors.

    Args:
        outputs: The tensors.

    Returns:
        True if a backward pass from them runs code in Python.

    Example:
        >>> has_custom_function([torch.ones(2, requires_grad=True).exp()])
        False
    """
    pending = [output.grad_fn for output in outputs if output.grad_fn is not None]
    visited: set[Node] = set()
    while pending:
        node = pending.pop()
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        if node not in visited:
            visited.add(node)
            pending += [before for before, _ in node.next_functions if before is not None]
    return False
