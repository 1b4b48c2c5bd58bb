"""Every recipe runs as its README says, in a small setting."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything

from lib_lightning import InteractionGraph
from lib_lightning.errors import LIBError
from lib_lightning.io.rendering_file import read_lines
from lib_lightning.training.cli import main
from recipes import many_seeds
from recipes.checkpoint import load_pretrained
from recipes.cifar10_mlp import TEST_FILES, TRAIN_FILES, Cifar10
from recipes.digits_mlp import Digits
from recipes.language_model import GPTNeo, LanguageModel, Text
from recipes.mlp import MLP
from recipes.modular_addition import AllPairs, ModularAddition, ModularAdditionTransformer
from tests.test_pretrained import checkpoint

RECIPES = Path(__file__).parents[1] / "recipes"
ADDITION = ["resid_pre", "resid_mid", "resid_post", "output"]
PERCEPTRON = ["pixels", "hidden1", "hidden2", "output"]
SMALL = {
    "modular_addition": (["--data.steps_per_epoch=60", "--trainer.val_check_interval=20"], ["lib"], ADDITION),
    "modular_addition_paper": (
        ["--data.modulus=13", "--data.steps_per_epoch=3", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"],
        ["lib"], ADDITION,
    ),
    "digits_mlp": (
        ["--trainer.max_epochs=2", "--trainer.check_val_every_n_epoch=1"],
        ["lib", "pca", "neuron"], PERCEPTRON,
    ),
    "cifar10_mlp": (
        # Each snapshot takes the eigenvectors of a 3,072 x 3,072 matrix: one less is time saved.
        ["--trainer.max_epochs=1", "--trainer.callbacks.at_steps=[2]"], ["lib", "pca"], PERCEPTRON,
    ),
    "language_model": (
        ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=2", "--data.context=8",
         "--trainer.callbacks.num_samples=2"],
        ["lib"], ["resid0", "resid2", "resid4", "resid6", "resid8"],
    ),
    "pretrained_lm": (
        ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=2", "--data.context=8",
         "--trainer.callbacks.num_samples=4", "--trainer.callbacks.at_steps=[0]"],
        ["lib"], ["quarter", "middle", "three_quarters", "end"],
    ),
}  # fmt: skip
# A sample as each recipe shows it.
RENDERED = {
    "modular_addition": r'"tokens": \["\d+", " \+ \d+", " ="\], "label": "\d+"',
    "modular_addition_paper": r'"tokens": \["\d+", " \+ \d+", " ="\]',
    "digits_mlp": r'"size": \[8, 8\], "label": "\d"',
    "cifar10_mlp": r'"size": \[32, 32\], "label": "(airplane|automobile|bird|cat|deer|dog|frog|horse|ship|truck)"',
    "language_model": r'"tokens": \["."',
    "pretrained_lm": r'"tokens": \["',
}


def test_every_recipe_is_tried() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(SMALL)


@pytest.mark.recipe
@pytest.mark.parametrize("name", sorted(SMALL))
def test_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)
    options, callbacks, node_layers = SMALL[name]
    if name == "cifar10_mlp":
        options = [*options, f"--data.root={write_cifar10(tmp_path)}"]
    if name == "pretrained_lm":
        options = [*options, f"--model.pretrained={checkpoint(tmp_path / 'checkpoint')}"]
    main(["fit", "--config", f"recipes/{name}.yaml", f"--trainer.default_root_dir={tmp_path}", *options])
    (folder,) = (tmp_path / "lightning_logs").iterdir()
    assert {path.parent.name for path in folder.glob("*/final.safetensors")} == set(callbacks)
    for callback in callbacks:
        final = InteractionGraph.load(folder / callback / "final.safetensors")
        assert final.node_layers == node_layers
        assert final.info["settings"]["basis"] == callback
        (line, *_) = read_lines(folder / callback / "samples.jsonl")
        assert re.search(RENDERED[name], line)
        snapshots = {path.stem for path in (folder / callback / "snapshots").iterdir()}
        assert snapshots == {path.stem for path in (folder / callback / "figures").iterdir()}
        assert "step-00000000" in snapshots or callback == "pca"
    assert len(list(folder.glob("events.*"))) == 1


def train(model: LightningModule, data: LightningDataModule, **options: Any) -> Trainer:
    """Train without leaving anything behind."""
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(model, data)
    return trainer


@pytest.mark.recipe
def test_modular_addition_learns_what_it_is_taught() -> None:
    # A small modulus and many pairs, so that 1,500 steps are enough to generalise: after 800, 90 to 100% by machine.
    seed_everything(0, verbose=False)
    data = AllPairs(modulus=17, train_fraction=0.8, steps_per_epoch=1500)
    trainer = train(ModularAddition(modulus=17), data, max_epochs=1)
    assert trainer.callback_metrics["accuracy/train"] == 1
    assert trainer.callback_metrics["accuracy/test"] > 0.9


def test_split_of_the_paper() -> None:
    data = AllPairs(modulus=113, train_fraction=0.3)
    order = torch.randperm(113**2, generator=torch.Generator().manual_seed(0))
    assert data.n_train == 3830
    assert torch.equal(data.tokens[:, 0] * 113 + data.tokens[:, 1], order)
    assert torch.equal(data.answers, (data.tokens[:, 0] + data.tokens[:, 1]) % 113)
    assert (data.tokens[:, 2] == 113).all()


def test_last_token_attention_is_causal_attention_at_the_last_token() -> None:
    model, tokens = ModularAdditionTransformer(11, 16, 2, 32), torch.randint(0, 11, (5, 3))
    x, attention = model.embed(tokens), model.attention
    q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (attention.query, attention.key, attention.value))
    whole = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), attention.out(whole)[:, -1])


# digits_mlp


@pytest.mark.recipe
def test_digits_are_learned() -> None:
    seed_everything(0, verbose=False)
    trainer = train(MLP([64, 32, 32, 10], lr=3e-3), Digits(), max_epochs=8, check_val_every_n_epoch=8)
    assert trainer.callback_metrics["accuracy/test"] > 0.9


def test_digits_are_split_without_overlap() -> None:
    data = Digits()
    data.setup("fit")
    assert (len(data.train), len(data.test)) == (1438, 359)
    both = torch.cat([data.train.images, data.test.images])
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, load_digits_flat()))
    assert data.train[0][0].max() == 1


def load_digits_flat() -> list[list[float]]:
    """All digits as scikit-learn gives them."""
    from sklearn.datasets import load_digits

    return load_digits().data.tolist()


def test_digits_say_that_scikit_learn_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(LIBError, match="pip install scikit-learn"):
        Digits().setup("fit")


# cifar10_mlp


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes what the official files hold: strings without a type, as Python 2 had them."""

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_string(self, obj: bytes | str) -> None:
        raw = obj if isinstance(obj, bytes) else obj.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(obj)

    dispatch[bytes] = dispatch[str] = save_string


