"""Which features of a language model form when? From the checkpoints of a training that never saw this library.

    python -m recipes.formation                       # train, trace, measure and draw, into runs/formation
    python -m recipes.formation --committed           # the result that is committed here

`recipes.scipy_lm`, a program of its own, trains a small GPT-2 on the documentation of SciPy with Hugging Face's
Trainer, and leaves 17 checkpoints. `lib_lightning.trace` takes a snapshot of each, and names features by what the
places have in common at which they are most active. Here, features are grouped by what their names speak of: the
position, kinds of tokens, single tokens. On other text all features of a group are held at their means, and the loss
that this costs is measured. Beside it are the losses of n-gram models of the same text, and how much attention the
token before gets.

Four minutes of one CPU core. Started again, checkpoints and snapshots that are there are not computed again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor, nn

from lib_lightning import InteractionGraph, NodeLayer, trace
from lib_lightning.features import TokenRenderer
from lib_lightning.interventions import MEAN, edit_features
from lib_lightning.labels import ExampleLabels
from lib_lightning.plots.image import render_png
from lib_lightning.plots.palette import MODULES, MUTED, TEXT
from lib_lightning.plots.steps_axis import set_step_axis
from lib_lightning.viewer import Run

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "formation.json"
STEPS = 3000
# The residual stream before the first block and after each.
LAYERS = {"embedding": "transformer.h.0:input", "block1": "transformer.h.0", "block2": "transformer.h.1"}
PLACES = ("token and position embedding", "after block 1", "after block 2")
# Pieces of 64 tokens that features are computed on and, these and others, named on; and those after them that losses
# without features are measured on.
SAMPLES, NAMED, MEASURED = 128, 512, 128
# Pieces that the training measures its loss on, and n-gram models here.
EVALUATED = 256
# What a name speaks of, by how it begins; all other names are those of kinds of tokens.
POSITION, KIND, TOKEN, OTHER = "positions", "kinds of tokens", "single tokens", "text around, or no name"
STARTS = {
    POSITION: ("position", "early position", "late position"),
    TOKEN: ("“",),
    OTHER: ("before “", "after “", "samples with “"),
}
GROUPS = (POSITION, KIND, TOKEN, OTHER)
# What the key of the figure adds.
EXAMPLES = {POSITION: "", KIND: " (letters, spaces)", TOKEN: " (“the”)", OTHER: ""}
N_GRAMS = ("token frequencies", "pairs of tokens", "triples of tokens")
# Subtracted from each count of an n-gram, and given to shorter ones.
_DISCOUNT = 0.75
# Features matter from this cost on, in nats a token; costs below the other are drawn at the lower end of the axis.
MATTERS, _FLOOR = 0.05, 0.01


def train(folder: Path, steps: int = STEPS, *options: str) -> None:
    """Train in a process of its own, unless the last checkpoint is there.

    Args:
        folder: Folder for checkpoints.
        steps: Number of steps.
        options: Other options of the program.
    """
    if (folder / f"checkpoint-{steps}" / "trainer_state.json").exists():
        return
    command = [sys.executable, "-m", "recipes.scipy_lm", f"--folder={folder.resolve()}", f"--steps={steps}", *options]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise SystemExit("The training has failed, for the reason above.")


def take_snapshots(training: Path, logs: Path) -> Run:
    """Take a snapshot of each checkpoint.

    Args:
        training: Folder of the training.
        logs: The log directory.

    Returns:
        The run.
    """
    from transformers import AutoTokenizer

    text = held_out(training)[:NAMED]
    return trace(
        load(training, 0),
        training,
        [{"input_ids": tokens, "labels": tokens} for tokens in text.split(64)],
        [NodeLayer([tap], name=name) for name, tap in LAYERS.items()],
        logs,
        skip_positions=1,  # which has no token before it
        num_samples=min(SAMPLES, len(text)),
        n_probes=4,
        n_pushed=4,
        final_metric="fisher",
        labeller=ExampleLabels(),
        renderer=TokenRenderer(AutoTokenizer.from_pretrained(training)),
    )


def held_out(training: Path) -> Tensor:
    """Text that was not trained on, as tokens ``(n, 64)``."""
    text: Tensor = torch.load(training / "text" / "held_out.pt", weights_only=True)
    return text


def load(training: Path, step: int) -> nn.Module:
    """The model at a checkpoint."""
    from transformers import AutoModelForCausalLM

    # Only this implementation returns what is attended to.
    folder = training / f"checkpoint-{step}"
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model


def group_of(name: str) -> str:
    """What the name of a feature speaks of, at the end that it predicts better, which comes first.

    Args:
        name: The name.

    Returns:
        One of `GROUPS`.

    Example:
        >>> [group_of(name) for name in ("high: “ the” “ a”; low: digit", "low: early position", "high: no letter", "")]
        ['single tokens', 'positions', 'kinds of tokens', 'text around, or no name']
    """
    said = name.partition(": ")[2]
    found = [group for group, starts in STARTS.items() if said.startswith(starts)]
    return found[0] if found else KIND if said else OTHER


def measure(training: Path, run: Run) -> dict[str, Any]:
    """What the figure shows.

    Args:
        training: Folder of the training.
        run: Its snapshots.

    Returns:
        Numbers and strings, as they are committed.
    """
    state = json.loads((training / f"checkpoint-{run.steps[-1]}" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    trained_on: Tensor = torch.load(training / "text" / "training.pt", weights_only=True)
    text = held_out(training)
    other = text[NAMED : NAMED + MEASURED] if len(text) > NAMED else text
    found: dict[str, Any] = {
        "step": run.steps,
        "loss": [round(losses[step], 4) for step in run.steps],
        "n-grams": [round(x, 4) for x in n_gram_losses(trained_on.flatten(), text[:EVALUATED], len(N_GRAMS))],
        "attention": [],
        "layers": {name: [] for name in LAYERS},
    }
    for step in run.steps:
        graph, model = run.graph(step), load(training, step)
        found["attention"].append(attention_to_token_before(model, other))
        for name, layers in found["layers"].items():
            layers.append(_groups(graph, name, model, other))
    return found


def _groups(graph: InteractionGraph, layer: str, model: nn.Module, text: Tensor) -> dict[str, Any]:
    """For each group of features of a node layer, how many there are, and the loss that it costs to hold them."""
    groups = [group_of(name) for name in graph.labels[layer]]
    loss = _loss(graph, model, text, {})
    without = _loss(graph, model, text, {(layer, k): MEAN for k in range(len(groups))})
    found: dict[str, Any] = {"all": round(without - loss, 4)}
    for group in GROUPS:
        those = [k for k, one in enumerate(groups) if one == group]
        cost = _loss(graph, model, text, {(layer, k): MEAN for k in those}) - loss if those else 0.0
        found[group] = [len(those), round(cost, 4)]
    return found


def _loss(graph: InteractionGraph, model: nn.Module, text: Tensor, edits: Mapping[Any, float]) -> float:
    with torch.no_grad(), edit_features(model, graph, edits) if edits else nullcontext():
        return float(model(input_ids=text, labels=text).loss)


def attention_to_token_before(model: nn.Module, text: Tensor) -> list[float]:
    """How much of its attention each head of the first block gives to the token before.

    Args:
        model: The model.
        text: Tokens, shape ``(n, S)``.

    Returns:
        Mean over all positions but the first two, for each head.
    """
    with torch.no_grad():
        attention = model(input_ids=text, output_attentions=True).attentions[0]
    before = attention.diagonal(-1, -2, -1)[..., 1:]
    return [round(float(x), 4) for x in before.mean((0, 2))]


def n_gram_losses(training: Tensor, text: Tensor, longest: int) -> list[float]:
    """Cross entropies of n-gram models, which subtract a part of each count and give it to shorter n-grams.

    The method is absolute discounting with interpolation (Ney, Essen and Kneser 1994).

    Args:
        training: Tokens to count, shape ``(m,)``.
        text: Tokens to predict from those before in the same row, shape ``(n, S)``; the first of a row is given.
        longest: The longest n-grams.

    Returns:
        For n-grams of 1, 2, ... tokens the mean loss in nats a token. Where a row has fewer tokens before, these are
        used.

    Example:
        >>> tokens = torch.tensor([0, 1] * 50)
        >>> [round(loss, 2) for loss in n_gram_losses(tokens, tokens.view(10, 10), 2)]
        [0.69, 0.01]
    """
    V = int(max(training.max(), text.max())) + 1
    targets = text[:, 1:]
    p = torch.full(targets.shape, 1 / V, dtype=torch.float64)
    found = []
    for n in range(1, longest + 1):
        # Each n-gram, and the tokens before its last one, as one number.
        last = training[n - 1 :]
        contexts = torch.zeros_like(last)
        for k in range(n - 1):
            contexts = contexts * V + training[k : len(last) + k]
        grams, counts = (contexts * V + last).unique(return_counts=True)
        before, totals = contexts.unique(return_counts=True)
        followers = (grams // V).unique(return_counts=True)[1]
        asked, is_known = torch.zeros_like(targets), torch.ones_like(targets, dtype=torch.bool)
        for k in range(n - 1):  # tokens before the target, from the nearest one on
            asked[:, k:] += text[:, : text.shape[1] - 1 - k] * V**k
            is_known[:, :k] = False
        count = _looked_up(asked * V + targets, grams, counts)
        total, kinds = _looked_up(asked, before, totals), _looked_up(asked, before, followers)
        longer = ((count - _DISCOUNT).clamp(min=0) + _DISCOUNT * kinds * p) / total.clamp(min=1)
        p = torch.where((total > 0) & is_known, longer, p)
        found.append(float(-p.log().mean()))
    return found


def _looked_up(asked: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Values of sorted keys; 0 where there is none."""
    at = torch.searchsorted(keys, asked).clamp(max=len(keys) - 1)
    return torch.where(keys[at] == asked, values[at], 0).double()


