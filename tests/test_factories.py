"""New tensors are on a device that the code names, whatever `torch.set_default_device` says."""

from __future__ import annotations

import ast
from pathlib import Path

import lib_lightning

PACKAGE = Path(lib_lightning.__file__).parent
# Functions of torch that make a tensor from numbers, on the default device unless `device=` is given.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint"),
    *("randn", "randperm", "tensor", "tril_indices", "triu_indices", "zeros"),
}


def factories_without_device(source: str) -> list[int]:
    """Lines of calls of such functions that leave the device open."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and call.func.attr in FACTORIES
        and not any(keyword.arg in ("device", None) for keyword in call.keywords)
    ]


def test_calls_are_found() -> None:
    source = (
        "torch.zeros(3)\ntorch.zeros(3, device=d)\nx.new_zeros(3)\ntorch.eye(2).to(x)\ntorch.full((1,), 2, **options)"
    )
    assert factories_without_device(source) == [1, 4]


def test_every_new_tensor_has_a_device() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line in factories_without_device(path.read_text())
    }
    assert not found, f"these calls depend on torch.set_default_device: {sorted(found)}"
