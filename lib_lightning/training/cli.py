"""The command line: ``lib-lightning fit --config recipe.yaml``, and what to do with basis files afterwards."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from lib_lightning import __version__
from lib_lightning.algorithm.cost import size
from lib_lightning.api import list_node_layers, proposed_node_layers
from lib_lightning.errors import LIBError, did_you_mean, shows_tracebacks
from lib_lightning.graph import InteractionGraph
from lib_lightning.io.basis_file import write_bytes
from lib_lightning.io.basis_format import EPOCH, NUM_SAMPLES, SETTINGS, STEP, VERSIONS, WEIGHTS, WEIGHTS_HASH
from lib_lightning.metrics.summary import graph_scalars
from lib_lightning.model.batch import map_tensors
from lib_lightning.model.forward_errors import wrap_forward_errors
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.node_layer import as_node_layers
from lib_lightning.training.recipes import copy_recipe, list_recipes
from lib_lightning.training.samples import SampleBuffer
from lib_lightning.training.trace_options import add_trace_options, parse_trace_options
from lib_lightning.viewer.run import Run, write_film

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lib_lightning.training.callback import LIBCallback

# Samples with which node layers are looked for.
_NUM_SAMPLES = 8
COMMANDS = (
    "fit", "validate", "test", "predict", "nodes", "estimate", "profile", "trace", "inspect", "plot", "view", "align",
    "compare", "universal", "recipe",
)  # fmt: skip
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments; those of the process by default.
    """
    words = sys.argv[1:] if args is None else list(args)
    if words and words[0].isalpha() and words[0] not in COMMANDS:
        sys.exit(f"lib-lightning: there is no command '{words[0]}'.{did_you_mean(words[0], COMMANDS)} See --help.")
    if words and words[0] in TRAINER_COMMANDS:
        run_trainer(args)
        return
    # The other options of these commands are those of LightningCLI, which argparse does not know.
    if words and words[0] in _WITH_FIT_OPTIONS and not {"-h", "--help"} & set(words):
        run = partial(_WITH_FIT_OPTIONS[words[0]], words[1:])
    else:
        parsed = _parser().parse_args(words)
        run = partial(parsed.run, parsed)
    try:
        run()
    except (LIBError, OSError) as error:
        _exit(error)


def run_trainer(args: Sequence[str] | None) -> None:
    """Run LightningCLI, with every option of trainer, model, data and callbacks in YAML or on the command line.

    Args:
        args: Arguments, the subcommand first; those of the process by default.
    """
    from lib_lightning.training.trainer_cli import hide_advertisements, trainer_cli_for

    hide_advertisements()
    _import_from_working_directory()
    cli = trainer_cli_for(sys.argv[1:] if args is None else list(args))
    import lib_lightning.training.callback  # noqa: F401  (so that YAML may name it LIBCallback)

    try:
        cli(args=None if args is None else list(args), save_config_kwargs={"overwrite": True})
    except LIBError as error:
        _exit(error)


def _exit(error: Exception) -> NoReturn:
    """End with an error in at most five lines, or with its traceback if tracebacks are wanted."""
    if shows_tracebacks():
        raise error
    said = "\n".join(line[:400] for line in str(error).splitlines()[:5])
    sys.exit(f"lib-lightning: {said}")