def first_step(found: Mapping[str, Any], layer: str, group: str) -> int | None:
    """The first step at which it costs something to hold the features of a group; None if it never does."""
    costs = [one[group][1] for one in found["layers"][layer]]
    return next((step for step, cost in zip(found["step"], costs, strict=True) if cost >= MATTERS), None)


def report(found: Mapping[str, Any]) -> str:
    """When the features of each group begin to matter, and what they are worth in the end.

    Args:
        found: As `measure` returns it.

    Returns:
        A table in Markdown.
    """
    lines = [f"| features of | {' | '.join(PLACES)} |", "|---" * (1 + len(PLACES)) + "|"]
    for group in GROUPS:
        cells = []
        for layer, of_layer in found["layers"].items():
            step, (count, cost) = first_step(found, layer, group), of_layer[-1][group]
            cells.append(f"{'never' if step is None else f'from step {step:,}'}; {count} in the end, {cost:.2f}")
        lines.append(f"| {group} | {' | '.join(cells)} |")
    return "\n".join(lines)


def story(found: Mapping[str, Any]) -> str:
    """What the results show, as docs/trace.md says it.

    Args:
        found: As `measure` returns it.

    Returns:
        Sentences, in one line.
    """
    kinds, tokens = (first_step(found, "block2", group) or 0 for group in (KIND, TOKEN))
    positions = first_step(found, "embedding", POSITION) or 0
    steps, end = found["step"], found["step"][-1]
    earlier = steps[steps.index(positions) - 2]

    def worth(layer: str, step: int, group: str) -> str:
        return f"{found['layers'][layer][steps.index(step)][group][1]:.2f}"

    return (
        f"Up to step {steps[steps.index(kinds) - 1]} no feature matters: the model learns how frequent tokens are. "
        f"After block 2, features of kinds of tokens (punctuation, starts of words) come first, worth "
        f"{worth('block2', kinds, KIND)} nats a token at step {kinds}, when those of single tokens are worth "
        f"{worth('block2', kinds, TOKEN)}; at step {tokens} it is {worth('block2', tokens, KIND)} and "
        f"{worth('block2', tokens, TOKEN)}. Features of positions come last, as the first block begins to look at "
        f"the token before: in the embedding they are worth {worth('embedding', earlier, POSITION)} nats at step "
        f"{earlier}, "
        f"{worth('embedding', positions, POSITION)} at step {positions} and {worth('embedding', end, POSITION)} in the "
        f"end, and at step {crossed(found)} the loss is below that of pairs of tokens ({found['n-grams'][1]:.2f})."
    )


