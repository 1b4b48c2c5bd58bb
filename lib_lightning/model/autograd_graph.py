"""The graph that autograd records, and the internals of autograd that this package relies on.

The attributes in `NAMES`, and the names that autograd gives to operations, are not part of torch's public interface.
Each is used in one function here, and that function has a fallback for versions of torch without it;
``tests/model/test_torch_internals.py`` lists what each fallback costs. Other internals of torch are in
`lib_lightning.model.torch_internals`.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge, saved_tensors_hooks

from lib_lightning.model.torch_internals import storage_key

# The names of the attributes, by what they are.
NAMES = {
    "version counter": "_unsafe_preserve_version_counter",
    "input metadata": "_input_metadata",
    "saved tensors": "_saved_",  # a prefix
    "saved memory": "_raw_saved_",  # a prefix; the same names after it
    "is view": "_is_view",
    "base": "_base",
    "custom function": "BackwardCFunction",
}
# Operations, by their names in autograd. Those that mix features or positions; all others are elementwise or change
# the layout.
_MIXING = re.compile(r"mm|Mm|Mv|Dot|Conv|Linear|Rnn|Attention|MatMul|Matmul")
# Operations that keep the order of the elements: the identity if the shape is the same in the end.
_IDENTITY = re.compile(r"^(AccumulateGrad|Clone|Alias|Slice|Squeeze|Unsqueeze|View|UnsafeView|ReshapeAlias)")
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
# Operations of which autograd shows everything that they have saved.
_SHOWN = re.compile(r"Backward\d$|::(AccumulateGrad|CopyBackwards)$")


class Edge(NamedTuple):
    """A tensor in autograd's graph: one output of an operation.

    Attributes:
        node: The operation.
        output: Index of the output.
    """

    node: Node
    output: int


class PathNode(NamedTuple):
    """A tensor on a path from the sources to the output.

    Attributes:
        edge: The tensor in the graph.
        is_dominator: Whether every path from the sources to the output goes through it.
        mixing_depth: Number of operations before it that mix features or positions.
        op_depth: Number of operations before it that change more than the layout.
        uses: Number of operations on these paths that use it.
    """

    edge: Edge
    is_dominator: bool
    mixing_depth: int
    op_depth: int
    uses: int


def edge_of(t: Tensor) -> Edge:
    """The edge of a tensor.

    Args:
        t: A tensor that requires a gradient.

    Returns:
        Its current edge; an in-place operation on the tensor changes it.
    """
    edge = get_gradient_edge(t)
    return Edge(edge.node, edge.output_nr)


def shape_of(edge: Edge) -> torch.Size:
    """Shape of a tensor in the graph.

    Args:
        edge: The tensor.

    Returns:
        Its shape.

    Raises:
        NotImplementedError: If this version of torch does not provide it.

    Example:
        >>> shape_of(edge_of(torch.ones(2, 3, requires_grad=True)))
        torch.Size([2, 3])
    """
    metadata = getattr(edge.node, NAMES["input metadata"], None)  # as used by torch.autograd.grad
    if metadata is None:
        raise NotImplementedError("This version of torch does not provide the shapes of tensors in autograd's graph.")
    return torch.Size(metadata[edge.output].shape)


def is_view(t: Tensor) -> bool:
    """Whether a tensor is a view of another one. Autograd does not allow to detach a view in place.

    Args:
        t: The tensor.

    Returns:
        True if so, or if this version of torch does not show it.
    """
    is_view = getattr(t, NAMES["is view"], None)
    return getattr(t, NAMES["base"], t) is not None if is_view is None else is_view()


def overwrite(t: Tensor, value: Tensor, new_memory: bool) -> None:
    """Replace the value of a tensor in place, and its history by that of the new value.

    Tensors that autograd has saved for the old history remain valid within `saved_tensors_kept`.

    Args:
        t: The tensor; not a view.
        value: The new value, of the same shape.
        new_memory: Whether to move the tensor to new memory first. Needed if it has a history, or if the value differs.
    """
    t.detach_()
    if new_memory:  # tensors that autograd has saved keep the old memory
        t.data = torch.empty_like(value)
    preserve_version = _preserve_version()
    with nullcontext() if preserve_version is None else preserve_version(t):
        t.copy_(value)


def swap_in(t: Tensor, new: Tensor) -> bool:
    """Make a tensor object another tensor, for everything that has a reference to the object.

    Unlike `overwrite` this also works for views. Views of ``t`` itself keep the old values.

    Args:
        t: The tensor object.
        new: The tensor that it becomes; not used afterwards.

    Returns:
        False, with nothing changed, if autograd or something else inside torch has a reference to ``t``.

    Example:
        >>> x = torch.zeros(3, 2)
        >>> column = x[:, 0]
        >>> also_column = column
        >>> swap_in(column, torch.ones(3)), also_column
        (True, tensor([1., 1., 1.]))
    """
    attributes = dict(vars(t))
    try:
        torch.utils.swap_tensors(t, new)
    except RuntimeError:
        return False
    vars(t).update(attributes)
    return True


@contextmanager
def saved_tensors_kept(after_use: bool = False) -> Iterator[None]:
    """Run a forward pass in which `overwrite` is called.

    Args:
        after_use: Whether it is also called for tensors that operations have used. Autograd then saves aliases of the
            tensors in place of the tensors themselves, which takes time.

    Autograd raises an error for a saved tensor whose version counter has increased. `overwrite` resets the counter. In
    a version of torch without that possibility autograd saves copies in this block, which takes time and memory.
    """
    save = torch.clone if not _preserve_version() else torch.detach if after_use else None
    with nullcontext() if save is None else saved_tensors_hooks(save, lambda t: t):
        yield


def version_of(t: Tensor) -> AbstractContextManager[None]:
    """The version counter of a tensor now, which leaving this context restores.

    For values that are written back: a graph that has saved the tensor is as valid as before. Without the possibility
    to reset counters autograd raises an error there.
    """
    preserve = _preserve_version()
    return nullcontext() if preserve is None or t.is_inference() else preserve(t)


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """The version counters of tensors, which increase when something is written to their memory."""
    return [-1 if t.is_inference() else t._version for t in tensors]


def saved_as_copies(tensors: Iterable[Tensor]) -> AbstractContextManager[object]:
    """A block in which autograd saves copies of some tensors, since something will write to them later."""
    memory = {storage_key(t) for t in tensors if t.layout == torch.strided}

    def pack(t: Tensor) -> Tensor:
        return t.clone() if t.layout == torch.strided and storage_key(t) in memory else t

    return saved_tensors_hooks(pack, lambda t: t)


def _preserve_version() -> Any:
    return getattr(torch.autograd, NAMES["version counter"], None)


def path_nodes(sources: Sequence[Edge], output: Edge) -> list[PathNode]:
    """All tensors on paths from the sources to the output, and which of them are dominators.

    In a topological order of operations and tensors, a tensor is a dominator if no edge of the graph leads from before
    it to after it: such an edge could be extended to a path that avoids it.

    Args:
        sources: Where the paths begin.
        output: Where they end.

    Returns:
        The tensors, in topological order.
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
    outputs: dict[Node, list[Edge]] = defaultdict(list)
    for edge in users:
        outputs[edge.node].append(edge)
    order: dict[Node | Edge, int] = {}
    for node in inputs:
        order[node] = len(order)
        for edge in outputs[node]:
            order[edge] = len(order)
    path_nodes = []
    mixing_depth = op_depth = 0
    furthest = max(order[node] for node in begin if node in order)  # end of all edges so far
    for node in inputs:
        mixing_depth += bool(_MIXING.search(node.name()))
        op_depth += not _IDENTITY.search(node.name())
        furthest = max([furthest, *(order[edge] for edge in outputs[node])])
        for edge in outputs[node]:
            path_nodes.append(PathNode(edge, furthest <= order[edge], mixing_depth, op_depth, len(users[edge])))
            furthest = max([furthest, *(order[user] for user in users[edge])])
    return path_nodes


