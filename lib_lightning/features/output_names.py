"""Names of a model's outputs: classes or tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lib_lightning.errors import SettingError, SettingTypeError, counted, shortened
from lib_lightning.features.renderers import TokenRenderer
from lib_lightning.graph import InteractionGraph
from lib_lightning.io import basis_format as keys
from lib_lightning.model.batch import first_tensor
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.node_layer import NodeLayer

# Of more outputs, a file has the names of those that it mentions.
MOST_NAMES = 1000
# What Hugging Face names classes that nobody has named.
_NO_NAME = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class OutputNames:
    """Names of outputs by their number.

    Attributes:
        names: The names; None if `name_of` has them.
        name_of: Gives the name of an output.
        count: Number of outputs; 0 if unknown.

    Example:
        >>> OutputNames(("cat", "dog")).of([1, 2])
        {1: 'dog'}
    """

    names: tuple[str, ...] | None = None
    name_of: Callable[[int], str] | None = None
    count: int = 0

    @classmethod
    def of_graph(cls, graph: InteractionGraph) -> OutputNames:
        """The names that a graph has."""
        names = graph.info.get(keys.OUTPUT_NAMES) or []
        if isinstance(names, list):
            return cls(tuple(names), count=len(names))
        return cls(name_of=lambda output: str(names.get(str(output), output)))

    def of(self, outputs: Sequence[int]) -> dict[int, str]:
        """Names of some outputs; those without a name are left out."""
        if self.names is not None:
            return {i: self.names[i] for i in outputs if 0 <= i < len(self.names)}
        return {} if self.name_of is None else {i: self.name_of(i) for i in outputs if i >= 0}

    def plain(self, graph: InteractionGraph) -> list[str] | dict[str, str]:
        """Names for ``graph.info["output_names"]``: all, or by number those of outputs that a graph mentions.

        Args:
            graph: The graph.

        Returns:
            A list of at most 1,000 names; of more outputs, names by number as text.
        """
        count = len(self.names) if self.names is not None else self.count
        if 0 < count <= MOST_NAMES:
            found = self.of(range(count))
            return [found[i] for i in range(count)]
        parts = [effects.outputs.flatten() for effects in graph.output_effects.values()]
        mentioned = torch.cat(parts).unique().tolist() if parts else []
        return {str(i): name for i, name in self.of(mentioned).items()}


def check_output_names(setting: object) -> None:
    """Check the setting of output names.

    Args:
        setting: A list of names, or anything else that has them; see `lib_lightning.LIBCallback`.

    Raises:
        SettingTypeError: If it is none of these.
    """
    if setting is None or isinstance(setting, Mapping) or hasattr(setting, "id2label") or callable(setting):
        return
    is_list = isinstance(setting, Sequence) and not isinstance(setting, str)
    if not is_list and not hasattr(setting, "decode") and not isinstance(setting, TokenRenderer):
        raise SettingTypeError(
            "output_names is a list of names, a dict of names by number, a configuration with id2label, a tokenizer or "
            f"a function of a number; got {shortened(repr(setting), 80)}."
        )


def find_output_names(
    setting: Any, renderer: object, instrumented: InstrumentedModel, batch: Any
) -> OutputNames | None:
    """Names of a model's outputs: those of the setting, of its configuration, or of the tokens of its renderer.

    Args:
        setting: As for `check_output_names`.
        renderer: The renderer of samples.
        instrumented: The model.
        batch: One batch, to see how many outputs there are.

    Returns:
        The names; None if nothing has any.

    Raises:
        SettingError: If there are more or fewer names than outputs.
    """
    config = getattr(instrumented.entry, "config", None)
    tokens = renderer if isinstance(renderer, TokenRenderer) and renderer.tokenizer is not None else None
    if setting is None:
        setting = _of_config(config) or tokens
        if setting is None:
            return None
    count = count_outputs(instrumented, batch)
    listed = _listed(setting)
    if listed is not None:
        if count and len(listed) != count:
            raise SettingError(
                f"output_names has {counted(len(listed), 'name')}, and the model has {counted(count, 'output')}."
            )
        return OutputNames(listed, count=len(listed))
    if setting is tokens:
        # A classifier of texts has other outputs than tokens.
        size = tokens.vocabulary
        return OutputNames(name_of=tokens.text, count=count) if size is not None and count >= size else None
    name_of = setting if callable(setting) and not hasattr(setting, "decode") else TokenRenderer(setting).text
    return OutputNames(name_of=name_of, count=count)


def _of_config(config: Any) -> Mapping[Any, Any] | None:
    names = getattr(config, "id2label", None)
    is_named = isinstance(names, Mapping) and not all(_NO_NAME.fullmatch(str(name)) for name in names.values())
    return names if is_named else None


def _listed(setting: Any) -> tuple[str, ...] | None:
    setting = getattr(setting, "id2label", setting)
    if isinstance(setting, Mapping):
        by_number = {int(k): str(name) for k, name in setting.items()}
        return tuple(by_number.get(i, str(i)) for i in range(max(by_number, default=-1) + 1))
    return tuple(map(str, setting)) if isinstance(setting, (list, tuple)) else None


def count_outputs(instrumented: InstrumentedModel, batch: Any) -> int:
    """Number of outputs of a model at each position; 0 if its output is no tensor.

    Args:
        instrumented: The model.
        batch: One batch, a sample or two of which is run.

    Returns:
        The number.

    Example:
        >>> count_outputs(InstrumentedModel(torch.nn.Linear(4, 3), []), torch.ones(5, 4))
        3
    """
    with instrumented.session(), torch.no_grad():
        output = first_tensor(instrumented.run_on_few(instrumented.run, batch, 2))
    return 0 if output is None or output.ndim == 0 else NodeLayer("output").read([output]).shape[2]
