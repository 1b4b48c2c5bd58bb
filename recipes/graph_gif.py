"""The graphs of a run as an animated picture, for pages that show nothing but pictures.

    python -m recipes.graph_gif lightning_logs/version_0 -o graph.gif --steps 0 100 350 1000 1500 3000

`lib-lightning view` writes a film that can be stopped and clicked at.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageColor

from lib_lightning.plots.animated_layout import AnimatedLayout
from lib_lightning.plots.image import render_png
from lib_lightning.plots.palette import MODULES, MUTED, NO_MODULE, OTHER_MODULES, TEXT
from lib_lightning.viewer import Run

# Tints of each colour, from the full one to white, for transparent lines and smooth borders.
_TINTS = 9


def frames(
    run: Run, steps: Sequence[int], features: int, edges: int, width: int, keep_positions: bool = False
) -> list[Image.Image]:
    """Draw snapshots.

    Args:
        run: The run.
        steps: Steps; of each, the nearest snapshot is drawn, and no snapshot twice.
        features: Features to draw in each node layer.
        edges: Edges to draw.
        width: Width of a frame in pixels.
        keep_positions: Whether features stay where they were; otherwise each snapshot is laid out by its modules.
    """
    nearest = sorted({min(run.steps, key=lambda known: abs(known - step)) for step in steps})
    layout = AnimatedLayout(limit=features) if keep_positions else None
    drawn = []
    for step in nearest:
        figure = run.graph(step).plot(edges, features, layout=layout)
        image = Image.open(io.BytesIO(render_png(figure).data)).convert("RGB")
        drawn.append(image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS))
    # Figures are as high as they need to be; a film has one height.
    height = max(image.height for image in drawn)
    canvases = [Image.new("RGB", (width, height), "white") for _ in drawn]
    for canvas, image in zip(canvases, drawn, strict=True):
        canvas.paste(image)
    return canvases


def palette() -> Image.Image:
    """The colours of all frames: those of text and modules, and tints of them.

    Colours that are chosen for each frame give most of them to grey text and lines, and one to several modules.
    """
    colors = [ImageColor.getrgb(color) for color in (TEXT, MUTED, NO_MODULE, OTHER_MODULES, *MODULES)]
    shares = [tint / _TINTS for tint in range(_TINTS)]
    tints = {tuple(round(255 * share + (1 - share) * c) for c in color) for color in colors for share in shares}
    every = [(255, 255, 255), *sorted(tints)]
    image = Image.new("P", (1, 1))
    image.putpalette([c for color in every for c in color])
    return image


def main(args: Sequence[str] | None = None) -> None:
    """Write the picture.

    Args:
        args: Arguments of the command line; None for those of the process.
    """
    parser = argparse.ArgumentParser(prog="python -m recipes.graph_gif", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", help="folder of a run, or its log directory")
    parser.add_argument("-o", "--output", type=Path, default=Path("graph.gif"), help="the file to write")
    parser.add_argument("--steps", type=int, nargs="+", help="steps to show; all snapshots by default")
    parser.add_argument("--features", type=int, default=12, help="features to draw in each node layer")
    parser.add_argument("--edges", type=int, default=300, help="edges to draw")
    parser.add_argument("--width", type=int, default=760, help="width in pixels")
    parser.add_argument(
        "--seconds", type=float, default=1.5, help="seconds that a snapshot is shown, the last one twice"
    )
    parser.add_argument("--keep-positions", action="store_true", help="leave features where they were")
    options = parser.parse_args(args)
    run = Run(options.run)
    shape = options.features, options.edges, options.width, options.keep_positions
    first, *others = frames(run, options.steps or run.steps, *shape)
    colors = palette()
    pictures = [image.quantize(palette=colors, dither=Image.Dither.NONE) for image in (first, *others)]
    milliseconds = round(1000 * options.seconds)
    durations = [milliseconds] * len(others) + [2 * milliseconds]
    pictures[0].save(
        options.output, save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True
    )


if __name__ == "__main__":
    main()
