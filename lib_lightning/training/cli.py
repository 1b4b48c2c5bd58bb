"""The command line: ``lib-lightning fit --config recipe.yaml``, and what to do with basis files afterwards."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lib_lightning import __version__
from lib_lightning.api import list_node_layers
from lib_lightning.errors import LIBError
from lib_lightning.graph import InteractionGraph
from lib_lightning.io.basis_file import write_bytes
from lib_lightning.metrics.summary import graph_scalars
from lib_lightning.model.batch import map_tensors
from lib_lightning.training.samples import SampleBuffer
from lib_lightning.viewer.run import Run, write_film

if TYPE_CHECKING:
    from lib_lightning.training.callback import LIBCallback

# Enough to look for node layers with.
_SAMPLES = 8
# Names do not depend on where a model is trained: it only has to run once.
_HERE = ("accelerator=cpu",)
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
_OTHERS = ("nodes", "profile", "inspect", "plot", "view")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments; those of the process by default.
    """
    words = sys.argv[1:] if args is None else list(args)
    if words and words[0] in TRAINER_COMMANDS:
        run_trainer(args)
        return
    # What follows is LightningCLI's, but for one word of nodes and the question what all this is.
    if words and words[0] in _LIKE_FIT and not {"-h", "--help"} & set(words):
        run = partial(_LIKE_FIT[words[0]], words[1:])
    else:
        parsed = _parser().parse_args(words)
        run = partial(parsed.run, parsed)
    try:
        run()
    except (LIBError, OSError) as error:
        sys.exit(f"lib-lightning: {error}")


def run_trainer(args: Sequence[str] | None) -> None:
    """Hand over to LightningCLI: every option of trainer, model, data and callbacks, from YAML or the command line.

    Args:
        args: Arguments, the subcommand first; those of the process by default.
    """
    import lib_lightning.training.callback  # noqa: F401  (known by its plain name in YAML)
    from lib_lightning.training.trainer_cli import TrainerCLI

    _find_classes_here()
    try:
        TrainerCLI(args=None if args is None else list(args), save_config_kwargs={"overwrite": True})
    except LIBError as error:
        sys.exit(f"lib-lightning: {error}")


def _find_classes_here() -> None:
    # Recipes name classes such as recipes.modular_addition.ModularAddition: found from the folder one stands in.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lib-lightning",
        description="Watch a network's features form while it trains.",
        epilog="fit, validate, test and predict take the options of LightningCLI: lib-lightning fit --help.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="{fit,validate,test,predict,nodes,profile,inspect,plot,view}"
    )
    for command in TRAINER_COMMANDS:
        commands.add_parser(command, help=f"{command} with a Lightning trainer (see lib-lightning {command} --help)")
    nodes = commands.add_parser(
        "nodes",
        help="list where a model can be cut: names to write under node_layers",
        usage="lib-lightning nodes --config FILE [--all] [any option of fit]",
        description="List where a model can be cut, found by running it on the first validation batch: names to write "
        "under node_layers, what lies there, and which of them (*) are proposed.",
        epilog="Model and data are given as for fit, by --config and any other option of it.",
    )
    nodes.add_argument("--all", action="store_true", help="show all names of each place")
    commands.add_parser(
        "profile",
        help="measure where the time of one snapshot of a model goes",
        usage="lib-lightning profile --config FILE [any option of fit]",
        description="Measure where the time of one snapshot goes: seconds and floating-point operations of every step, "
        "and how near they come to the speed of large matrix products on this machine. Nothing is trained or kept.",
        epilog="Model, data and callbacks are given as for fit, by --config and any other option of it.",
    )
    inspect = commands.add_parser("inspect", help="print what basis files hold")
    inspect.add_argument("files", nargs="+", type=Path, help="basis files (.safetensors)")
    inspect.set_defaults(run=_inspect)
    plot = commands.add_parser("plot", help="draw the interaction graph, or the importances, of a basis file")
    plot.add_argument("file", type=Path, help="basis file (.safetensors)")
    plot.add_argument("-o", "--output", type=Path, help="image to write; by default beside the basis file")
    plot.add_argument(
        "--kind", choices=("graph", "spectrum"), default="graph", help="what to draw (default: %(default)s)"
    )
    plot.add_argument("--max-edges", type=int, default=300, help="most edges to draw (default: %(default)s)")
    plot.add_argument("--max-features", type=int, default=40, help="most features in a column (default: %(default)s)")
    plot.set_defaults(run=_plot)
    view = commands.add_parser("view", help="write the film of a run as one HTML file, to look at in a browser")
    view.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="log directory of a run, or its folder in it")
    view.add_argument("-o", "--output", type=Path, help="file to write; by default film.html in the folder of graphs")
    view.add_argument("--edges", type=int, default=400, help="most edges of a section in each snapshot (default: 400)")
    view.add_argument("--every", type=int, default=1, metavar="N", help="take each Nth snapshot (default: all)")
    view.set_defaults(run=_view)
    return parser


