"""The callback that trains sparse autoencoders: unchanged training, the right activations, budget, state and errors."""

from __future__ import annotations

import copy
import csv
import importlib
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lib_lightning import LIBCallback, NodeLayer, SAETrainer
from lib_lightning.dictionaries.topk_sae import TopKSAE
from lib_lightning.dictionaries.topk_training import TopKTraining
from lib_lightning.errors import LIBError
from tests.dictionaries.test_topk_sae import Planted
from tests.tiny_training import Classifier, trainer_of
from tests.training.test_callback import run
from tests.training.test_distributed import torchrun
from tests.training.test_frameworks import each_package, fit

pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS = ["net.0:input", "net.4:input"]


class Checkpointed(Classifier):
    """Computes its hidden layer again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net[4](checkpoint(self.net[:4], x, use_reentrant=False))


class Compiled(Classifier):
    """Runs compiled code."""

    def __init__(self) -> None:
        super().__init__()
        self.net.compile(backend="eager")


class Failing(Classifier):
    """Works in training and validation and, after some steps, fails in evaluation mode elsewhere, with a mess."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.trainer.training and self.trainer.global_step > 2:
            torch.rand(3)
            self.train()
            self.net(x)
            raise RuntimeError("the model fails")
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (Classifier, {}),
        (Classifier, {"accumulate_grad_batches": 2, "num_sanity_val_steps": 0}),
        (Classifier, {"precision": "bf16-mixed", "val_check_interval": 0.5, "gradient_clip_val": 0.1}),
        (Classifier, {"precision": "64-true"}),
        (Classifier, {"precision": "bf16-true"}),
        (Checkpointed, {}),
        (Compiled, {}),
        (Failing, {}),
    ],
)
def test_training_is_bit_identical(
    model: type[Classifier], options: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = SAETrainer(LAYERS, n_latents=12, k=2, every_n_batches=1)
    without = run(Classifier() if model is Failing else model(), tmp_path, max_epochs=7, **options)
    found = run(model(), tmp_path, callback, max_epochs=7, **options)
    assert found == without
    said = [record.getMessage() for record in caplog.records if record.name == "lib_lightning.training.sae_trainer"]
    if model is Failing:
        assert said == [
            "sae: a batch was left out, and training continues. RuntimeError: the model fails",
            "sae: 3 batches in a row have failed: no more of them are tried. RuntimeError: the model fails",
        ]
        assert [t.n_seen for t in callback._trainings.values()] == [24, 24]
        assert callback.saes == {}
    else:
        assert said == []
        assert all(t.n_seen == 7 * 48 and t.n_steps >= 4 for t in callback._trainings.values())


@each_package
def test_both_packages(package: str, tmp_path: Path) -> None:
    callback = SAETrainer("net.2:input", every_n_batches=1)
    expected, trainer = fit(package, tmp_path / "without"), fit(package, tmp_path / "with", callback, max_epochs=17)
    assert isinstance(callback, importlib.import_module(package).Callback)
    longer = fit(package, tmp_path / "longer", max_epochs=17)
    for a, b in zip(longer.lightning_module.parameters(), trainer.lightning_module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert expected.global_step == 8
    assert 0 < trainer.callback_metrics["sae/unexplained_variance/net.2.input"] < 1.5
    assert len(list((tmp_path / "with").rglob("sae/net.2.input.safetensors"))) == 1


class Recorded(pl.LightningModule):
    """Any network on any batches, whose loss is the mean square of its output."""

    def __init__(self, network: nn.Module, batches: list[Any], run: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.net, self.batches, self.run = network, batches, run

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.run(self.net, batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)


def perceptron() -> tuple[Recorded, str, str, Callable[[Tensor, Any], Tensor]]:
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.ReLU(), nn.Linear(6, 2))
    batches = [torch.randn(9, 5) for _ in range(4)]
    return Recorded(net, batches, lambda net, x: net(x)), "net.4:input", "net.4", lambda a, batch: a


def convolutions() -> tuple[Recorded, str, str, Callable[[Tensor, Any], Tensor]]:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(48, 2))
    batches = [torch.randn(3, 1, 8, 8) for _ in range(4)]
    # Channels are dimensions, and each place of each image is a sample.
    return Recorded(net, batches, lambda net, x: net(x)), "net.2:input", "net.2", lambda a, x: a.movedim(1, -1)


def language_model(kind: str) -> tuple[Recorded, str, str, Callable[[Tensor, Any], Tensor]]:
    import transformers

    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=31, n_embd=12, n_layer=2, n_head=2, n_positions=16)
        net, place = transformers.GPT2LMHeadModel(config), "transformer.h.1"
    else:
        config = transformers.LlamaConfig(
            vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=20, max_position_embeddings=16,
        )  # fmt: skip
        net, place = transformers.LlamaForCausalLM(config), "model.layers.1"
    mask = torch.ones(5, 11, dtype=torch.int64)
    mask[1, 7:] = mask[3, 4:] = 0
    batches = [{"input_ids": torch.randint(31, (5, 11)), "attention_mask": mask} for _ in range(4)]
    return (
        Recorded(net, batches, lambda net, batch: net(**batch).logits), f"net.{place}:input", f"net.{place}",
        lambda a, batch: a[batch["attention_mask"].bool()],
    )  # fmt: skip