def write_batch(path: Path, batch: Any, protocol: int = 0) -> None:
    """Write a batch; protocol 0 is as in the official files."""
    with path.open("wb") as file:
        if protocol:
            pickle.dump(batch, file, protocol=protocol)
        else:
            Python2Pickler(file, 2).dump(batch)
    if not protocol:
        path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))


def write_cifar10(root: Path, protocol: int = 0) -> Path:
    """Write six small batches of noise in the official layout."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in (*TRAIN_FILES, *TEST_FILES):
        data = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        labels = rng.integers(0, 10, 20).tolist()
        write_batch(folder / name, {"batch_label": name, "labels": labels, "data": data, "filenames": []}, protocol)
    return root


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_cifar10_is_read_from_the_official_layout(protocol: int, tmp_path: Path) -> None:
    root = write_cifar10(tmp_path, protocol)
    if protocol == 0:
        assert b"cnumpy.core.multiarray" in (root / "cifar-10-batches-py" / "test_batch").read_bytes()
    rng = np.random.default_rng(0)
    expected, labels = zip(
        *((rng.integers(0, 256, (20, 3072), dtype=np.uint8), rng.integers(0, 10, 20)) for _ in range(6)), strict=True
    )
    for given in (root, root / "cifar-10-batches-py"):
        data = Cifar10(str(given))
        data.setup("fit")
        assert torch.equal(data.train.images, torch.from_numpy(np.concatenate(expected[:5])))
        assert torch.equal(data.test.labels, torch.from_numpy(labels[5]))
        x, y = next(iter(data.val_dataloader()[1]))
        assert x.shape == (20, 3072)
        assert torch.equal(x, torch.from_numpy(expected[5]).float() / 255)
        assert torch.equal(y, data.test.labels)
        assert torch.equal(x[3], data.test[3][0])


def test_cifar10_is_read_from_an_archive(tmp_path: Path) -> None:
    arrays = {
        "x_train": np.arange(2 * 3072).reshape(2, 3, 32, 32).astype(np.uint8), "y_train": np.array([0, 9]),
        "x_test": np.zeros((1, 3, 32, 32), np.uint8), "y_test": np.array([5], np.uint8),
    }  # fmt: skip
    np.savez(tmp_path / "part.npz", **arrays)
    data = Cifar10(str(tmp_path / "part.npz"))
    data.setup("fit")
    assert data.train.images.shape == (2, 3072)
    assert data.train.images[1, 1] == (3072 + 1) % 256
    assert data.test.labels.tolist() == [5]
    for change in (
        {"x_train": arrays["x_train"].astype(np.float32)}, {"y_test": np.array([10])}, {"y_train": np.array([1])},
        {"x_test": np.array([{}], object)},
    ):  # fmt: skip
        np.savez(tmp_path / "wrong.npz", **{**arrays, **change})
        with pytest.raises(LIBError, match=r"wrong\.npz"):
            Cifar10(str(tmp_path / "wrong.npz")).setup("fit")
    (tmp_path / "wrong.npz").write_bytes(b"no archive")
    with pytest.raises(LIBError, match="no NumPy archive"):
        Cifar10(str(tmp_path / "wrong.npz")).setup("fit")
    with pytest.raises(LIBError, match=r"no file .*absent\.npz.*cifar-10-python"):
        Cifar10(str(tmp_path / "absent.npz")).setup("fit")
    with pytest.raises(LIBError, match="verify"):
        Cifar10(str(tmp_path / "part.npz"), verify=True).setup("fit")


class Evil:
    """Runs something when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("where", ["alone", "in the dictionary", "in an array"])