def _nodes(words: Sequence[str]) -> None:
    show_all = "--all" in words
    model, (seen, *_) = _as_fit_sees_it([word for word in words if word != "--all"], _SAMPLES, _HERE)
    cuts = list_node_layers(model, seen.buffer.batches[0], seen.callback.spec.input_fn)
    sizes = [f"{cut.positions:,} x {cut.features:,}" for cut in cuts]
    names, numbers = max(len(cut.tap) for cut in cuts), max(map(len, [*sizes, "positions x features"]))
    print(f"  {'name':<{names}}  {'positions x features':>{numbers}}  module")
    for cut, size in zip(cuts, sizes, strict=True):
        print(f"{'*' if cut.proposed else ' '} {cut.tap:<{names}}  {size:>{numbers}}  {cut.module}")
        for alias in cut.aliases if show_all else ():
            print(f"    = {alias}")
    print(f"\nnode_layers: [{', '.join(_in_yaml(cut.tap) for cut in cuts if cut.proposed)}]")


def _in_yaml(name: str) -> str:
    return name if set(name).isdisjoint(":#") else f'"{name}"'


def _profile(words: Sequence[str]) -> None:
    from lib_lightning.training.profiling import RATE_SIZE, profile_snapshot

    model, all_seen = _as_fit_sees_it(words, None, ())
    for seen in all_seen:
        callback, batches = seen.callback, seen.buffer.batches
        options: Any = {"input_fn": callback.spec.input_fn, "mask": callback.spec.mask, "dtype": callback.spec.dtype}
        profile = profile_snapshot(model, batches, callback.node_layers, callback.config, **options)
        layers = " -> ".join(profile.node_layers)
        print(f"{callback.name}: one snapshot of {layers} on {profile.samples:,} samples\n")
        width = max(len(row.step) for row in profile.rows)
        print(f"{'step':<{width}}  {'seconds':>9}  {'share':>6}  {'GFLOP':>10}  {'GFLOP/s':>9}  {'of peak':>7}")
        for row in (*profile.rows, profile.total):
            print(
                f"{row.step:<{width}}  {row.seconds:>9.4f}  {row.share:>6.1%}  {row.gflop:>10,.3f}  {row.rate:>9,.1f}  "
                f"{row.of_peak:>7.1%}"
            )
        peaks = ", ".join(f"{str(kind).removeprefix('torch.')} {rate:,.0f}" for kind, rate in profile.rates.items())
        print(
            f"\nPeak, by products of {RATE_SIZE:,} x {RATE_SIZE:,} matrices on {profile.device}, in GFLOP/s: {peaks}.\n"
            "Counted are matrix products and convolutions; eigenproblems and the like take seconds only.\n"
        )


@dataclass(frozen=True)
class _Seen:
    """The samples that a callback would see."""

    callback: LIBCallback
    buffer: SampleBuffer


class _Enough(BaseException):
    """All samples are there."""


