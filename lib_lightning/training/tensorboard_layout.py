"""TensorBoard's tabs CUSTOM SCALARS and HPARAMS: what to look at first among the scalars of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import custom_scalars, hparams

from lib_lightning.training.frameworks import is_instance
from lib_lightning.training.loggers import add_summaries

if TYPE_CHECKING:
    import lightning.pytorch as pl

# Title of each chart, and the scalars in it: all node layers or sections are lines of one chart.
FIRST = {
    "How sparsely does it compute? Effective edges between features": ["effective_edges/total"],
    "How much of each layer is used? Effective features": ["effective_features/(?!total)"],
    "Does it fall into parts? Modularity, from 0 to 1": ["modularity/total"],
    "Is something new? Features that were not in the snapshot before": ["born/(?!total)"],
    # Not the overhead: before the first steps, that is thousands of times the training.
    "What does it cost? Seconds of the latest snapshot": ["seconds$"],
}
OTHERS = {
    "Features above 1e-6 of the layer's most important one": ["features/(?!total)"],
    "Features that change the labels' likelihood": ["causal_features/(?!total)"],
    "Effect of single features on the predictions, in nats": ["nats/"],
    "Effective edges, by section": ["effective_edges/(?!total)"],
    "Edges above 1e-3 of the section's strongest": ["edges/(?!total)"],
    "Edges required for the score": ["edges_required/"],
    "Share of the edges that holds 99% of the strength": ["share_of_edges/"],
    "Modularity, by section": ["modularity/(?!total)"],
    "Features that are gone since the snapshot before": ["ended/(?!total)"],
    "Share of the subspace that is unchanged": ["overlap/(?!total)"],
    "Time in the callback, as a share of the training's": ["overhead$"],
}
# Metrics beside Lightning's own in the table of hyperparameters.
METRICS = ("effective_edges/total", "modularity/total")


def add_layout(trainer: pl.Trainer, prefixes: Mapping[str, Sequence[str]]) -> None:
    """Tell TensorBoard, before it has any scalars, which ones belong together, and which of them are results of a run.

    What the user writes into the same tabs stays: a layout of theirs comes later, and replaces this one; a logger with
    ``default_hp_metric=False``, whose metrics users choose themselves, gets none of these.

    Args:
        trainer: The trainer; loggers other than TensorBoard's are passed over.
        prefixes: For the name of each callback, the prefixes of what it logs: the basis itself first.
    """
    for logger in trainer.loggers:
        if is_instance(logger, "loggers.TensorBoardLogger"):
            # Made where a failure is reported, and does not end the training.
            add_summaries(logger, _summaries(trainer, prefixes, getattr(logger, "_default_hp_metric", False)))


def _summaries(trainer: pl.Trainer, prefixes: Mapping[str, Sequence[str]], has_metrics: bool) -> Iterator[Summary]:
    yield custom_scalars(layout_of(prefixes))
    if has_metrics and (values := _hyperparameters(trainer)) is not None:
        yield _hparams_metrics(values, list(prefixes))


def layout_of(prefixes: Mapping[str, Sequence[str]]) -> dict[str, dict[str, tuple[str, list[str]]]]:
    """The charts of CUSTOM SCALARS: five to look at first, and the others by quantity.

    Args:
        prefixes: For the name of each callback, the prefixes of what it logs.

    Returns:
        By title of a group and of a chart its kind, and regular expressions for its scalars, as
        `torch.utils.tensorboard.SummaryWriter.add_custom_scalars` takes them.

    Example:
        >>> list(layout_of({"lib": ["lib"]}))
        ['lib: look at these first', 'lib: more']
    """
    groups = {}
    for name, known in prefixes.items():
        start = f"^({'|'.join(map(re.escape, known))})/"
        for title, charts in (("look at these first", FIRST), ("more", OTHERS)):
            groups[f"{name}: {title}"] = {
                chart: ("Multiline", [start + tag for tag in tags]) for chart, tags in charts.items()
            }
    return groups


def _hyperparameters(trainer: pl.Trainer) -> dict[str, Any] | None:
    """The hyperparameters that Lightning is about to log, by the names that it gives them; None if it logs none."""
    found: dict[str, Any] = {}
    sources: list[Any] = [trainer.lightning_module, getattr(trainer, "datamodule", None)]
    logged = [source for source in sources if getattr(source, "_log_hyperparams", False)]
    for source in logged:
        found |= {name: value for name, value in source.hparams_initial.items() if name != "_class_path"}
    return dict(_flat(found)) if logged else None


def _flat(values: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{key}/")
        else:
            pairs.append((key, value if isinstance(value, (bool, int, float, str)) else str(value)))
    return pairs


def _hparams_metrics(values: Mapping[str, Any], names: Sequence[str]) -> Summary:
    # Lightning writes the same summary with its own metric alone, a little later. TensorBoard keeps the first one.
    metrics = {"hp_metric": 0.0, **{f"{name}/{metric}": 0.0 for name in names for metric in METRICS}}
    experiment, _, _ = hparams(dict(values), metrics)
    return experiment