def test_cifar10_refuses_pickles_that_run_code(where: str, protocol: int, tmp_path: Path) -> None:
    root, trace = write_cifar10(tmp_path), tmp_path / "it ran"
    for evil, name in (
        (Evil(os.mkdir, str(trace)), "mkdir"),
        (Evil(eval, f"__import__('os').mkdir({str(trace)!r})"), "eval"),
    ):
        batch = {"alone": evil, "in the dictionary": {"data": evil}, "in an array": {"data": np.array([evil])}}[where]
        write_batch(root / "cifar-10-batches-py" / "data_batch_3", batch, protocol)
        with pytest.raises(LIBError, match=rf"data_batch_3 .*{name}, which could run code"):
            Cifar10(str(root)).setup("fit")
        assert not trace.exists()
    with (root / "cifar-10-batches-py" / "data_batch_3").open("rb") as file:
        pickle.load(file)  # that it would have run otherwise
    assert trace.exists()


def test_cifar10_refuses_what_is_something_else(tmp_path: Path) -> None:
    folder = write_cifar10(tmp_path) / "cifar-10-batches-py"
    good = (folder / "test_batch").read_bytes()
    x, y = np.zeros((2, 3072), np.uint8), [0, 1]
    for batch in ([x, y], {"data": x}, {"data": x[:, :9], "labels": y}, {"data": x, "labels": [0, "cat"]}, {}):
        write_batch(folder / "test_batch", batch)
        with pytest.raises(LIBError, match=r"test_batch does not contain CIFAR-10.*kriz/cifar"):
            Cifar10(str(folder)).setup("fit")
    for content in (b"", good[:1000], b"<html>not found</html>"):
        (folder / "test_batch").write_bytes(content)
        with pytest.raises(LIBError, match=r"test_batch is damaged or no pickle"):
            Cifar10(str(folder)).setup("fit")
    (folder / "test_batch").write_bytes(good)
    with pytest.raises(LIBError, match=r"data_batch_1 is not the official file"):
        Cifar10(str(folder), verify=True).setup("fit")
    (folder / "test_batch").unlink()
    with pytest.raises(LIBError, match=r"^A part of CIFAR-10 \(test_batch\) is not in"):
        Cifar10(str(folder)).setup("fit")