def draw(found: Mapping[str, Any]) -> Figure:
    """Draw losses and attention, and below them what the features of each node layer are worth, by group.

    Args:
        found: As `measure` returns it.

    Returns:
        The figure, which is 1,000 pixels wide.
    """
    steps = found["step"]
    figure = Figure(figsize=(10, 6.6), dpi=100, facecolor="white")
    title = "When the features of a small GPT-2 form, by what they respond to"
    figure.text(0.012, 0.955, title, fontsize=15, weight="bold", color=TEXT)
    grid = figure.add_gridspec(2, 6, left=0.082, right=0.985, top=0.885, bottom=0.135, hspace=0.6, wspace=0.9)
    loss, attention = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
    _entitle(loss, "loss on other text")
    loss.set_ylabel("nats a token", fontsize=9.5, color=MUTED)
    loss.plot(steps, found["loss"], "-o", color=TEXT, lw=1.8, ms=3)
    loss.set_ylim(min(found["loss"] + found["n-grams"]) - 0.2)
    for k, (name, value) in enumerate(zip(N_GRAMS, found["n-grams"], strict=True)):
        loss.axhline(value, color=MUTED, lw=0.9, ls=(0, (4, 2)), zorder=1)
        loss.annotate(
            f"{name} alone: {value:.2f}", (0.01 if k else 0.99, value), xycoords=("axes fraction", "data"),
            xytext=(0, 3), textcoords="offset points", ha="left" if k else "right", fontsize=9, color=MUTED,
        )  # fmt: skip
    _entitle(attention, "attention to the token before, heads of block 1")
    attention.set_ylabel("mean weight", fontsize=9.5, color=MUTED)
    for head in zip(*found["attention"], strict=True):
        attention.plot(steps, head, "-o", color=TEXT, lw=1.2, ms=2.5)
    attention.set_ylim(0)
    even = found["attention"][0][0]
    attention.axhline(even, color=MUTED, lw=0.9, ls=(0, (4, 2)), zorder=1)
    attention.annotate(
        f"all tokens before alike: {even:.2f}", (0.01, even), xycoords=("axes fraction", "data"), xytext=(0, -12),
        textcoords="offset points", fontsize=9, color=MUTED,
    )  # fmt: skip
    attention.annotate(
        "from here on the loss is\nbelow that of pairs of tokens", (crossed(found), 0.96),
        xycoords=("data", "axes fraction"), xytext=(-5, 0), textcoords="offset points", ha="right", va="top",
        fontsize=9, color=MUTED,
    )  # fmt: skip
    colors = dict(zip(GROUPS, (MODULES[6], MODULES[2], MODULES[0], MUTED), strict=True))
    highest = 1.5 * max(layer[group][1] for layers in found["layers"].values() for layer in layers for group in GROUPS)
    for k, (place, layers) in enumerate(zip(PLACES, found["layers"].values(), strict=True)):
        axes = figure.add_subplot(grid[1, 2 * k : 2 * k + 2])
        _entitle(axes, place)
        for group in GROUPS:
            axes.plot(steps, [max(one[group][1], _FLOOR) for one in layers], "-o", color=colors[group], lw=1.8, ms=3)
        axes.set_yscale("log")
        axes.set_ylim(0.9 * _FLOOR, max(highest, 10 * _FLOOR))
        axes.set_yticks([0.01, 0.1, 1], ["≤ 0.01", "0.1", "1"] if k == 0 else [""] * 3)
        axes.minorticks_off()
        if k == 0:
            axes.set_ylabel("nats a token", fontsize=9.5, color=MUTED)
    worth = "What features are worth: the loss that it costs to hold all those of a colour at their means"
    figure.text(0.012, 0.498, worth, fontsize=12, weight="bold", color=TEXT)
    for axes in figure.axes:
        set_step_axis(axes, steps)
        axes.axvline(crossed(found), color=MUTED, lw=1.1, ls=(0, (1, 2)), zorder=1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, colors=MUTED)
    figure.text(0.53, 0.065, "training steps", ha="center", fontsize=10, color=MUTED)
    figure.text(0.012, 0.021, "features of", fontsize=10, color=TEXT)
    handles = [Line2D([], [], color=colors[group], marker="o", ms=3, lw=1.8) for group in GROUPS]
    figure.legend(
        handles, [f"{group}{EXAMPLES[group]}" for group in GROUPS], loc="lower left",
        bbox_to_anchor=(0.105, -0.008), ncols=len(GROUPS), frameon=False, fontsize=10, labelcolor=TEXT,
        handlelength=1.6, columnspacing=1.8,
    )  # fmt: skip
    return figure


