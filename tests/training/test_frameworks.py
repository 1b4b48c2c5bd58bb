"""The same behaviour for both packages that Lightning is distributed as, in whatever order they are imported."""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lib_lightning import LIBCallback
from lib_lightning.errors import LIBError
from lib_lightning.training.frameworks import PACKAGES, is_instance, member, package_of
from lib_lightning.training.trainer import check_strategy, is_sharded
from lib_lightning.training.trainer_cli import trainer_cli_for

ROOT = Path(__file__).parents[2]
TRAINING = ROOT / "lib_lightning" / "training"
NODE_LAYERS = ["net.0", "net.2:input", "output"]
each_package = pytest.mark.parametrize("package", PACKAGES)


def model_of(package: str) -> Any:
    """A model for the trainer of a package, which logs in its forward pass."""
    pl = importlib.import_module(package)

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            self.log("mean_output", y.mean(), on_step=True, on_epoch=True)
            return y

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), 0.01)

        def train_dataloader(self) -> DataLoader[Any]:
            x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
            return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8)

        val_dataloader = train_dataloader

    pl.seed_everything(0, verbose=False)
    return Model()


def fit(package: str, folder: Path, *callbacks: Any, ckpt_path: str | None = None, **options: Any) -> Any:
    """Train a model with the trainer of a package; return the trainer."""
    pl = importlib.import_module(package)
    defaults: dict[str, Any] = {
        "default_root_dir": folder, "max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False,
        "enable_model_summary": False, "log_every_n_steps": 1, "callbacks": list(callbacks),
    }  # fmt: skip
    trainer = pl.Trainer(**(defaults | options))
    trainer.fit(model_of(package), ckpt_path=ckpt_path)
    return trainer


def logged(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder / "lightning_logs" / "version_0"), {"images": 0, "scalars": 0})
    events.Reload()
    return events