def _import_from_working_directory() -> None:
    # Recipes name classes such as recipes.modular_addition.ModularAddition.
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
        required=True,
        metavar="{fit,validate,test,predict,nodes,estimate,profile,trace,inspect,plot,view,align,compare,universal,recipe}",
    )
    for command in TRAINER_COMMANDS:
        commands.add_parser(command, help=f"{command} with a Lightning trainer (see lib-lightning {command} --help)")
    nodes = commands.add_parser(
        "nodes",
        help="list where a model can be cut, by the names that node_layers takes",
        usage="lib-lightning nodes --config FILE [--all] [any option of fit]",
        description="Run a model on the first validation batch and list where it can be cut, by the names that "
        "node_layers takes, with their shapes and modules. Those proposed as node layers are marked by *.",
        epilog="Model and data are specified as for fit, by --config and its other options.",
    )
    nodes.add_argument("--all", action="store_true", help="list all names of each place")
    commands.add_parser(
        "estimate",
        help="predict time, memory and file size of a snapshot without computing it",
        usage="lib-lightning estimate --config FILE [any option of fit]",
        description="Print what a graph of the model would compute, and the predicted seconds, peak memory and size of "
        "its file on this machine. A much smaller graph is computed to measure its rate.",
        epilog="Model, data and callbacks are specified as for fit, by --config and its other options.",
    )
    commands.add_parser(
        "profile",
        help="measure the time of each step of a snapshot",
        usage="lib-lightning profile --config FILE [any option of fit]",
        description="Measure the seconds and floating-point operations of every step of a snapshot, and their ratio to "
        "the rate of large matrix products on this machine. Nothing is trained, and no files are written.",
        epilog="Model, data and callbacks are specified as for fit, by --config and its other options.",
    )
    add_trace_options(
        commands.add_parser(
            "trace",
            help="compute the snapshots of a training from its checkpoints",
            usage="lib-lightning trace --config FILE --checkpoints PATH [PATH ...] [any option of fit]",
            description="Compute the snapshots that LIBCallback would have taken, from the checkpoints of a training "
            "that had none. Started again with the same output, an interrupted trace goes on.",
            epilog="Model, data and callbacks are specified as for fit, by --config and its other options.",
        )
    )
    inspect = commands.add_parser("inspect", help="print settings, metrics and features of basis files")
    inspect.add_argument("files", nargs="+", type=Path, help="basis files (.safetensors)")
    inspect.add_argument(
        "--features", type=int, default=5, metavar="N", help="features to list per node layer (default: %(default)s)"
    )
    inspect.set_defaults(run=_inspect)
    plot = commands.add_parser("plot", help="draw the interaction graph, or the importances, of a basis file")
    plot.add_argument("file", type=Path, help="basis file (.safetensors)")
    plot.add_argument(
        "-o", "--output", type=Path, help="image to write: .png, .svg or .pdf (default: next to the basis file)"
    )
    plot.add_argument(
        "--kind", choices=("graph", "spectrum"), default="graph", help="what to draw (default: %(default)s)"
    )
    plot.add_argument("--max-edges", type=int, default=300, help="maximum number of edges (default: %(default)s)")
    plot.add_argument(
        "--max-features", type=int, default=12, help="maximum number of features per node layer (default: %(default)s)"
    )
    plot.set_defaults(run=_plot)
    view = commands.add_parser("view", help="write the animated graph of a run as one HTML file")
    view.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="log directory of a run, or the folder of one callback in it"
    )
    view.add_argument(
        "-o", "--output", type=Path, help="file to write (default: film.html in the folder of the graphs)"
    )
    view.add_argument(
        "--edges", type=int, default=400, help="maximum number of edges of each section in a snapshot (default: 400)"
    )
    view.add_argument("--every", type=int, default=1, metavar="N", help="use every Nth snapshot (default: all)")
    view.set_defaults(run=_view)
    align = commands.add_parser(
        "align",
        help="how long before or after the steepest change of a scalar the events of features come",
        description="Find where a scalar of each run changes most steeply, and print for each kind of event how many "
        "steps before or after it comes, with the spread over runs.",
    )
    align.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="log directory of a run, or its folder")
    align.add_argument(
        "--scalar", required=True, metavar="NAME", help="a scalar of the runs, such as val/loss, or a metric of graphs"
    )
    align.add_argument(
        "--kind", nargs="+", metavar="KIND", help="kinds of events, such as born or 'metric fell' (default: all)"
    )
    align.add_argument(
        "--direction", choices=("either", "rise", "fall"), default="either",
        help="which change of the scalar (default: the steeper one)",
    )  # fmt: skip
    align.add_argument(
        "--axis", choices=("auto", "linear", "log"), default="auto",
        help="axis of steps on which it is steepest (default: logarithmic if snapshots are log-spaced)",
    )  # fmt: skip
    align.add_argument(
        "--weight", choices=("importance", "equal"), default="importance",
        help="what an event counts: the importance of its feature, or all the same (default: %(default)s)",
    )  # fmt: skip
    align.add_argument(
        "--between", nargs=2, type=float, metavar=("FIRST", "LAST"), help="steps between which to look for the change"
    )
    align.add_argument("-o", "--output", type=Path, help="file to write everything to, as JSON")
    align.set_defaults(run=_align)
    compare = commands.add_parser(
        "compare",
        help="find which features of one network are in others",
        description="Match the features of the first network with those of each of the others, by their values on the "
        "same samples. Print a table; write a page with both graphs, figures and results as JSON.",
        epilog="Runs with the same validation samples need no model: their files have the values. Otherwise models and "
        "samples are those of config.yaml and the checkpoints in the log directories, which lib-lightning fit writes.",
    )
    compare.add_argument(
        "networks",
        nargs="+",
        type=Path,
        metavar="NETWORK",
        help="log directory of a run, or a basis file; at least two",
    )
    compare.add_argument("--step", type=int, help="snapshot of the runs (default: the last one of each)")
    compare.add_argument(
        "--layers",
        nargs="+",
        metavar="A=B",
        help="node layers of the first network, and those of the others to compare them with (default: the same names)",
    )
    compare.add_argument("--level", type=float, help="false discovery rate of matches (default: 0.05)")
    compare.add_argument(
        "-o",
        "--output",
        type=Path,
        help="folder to write to (default: comparison, in the folder of the first run)",
    )
    compare.set_defaults(run=_compare)
    universal = commands.add_parser(
        "universal",
        help="find which features all of many runs have",
        description="Match the features of every run with those of each other one, by their values on the same "
        "samples. Print which features how many of the runs have, and write a file that the tab and the film show.",
        epilog="Values are those of compare: runs with the same validation samples need no model.",
    )
    universal.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="log directories of runs, or a folder that contains them; baselines beside a run are left out",
    )
    universal.add_argument("--step", type=int, help="snapshot of the runs (default: the last one of each)")
    universal.add_argument("--level", type=float, help="false discovery rate of matches (default: 0.05)")
    universal.add_argument(
        "-o",
        "--output",
        type=Path,
        help="JSON file to write (default: universal.json, in the folder that contains all runs)",
    )
    universal.set_defaults(run=_universal)
    recipe = commands.add_parser("recipe", help="list the trainings that come with the package, or copy one")
    actions = recipe.add_subparsers(required=True, metavar="{list,copy}")
    actions.add_parser("list", help="list all recipes").set_defaults(run=_list_recipes)
    copy = actions.add_parser(
        "copy",
        help="copy a recipe to run or change it",
        description="Copy a recipe and the modules that it needs into recipes/ in a folder, and print how to run it.",
    )
    copy.add_argument("name", metavar="NAME", help="name of the recipe, as listed by lib-lightning recipe list")
    copy.add_argument("folder", nargs="?", type=Path, default=Path(), help="folder (default: the working directory)")
    copy.add_argument("--replace", action="store_true", help="replace files that have another content")
    copy.set_defaults(run=_copy_recipe)
    return parser