def saved_names(operation: type[Node]) -> list[str]:
    """Names of the attributes in which an operation saves values for its derivative.

    Args:
        operation: The type of a node in autograd's graph.

    Returns:
        Names of the node's attributes.

    Example:
        >>> saved_names(type(torch.ones(2, requires_grad=True).exp().grad_fn))
        ['_saved_result']
    """
    return _names_with_prefix(operation, NAMES["saved tensors"])


@cache
def _names_with_prefix(operation: type[Node], prefix: str) -> list[str]:
    return [name for name in dir(operation) if name.startswith(prefix) or name == "saved_tensors"]


def _shows_saved_tensors() -> bool:
    """Whether this version of torch shows the tensors that operations have saved."""
    return _shows_saved(NAMES["saved tensors"])


@cache
def _shows_saved(prefix: str) -> bool:
    with torch.inference_mode(False), torch.enable_grad():
        node = torch.ones(1, requires_grad=True, device="cpu").exp().grad_fn
    assert node is not None
    return bool(_names_with_prefix(type(node), prefix))


def saved_tensors_intact(output: Tensor) -> bool:
    """Check whether a computation can still be differentiated, without doing so.

    Args:
        output: The result of the computation.

    Returns:
        True if none of the tensors that its operations have saved was modified; False if one was, or if an operation
        does not show what it has saved.

    Example:
        >>> x, weight = torch.ones(2, requires_grad=True), torch.ones(2)
        >>> y = x * weight
        >>> saved_tensors_intact(y), weight.add_(1), saved_tensors_intact(y)
        (True, tensor([2., 2.]), False)
    """
    if output.grad_fn is None:
        return True
    is_shown = _shows_saved_tensors()
    for node in topological_order(output.grad_fn):
        names = saved_names(type(node))
        if not names and not (is_shown and _SHOWN.search(node.name())):
            return False
        try:
            for name in names:
                getattr(node, name)
        except RuntimeError:  # the error of a backward pass
            return False
    return True