def _entitle(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, weight="bold", color=TEXT)


def crossed(found: Mapping[str, Any]) -> int:
    """The first step whose loss is below that of pairs of tokens; the last step if there is none."""
    limit = found["n-grams"][N_GRAMS.index("pairs of tokens")]
    return next((s for s, loss in zip(found["step"], found["loss"], strict=True) if loss < limit), found["step"][-1])


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure with 96 colours, for pages that people load."""
    image = Image.open(BytesIO(render_png(figure).data)).convert("RGB").quantize(96)
    image.save(path, optimize=True)


def main(args: Sequence[str] | None = None) -> None:
    """Train, trace, measure, draw, and print."""
    parser = argparse.ArgumentParser(prog="python -m recipes.formation", description=(__doc__ or "").split("\n")[0])
    folder = Path("runs/formation")
    parser.add_argument("--folder", type=Path, default=folder, help="where to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the training (default: %(default)s)")
    parser.add_argument("--documents", type=int, help="train on so many docstrings only")
    parser.add_argument("--committed", action="store_true", help="only print the result that is committed")
    parser.add_argument("--commit", action="store_true", help="also write the committed results and their figure")
    parsed = parser.parse_args(args)
    if parsed.committed:
        sys.stdout.write(report(json.loads(RESULTS.read_text())) + "\n")
        return
    if missing := [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"This recipe needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    training, logs = parsed.folder / "training", parsed.folder / "logs"
    train(training, parsed.steps, *([] if parsed.documents is None else [f"--documents={parsed.documents}"]))
    run = take_snapshots(training, logs)
    found = measure(training, run)
    targets = [(parsed.folder / "formation.json", parsed.folder / "formation.png")]
    if parsed.commit:
        targets.append((RESULTS, ROOT / "docs" / "images" / "formation.png"))
    for results, figure in targets:
        results.write_text(json.dumps(found, ensure_ascii=False) + "\n")
        write_png(draw(found), figure)
    sys.stdout.write(
        f"\nFrom which step on it costs {MATTERS} nats a token to hold features at their means, and what it costs in "
        f"the end:\n\n{report(found)}\n\n"
        f"The loss is below that of pairs of tokens, {found['n-grams'][1]:.2f}, from step "
        f"{crossed(found):,} on.\n\n"
        f"  figure        {targets[0][1]}\n"
        f"  results       {targets[0][0]}\n"
        f"  checkpoints   {training}\n"
        f"  the features  tensorboard --logdir {logs}   (tab LIB)\n"
        f"  in one file   lib-lightning view {logs}\n"
    )


if __name__ == "__main__":
    main()
