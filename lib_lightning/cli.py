"""The command line: ``lib-lightning fit --config recipe.yaml``, and what to do with basis files afterwards."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lib_lightning.core.errors import LIBError
from lib_lightning.export.files import write_bytes
from lib_lightning.graph import InteractionGraph
from lib_lightning.metrics.summary import graph_scalars
from lib_lightning.version import __version__

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
    parsed = _parser().parse_args(words)
    try:
        parsed.run(parsed)
    except (LIBError, FileNotFoundError) as error:
        sys.exit(f"lib-lightning: {error}")


def run_trainer(args: Sequence[str] | None) -> None:
    """Hand over to LightningCLI: every option of trainer, model, data and callbacks, from YAML or the command line.

    Args:
        args: Arguments, the subcommand first; those of the process by default.
    """
    from lightning.pytorch.cli import LightningCLI

    import lib_lightning.callback  # noqa: F401  (known by its plain name in YAML)

    # Recipes name classes such as recipes.modular_addition.ModularAddition: found from the folder one stands in.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        LightningCLI(
            args=None if args is None else list(args),
            parser_kwargs={"parser_mode": "omegaconf+"},
            save_config_kwargs={"overwrite": True},
        )
    except LIBError as error:
        sys.exit(f"lib-lightning: {error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lib-lightning",
        description="Watch a network's features form while it trains.",
        epilog="fit, validate, test and predict take the options of LightningCLI: lib-lightning fit --help.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="{fit,validate,test,predict,inspect,plot}")
    for command in TRAINER_COMMANDS:
        commands.add_parser(command, help=f"{command} with a Lightning trainer (see lib-lightning {command} --help)")
    inspect = commands.add_parser("inspect", help="print what basis files hold")
    inspect.add_argument("files", nargs="+", type=Path, help="basis files (.safetensors)")
    inspect.set_defaults(run=_inspect)
    plot = commands.add_parser("plot", help="draw the interaction graph of a basis file")
    plot.add_argument("file", type=Path, help="basis file (.safetensors)")
    plot.add_argument("-o", "--output", type=Path, help="image to write; by default the basis file's name with .png")
    plot.add_argument("--max-edges", type=int, default=300, help="most edges to draw (default: %(default)s)")
    plot.add_argument("--max-features", type=int, default=40, help="most features in a column (default: %(default)s)")
    plot.set_defaults(run=_plot)
    return parser


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

    output = args.output or args.file.with_suffix(".png")
    figure = InteractionGraph.load(args.file).plot(max_edges=args.max_edges, max_features=args.max_features)
    write_bytes(output, render_png(figure).data)
    print(output)