MODELS: dict[str, Callable[[], Any]] = {
    "perceptron": perceptron,
    "convolutions": convolutions,
    "gpt2": lambda: language_model("gpt2"),
    "llama": lambda: language_model("llama"),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_activations_are_those_of_the_batch_in_evaluation_mode(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module, layer, path, rows_of = MODELS[name]()
    found: list[Tensor] = []
    expected: list[Tensor] = []
    monkeypatch.setattr(TopKTraining, "add", lambda self, rows: found.append(rows))

    class Expected(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            other = copy.deepcopy(pl_module.net).eval()
            target = other.get_submodule(path.removeprefix("net."))
            target.register_forward_pre_hook(
                lambda _, args, kwargs: expected.append((args or tuple(kwargs.values()))[0]), with_kwargs=True
            )
            with torch.no_grad():
                pl_module.run(other, batch)
            expected[-1] = rows_of(expected[-1], batch).reshape(-1, rows_of(expected[-1], batch).shape[-1])

    mask = "attention_mask" if name in ("gpt2", "llama") else None
    callback = SAETrainer(layer, every_n_batches=1, mask=mask)
    trainer_of(tmp_path, callback, Expected(), max_epochs=1).fit(module)
    assert len(found) == len(expected) == 4
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # attention is computed by another kernel


def test_node_layers_of_many_kinds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, *_ = language_model("gpt2")
    layers = [
        NodeLayer(["net.transformer.h.0:input"], name="start", skip_positions=1),
        "net.transformer.h.1:input",
        NodeLayer(["net.transformer.h.1"], positions=-1, name="last"),
    ]
    callback = SAETrainer(layers, every_n_batches=1)
    trainer_of(tmp_path, callback, max_epochs=1).fit(module)
    assert {name: training.n_seen for name, training in callback._trainings.items()} == {
        "start": 4 * 50, "net.transformer.h.1:input": 4 * 55, "last": 4 * 5,
    }  # fmt: skip


def test_a_large_batch_is_not_run_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(TopKTraining, "add", lambda self, rows: sizes.append(len(rows)))
    batches = [torch.randn(8000, 5) for _ in range(3)]
    module = Recorded(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)), batches, lambda net, x: net(x))
    trainer_of(tmp_path, SAETrainer("net.2:input", every_n_batches=1), max_epochs=1).fit(module)
    assert sizes == [32, 4096, 4096]


def planted_module(rows: Tensor) -> Recorded:
    net = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 2))
    return Recorded(net, list(rows.split(512)), lambda net, x: net(x))


def test_a_planted_dictionary_is_found_in_a_training(tmp_path: Path) -> None:
    planted = Planted()
    module = planted_module(planted.rows(40 * 512))
    callback = SAETrainer("net.0:input", n_latents=64, k=3, max_overhead=math.inf)
    trainer = trainer_of(tmp_path, callback, logger=CSVLogger(tmp_path, "csv"))
    trainer.fit(module)
    sae = TopKSAE.load(Path(trainer.log_dir) / "sae" / "net.0.input.safetensors")
    assert planted.similarity(sae) > 0.95
    rows = planted.rows(2000)
    unexplained = float((rows - sae(rows)).square().sum() / (rows - rows.mean(0)).square().sum())
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    curve = [float(x) for line in lines if (x := line["sae/unexplained_variance/net.0.input"])]
    assert curve[-1] < 0.5 * curve[0]
    assert unexplained < 0.12
    assert 0.5 * unexplained < curve[-1] < 2 * unexplained
    last = {name: float(value) for name, value in lines[-1].items() if name.startswith("sae/")}
    assert last["sae/l0/net.0.input"] == pytest.approx(3, abs=0.1)
    assert 0 <= last["sae/dead_latents/net.0.input"] < 0.3
    assert last["sae/activations"] == callback._trainings["net.0:input"].n_seen > 30_000
    assert last["sae/steps"] > 480
    # The object that follows the training has the same weights.
    assert torch.equal(callback.dictionary().encode(rows), sae.encode(rows))
    assert callback.dictionary("net.0:input").decode(sae.encode(rows)).shape == rows.shape