def _as_fit_sees_it(
    words: Sequence[str], num_samples: int | None, options: Sequence[str]
) -> tuple[nn.Module, list[_Seen]]:
    """Build model and data from options of fit, and run fit as far as it takes to have samples.

    Args:
        words: Options of fit.
        num_samples: Samples of the first validation batches; None for all that each callback wants.
        options: Options that go before those.

    Returns:
        The model, where it is trained, and the samples of each callback, at least of one.
    """
    from lightning.pytorch import Callback
    from lightning.pytorch.cli import LightningArgumentParser

    from lib_lightning.training.callback import LIBCallback
    from lib_lightning.training.trainer_cli import TrainerCLI

    class Build(TrainerCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            # Files that fit has written name its own options, too.
            parser.add_method_arguments(self.trainer_class, "fit", skip=self.subcommands()["fit"])

    class Keep(Callback):
        def on_validation_batch_start(
            self, trainer: Any, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            for seen in all_seen:
                if seen.callback.sample_config.val_dataloader == dataloader_idx:
                    seen.buffer.add(batch)

        def on_validation_batch_end(self, *_: Any) -> None:
            if all(seen.buffer.batches if num_samples else seen.buffer.is_full for seen in all_seen):
                raise _Enough

    _find_classes_here()
    with _quiet():
        alone = [f"--trainer.{option}" for option in ("devices=1", "strategy=auto", "logger=false", *options)]
        cli = Build(args=[*words, *alone], run=False, save_config_callback=None)
        trainer: Any = cli.trainer
        callbacks = [callback for callback in trainer.callbacks if isinstance(callback, LIBCallback)]
        all_seen = [
            _Seen(callback, SampleBuffer(num_samples or callback.sample_config.num_samples))
            for callback in callbacks or [LIBCallback()]
        ]
        trainer.callbacks = [Keep()]
        trainer.num_sanity_val_steps, trainer.limit_train_batches = float("inf"), 0
        try:
            for seen in all_seen:
                for batch in () if num_samples else seen.callback.sample_config.dataloader or ():
                    if seen.buffer.is_full:
                        break
                    seen.buffer.add(batch)
            trainer.fit(cli.model, datamodule=cli.datamodule)
        except _Enough:
            pass
        except Exception as error:
            raise LIBError(
                f"The first validation batch of {type(cli.model).__name__} cannot be had: fit stops before with "
                f"{type(error).__name__}: {error}"
            ) from error
    if not all(seen.buffer.batches for seen in all_seen):
        raise LIBError(
            "There is no validation batch to run the model on: it takes a validation data loader with data in it, and "
            "a validation_step."
        )
    device = trainer.strategy.root_device
    for seen in all_seen:
        seen.buffer.batches = [map_tensors(batch, lambda t: t.to(device)) for batch in seen.buffer.batches]
    return cli.model.to(device), all_seen


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's remarks on hardware and data loaders, which are for training, out of a listing."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _inspect(args: argparse.Namespace) -> None:
    for path in args.files:
        graph = InteractionGraph.load(path)
        made = {key: graph.info[key] for key in ("step", "epoch", "n_samples") if key in graph.info}
        print(path)
        print("  made at   ", ", ".join(f"{key} {value:,}" for key, value in made.items()))
        print("  settings  ", ", ".join(f"{key} {value}" for key, value in graph.info.get("settings", {}).items()))
        print("  versions  ", ", ".join(f"{key} {value}" for key, value in graph.info.get("versions", {}).items()))
        for name, value in graph_scalars(list(graph.bases.values()), list(graph.edges.values())).items():
            print(f"  {name:<50} {value:>12,.6g}")


def _plot(args: argparse.Namespace) -> None:
    from lib_lightning.plots.image import render_png

    graph = InteractionGraph.load(args.file)
    if args.kind == "spectrum":
        output, figure = args.file.with_suffix(".spectrum.png"), graph.plot_spectrum()
    else:
        output, figure = args.file.with_suffix(".png"), graph.plot(args.max_edges, args.max_features)
    output = args.output or output
    write_bytes(output, render_png(figure).data)
    print(output)


def _view(args: argparse.Namespace) -> None:
    path = write_film([Run(path) for path in args.runs], args.output, args.edges, args.every)
    print(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")


# Commands that take the options of fit.
_LIKE_FIT = {"nodes": _nodes, "profile": _profile}