def _nodes(words: Sequence[str]) -> None:
    show_all = "--all" in words
    # Names do not depend on the device, and every machine has a CPU.
    options = [*(word for word in words if word != "--all"), "--trainer.accelerator=cpu"]
    collected = _model_and_samples(options, _NUM_SAMPLES)
    model, ((callback, batches), *_) = collected.model, collected.samples
    cuts = list_node_layers(model, batches[0], callback.spec.input_fn)
    sizes = [f"{cut.positions:,} x {cut.features:,}" for cut in cuts]
    width, size_width = max(len(cut.tap) for cut in cuts), max(map(len, [*sizes, "positions x features"]))
    print(f"  {'name':<{width}}  {'positions x features':>{size_width}}  module")
    for cut, shape in zip(cuts, sizes, strict=True):
        print(f"{'*' if cut.proposed else ' '} {cut.tap:<{width}}  {shape:>{size_width}}  {cut.module}")
        for alias in cut.aliases if show_all else ():
            print(f"    = {alias}")
    print(f"\nnode_layers: [{', '.join(_in_yaml(cut.tap) for cut in cuts if cut.proposed)}]")


def _in_yaml(name: str) -> str:
    return name if set(name).isdisjoint(":#") else f'"{name}"'


def _estimate(words: Sequence[str]) -> None:
    from lib_lightning.training.effort import RunPlanner

    collected = _model_and_samples(words)
    model = collected.model
    for callback, batches in collected.samples:
        layers = callback.node_layers or as_node_layers(proposed_node_layers(model, batches[:1], callback.spec))
        instrumented = InstrumentedModel(model, layers, callback.spec)
        planner = RunPlanner(
            collected.trainer, callback.schedule, callback.max_overhead, len(callback.computer.prefixes)
        )
        settings = callback.plan_settings(sum(map(instrumented.num_samples, batches)))
        with wrap_forward_errors(model, callback.spec):
            result = planner.plan(instrumented, batches[0], settings, estimate=True)
        plan, estimate = result.plan, result.estimate
        print(f"{callback.name}: {planner.describe(plan, callback.config.ablation is not None)}.")
        assert estimate is not None
        file_bytes = callback.file_bytes(result)
        files = (plan.snapshots or 1) * len(callback.computer.prefixes)
        in_all = f" of {files:,} files, {size(files * file_bytes)} in all" if plan.snapshots else " file"
        peak = f"{size(estimate.peak_bytes)} of memory at its peak"
        print(f"  {estimate.where}: {peak}; {size(file_bytes)} for each{in_all}.")
        for warning in result.warnings:
            print(f"  {warning}")