def save_contiguous(outputs: Iterable[Tensor]) -> bool:
    """Let operations keep what they have saved with channels last in the usual order of memory, channels first.

    Some derivatives bring gradients into the order of memory of a saved tensor, which is not possible for a batch of
    gradients: that of GroupNorm, and the second one of max pooling.

    Args:
        outputs: Results of the computation.

    Returns:
        Whether any saved tensor was reordered; its values are the same.

    Example:
        >>> x = torch.ones(1, 2, 3, 3).to(memory_format=torch.channels_last).requires_grad_()
        >>> y = x.exp()
        >>> save_contiguous([y]), save_contiguous([y])
        (True, False)
    """
    saved, memory = NAMES["saved tensors"], NAMES["saved memory"]
    reordered = False
    for node in dict.fromkeys(itertools.chain(*(topological_order(t.grad_fn) for t in outputs if t.grad_fn))):
        for name in _names_with_prefix(type(node), memory):
            # Refused where it was modified, and where a hook packs what is saved in another way.
            with suppress(RuntimeError):
                t = getattr(node, name.replace(memory, saved, 1), None) if name.startswith(memory) else None
                if isinstance(t, Tensor) and t.ndim in (4, 5) and t.stride(1) == 1 and not t.is_contiguous():
                    getattr(node, name).register_hooks(torch.Tensor.contiguous, lambda t: t)
                    reordered = True
    return reordered


def topological_order(last: Node) -> list[Node]:
    """All operations that an operation depends on, in topological order.

    Args:
        last: The operation.

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
    """An edge in the form in which `torch.autograd.grad` accepts it."""
    return GradientEdge(*edge)


def input_edges(node: Node) -> list[Edge]:
    """Edges of an operation's inputs that require a gradient.

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
    return _BUILT_IN.search(node.name()) is not None and _shows_saved_tensors()


def is_fully_described(node: Node) -> bool:
    """Whether an operation is a linear one that its name and the tensors it saves describe completely."""
    return _FULLY_DESCRIBED.search(node.name()) is not None and _shows_saved_tensors()


def has_custom_function(outputs: Sequence[Tensor]) -> bool:
    """Whether a custom `torch.autograd.Function` led to some tensors.

    Args:
        outputs: The tensors.

    Returns:
        True if a backward pass from them runs code in Python, or if this version of torch does not show it.

    Example:
        >>> has_custom_function([torch.ones(2, requires_grad=True).exp()])
        False
    """
    custom = getattr(torch.autograd.function, NAMES["custom function"], Node)
    operations = [output.grad_fn for output in outputs if output.grad_fn is not None]
    return any(isinstance(node, custom) for last in operations for node in topological_order(last))