def test_what_is_logged(tmp_path: Path) -> None:
    callback = SAETrainer(LAYERS, every_n_batches=2)
    trainer = trainer_of(tmp_path, callback, logger=CSVLogger(tmp_path, "csv"), max_epochs=12)
    trainer.fit(Classifier())
    keys = {
        *(f"sae/{name}/{layer}" for name in ("unexplained_variance", "l0", "dead_latents")
          for layer in ("net.0.input", "net.4.input")),
        "sae/activations", "sae/steps", "sae/overhead",
    }  # fmt: skip
    assert {key for key in trainer.callback_metrics if key.startswith("sae/")} == keys
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["sae/steps"]]
    seen = [float(line["sae/activations"]) for line in lines]
    assert seen == [24.0 * epoch for epoch in range(1, 13)] + [24.0 * 12]
    # Before there is an autoencoder, nothing is known of it.
    first = [math.isnan(float(line["sae/unexplained_variance/net.0.input"])) for line in lines]
    assert first == [True] * 10 + [False] * 3


class Timed(Classifier):
    """A training step takes one second, and a batch that autoencoders are trained on ten."""

    now = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.now += 1
        return super().training_step(batch, batch_idx)

    def watch(self, callback: SAETrainer) -> None:
        train = callback._train

        def train_ten_seconds(*args: Any) -> None:
            self.now += 10
            train(*args)

        callback._train = train_ten_seconds  # type: ignore[method-assign]
        callback.clock = lambda: self.now


@pytest.mark.parametrize(("limit", "most"), [(0.1, 0.1), (0.5, 0.5), (math.inf, 10.0)])
def test_the_overhead_stays_within_its_limit(
    limit: float, most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib_lightning.training.budget.GRACE", 1.0)
    model, callback = Timed(), SAETrainer(LAYERS[0], max_overhead=limit)
    model.watch(callback)
    trainer_of(tmp_path, callback, max_epochs=30).fit(model)
    spent = callback.meter.spent
    assert spent.training == 180
    # What is left of the time would not be enough for another batch. (The first one is not asked for.)
    assert most - 10 / 180 - 0.01 < spent.overhead / spent.training <= most
    assert callback._scalars["sae/overhead"] == spent.overhead / spent.training


def test_the_summary_says_what_it_has_cost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("lib_lightning.training.budget.GRACE", 1.0)
    model, callback = Timed(), SAETrainer(LAYERS, max_overhead=5.0)
    model.watch(callback)
    trainer = trainer_of(tmp_path, callback, max_epochs=20, logger=CSVLogger(tmp_path))
    trainer.fit(model)
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("sae: ")]
    first, *paths = said.split("\n")
    n_seen, n_steps = (getattr(callback._trainings[LAYERS[0]], name) for name in ("n_seen", "n_steps"))
    assert first == (
        f"sae: 2 sparse autoencoders with {n_steps} steps on {n_seen} activations took "
        f"{callback.meter.spent.overhead:g} s, beside 120 s of training"
    )
    assert [Path(path.strip()).exists() for path in paths] == [True, True]