def values(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


@each_package
def test_training_and_its_log_are_the_same_with_the_callback(package: str, tmp_path: Path) -> None:
    without = fit(
        package, tmp_path / "without", logger=member(package, "loggers.TensorBoardLogger")(tmp_path / "without")
    )
    callback = LIBCallback(NODE_LAYERS, every_n_steps=1)
    trainer = fit(
        package, tmp_path / "with", callback, logger=member(package, "loggers.TensorBoardLogger")(tmp_path / "with")
    )
    assert callback.snapshots == 9
    folder = tmp_path / "with" / "lightning_logs" / "version_0"
    assert (folder / "lib" / "final.safetensors").exists()
    expected, found = logged(tmp_path / "without"), logged(tmp_path / "with")
    for tag in ("mean_output_step", "val_loss"):
        assert values(found, tag) == values(expected, tag), "a snapshot logs nothing of the model's own"
    assert "lib/features/total" in found.Tags()["scalars"]
    assert len(found.Images("lib/graph")) == 9
    for a, b in zip(without.lightning_module.parameters(), trainer.lightning_module.parameters(), strict=True):
        assert torch.equal(a, b)


@each_package
@pytest.mark.parametrize("of_logger", PACKAGES)
@pytest.mark.parametrize("kind", ["CSVLogger", "TensorBoardLogger"])
def test_files_are_in_the_folder_of_the_run(package: str, of_logger: str, kind: str, tmp_path: Path) -> None:
    logger = member(of_logger, f"loggers.{kind}")(tmp_path, name="name")
    fit(package, tmp_path, LIBCallback(NODE_LAYERS, every_n_validations=1), logger=logger, max_epochs=1)
    assert (tmp_path / "name" / "version_0" / "lib" / "final.safetensors").exists()


@pytest.mark.parametrize(("first", "second"), list(itertools.product(PACKAGES, PACKAGES)))
def test_checkpoints_are_resumed_by_either_package(first: str, second: str, tmp_path: Path) -> None:
    checkpoint = member(first, "callbacks.ModelCheckpoint")(tmp_path, filename="last")
    interrupted = LIBCallback(NODE_LAYERS, every_n_validations=1)
    fit(first, tmp_path, interrupted, checkpoint, max_epochs=1, logger=False)
    resumed = LIBCallback(NODE_LAYERS, every_n_validations=1)
    fit(second, tmp_path, resumed, ckpt_path=str(tmp_path / "last.ckpt"), logger=False)
    assert (interrupted.snapshots, resumed.snapshots) == (1, 2)
    assert len(resumed.state.history.steps) == 2


@each_package
@pytest.mark.parametrize(
    ("strategy", "is_refused"), [("DeepSpeedStrategy", True), ("FSDPStrategy", True), ("DDPStrategy", False)]
)
def test_the_same_strategies_are_refused(package: str, strategy: str, is_refused: bool) -> None:
    cls = member(package, f"strategies.{strategy}")
    trainer: Any = SimpleNamespace(strategy=cls.__new__(cls))
    if is_refused:
        with pytest.raises(LIBError, match=f"LIBCallback does not work with {strategy}"):
            check_strategy(trainer, None)
    else:
        check_strategy(trainer, torch.float64)


@each_package
def test_sharded_weights_are_recognised(package: str) -> None:
    trainer: Any = SimpleNamespace(strategy=member(package, "strategies.ModelParallelStrategy")())
    assert is_sharded(trainer)
    with pytest.raises(LIBError, match="cannot compute in float64 on a model whose weights are sharded"):
        check_strategy(trainer, torch.float64)


@each_package
def test_two_callbacks_of_one_name_are_refused(package: str, tmp_path: Path) -> None:
    pl = importlib.import_module(package)
    with pytest.raises(LIBError, match="give each a name="):
        fit(
            package,
            tmp_path,
            LIBCallback(NODE_LAYERS, every_n_validations=1),
            LIBCallback(NODE_LAYERS, every_n_validations=1),
            logger=False,
        )
    assert pl.Trainer(
        callbacks=LIBCallback(NODE_LAYERS, every_n_validations=1), logger=False, accelerator="cpu"
    ).callbacks


@each_package
def test_other_callbacks_can_monitor_it(package: str, tmp_path: Path) -> None:
    stop = member(package, "callbacks.EarlyStopping")("lib/age", patience=1)
    checkpoint = member(package, "callbacks.ModelCheckpoint")(tmp_path, monitor="lib/features/total", save_top_k=1)
    trainer = fit(
        package, tmp_path, stop, LIBCallback(NODE_LAYERS, every_n_validations=1), checkpoint, logger=False, max_epochs=9
    )
    assert trainer.current_epoch == 2, "stopped, since the age is always 0"
    assert checkpoint.best_model_path


# the command line

A, B = PACKAGES

OWN_CLI = """
import sys
import {package} as pl
from {package}.cli import LightningCLI
from {package}.demos.boring_classes import BoringModel
LightningCLI(BoringModel, run=True, save_config_callback=None)
"""


def config_of(folder: Path, name: str) -> str:
    """Configuration of a run of two steps, in which the callback has this name."""
    callback = f"[{{class_path: {name}, init_args: {{node_layers: ['layer:input', output]}}}}]"
    options = (
        "max_steps: 2, limit_val_batches: 1, accelerator: cpu, enable_progress_bar: false, enable_checkpointing: false"
    )
    path = folder / "config.yaml"
    path.write_text(f"trainer: {{{options}, default_root_dir: {folder}, logger: false, callbacks: {callback}}}\n")
    return str(path)


def python(*args: str) -> str:
    done = subprocess.run(
        [sys.executable, *args], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("package", "name"), [(A, "LIBCallback"), (B, "LIBCallback"), (B, "lib_lightning.LIBCallback")]
)
def test_the_users_own_command_line(package: str, name: str, tmp_path: Path) -> None:
    needed = "import lib_lightning.training.callback\n" if name == "LIBCallback" else ""
    python("-c", needed + OWN_CLI.format(package=package), "fit", "--config", config_of(tmp_path, name))
    assert (tmp_path / "lib" / "final.safetensors").exists()


def test_our_command_line_takes_models_of_either_package(tmp_path: Path) -> None:
    config, name = config_of(tmp_path, "LIBCallback"), f"{B}.demos.boring_classes.BoringModel"
    assert "* output" in python("-m", "lib_lightning", "nodes", "--config", config, f"--model={name}")
    with Path(config).open("a") as file:
        file.write(f"model: {{class_path: {name}}}\n")
    python("-m", "lib_lightning", "fit", "--config", config)
    assert (tmp_path / "lib" / "final.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "package"),
    [
        ([], A),
        (["fit", "--model", f"{B}.demos.boring_classes.BoringModel"], B),
        ([f"--model.class_path={B}.demos.boring_classes.BoringModel", "--trainer.max_steps=1"], B),
        (["--model=BoringModel"], A),
        (["--model=no.such.Model"], A),
        (["--config"], A),
        (["--config=no such file"], A),
        ([f"--model={B}.LightningModule", f"--model={A}.LightningModule"], A),
    ],
)
def test_the_model_decides_on_the_package(words: list[str], package: str) -> None:
    assert package_of(trainer_cli_for(words)) == package


# imports

OURS = "lib_lightning.training.callback"
ORDERS = [(OURS,), (OURS, B), (B, OURS), (OURS, B, A), (A, OURS, B)]
REPORT = """
import sys
from lib_lightning import LIBCallback
for package in {packages}:
    if package in sys.modules:
        base = sys.modules[package].Callback
        assert issubclass(LIBCallback, base), package
        assert isinstance(made, base), package
        assert LIBCallback in base.__subclasses__(), "found by its name on the command line"
        trainer = sys.modules[package].Trainer(callbacks=made, logger=False, accelerator="cpu")
        assert made in trainer.callbacks
waiting = [finder for finder in sys.meta_path if type(finder).__module__ == "lib_lightning.training.frameworks"]
assert not [f for f in waiting if f._package in sys.modules], "no finder stays once it has done its work"
print("imported:", *(package for package in {packages} if package in sys.modules))
"""


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_any_order_of_imports(order: tuple[str, ...]) -> None:
    make = "from lib_lightning import LIBCallback; made = LIBCallback(['a', 'b'])"
    lines = [make if name == OURS else f"import {name}" for name in order]
    output = python("-W", "ignore", "-c", "\n".join(lines) + REPORT.format(packages=PACKAGES))
    (printed,) = (line.split()[1:] for line in output.splitlines() if line.startswith("imported:"))
    # A callback needs one of the two, so that the first one is imported where the user has imported none before.
    own = [PACKAGES[0]] if order[0] == OURS else []
    assert printed == [name for name in PACKAGES if name in (*order, *own)], "only what is needed"


def test_no_module_imports_either_package_itself() -> None:
    for path in TRAINING.glob("*.py"):
        tree = ast.parse(path.read_text())
        for_types = {
            inner for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            for inner in ast.walk(node)
        }  # fmt: skip
        for node in set(ast.walk(tree)) - for_types:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] in ("lightning", "pytorch_lightning")], path.name


def test_every_class_that_is_looked_for_is_in_both_packages() -> None:
    calls = [
        call for path in TRAINING.glob("*.py") for call in re.findall(r"is_instance\(([^()]*)\)", path.read_text())
    ]
    names = {name for call in calls for name in re.findall(r'"([\w.]+)"', call)}
    assert len(names) > 6
    for package, name in itertools.product(PACKAGES, names):
        assert isinstance(member(package, name), type), f"{package} has no {name}"


@each_package
def test_objects_are_told_apart(package: str) -> None:
    stop = member(package, "callbacks.EarlyStopping")("loss")
    assert is_instance(stop, "callbacks.EarlyStopping")
    assert is_instance(stop, "loggers.Logger", "Callback")
    assert not is_instance(stop, "loggers.Logger", "no.such.name")
    assert package_of(stop) == package_of(model_of(package)) == package