def _profile(words: Sequence[str]) -> None:
    from lib_lightning.training.profiling import profile_snapshot

    collected = _model_and_samples(words)
    model = collected.model
    for callback, batches in collected.samples:
        profile = profile_snapshot(model, batches, callback.node_layers, callback.config, **vars(callback.spec))
        print(f"{callback.name}: {profile}\n")


class _AllCollected(BaseException):
    """Ends fit when all samples are collected. Not an Exception, so that no handler in fit takes it for an error."""


def _builder(words: Sequence[str]) -> Callable[[], Any]:
    """A function that builds model, data and a trainer of one process from options of fit."""
    from lib_lightning.training.trainer_cli import trainer_cli_for

    _import_from_working_directory()
    cli_class: Any = trainer_cli_for(words)
    import lib_lightning.training.callback  # noqa: F401  (so that YAML may name it LIBCallback)

    class Build(cli_class):  # type: ignore[misc]
        def add_arguments_to_parser(self, parser: Any) -> None:
            # Configuration files written by fit contain these options.
            parser.add_method_arguments(self.trainer_class, "fit", skip=self.subcommands()["fit"])

    single = [f"--trainer.{option}" for option in ("devices=1", "strategy=auto", "logger=false")]
    return partial(Build, args=[*words, *single], run=False, save_config_callback=None)


@dataclass(frozen=True)
class _Collected:
    """What a command needs of a run.

    Attributes:
        model: The model, on the device that it would be trained on.
        trainer: The trainer, with its training data set up.
        samples: Each callback, or a default one, with its batches.
    """

    model: nn.Module
    trainer: pl.Trainer
    samples: list[tuple[LIBCallback, list[Any]]]