def test_cifar10_says_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)
    with pytest.raises(SystemExit, match=r"cifar-10-python\.tar\.gz.*cifar\.html.*--data\.root"):
        main([
            "fit", "--config", "recipes/cifar10_mlp.yaml", f"--data.root={tmp_path / 'none'}",
            f"--trainer.default_root_dir={tmp_path}",
        ])  # fmt: skip


@pytest.mark.recipe
def test_cifar10_on_a_part_of_the_real_images(reference_dir: Path) -> None:
    seed_everything(0, verbose=False)
    model = MLP([3072, 100, 100, 10])
    trainer = train(model, Cifar10(str(reference_dir / "cifar10_part.npz")), max_epochs=3, num_sanity_val_steps=0)
    assert trainer.callback_metrics["accuracy/test"] > 0.25  # chance is 0.1


# language_model


def tiny_checkpoint(folder: Path, kind: str, vocabulary: int = 256) -> str:
    """Save a random model of a handful of parameters."""
    import transformers

    special = {"bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt_neo":
        config = transformers.GPTNeoConfig(
            vocab_size=vocabulary, hidden_size=16, num_layers=8, num_heads=4, window_size=4,
            attention_types=[[["global", "local"], 4]], max_position_embeddings=32, **special,
        )  # fmt: skip
    else:
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=16, n_layer=8, n_head=4, n_positions=32, **special
        )
    transformers.AutoModelForCausalLM.from_config(config).half().save_pretrained(folder)
    return str(folder)


def test_language_model_is_gpt_neo(tmp_path: Path) -> None:
    theirs = load_pretrained(tiny_checkpoint(tmp_path, "gpt_neo"))
    ours = GPTNeo(n_positions=32, d_model=16, n_heads=4, d_mlp=64, window=4)
    for parameter in theirs.parameters():  # far from zero, so that nothing hides behind small weights
        parameter.data.normal_(std=0.3)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(0, 256, (3, 32))
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    assert ours.lm_head.weight is ours.transformer.wte.weight


def test_language_model_learns(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"never odd or even, " * 500)
    data = Text(str(tmp_path / "text"), context=16)
    model = LanguageModel(n_positions=16, n_layers=2, d_model=32, n_heads=4, d_mlp=64, lr=1e-2, warmup_steps=5)
    trainer = train(model, data, max_epochs=6)
    # All but the first bytes of a piece can be known.
    assert trainer.callback_metrics["loss/test"] < 0.6


def test_language_model_reads_pythons_documentation() -> None:
    data = Text()
    data.setup("fit")
    text = bytes(data.train.flatten().to(torch.uint8).tolist())
    assert len(text) > 200_000
    assert b"the Python" in text
    assert 0.09 < len(data.test) / (len(data.train) + len(data.test)) < 0.11


