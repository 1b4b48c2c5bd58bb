"""The animated picture of a run."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageColor, ImageSequence

from lib_lightning.plots.palette import MODULES
from lib_lightning.viewer import Run
from recipes import graph_gif
from tests.viewer.saved_run import SavedRun

LAYERS = ("embed", "hidden", "output")


def test_a_run_becomes_a_picture_with_a_frame_for_each_snapshot(tmp_path: Path) -> None:
    SavedRun(LAYERS, snapshots=4).write(tmp_path / "lib")
    steps = Run(tmp_path).steps
    graph_gif.main([str(tmp_path), "-o", str(tmp_path / "all.gif"), "--width", "300", "--seconds", "0.5"])
    with Image.open(tmp_path / "all.gif") as image:
        shown = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
        assert image.width == 300
    assert shown == [500] * (len(steps) - 1) + [1000]


def test_the_nearest_snapshot_is_drawn_once(tmp_path: Path) -> None:
    SavedRun(LAYERS, snapshots=4).write(tmp_path / "lib")
    run = Run(tmp_path)
    drawn = graph_gif.frames(run, [run.steps[0], run.steps[0] + 1, run.steps[2]], features=3, edges=10, width=200)
    assert len(drawn) == 2
    assert {image.size for image in drawn} == {(200, drawn[0].height)}


def test_modules_keep_their_colours() -> None:
    swatches = Image.new("RGB", (300, 10 + len(MODULES)), "#DDDDDD")  # mostly grey, as graphs are
    for y, color in enumerate(MODULES):
        swatches.paste(color, (0, y, 3, y + 1))
    shown = swatches.quantize(palette=graph_gif.palette(), dither=Image.Dither.NONE).convert("RGB")
    assert [shown.getpixel((1, y)) for y in range(len(MODULES))] == [ImageColor.getrgb(color) for color in MODULES]