def _model_and_samples(words: Sequence[str], num_samples: int | None = None) -> _Collected:
    """Build model and data from options of fit, and run fit until the samples of all callbacks are collected.

    Args:
        words: Options of fit.
        num_samples: Number of samples of the first validation batches; None for the ``num_samples`` of each callback.

    Returns:
        Model, trainer and samples.
    """
    from lib_lightning.training.effort import training_steps

    build = _builder(words)
    from lib_lightning.training.callback import LIBCallback
    from lib_lightning.training.frameworks import Callback, callback_of_both_packages

    @callback_of_both_packages
    class Collect(Callback):
        def on_validation_batch_start(
            self, trainer: Any, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
        ) -> None:
            for callback, buffer in buffers:
                if callback.sample_config.val_dataloader == dataloader_idx:
                    buffer.add(batch)

        def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
            if all(buffer.batches if num_samples else buffer.is_full for _, buffer in buffers):
                self.on_sanity_check_end(trainer)

        def on_sanity_check_end(self, trainer: Any, *_: Any) -> None:
            training_steps(trainer)  # sets up the training data, as a plan needs them
            raise _AllCollected

        def on_train_start(self, trainer: Any, *_: Any) -> None:  # without a sanity check
            self.on_sanity_check_end(trainer)

    with _quiet():
        cli = build()
        trainer: Any = cli.trainer
        callbacks = [callback for callback in trainer.callbacks if isinstance(callback, LIBCallback)]
        buffers = [
            (callback, SampleBuffer(num_samples or callback.sample_config.num_samples))
            for callback in callbacks or [LIBCallback()]
        ]
        trainer.callbacks = [Collect()]
        trainer.num_sanity_val_steps = float("inf")
        try:
            for callback, buffer in buffers:
                for batch in () if num_samples else callback.sample_config.dataloader or ():
                    if buffer.is_full:
                        break
                    buffer.add(batch)
            trainer.fit(cli.model, datamodule=cli.datamodule)
        except _AllCollected:
            pass
        except Exception as error:
            raise LIBError(
                f"fit failed before the first validation batch of {type(cli.model).__name__} with "
                f"{type(error).__name__}: {error}"
            ) from error
    if not all(buffer.batches for _, buffer in buffers):
        raise LIBError(
            "There is no validation batch to run the model on. The model needs a validation_step, and a validation "
            "data loader that is not empty."
        )
    device = trainer.strategy.root_device
    samples = [(callback, map_tensors(buffer.batches, lambda t: t.to(device))) for callback, buffer in buffers]
    return _Collected(cli.model.to(device), trainer, samples)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's messages on hardware and data loaders, which concern training only."""
    loggers = [
        logging.getLogger(name)
        for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")
    ]
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
        origin = {key: graph.info[key] for key in (STEP, EPOCH, NUM_SAMPLES) if key in graph.info}
        print(path)
        print("  made at   ", ", ".join(f"{key} {value:,}" for key, value in origin.items()))
        if WEIGHTS_HASH in graph.info:
            print(f"  weights    {graph.info.get(WEIGHTS, 'validated')}, with hash {graph.info[WEIGHTS_HASH]}")
        print("  settings  ", ", ".join(f"{key} {value}" for key, value in graph.info.get(SETTINGS, {}).items()))
        print("  versions  ", ", ".join(f"{key} {value}" for key, value in graph.info.get(VERSIONS, {}).items()))
        for name, value in graph_scalars(list(graph.bases.values()), list(graph.edges.values())).items():
            print(f"  {name:<50} {value:>12,.6g}")
        for line in _features(graph, args.features):
            print(f"  {line}")


def _features(graph: InteractionGraph, limit: int) -> list[str]:
    """A table of the most important features of each node layer."""
    lines = []
    for layer, basis in graph.bases.items():
        order = basis.importance.argsort(descending=True, stable=True)[: max(0, limit)].tolist()
        features = [graph.feature((layer, index)) for index in order]
        width = max((len(feature.id) for feature in features), default=0)
        share = 1 / (float(basis.importance.sum()) or 1.0)
        for feature in features:
            module = "" if feature.module is None else f"  module {feature.module if feature.module >= 0 else '-'}"
            lines.append(
                f"{feature.id:<{width}}  index {feature.index:>4}  importance {feature.importance:>10.4g}  "
                f"{share * feature.importance:>6.1%}{module}  {feature.label}".rstrip()
            )
    ids = "the same in all snapshots of the run" if graph.lineages else "the index, as features are not tracked"
    what = f"features by id ({ids}); index: position in this file's bases, edges and labels"
    return [what, *lines] if lines else []