@pytest.mark.recipe
@pytest.mark.parametrize("kind", ["gpt_neo", "gpt2"])
def test_language_model_goes_on_from_a_checkpoint(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = tiny_checkpoint(tmp_path / "checkpoint", kind)
    monkeypatch.chdir(RECIPES.parent)
    for command, place in (("fit", "lib"), ("validate", "lib/validate")):
        main([
            command, "--config", "recipes/language_model.yaml", f"--model.pretrained={name}",
            f"--trainer.default_root_dir={tmp_path / command}", *SMALL["language_model"][0],
        ])  # fmt: skip
        (folder,) = (tmp_path / command / "lightning_logs").iterdir()
        graph = InteractionGraph.load(max((folder / place / "snapshots").iterdir()))
        assert graph.node_layers == SMALL["language_model"][2]
        assert {len(basis.mean) for basis in graph.bases.values()} == {16}
    assert (tmp_path / "fit" / "lightning_logs" / "version_0" / "lib" / "final.safetensors").exists()


def test_language_model_uses_the_tokenizer_of_a_checkpoint(tmp_path: Path) -> None:
    import tokenizers
    import transformers

    words = {"[UNK]": 0, "to": 1, "be": 2, "or": 3, "not": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    name = tiny_checkpoint(tmp_path / "checkpoint", "gpt_neo", vocabulary=5)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(name)
    (tmp_path / "text").write_text("to be or not to be " * 100)

    data = Text(str(tmp_path / "text"), name, context=6, batch_size=2)
    trainer = train(LanguageModel(name), data, max_epochs=1, limit_train_batches=1)
    assert data.vocabulary == 5
    assert data.train[0].tolist() == [1, 2, 3, 4, 1, 2]
    assert torch.isfinite(trainer.callback_metrics["loss/test"])

    with pytest.raises(LIBError, match=r"knows 5 tokens, and the text has 256: pass --data\.tokenizer"):
        train(LanguageModel(name), Text(context=6), max_steps=1)
    with pytest.raises(LIBError, match=r"has 32 positions.* pieces of 33: pass --data\.context with 32"):
        train(LanguageModel(name), Text(str(tmp_path / "text"), name, context=33, batch_size=1), max_steps=1)


def test_language_model_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("too short")
    with pytest.raises(LIBError, match=r"too short: its 9 tokens are 0 pieces"):
        Text(str(tmp_path / "text")).setup("fit")
    with pytest.raises(LIBError, match=r"--data\.path .*absent cannot be read"):
        Text(str(tmp_path / "absent")).setup("fit")
    (tmp_path / "empty").mkdir()
    for name, message in ((tmp_path / "absent", "There is no folder"), (tmp_path / "empty", "cannot be loaded")):
        with pytest.raises(LIBError, match=message):
            Text(tokenizer=str(name)).setup("fit")
        with pytest.raises(LIBError, match=message):
            LanguageModel(str(name)).configure_model()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(LIBError, match=r"pass --data\.path"):
        Text().setup("fit")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LIBError, match="pip install transformers"):
        LanguageModel("roneneldan/TinyStories-1M").configure_model()


@pytest.mark.recipe
def test_many_seeds_are_trained_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(many_seeds, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(many_seeds, "WIDTHS", {"narrow": 8})
    monkeypatch.setattr(many_seeds, "SEEDS", range(2))
    monkeypatch.setattr(many_seeds.train, "__defaults__", (1, 1))
    many_seeds.main(["--folder", str(tmp_path / "logs")])
    table = capsys.readouterr().out.splitlines()[-10:]
    assert table[0] == "| | features | in all 2 | in at least 1 | in one only |"
    assert [row.split(" | ")[0] for row in table[2:]] == [
        f"| {layer}, {when}" for when in ("trained", "untrained") for layer in PERCEPTRON
    ]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["runs"] == ["narrow/seed0/lib", "narrow/seed1/lib"]
    for layer in (*results["trained"], *results["untrained"]):
        assert layer["half"] == pytest.approx([layer["features"], 1])
        assert sum(layer[key][0] for key in ("all", "one")) == pytest.approx(layer["features"])
    assert (tmp_path / "logs" / "narrow" / "universal.json").exists()  # the folder of all runs
    # What is there already is not trained again.
    monkeypatch.setattr(many_seeds, "lib_lightning", lambda words: pytest.fail("again") if "fit" in words else None)
    many_seeds.main(["--folder", str(tmp_path / "logs")])


def test_table_of_many_seeds() -> None:
    page = (RECIPES.parent / "docs" / "many_runs.md").read_text()
    results = json.loads(many_seeds.RESULTS.read_text())
    assert f"<!-- seeds -->\n{many_seeds.table(results)}\n<!-- end of seeds -->" in page
    assert len(results["runs"]) == 12
    # What the page says of it.
    assert all(layer["all"][1] >= 0.5 for layer in results["trained"])
    assert not any(layer["half"][0] for layer in results["untrained"])
    assert results["universal"][0]["label"] == "high: class 4; low: class 3"