def test_too_few_activations_are_explained(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    trainer_of(tmp_path, SAETrainer("net.1"), max_steps=1).fit(Classifier())
    assert not list(tmp_path.rglob("*.safetensors"))
    assert any(
        re.fullmatch(r"sae: no autoencoder was trained: there were \d+ activations, and a step takes 256\. .*", message)
        for message in caplog.messages
    ), caplog.messages


@pytest.mark.parametrize("at", [3, 8])
def test_a_resumed_run_ends_with_the_same_autoencoders(at: int, tmp_path: Path) -> None:
    def fitted(folder: Path, epochs: int, ckpt_path: str | None = None) -> SAETrainer:
        pl.seed_everything(3, verbose=False)
        callback = SAETrainer(LAYERS, n_latents=12, k=2, every_n_batches=1)
        saved = ModelCheckpoint(folder, "last", save_last=False)
        trainer = trainer_of(folder, callback, saved, max_epochs=epochs, enable_checkpointing=True)
        net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Tanh(), nn.Linear(8, 2))
        batches = [torch.randn(8, 5) for _ in range(6)]
        trainer.fit(Recorded(net, batches, lambda net, x: net(x)), ckpt_path=ckpt_path)
        return callback

    whole = fitted(tmp_path / "whole", 12)
    fitted(tmp_path / "part", at)
    path = str(tmp_path / "part" / "last.ckpt")
    assert torch.load(path, weights_only=True)["callbacks"]["SAETrainer{'name': 'sae'}"]["n_batches"] == 6 * at
    resumed = fitted(tmp_path / "part", 12, path)
    assert resumed._trainings["net.0:input"].n_seen == whole._trainings["net.0:input"].n_seen == 12 * 48
    for layer, sae in whole.saes.items():
        for a, b in zip(sae.buffers(), resumed.saes[layer].buffers(), strict=True):
            assert torch.equal(a, b)


