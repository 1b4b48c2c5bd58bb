"""Snapshots from the checkpoints of a training that had no callback are those that the callback would have taken."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors import safe_open
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from lib_lightning import LIBCallback, trace
from lib_lightning.errors import LIBError, SettingError
from lib_lightning.model.weights_hash import weights_hash
from lib_lightning.training.checkpoint_files import step_in_name
from lib_lightning.training.cli import main
from lib_lightning.training.trace import CheckpointSource
from lib_lightning.training.trace_options import parse_trace_options
from lib_lightning.training.weights_files import UnreadableError, read_checkpoint
from lib_lightning.training.weights_names import WrongWeightsError, load_weights
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.many_runs import curves
from lib_lightning.viewer.run import Run, runs_below
from lib_lightning.viewer.run_discovery import find_runs
from lib_lightning.viewer.run_view import RunView
from tests.tiny_training import trainer_of

ROOT = Path(__file__).parents[2]
NODE_LAYERS = ["net.0:input", "net.4:input", "output"]
STEPS = 12


class Net(pl.LightningModule):
    """Batch norm, whose buffers are in checkpoints, and dropout; the data are the same in each process."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def _data(self, n: int) -> DataLoader[Any]:
        x = torch.randn(n, 5, generator=torch.Generator().manual_seed(n))
        return DataLoader(TensorDataset(x, x[:, :2].prod(1).gt(0).long()), batch_size=8)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._data(8 * STEPS // 2)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._data(60)


class SaveAtSnapshots(pl.Callback):
    """Saves a checkpoint when a snapshot has been taken."""

    def __init__(self, callback: LIBCallback, folder: Path) -> None:
        self.callback, self.folder, self.saved = callback, folder, -1

    def _save(self, trainer: pl.Trainer) -> None:
        if self.callback.snapshots and self.callback.state.step != self.saved:
            self.saved = int(self.callback.state.step or 0)
            trainer.save_checkpoint(self.folder / f"epoch={trainer.current_epoch}-step={self.saved}.ckpt")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._save(trainer)


def _live(folder: Path, **settings: Any) -> Path:
    pl.seed_everything(0, verbose=False)
    callback = LIBCallback(NODE_LAYERS, **settings)
    logger = TensorBoardLogger(folder, name="", version="live")
    trainer_of(folder, callback, SaveAtSnapshots(callback, folder / "checkpoints"), logger=logger).fit(Net())
    return folder / "live"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a live run and a checkpoint of each of its snapshots."""
    folder = tmp_path_factory.mktemp("trained")
    _live(folder)
    return folder


def _hashes(logs: Path) -> dict[str, str]:
    """Content hashes of all basis files of a run."""
    found = {}
    for path in sorted(logs.rglob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            found[path.relative_to(logs).as_posix()] = json.loads(file.metadata()["lib_lightning"])["content_hash"]
    return found


def _scalars(logs: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(logs), {"scalars": 0, "images": 0, "tensors": 0}).Reload()
    found = {tag: [(x.step, x.value) for x in events.Scalars(tag)] for tag in events.Tags()["scalars"] if "lib" in tag}
    images = {tag: [(x.step, 0.0) for x in events.Images(tag)] for tag in events.Tags()["images"]}
    return found | images


@pytest.fixture(scope="module")
def traced(trained: Path) -> Path:
    """The log directory of a trace along these checkpoints, by the command line."""
    callback = {
        "class_path": "lib_lightning.LIBCallback",
        "init_args": {"node_layers": NODE_LAYERS},
    }
    trainer = {"max_epochs": 2, "accelerator": "cpu", "callbacks": [callback]}
    config = trained / "run.yaml"
    config.write_text(json.dumps({"seed_everything": 5, "model": "tests.training.test_trace.Net", "trainer": trainer}))
    main(["trace", "--config", str(config), "--checkpoints", str(trained / "checkpoints" / "*.ckpt")])
    return trained / "checkpoints-trace"


def test_a_trace_leaves_what_the_callback_leaves(trained: Path, traced: Path) -> None:
    live = trained / "live"
    assert len(_hashes(live)) == 6
    assert _hashes(traced) == _hashes(live)
    for name in ("events.jsonl", "retraced.json", "samples.jsonl"):
        assert (traced / "lib" / name).read_bytes() == (live / "lib" / name).read_bytes(), name
    files = {p.relative_to(live) for p in live.rglob("*") if p.is_file() and "tfevents" not in p.name}
    assert files - {Path("hparams.yaml")} <= {p.relative_to(traced) for p in traced.rglob("*")}


def test_scalars_are_at_the_steps_of_a_training(trained: Path, traced: Path) -> None:
    live, found = _scalars(trained / "live"), _scalars(traced)
    assert set(live) - set(found) == {"lib/overhead"}
    steps = [max(step - 1, 0) for step in Run(traced).steps]
    assert [step for step, _ in found["lib/features/total"]] == steps
    for tag, points in found.items():
        if tag not in ("lib/seconds", "lib/age"):  # a training repeats the latest values between snapshots
            assert set(map(str, points)) <= set(map(str, live[tag])), tag


def test_a_trace_and_a_live_run_below_one_folder_are_shown_together(trained: Path, traced: Path) -> None:
    """The tab's curves of all runs are those of both, and here the same."""
    folder = trained.resolve()
    views = [RunView(path, name, Cache(1 << 20), folder) for name, path in find_runs(folder).items()]
    assert [view.name for view in views] == ["checkpoints-trace/lib", "live/lib"]
    ours, live = json.loads(curves(views, "metric", "features/total"))
    assert (ours["steps"], ours["values"]) == (live["steps"], live["values"])
    assert len(live["values"]) == len(Run(traced).steps)
    assert [run.folder.parent for run in runs_below(folder)] == [traced.resolve(), folder / "live"]


# In Python, with any module and any file.


def _mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def _files(folder: Path, steps: tuple[int, ...] = (9, 10, 100), write: Callable[..., Any] = torch.save) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        write(_mlp(step).state_dict(), folder / f"model_step{step}.pt")
    return folder


LAYERS = ["input", "1", "output"]
BATCHES = [torch.randn(40, 4, generator=torch.Generator().manual_seed(0))]


def _trace(checkpoints: Any, folder: Path, **options: Any) -> Run:
    return trace(_mlp(), checkpoints, BATCHES, LAYERS, folder, **options)


LABELLED = [(BATCHES[0], (BATCHES[0][:, 0] > 0).long())]  # so that features that matter are counted at the end


def _count_file_events(at: Callable[[int], object]) -> None:
    """Call a function with the number of files opened to write, renamed and removed so far, before each of them."""
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        writes = event == "open" and isinstance(args[1], str) and not args[1].startswith("r")
        if writes or event in ("os.rename", "os.remove", "os.mkdir"):
            count += 1
            at(count)

    sys.addaudithook(hook)


# Children are forked by a process of its own, which has one thread. In a child of this process, a lock that another
# thread (of pytest-xdist, of torch) holds at that moment would stay locked for ever.
_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload([__name__])


def _in_child(act: Callable[..., object], *args: object) -> int | None:
    """Do something in a process of its own; its exit code, which is negative for a signal."""
    child = _FORKED.Process(target=act, args=args)
    child.start()
    child.join()
    return child.exitcode


def _trace_labelled(checkpoints: Path, folder: Path) -> None:
    trace(_mlp(), checkpoints, LABELLED, LAYERS, folder)


def _trace_and_count(checkpoints: Path, folder: Path, counts: Path) -> None:
    latest = [0]
    _count_file_events(lambda count: latest.__setitem__(0, count))
    _trace_labelled(checkpoints, folder)
    counts.write_text(str(latest[0]))


def _trace_until(number: int, checkpoints: Path, folder: Path) -> None:
    _count_file_events(lambda count: os.kill(os.getpid(), signal.SIGKILL) if count == number else None)
    _trace_labelled(checkpoints, folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder with checkpoints and the whole trace along them, and how often it opens, renames and removes files."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    checkpoints, counts = _files(folder / "checkpoints"), folder / "counts.txt"
    assert _in_child(_trace_and_count, checkpoints, folder / "whole", counts) == 0
    return folder, int(counts.read_text())


# Without smaller examples of a failure: each takes seconds.
@settings(max_examples=2, deadline=None, phases=[Phase.generate])
@given(data=st.data())
def test_killed_at_any_moment_it_goes_on_and_ends_the_same(
    uninterrupted: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder, events = uninterrupted
    checkpoints, whole = folder / "checkpoints", folder / "whole"
    killed = tmp_path_factory.mktemp("killed") / "logs"
    for number in data.draw(st.lists(st.integers(1, events), min_size=1, max_size=2), label="killed before event"):
        assert _in_child(_trace_until, number, checkpoints, killed) in (0, -signal.SIGKILL)
    assert _in_child(_trace_labelled, checkpoints, killed) == 0
    assert _hashes(killed) == _hashes(whole)
    names = [
        {path.relative_to(logs) for path in logs.rglob("*") if path.is_file() and "tfevents" not in path.name}
        for logs in (whole, killed)
    ]
    assert names[0] == names[1]
    for name in ("events.jsonl", "retraced.json", "samples.jsonl"):
        assert (killed / "lib" / name).read_bytes() == (whole / "lib" / name).read_bytes()
    # Each scalar and image once, whatever was written before the kill.
    expected, found = _scalars(whole), _scalars(killed)
    assert not math.isnan(expected["lib/causal_features/total"][-1][1])
    for took in (expected, found):
        took["lib/seconds"] = [(step, 0.0) for step, _ in took["lib/seconds"]]
    assert {tag: str(points) for tag, points in found.items()} == {tag: str(x) for tag, x in expected.items()}


def test_a_folder_that_is_being_written_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_lightning.training.trace.POLL", 0.05)
    folder = _files(tmp_path / "checkpoints", (10,))
    later = [(_files(tmp_path / "later", (step,)) / f"model_step{step}.pt").read_bytes() for step in (20, 30)]

    def write() -> None:
        (folder / "model_step20.pt").write_bytes(later[0][:900])
        (folder / "model_step30.pt").write_bytes(later[1])
        time.sleep(0.5)
        with (folder / "model_step20.pt").open("ab") as file:
            file.write(later[0][900:])

    writer = threading.Timer(0.2, write)
    writer.start()
    run = _trace(folder, tmp_path / "logs", watch=2.0)
    writer.join()
    assert run.steps == [10, 20, 30]
    for step in run.steps:
        assert run.graph(step).info["weights_hash"] == weights_hash(_mlp(step))
    assert run.folder.joinpath("final.safetensors").exists()


_WRITER = """
import sys, time
from pathlib import Path
source, target = map(Path, sys.argv[1:])
for path in sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns):
    place = target / path.relative_to(source)
    place.parent.mkdir(parents=True, exist_ok=True)
    data = path.read_bytes()
    with place.open("wb", buffering=0) as file:
        for k in range(3):
            file.write(data[k * len(data) // 3 : (k + 1) * len(data) // 3])
            time.sleep(0.03)
"""


def test_another_process_is_followed_while_it_writes_in_pieces(
    trained: Path, traced: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training in plain torch, which saves files, and one that saves folders file by file, the index first."""
    monkeypatch.setattr("lib_lightning.training.trace.POLL", 0.02)
    source = tmp_path / "source"
    source.mkdir()
    for step in (4, 10, 12):
        torch.manual_seed(step)
        weights = Net().state_dict()
        if step < 10:
            torch.save({"model": weights, "step": step}, source / f"step_{step}.pt")
            os.utime(source / f"step_{step}.pt", ns=(step * 1000, step * 1000))  # in this order they are written
            continue
        (source / f"checkpoint-{step}").mkdir()
        _in_parts(weights, source / f"checkpoint-{step}")
        (source / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        folder = source / f"checkpoint-{step}"
        files = [folder / name for name in ("trainer_state.json", "model.safetensors.index.json")]
        for k, file in enumerate([*files, *sorted(folder.glob("*.safetensors"))]):
            os.utime(file, ns=(step * 1000 + k, step * 1000 + k))
    (tmp_path / "checkpoints").mkdir()
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(source), str(tmp_path / "checkpoints")])
    words = ["trace", "--config", str(trained / "run.yaml"), "--checkpoints"]
    main([*words, str(tmp_path / "checkpoints"), "--watch", "3"])
    assert writer.wait() == 0
    main([*words, str(source)])
    followed, after = tmp_path / "checkpoints-trace", tmp_path / "source-trace"
    assert Run(followed).steps == [4, 10, 12]
    assert _hashes(followed) == _hashes(after)
    assert (followed / "lib" / "events.jsonl").read_bytes() == (after / "lib" / "events.jsonl").read_bytes()


def test_the_step_is_in_the_file_or_its_name_or_said(tmp_path: Path) -> None:
    files = sorted(_files(tmp_path / "a", (3, 20, 100)).iterdir(), key=str)
    assert [step_in_name(file) for file in files] == [100, 20, 3]
    source = CheckpointSource(files)
    torch.save({"state_dict": _mlp().state_dict(), "global_step": 7, "epoch": 1}, tmp_path / "epoch=1-step=9.ckpt")
    assert source.step(tmp_path / "epoch=1-step=9.ckpt") == 7
    torch.save(_mlp().state_dict(), tmp_path / "epoch_3.pt")
    with pytest.raises(LIBError, match=r"The step of .*epoch_3.pt is unknown: .* step_of="):
        source.step(tmp_path / "epoch_3.pt")
    assert CheckpointSource(files, step_of=lambda path: int(path.stem[6:])).step(tmp_path / "epoch_3.pt") == 3
    assert CheckpointSource({5: tmp_path / "epoch_3.pt"}).step(tmp_path / "epoch_3.pt") == 5
    loaded = CheckpointSource(["step0", "step1000"], load=lambda revision: _mlp(int(revision[4:])))
    assert [loaded.step(one) for one in loaded.find()] == [0, 1000]
    assert torch.equal(loaded.read("step1000").weights["0.weight"], _mlp(1000)[0].weight)


def test_the_folder_of_a_trainer_has_its_final_weights_beside_its_checkpoints(tmp_path: Path) -> None:
    for folder, step in ((tmp_path, 30), (tmp_path / "checkpoint-10", 10), (tmp_path / "checkpoint-30", 30)):
        folder.mkdir(exist_ok=True)
        save_file(_mlp(step).state_dict(), folder / "model.safetensors")
    torch.save(SimpleNamespace(lr=0.1), tmp_path / "training_args.bin")
    source = CheckpointSource(tmp_path)
    assert [source.step(one) for one in source.find()] == [10, 30]
    assert CheckpointSource(tmp_path / "checkpoint-30").find() == [tmp_path / "checkpoint-30"]
    for step in (10, 30):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    assert CheckpointSource(tmp_path).find() == [tmp_path]


def test_files_without_a_step_are_left_out_if_others_have_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = _files(tmp_path / "a", (10, 20))
    torch.save({"text": torch.zeros(3)}, folder / "text.pt")
    run = _trace(folder, tmp_path / "logs")
    assert run.steps == [10, 20]
    (said,) = [record.message for record in caplog.records if "left out" in record.message]
    assert re.search(r"the checkpoint .*text\.pt is left out\. The step of .* is unknown", said)
    for file in folder.glob("*step*"):
        file.unlink()
    with pytest.raises(LIBError, match=r"The step of .*text\.pt is unknown: .* step_of="):
        _trace(folder, tmp_path / "other")


def _lightning(weights: Mapping[str, Tensor], path: Path) -> Path:
    loops = {"fit_loop": {"epoch_loop.state_dict": {"_batches_that_stepped": 39}}}
    torch.save({"state_dict": weights, "global_step": 40, "epoch": 2, "loops": loops}, path / "last.ckpt")
    return path / "last.ckpt"


def _nano(weights: Mapping[str, Tensor], path: Path) -> Path:
    torch.save({"model": weights, "optimizer": {"state": {}}, "iter_num": 40, "config": {"lr": 1}}, path / "ckpt.pt")
    return path / "ckpt.pt"


def _safetensors(weights: Mapping[str, Tensor], path: Path) -> Path:
    save_file(dict(weights), path / "model-40.safetensors")
    return path / "model-40.safetensors"


def _in_parts(weights: Mapping[str, Tensor], path: Path, ending: str = "safetensors") -> Path:
    names, index = sorted(weights), {}
    stem = "model" if ending == "safetensors" else "pytorch_model"
    for k, name in enumerate(names):
        index[name] = f"{stem}-{k + 1:05}-of-{len(names):05}.{ending}"
        part = {name: weights[name]}
        (save_file if ending == "safetensors" else torch.save)(part, path / index[name])  # type: ignore[operator]
    (path / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": index}))
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 40}))
    return path


def _distributed(weights: Mapping[str, Tensor], path: Path, **nested: Any) -> Path:
    """As Lightning's FSDPStrategy saves, and plain FSDP beside ``meta.pt``."""
    with warnings.catch_warnings():  # that it is one process
        warnings.simplefilter("ignore")
        state = nested or {"model": dict(weights), "optimizer_0": {"exp_avg": torch.ones(9)}}
        dcp.save(state, checkpoint_id=path, no_dist=True)
    torch.save({"global_step": 40, "epoch": 2}, path / "meta.pt")
    return path


def _deepspeed(weights: Mapping[str, Tensor], path: Path) -> Path:
    inside = path / "global_step40"
    inside.mkdir()
    (path / "latest").write_text("global_step40")
    torch.save({"module": weights, "optimizer": None, "global_steps": 40}, inside / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, inside / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return path


FORMATS = [
    _lightning, _nano, _safetensors, _in_parts, lambda weights, path: _in_parts(weights, path, "bin"), _distributed,
    lambda weights, path: _distributed(weights, path, app={"model": dict(weights), "optim": {"m": torch.ones(9)}}),
    _deepspeed,
]  # fmt: skip


@pytest.mark.parametrize("write", FORMATS)
def test_every_form_of_a_checkpoint_is_read(write: Callable[..., Path], tmp_path: Path) -> None:
    weights = Net().state_dict()
    path = write(weights, tmp_path)
    # DeepSpeed saves all checkpoints to one folder.
    assert CheckpointSource(path).find() == [path / "global_step40" if write is _deepspeed else path]
    contents = read_checkpoint(path)
    found = {name.removeprefix("app.model."): t for name, t in contents.weights.items()}
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], t) for name, t in weights.items())
    assert CheckpointSource(path).step(path) == 40


def test_incomplete_checkpoints_are_refused_in_a_sentence(tmp_path: Path) -> None:
    for write in FORMATS[3:]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        write(_mlp().state_dict(), folder)
        files = [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".bin", ".distcp")]
        files = files or list(folder.rglob("mp_rank*"))
        data = files[0].read_bytes()
        files[0].write_bytes(data[: len(data) // 2])
        with pytest.raises(UnreadableError, match=str(folder)):
            read_checkpoint(folder)
    shards = tmp_path / "zero3"
    shards.mkdir()
    torch.save({"module": {}, "global_steps": 4}, shards / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(UnreadableError, match=r"stage 3 of DeepSpeed. Install deepspeed, .* or run zero_to_fp32.py"):
        read_checkpoint(shards)
    torch.save({"state_dict": _mlp().state_dict(), "hyper_parameters": SimpleNamespace()}, tmp_path / "a.ckpt")
    with pytest.raises(UnreadableError, match=r"such as types.SimpleNamespace.*add_safe_globals"):
        read_checkpoint(tmp_path / "a.ckpt")


def test_names_may_have_prefixes_and_wrong_ones_are_explained() -> None:
    model, other = _mlp(1), _mlp(2)
    for prefix in ("module.", "_orig_mod.", "model.", "state.net.", "module._orig_mod."):
        load_weights(model, {f"{prefix}{name}": t for name, t in other.state_dict().items()})
        assert torch.equal(model[0].weight, other[0].weight)
        load_weights(model, _mlp(1).state_dict())
    load_weights(nn.ModuleDict({"net": model}), other.state_dict())
    assert torch.equal(model[0].weight, other[0].weight)
    load_weights(nn.DataParallel(model), _mlp(1).state_dict())
    assert torch.equal(model[0].weight, _mlp(1)[0].weight)
    tied = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    tied["head"].weight = tied["embed"].weight  # type: ignore[union-attr]
    load_weights(tied, {"embed.weight": torch.ones(5, 3)})
    weights = other.state_dict()
    for wrong, message in (
        ({**weights, "4.weight": torch.ones(1)}, "has '4.weight', which the model does not have"),
        ({**weights, "0.weight": torch.ones(9, 4)}, r"'0.weight' of the checkpoint has the shape \(9, 4\), in the"),
        ({("0.wieght" if k == "0.weight" else k): t for k, t in weights.items()}, "lacks '0.weight', 1 of 4 .*'0.wieg"),
        ({f"{p}.{k}": t for k, t in weights.items() for p in ("student", "teacher")}, "'student.', 'teacher.'"),
    ):
        with pytest.raises(WrongWeightsError, match=message):
            load_weights(model, wrong)
        assert torch.equal(model[0].weight, _mlp(1)[0].weight)


def test_a_wrong_checkpoint_stops_a_trace_or_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wide = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 2)).state_dict()
    files = _files(tmp_path / "files", (0, 10))
    torch.save(wide, files / "model_step5.pt")
    (files / "model_step7.pt").write_bytes((files / "model_step10.pt").read_bytes()[:-100])
    torch.save({name: t * math.nan for name, t in _mlp().state_dict().items()}, files / "model_step8.pt")
    assert _trace(files, tmp_path / "logs").steps == [0, 10]
    left_out = [r.getMessage() for r in caplog.records if "is left out" in r.getMessage()]
    assert len(left_out) == 3
    assert all(len(text) < 600 for text in left_out)
    torch.save(wide, files / "model_step0.pt")
    with pytest.raises(WrongWeightsError, match="another model"):
        _trace(files, tmp_path / "other")
    # A finished trace takes none that are earlier, and says so.
    assert _trace(_files(tmp_path / "files", (0, 4)), tmp_path / "logs").steps == [0, 10]
    assert "before the latest snapshot" in caplog.records[-1].getMessage()


def test_what_cannot_be_traced_is_refused_before_the_first_snapshot(tmp_path: Path, trained: Path) -> None:
    files = _files(tmp_path / "files", (0,))
    with pytest.raises(LIBError, match="has the snapshots of a training"):
        _trace(files, trained / "live")
    with pytest.raises(LIBError, match="There are no checkpoints in"):
        _trace(tmp_path, tmp_path / "a")
    with pytest.raises(LIBError, match=r"There is no checkpoint '.*missing'"):
        _trace(tmp_path / "missing", tmp_path / "a")
    with pytest.raises(SettingError, match="'every_n_steps' of trace: the checkpoints decide"):
        _trace(files, tmp_path / "a", every_n_steps=3)
    with pytest.raises(LIBError, match="There are no samples to compute on"):
        trace(_mlp(), files, [], LAYERS, tmp_path / "a")
    _trace(files, tmp_path / "a")
    with pytest.raises(LIBError, match="has a trace with other settings"):
        _trace(files, tmp_path / "a", rtol=0.1)
    shutil.rmtree(files)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "x.yaml"], "trace needs --checkpoints, such as"),
        (["--checkpoints", "missing.ckpt"], "There is no checkpoint 'missing.ckpt'"),
        (["--checkpoints", ".", "--step", "epoch"], "--step needs one group for the number"),
        (["--checkpoints", ".", "--watch", "soon"], "argument --watch: invalid float value: 'soon'"),
    ],
)
def test_wrong_options_are_explained(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["trace", *words])