def _plot(args: argparse.Namespace) -> None:
    from lib_lightning.plots.image import render

    graph = InteractionGraph.load(args.file)
    if args.kind == "spectrum":
        output, figure = args.file.with_suffix(".spectrum.png"), graph.plot_spectrum()
    else:
        output, figure = args.file.with_suffix(".png"), graph.plot(args.max_edges, args.max_features)
    output = args.output or output
    write_bytes(output, render(figure, output.suffix.removeprefix(".")))
    print(output)


def _view(args: argparse.Namespace) -> None:
    path = write_film([Run(path) for path in args.runs], args.output, args.edges, args.every)
    print(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")


def _align(args: argparse.Namespace) -> None:
    from lib_lightning.alignment import align_events

    settings: dict[str, Any] = {name: getattr(args, name) for name in ("direction", "axis", "weight")}
    if args.between is not None:
        settings["between"] = tuple(args.between)
    found = align_events(args.runs, args.scalar, args.kind, **settings)
    print(found.table())
    if args.output is not None:
        found.save(args.output)
        print(f"\n{args.output}")


def _compare(args: argparse.Namespace) -> None:
    from lib_lightning.comparison.comparison import write_page
    from lib_lightning.plots.image import render_png
    from lib_lightning.training.compare_runs import compare_networks, read_networks

    if len(args.networks) < 2:
        raise LIBError("compare needs at least two networks.")
    layers = [pair.partition("=") for pair in args.layers or ()]
    if wrong := [a + equals + b for a, equals, b in layers if not (a and b)]:
        raise LIBError(f"--layers takes pairs such as fc1=fc2; got '{wrong[0]}'.")
    networks = read_networks(args.networks, args.step)
    found = compare_networks(networks, _model_and_batches, {a: b for a, _, b in layers} or None, args.level)
    print("\n\n".join(comparison.table() for comparison in found))
    folder = args.output or Path(networks[0].folder or "", "comparison")
    page = write_page(found, folder / "comparison.html")
    for number, comparison in enumerate(found):
        name = "comparison" if len(found) == 1 else f"comparison-{number + 1}"
        comparison.save(folder / f"{name}.json")
        write_bytes(folder / f"{name}.png", render_png(comparison.plot()).data)
    print(f"\n{page}")


def _universal(args: argparse.Namespace) -> None:
    from lib_lightning.io.universal_file import NAME
    from lib_lightning.training.compare_runs import networks_below, universal_in_networks, write_universal

    networks, common = networks_below(args.runs, args.step)
    found = universal_in_networks(networks, _model_and_batches, args.level)
    print(found.table())
    path = args.output or common / NAME
    write_universal(found, networks, path)
    print(f"\n{path}")


def _list_recipes(args: argparse.Namespace) -> None:
    recipes = list_recipes()
    width = max(len(recipe.name) for recipe in recipes)
    for recipe in recipes:
        print(f"{recipe.name:<{width}}  {recipe.summary}")
    print("\nCopy one with: lib-lightning recipe copy NAME")


def _copy_recipe(args: argparse.Namespace) -> None:
    recipe = copy_recipe(args.name, args.folder, args.replace)
    print(args.folder / "recipes" / recipe.file.name)
    print(f"Run it with: {'' if args.folder == Path() else f'cd {args.folder} && '}{recipe.command}")


def _model_and_batches(words: Sequence[str]) -> tuple[nn.Module, list[Any], dict[str, Any]]:
    """Model and samples of the first callback, and how the model is called."""
    collected = _model_and_samples(words)
    callback, batches = collected.samples[0]
    return collected.model, batches, vars(callback.spec)


def _trace(words: Sequence[str]) -> None:
    options, rest = parse_trace_options(words)
    build = _builder(rest)
    from lib_lightning.training.trainer_trace import trace_in_trainer

    def built() -> Any:
        with _quiet():
            return build()

    trace_in_trainer(built, options.source(), options.logs, options.watch)


# Commands that take the options of fit.
_WITH_FIT_OPTIONS = {"nodes": _nodes, "estimate": _estimate, "profile": _profile, "trace": _trace}
