"""The profile of a snapshot: its steps, operations counted by hand, and an unchanged model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.errors import LIBError
from lib_lightning.model import torch_internals
from lib_lightning.training.cli import main
from lib_lightning.training.profiling import profile_snapshot
from lib_lightning.training.snapshot import SnapshotConfig

ROOT = Path(__file__).parents[2]


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.Dropout(), nn.Tanh(), nn.Linear(7, 3))


def test_shares_are_of_the_whole_and_every_step_is_there() -> None:
    layers = ["input", "2", "output"]
    profile = profile_snapshot(mlp(), [torch.randn(40, 5)] * 2, layers)
    steps = [row.step for row in profile.rows]
    wanted = {"moments", *(f"basis of {layer}" for layer in layers), "edges from input to 2"}
    wanted |= {
        "edges from 2 to output",
        "metrics and modules",
        "reference samples",
        "tracking",
        "figures",
        "files",
        "the rest",
    }
    assert wanted <= set(steps)
    assert len(steps) == len(set(steps))
    assert sum(row.share for row in profile.rows) == pytest.approx(1)
    assert all(row.seconds >= 0 and row.gflop >= 0 for row in profile.rows)
    assert profile.samples == 80
    assert profile.node_layers == layers
    total = profile.total
    assert total.seconds == pytest.approx(sum(row.seconds for row in profile.rows))
    assert total.rate == pytest.approx(total.gflop / total.seconds)
    # Small products are nowhere near the rate of large ones.
    assert 0 < total.of_peak < 1


def test_without_dispatch_modes_there_are_times_but_no_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(torch_internals.NAMES, "dispatch modes", "_missing")
    profile = profile_snapshot(mlp(), [torch.randn(40, 5)], ["input", "2", "output"])
    assert profile.total.seconds > 0
    assert profile.total.gflop == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operations_of_a_linear_model_are_those_counted_by_hand(dtype: torch.dtype) -> None:
    n, d_in, d_out = 64, 6, 4
    model = nn.Linear(d_in, d_out).to(dtype)
    settings = LIBConfig(basis="neuron")
    config = SnapshotConfig(settings, follow=False)
    profile = profile_snapshot(model, [torch.randn(n, d_in, dtype=dtype)], ["input", "output"], config)
    rows = {row.step: row for row in profile.rows}
    # Its closed form is C'^T W C^+T, in float64: one multiplication and one addition for each number of each product;
    # attributions take the products of the features of each sample, too.
    edges = rows["edges from input to output"]
    assert edges.gflop == pytest.approx(2e-9 * (d_out * d_out * d_in + d_out * d_in * d_in + n * d_out * d_in))
    assert edges.of_peak == pytest.approx(edges.gflop / profile.rates[torch.float64] / edges.seconds)
    assert rows["basis of input"].gflop == rows["figures"].gflop == 0
    assert "tracking" not in rows


def test_baselines_and_proposed_node_layers() -> None:
    model, batches = mlp(), [torch.randn(40, 5)]
    alone = profile_snapshot(model, batches)
    assert alone.node_layers == ["input", "2", "output"]
    beside = profile_snapshot(model, batches, config=SnapshotConfig(LIBConfig(), baselines=("neuron",)))
    edges = [{row.step: row for row in p.rows}["edges from 2 to output"].gflop for p in (alone, beside)]
    assert edges[1] > edges[0] > 0


def test_model_and_random_numbers_are_left_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(), nn.Linear(7, 3))
    model[0].eval()
    batch = torch.randn(40, 5)
    before, state, kept = copy.deepcopy(model.state_dict()), torch.get_rng_state(), batch.clone()
    profile_snapshot(model, [batch], ["input", "1", "output"])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch, kept)
    assert [m.training for m in model] == [False, True, True, True]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_without_samples_or_with_wrong_node_layers() -> None:
    with pytest.raises(LIBError, match="no samples"):
        profile_snapshot(mlp(), [])
    with pytest.raises(LIBError, match=r"has no module '4'"):
        profile_snapshot(mlp(), [torch.randn(9, 5)], ["4", "output"])
    with pytest.raises(LIBError, match="Sequential cannot be run on a batch"):
        profile_snapshot(mlp(), [torch.randn(9, 6)])


# the command


SMALL = ["--config", "recipes/modular_addition.yaml", "--data.modulus", "13", "--trainer.callbacks.num_samples", "50"]


def test_command_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    before = set(ROOT.iterdir())
    main(["profile", *SMALL])
    printed = capsys.readouterr().out
    assert printed.startswith("lib: one snapshot of resid_pre -> resid_mid -> resid_post -> output on 50 samples\n")
    lines = printed.splitlines()
    assert lines[2].split() == ["step", "seconds", "share", "GFLOP", "GFLOP/s", "of", "peak"]
    shares = {line.split("  ")[0]: line.split()[-4] for line in lines[3:] if line.endswith("%")}
    assert {"basis of resid_pre", "edges from resid_pre to resid_mid", "labels", "total"} <= set(shares)
    assert shares.pop("total") == "100.0%"
    assert sum(float(share[:-1]) for share in shares.values()) == pytest.approx(100, abs=0.05 * len(shares))
    assert "float32" in lines[-2] + lines[-3]
    assert set(ROOT.iterdir()) == before


def test_command_takes_each_callback_in_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    one = "{class_path: lib_lightning.LIBCallback, init_args: {name: %s, num_samples: %d, basis: %s}}"
    both = f"[{one % ('a', 20, 'lib')}, {one % ('b', 30, 'pca')}]"
    main(["profile", "--model", "tests.tiny_training.Classifier", "--trainer.callbacks", both])
    printed = capsys.readouterr().out
    assert "a: one snapshot of input -> net.3 -> output on 20 samples" in printed
    # There are no more validation samples than that.
    assert "b: one snapshot of input -> net.3 -> output on 20 samples" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "tests.training.test_cli.WithoutValidation"], "There is no validation batch to run the model on"),
        (
            ["--model", "tests.training.test_cli.BadDay"],
            "fit failed before the first validation batch of BadDay with RuntimeError: no data",
        ),
        (["--model", "tests.training.test_cli.TwoArguments"], "TwoArguments cannot be run on a batch"),
        ([*SMALL, "--trainer.callbacks.node_layers=[transformer.embedd, output]"], "no module 'transformer.embedd'"),
    ],
)
def test_command_fails_with_a_few_lines(options: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=message) as stopped:
        main(["profile", *options])
    assert str(stopped.value).startswith("lib-lightning: ")
    assert len(str(stopped.value).splitlines()) <= 5
