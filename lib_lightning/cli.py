"""The command line: ``lib-lightning fit --config recipe.yaml``, and what to do with basis files afterwards."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lib_lightning.core.cut import InputFn
from lib_lightning.core.errors import LIBError
from lib_lightning.export.files import write_bytes
from lib_lightning.graph import InteractionGraph
from lib_lightning.metrics.summary import graph_scalars
from lib_lightning.questions import list_node_layers
from lib_lightning.samples import SampleBuffer
from lib_lightning.version import __version__
from lib_lightning.view.run import Run, write_film

# Enough to look for node layers with.
_SAMPLES = 8
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments; those of the process by default.
    """
    words = sys.argv[1:] if args is None else list(args)
    if words and words[0] in TRAINER_COMMANDS:
        run_trainer(args)
        return
    # What follows is LightningCLI's, but for one word of ours and the question what all this is.
    if words and words[0] == "nodes" and not {"-h", "--help"} & set(words):
        run = partial(_nodes, [word for word in words[1:] if word != "--all"], "--all" in words)
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
    import lib_lightning.callback  # noqa: F401  (known by its plain name in YAML)
    from lib_lightning.trainer_cli import TrainerCLI

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
    commands = parser.add_subparsers(required=True, metavar="{fit,validate,test,predict,nodes,inspect,plot,view}")
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


def _nodes(words: Sequence[str], show_all: bool) -> None:
    _find_classes_here()
    model, batch, input_fn = _first_validation_batch(words)
    cuts = list_node_layers(model, batch, input_fn)
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


def _first_validation_batch(words: Sequence[str]) -> tuple[nn.Module, Any, InputFn | None]:
    """Build model and data from options of fit, and run fit as far as the first batch of its sanity check."""
    from lightning.pytorch import Callback
    from lightning.pytorch.cli import LightningArgumentParser

    from lib_lightning.callback import LIBCallback
    from lib_lightning.trainer_cli import TrainerCLI

    class Build(TrainerCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            # Files that fit has written name its own options, too.
            parser.add_method_arguments(self.trainer_class, "fit", skip=self.subcommands()["fit"])

    class Keep(Callback):
        def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
            samples.add(batch)

    samples = SampleBuffer(_SAMPLES)
    # Names do not depend on where the model is trained; here it only has to run once.
    anywhere = [f"--trainer.{option}" for option in ("accelerator=cpu", "devices=1", "strategy=auto", "logger=false")]
    with _quiet():
        cli = Build(args=[*words, *anywhere], run=False, save_config_callback=None)
        trainer: Any = cli.trainer
        input_fns = [callback.input_fn for callback in trainer.callbacks if isinstance(callback, LIBCallback)]
        trainer.callbacks = [Keep()]
        trainer.num_sanity_val_steps, trainer.limit_train_batches = 1, 0
        try:
            trainer.fit(cli.model, datamodule=cli.datamodule)
        except Exception as error:
            raise LIBError(
                f"The first validation batch of {type(cli.model).__name__} cannot be had: fit stops before with "
                f"{type(error).__name__}: {error}"
            ) from error
    if not samples.batches:
        raise LIBError(
            "There is no validation batch to run the model on: it takes a validation data loader with data in it, and "
            "a validation_step."
        )
    return cli.model, samples.batches[0], input_fns[0] if input_fns else None


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
    from lib_lightning.display.image import render_png

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
