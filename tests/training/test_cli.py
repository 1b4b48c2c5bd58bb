"""The command line, as users type it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.graph import Lineages
from lib_lightning.training.cli import main

ROOT = Path(__file__).parents[2]


def command(*args: str, code: int = 0) -> str:
    """Run the command line in a process of its own and return all it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "lib_lightning", *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def _of_gpt2(setting: str) -> list[str]:
    """Options for a GPT-2 with one callback."""
    name, _, value = setting.partition("=")
    callback = {"class_path": "lib_lightning.LIBCallback", "init_args": {name: yaml.safe_load(value)}}
    return ["--model", "tests.training.test_cli.TinyGPT2", "--trainer.callbacks", json.dumps([callback])]


def said_and_ended(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What the command line prints before it ends without training; in this process, which is ten times as fast."""
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.fixture
def basis_file(tmp_path: Path) -> Path:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    graph = compute_interaction_graph(model, [torch.randn(20, 4)], ["input", "1", "output"])
    graph.info |= {"step": 1200, "epoch": 3}
    graph.save(tmp_path / "graph.safetensors")
    return tmp_path / "graph.safetensors"


def test_inspect_prints_how_and_how_many(basis_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(basis_file)])
    printed = capsys.readouterr().out
    assert "step 1,200, epoch 3, n_samples 20" in printed
    assert "basis lib" in printed
    features = InteractionGraph.load(basis_file).bases["1"].n_features
    assert any(line.split() == ["features/1", str(features)] for line in printed.splitlines())


def test_inspect_lists_features_by_id_and_index(basis_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = InteractionGraph.load(basis_file)
    main(["inspect", str(basis_file), "--features", "2"])
    assert "features by id (the index, as features are not tracked); index: position in" in capsys.readouterr().out
    basis = graph.bases["1"]
    ids = torch.arange(basis.n_features) + 40
    graph.lineages = {"1": Lineages(ids, ids.double(), ids)}
    graph.labels = {"1": [f"label {k}" for k in range(len(ids))]}
    graph.save(basis_file)
    main(["inspect", str(basis_file), "--features", "2"])
    printed = capsys.readouterr().out
    assert "features by id (the same in all snapshots of the run)" in printed
    listed = [line.split() for line in printed.splitlines() if line.startswith("  1/")]
    assert [(words[0], words[2], words[-1]) for words in listed] == [("1/40", "0", "0"), ("1/41", "1", "1")]
    main(["inspect", str(basis_file), "--features", "0"])
    assert "features by id" not in capsys.readouterr().out


def test_plot_writes_an_image(basis_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plot", str(basis_file)])
    image = basis_file.with_suffix(".png")
    assert capsys.readouterr().out.strip() == str(image)
    assert image.read_bytes().startswith(b"\x89PNG")
    main(["plot", str(basis_file), "-o", str(basis_file.parent / "other.png"), "--max-edges", "4"])
    assert (basis_file.parent / "other.png").exists()
    main(["plot", str(basis_file), "-o", str(basis_file.parent / "other.svg")])
    assert b"<svg" in (basis_file.parent / "other.svg").read_bytes()
    for wrong, message in (
        (["-o", "graph.xyz"], r"such as \.png, \.svg or \.pdf"),
        (["--max-edges", "-3"], "at least 0"),
    ):
        with pytest.raises(SystemExit, match=rf"^lib-lightning: .*{message}.*; got"):
            main(["plot", str(basis_file), *wrong])
    assert not Path("graph.xyz").exists()


def test_plot_draws_the_spectrum_beside_the_graph(basis_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plot", str(basis_file), "--kind", "spectrum"])
    image = basis_file.with_suffix(".spectrum.png")
    assert capsys.readouterr().out.strip() == str(image)
    assert image.read_bytes().startswith(b"\x89PNG")
    assert not basis_file.with_suffix(".png").exists()


@pytest.mark.parametrize("subcommand", ["inspect", "plot"])
def test_wrong_files_get_one_sentence(subcommand: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(SystemExit, match=r"^lib-lightning: '.*text' is truncated or not a basis file"):
        main([subcommand, str(tmp_path / "text")])
    with pytest.raises(SystemExit, match=r"^lib-lightning: The basis file .* does not exist"):
        main([subcommand, str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match=r"^lib-lightning: '.*' is a folder\. A run has its basis files in"):
        main([subcommand, str(tmp_path)])


def test_help_explains_every_option_of_the_callback(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(said_and_ended(capsys, "fit", "--trainer.callbacks.help", "LIBCallback").split())
    for words in (
        "Number of validation samples to compute on",
        "a snapshot before training and this many per tenfold increase of the step",
        "Directions whose metric or importance (PCA: variance) is below this fraction",
        "Prefix of everything logged and name of the folder",
        "or a NodeLayer",
    ):
        assert words in text


def test_options_are_overridden_and_interpolated() -> None:
    overrides = ["--data.modulus", "31", "--trainer.callbacks.num_samples", "77", "--model.d_mlp", "9"]
    printed = command("fit", "--config", "recipes/modular_addition.yaml", *overrides, "--print_config")
    assert printed.count("modulus: 31") == 4, "of the data, the model, the labeller and the renderer"
    assert "num_samples: 77" in printed
    assert "d_mlp: 9" in printed


def test_mistakes_get_one_sentence_before_training(tmp_path: Path) -> None:
    printed = command(
        *("fit", "--config", "recipes/modular_addition.yaml", "--trainer.default_root_dir", str(tmp_path)),
        *("--trainer.callbacks.node_layers", "[transformer.embedd, output]"),
        code=1,
    )
    assert printed.splitlines()[-1] == (
        "lib-lightning: ModularAddition has no module 'transformer.embedd' (node layer 'transformer.embedd'). Near "
        "matches: 'transformer.embed', 'transformer.unembed', 'transformer.embed.tokens'."
    )
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        (
            ["--trainer.callbacks.num_samples=1"],
            "num_samples must be at least 2: a basis needs samples to vary; got 1.",
        ),
        (["--trainer.callbacks.skip_positions=all"], "skip_positions is a number of first positions to leave out"),
        (["--trainer.callbacks.node_layers=[a]"], "At least two node layers are needed; got"),
        (["--trainer.callbacks.basis=lob"], "'neuron', 'random', 'ica', 'dictionary', 'varimax']. Got value: lob"),
        (["--trainer.callbacks.bases=lib"], "Option 'bases' is not accepted"),
        (["--model.lr=much"], "Expected a <class 'float'>. Got value: much"),
        (["--trainer.max_epoks=1"], "unrecognized arguments: --trainer.max_epoks=1"),
        (["--config=nowhere.yaml"], "File does not exist"),
        (["--ckpt_path=missing.ckpt"], "There is no checkpoint 'missing.ckpt'."),
    ],
)
def test_wrong_options_get_a_short_answer(
    options: list[str], answer: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", "recipes/modular_addition.yaml", *options])
    said = capfd.readouterr().err
    said = said[said.index("lib-lightning: ") :]
    assert stopped.value.code == 2
    assert answer in said
    assert len(said.splitlines()) <= 3


def test_top_level_help_names_every_command() -> None:
    printed = command("--help")
    assert all(name in printed for name in ("fit", "validate", "test", "predict", "nodes", "inspect", "plot"))


TABLE = """\
  name                       positions x features  module
  transformer.embed.tokens                 3 x 64  Embedding
* transformer.embed                        3 x 64  Embedding
* transformer.mlp:input                    1 x 64  Sequential
* transformer.unembed:input                1 x 64  Linear
* output                                   1 x 14  ModularAddition

node_layers: [transformer.embed, "transformer.mlp:input", "transformer.unembed:input", output]
"""


def test_nodes_lists_where_the_model_can_be_cut() -> None:
    before = set(ROOT.iterdir())
    assert command("nodes", "--config", "recipes/modular_addition.yaml", "--data.modulus", "13") == TABLE
    assert set(ROOT.iterdir()) == before, "and writes nothing"


def test_nodes_takes_a_file_that_fit_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = ("--config", "recipes/modular_addition.yaml", "--data.modulus", "13")
    with pytest.raises(SystemExit):
        main(["fit", *recipe, "--print_config"])
    written = capsys.readouterr().out
    assert "ckpt_path: null" in written
    # Without the callback, for an accelerator that is not here.
    (tmp_path / "config.yaml").write_text(written.replace("accelerator: cpu", "accelerator: tpu"))
    main(["nodes", "--config", str(tmp_path / "config.yaml"), "--trainer.callbacks", "null", "--all"])
    printed = capsys.readouterr().out
    assert "".join(line for line in printed.splitlines(keepends=True) if "    =" not in line) == TABLE
    assert "\n    = transformer.unembed\n    = transformer\n" in printed


def test_nodes_prints_a_list_that_node_layers_takes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["nodes", "--model", "tests.tiny_training.Classifier"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed.splitlines()[-1]) == {"node_layers": ["input", "net.3", "output"]}


class WithoutValidation(BoringModel):
    val_dataloader = None


class TwoArguments(BoringModel):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        pass  # and the training step calls it with one argument


class BadDay(BoringModel):
    def setup(self, stage: str) -> None:
        raise RuntimeError("no data today")


def scaled(batch: Tensor) -> tuple[Tensor, Tensor]:
    return batch, torch.ones(())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (WithoutValidation, "^lib-lightning: There is no validation batch to run the model on"),
        (
            TwoArguments,
            r"^lib-lightning: TwoArguments cannot be run on a batch: TypeError: .*'scale'. input_fn=",
        ),
        (
            BadDay,
            "^lib-lightning: fit failed before the first validation batch of BadDay with RuntimeError: no data today",
        ),
    ],
)
def test_nodes_fails_with_one_sentence(model: type[BoringModel], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(["nodes", "--model", f"tests.training.test_cli.{model.__name__}"])


def test_nodes_feeds_the_model_as_the_callback_does(capsys: pytest.CaptureFixture[str]) -> None:
    callback = {"class_path": "lib_lightning.LIBCallback"}
    callback["init_args"] = {"node_layers": ["input", "output"], "input_fn": "tests.training.test_cli.scaled"}
    main(["nodes", "--model", "tests.training.test_cli.TwoArguments", "--trainer.callbacks", json.dumps([callback])])
    assert capsys.readouterr().out.splitlines()[-1] == "node_layers: [input, output]"


class TinyGPT2(BoringModel):
    """GPT-2 with its own data."""

    def __init__(self, tokens: int = 12) -> None:
        super().__init__()
        self.tokens = tokens
        config = GPT2Config(
            vocab_size=32, n_positions=tokens, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        self.model = GPT2LMHeadModel(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self(batch)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(torch.randint(32, (24, self.tokens)), batch_size=8)


ESTIMATE = re.compile(
    r"^(?P<name>\w+): (?P<snapshots>\d+) snapshots .*, each with (?P<samples>[\d,]+) samples, .*metric, .*edges.*, "
    r"about .* each.* and .* in total.*\.\n"
    r"  \d+ threads?: .*B of memory at its peak; (?P<size>[\d.]+) (?P<unit>[kM])B for each of (?P<files>[\d,]+) files, "
    r".* in all\.$",
    re.MULTILINE,
)


def test_estimate_says_what_the_snapshots_of_a_recipe_cost(tmp_path: Path) -> None:
    before = set(ROOT.iterdir())
    recipe = ("--config", "recipes/digits_mlp.yaml", "--trainer.max_epochs=2")
    said = command("estimate", *recipe)
    found = ESTIMATE.match(said)
    assert found, said
    assert set(ROOT.iterdir()) == before, "and writes nothing"
    command("fit", *recipe, "--trainer.default_root_dir", str(tmp_path))
    (folder,) = tmp_path.glob("lightning_logs/version_0/lib/snapshots")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == int(found["snapshots"])
    assert int(found["files"]) == 3 * len(files), "with those of the baselines"
    predicted = float(found["size"]) * {"k": 1e3, "M": 1e6}[found["unit"]]
    assert predicted / 2 < files[-1].stat().st_size < 2 * predicted
    graph = InteractionGraph.load(files[0])
    assert graph.info["n_samples"] == int(found["samples"].replace(",", ""))
    assert graph.info["effort"]["n_probes"] is None


def test_estimate_follows_the_settings_of_each_callback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    callbacks = [
        {"class_path": "lib_lightning.LIBCallback", "init_args": {"name": name, **settings}}
        for name, settings in (
            ("sampled", {"n_probes": 3, "n_pushed": 2, "num_samples": 10}),
            ("exact", {"effort": "exact", "node_layers": ["model.transformer.h.0", "model.transformer.h.1"]}),
        )
    ]
    model = {"class_path": "tests.training.test_cli.TinyGPT2", "init_args": {"tokens": 8}}
    trainer = {"callbacks": callbacks, "max_epochs": 3}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": model, "trainer": trainer}))
    main(["estimate", "--config", "run.yaml"])
    said = capsys.readouterr().out
    sampled, exact = ESTIMATE.finditer(said)
    assert "10 samples, 3 probes per sample for the metric, edges from 2 features per sample" in sampled[0]
    assert "24 samples, the exact metric, exact edges" in exact[0]
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "nothing.yaml"], r"File does not exist: '.*nothing.yaml'"),
        ([], "the following arguments are required: model"),
        (["--model", "tests.training.test_cli.TinyGPT3"], "TinyGPT3"),
        (["--model", "tests.training.test_cli.WithoutValidation"], "There is no validation batch to run the model on"),
        (["--model", "tests.training.test_cli.BadDay"], "fit failed before the first validation batch of BadDay"),
        (["--model", "tests.training.test_cli.TwoArguments"], "TwoArguments cannot be run on a batch: TypeError"),
        (_of_gpt2("node_layers=[model.transformer.h.7, output]"), r"no module 'model.transformer.h.7'"),
        (_of_gpt2("node_layers=[model.transformer.h.1, model.transformer.h.0]"), "order"),
        (_of_gpt2("n_probes=0"), "n_probes must be at least 1"),
        (_of_gpt2("effort=most"), r"Expected a typing.Literal\['auto', 'exact'\]"),
        (_of_gpt2("memory_limit=-1"), "memory_limit"),
        (_of_gpt2("skip_positions=slice(0, 12)"), "position"),
    ],
)
def test_estimate_fails_with_a_few_lines(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["estimate", *words])
    said = capsys.readouterr().err if ended.value.code == 2 else str(ended.value)
    assert said.startswith("lib-lightning: ")
    assert re.search(message, said)
    assert len(said.strip().splitlines()) <= 5
    assert "Traceback" not in said


def test_saved_graphs_load_elsewhere(basis_file: Path) -> None:
    assert InteractionGraph.load(basis_file).node_layers == ["input", "1", "output"]


@pytest.mark.parametrize(
    ("word", "printed"), [("1", "1"), ("-1", "-1"), ("[0, 2]", "- 0\n      - 2"), ("slice(2, 10)", "slice(2, 10)")]
)
def test_positions_to_leave_out_on_the_command_line(
    word: str, printed: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    setting = f"--trainer.callbacks.skip_positions={word}"
    shown = said_and_ended(capsys, "fit", "--config", "recipes/modular_addition.yaml", setting, "--print_config")
    assert f"skip_positions: {printed}" in shown.replace("skip_positions:\n      -", "skip_positions: -")