def test_the_newest_weights_and_untrained_ones_before(tmp_path: Path) -> None:
    class Snapshots(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def on_train_batch_end(self, *args: Any) -> None:
            self.seen.append(callback.dictionary("net.4:input").encode(x))

    callback, snapshots, x = SAETrainer(LAYERS, n_latents=12, k=2, every_n_batches=1), Snapshots(), torch.ones(2, 8)
    untrained = callback.dictionary("net.4:input").encode(x)
    assert (untrained.shape, int((untrained > 0).sum(1).max())) == ((2, 12), 2)
    trainer_of(tmp_path, callback, snapshots, max_epochs=7).fit(Classifier())
    is_new = [not torch.equal(a, b) for a, b in zip(snapshots.seen, snapshots.seen[1:], strict=False)]
    assert is_new == [False] * 30 + [True] * 11
    # Snapshots of what is already there stay as they are; a new run begins anew.
    sae = callback.saes["net.4:input"]
    trainer_of(tmp_path, callback, max_epochs=1).fit(Classifier())
    assert callback.saes == {}
    assert torch.equal(sae.encode(x), snapshots.seen[-1])


def test_activations_of_another_width_are_refused_once_it_is_trained(tmp_path: Path) -> None:
    callback = SAETrainer("net.4:input", n_latents=12, k=2, every_n_batches=1)
    dictionary = callback.dictionary()
    assert dictionary.encode(torch.ones(2, 5)).shape == dictionary.encode(torch.ones(2, 8)).shape == (2, 12)
    assert not dictionary.is_trained
    trainer_of(tmp_path, callback, max_epochs=7).fit(Classifier())
    trained, x = callback.saes["net.4:input"], torch.ones(2, 8)
    assert dictionary.is_trained
    with pytest.raises(LIBError, match="trained on activations with 8 dimensions; got 5"):
        dictionary.encode(torch.ones(2, 5))
    assert torch.equal(dictionary.encode(x), trained.encode(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"node_layers": "net.9"}, "Classifier has no module 'net.9'"),
        ({"node_layers": []}, "needs a node layer, such as 'fc2:input'"),
        ({"node_layers": ["net.0", "net.0"]}, "once, under its own name; got 'net.0', 'net.0'"),
        ({"node_layers": 3}, "node_layers is a name"),
        ({"k": 0}, "k must be a whole number of at least 1; got 0"),
        ({"k": 9, "n_latents": 8}, "k=9 latents cannot be active among n_latents=8"),
        ({"k": 30}, "k=30 latents cannot be active among n_latents=20"),
        ({"lr": -1.0}, "lr must be above 0; got -1.0"),
        ({"every_n_batches": 1.5}, "every_n_batches must be a whole number of at least 1; got 1.5"),
        ({"max_overhead": 0}, "max_overhead is a share of the training time above 0"),
        ({"name": ""}, "name"),
        ({"name": "lib"}, "SAETrainer and LIBCallback would both write to 'lib'"),
        ({"mask": "attention"}, "attention"),
    ],
)
def test_mistakes_stop_before_the_first_step(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = Classifier()
    with pytest.raises(LIBError, match=message):
        trainer_of(
            tmp_path, SAETrainer(**{"node_layers": "net.0:input", "every_n_batches": 1, **settings}),
            LIBCallback(["net.0:input", "output"]), num_sanity_val_steps=0,
        ).fit(model)  # fmt: skip
    assert model.losses == []


def test_unknown_dictionaries(tmp_path: Path) -> None:
    with pytest.raises(LIBError, match=r"has the node layers 'net\.0:input', 'net\.4:input'; got None"):
        SAETrainer(LAYERS).dictionary()
    with pytest.raises(LIBError, match="Nothing has been encoded yet"):
        SAETrainer("net.0").dictionary().decode(torch.zeros(1, 4))


def test_a_full_disk_costs_only_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("lib_lightning.training.sae_trainer.write_bytes", full)
    trainer = trainer_of(tmp_path, SAETrainer(LAYERS, every_n_batches=1), max_epochs=7)
    trainer.fit(Classifier())
    assert trainer.state.finished
    assert sum("could not be written. OSError: No space left" in r.getMessage() for r in caplog.records) == 2


def test_trial_runs_write_nothing(tmp_path: Path) -> None:
    trainer_of(tmp_path, SAETrainer(LAYERS, every_n_batches=1), fast_dev_run=8).fit(Classifier())
    assert list(tmp_path.rglob("*")) == []


def test_beside_a_callback_with_snapshots(tmp_path: Path) -> None:
    alone = LIBCallback(["net.0:input", "net.4:input", "output"], every_n_validations=1)
    both = LIBCallback(["net.0:input", "net.4:input", "output"], every_n_validations=1)
    found = [
        run(Classifier(), tmp_path / str(k), *callbacks)
        for k, callbacks in enumerate([[alone], [SAETrainer(LAYERS, every_n_batches=1), both]])
    ]
    assert found[0] == found[1]
    assert alone.graph is not None
    assert both.graph is not None
    assert all(torch.equal(alone.graph.edges[section], both.graph.edges[section]) for section in alone.graph.edges)


def test_a_snapshot_says_that_an_autoencoder_is_untrained(tmp_path: Path) -> None:
    sae = SAETrainer("net.4:input", n_latents=12, k=2, every_n_batches=1)
    notes: dict[int, list[str]] = {}

    class Notes(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            assert callback.graph is not None
            notes[trainer.global_step] = callback.graph.info["notes"]

    callback = LIBCallback(["net.4:input", "output"], dictionaries={"net.4:input": sae.dictionary()}, at_steps=[0, 40])
    trainer_of(tmp_path, sae, callback, Notes(), max_epochs=7).fit(Classifier())
    said = {step: [note for note in found if "has not been trained yet" in note] for step, found in notes.items()}
    assert said[1] == ["The dictionary of 'net.4:input' has not been trained yet."]
    assert said[41] == []


def test_a_resumed_autoencoder_is_untrained_as_before(tmp_path: Path) -> None:
    callback, again = (SAETrainer("net.4:input", n_latents=12, k=2, every_n_batches=1) for _ in range(2))
    trainer_of(tmp_path, callback, max_epochs=1).fit(Classifier())  # 48 activations, and a batch has 256
    again.load_state_dict(callback.state_dict())
    assert not callback.dictionary().is_trained
    assert not again.dictionary().is_trained


def test_two_processes_train_on_the_activations_of_both(tmp_path: Path) -> None:
    torchrun("tests/two_processes_sae.py", tmp_path)
    names = ["ddp", *(["sharded"] if hasattr(torch.cpu.Stream, "record_event") else [])]
    for name in names:
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1))
        assert all(torch.equal(a, b) for a, b in zip(first["weights"], second["weights"], strict=True))
        assert first["same_training"]
        assert second["same_training"]
        # Process 0 decides for both: two seconds for each two of training, after the first.
        assert first["rounds"] == second["rounds"]
        assert first["rounds"][0] == 1
        assert first["overhead"] == second["overhead"] <= 1.0
        assert first["seen"] == second["seen"] == 8 * len(first["rounds"]), "of four samples on each process"
        assert first["steps"] == second["steps"] > 4
        assert len(list((tmp_path / name).rglob("*.safetensors"))) == 2


def test_imported_without_the_rest() -> None:
    code = "import lib_lightning.dictionaries.topk_sae, sys; print('lightning' in sys.modules, 'scipy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