def test_checkpoints_of_another_training_need_another_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, other = _files(tmp_path / "a", (0, 10)), _files(tmp_path / "b", (0, 20))
    torch.save(_mlp(7).state_dict(), other / "model_step0.pt")
    assert _trace(first, tmp_path / "logs").steps == [0, 10]
    with pytest.raises(LIBError, match="trace of another training: its snapshot at step 0"):
        _trace(other, tmp_path / "logs")
    with pytest.raises(LIBError, match="other samples"):
        _trace(first, tmp_path / "logs", num_samples=16)
    assert not caplog.text.count("it is not sure")
    (other / "model_step0.pt").unlink()
    assert _trace(other, tmp_path / "logs").steps == [0, 10, 20]
    assert "it is not sure that they are of the same training" in caplog.text


def test_what_failed_before_its_first_snapshot_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    files = _files(tmp_path / "a", (0,))
    with pytest.raises(LIBError):
        _trace({str(files / "none.pt"): 0}, tmp_path / "logs")
    run = _trace(files, tmp_path / "logs", num_samples=16)
    assert run.graph(0).info["n_samples"] == 16
    with pytest.raises(LIBError, match="Did you mean 'n_probes'"):
        _trace(files, tmp_path / "new", nprobes=3)


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "trace.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    (block, revisions) = re.findall(r"^```python.*?\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    exec(compile(block, "docs/trace.md", "exec"), names := {})
    assert "[0, 10, 20]" in capsys.readouterr().out
    stand_in = SimpleNamespace(from_pretrained=lambda _, revision: _llama(step_in_name(revision) or 0))
    monkeypatch.setattr("transformers.AutoModelForCausalLM", stand_in)
    names["batches"] = [{"input_ids": torch.randint(0, 11, (16, 5), generator=torch.Generator().manual_seed(0))}]
    exec(compile(revisions, "docs/trace.md", "exec"), names)
    assert Run("pythia").steps == [0, 1000, 143000]
    assert Run("pythia").graph(1000).info["weights_hash"] == weights_hash(_llama(1000))
    words = re.findall(r"^lib-lightning trace (.*)$", page, flags=re.MULTILINE)
    assert [parse_trace_options(shlex.split(line))[0].watch for line in words] == [None, math.inf]


def _llama(seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    return LlamaForCausalLM(config)
