"""Positions that are left out: what a setting means, and that everything is computed of the others alone."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lib_lightning import InteractionGraph, LIBCallback, NodeLayer, compute_interaction_graph
from lib_lightning.ablation import edges_required, node_ablation_curve
from lib_lightning.api import check_node_layers
from lib_lightning.errors import NodeLayerError, SettingError
from lib_lightning.labels.labeller import label_features
from lib_lightning.model.skip_positions import kept_positions, plain_skip, skipped_of
from tests.reference import keep_features, transcribe

SKIPS = st.one_of(
    st.integers(-4, 4),
    st.lists(st.integers(-5, 5), max_size=4),
    st.builds(slice, st.none() | st.integers(-5, 5), st.none() | st.integers(-5, 5), st.sampled_from([None, 1, 2, -1])),
)


class Block(nn.Module):
    """Attention in both directions, and a perceptron."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.q, self.v, self.up, self.down = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x + (self.q(x) @ x.transpose(-1, -2)).softmax(-1) @ self.v(x)
        return x + self.down(torch.tanh(self.up(x)))


def blocks(d: int = 3, depth: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(d) for _ in range(depth))).double()


NODE_LAYERS = ["input", "0", "output"]


@given(skip=SKIPS, length=st.integers(1, 6))
def test_a_setting_means_what_a_python_list_would_lose(skip: int | list[int] | slice, length: int) -> None:
    plain = plain_skip(skip)
    assert plain_skip(json.loads(json.dumps(plain))) == plain
    items = list(range(length))
    if isinstance(skip, slice):
        expected = set(items[skip])
    elif isinstance(skip, list):
        expected = {items[i] for i in skip if -length <= i < length}
    else:
        expected = set(items[:skip] if skip >= 0 else items[skip:])
    assert skipped_of(plain, length) == sorted(expected)
    assert plain_skip(plain) == plain


@given(skip=SKIPS, valid=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_positions_are_counted_among_the_valid_ones(skip: int | list[int] | slice, valid: list[list[bool]]) -> None:
    kept = kept_positions(plain_skip(skip), torch.tensor(valid)).tolist()
    for row, found in zip(valid, kept, strict=True):
        places = [s for s, is_valid in enumerate(row) if is_valid]
        left_out = skipped_of(plain_skip(skip), len(places))
        assert [s for s, is_kept in enumerate(found) if is_kept] == [
            s for rank, s in enumerate(places) if rank not in left_out
        ]


@settings(deadline=None, max_examples=25)
@given(skip=SKIPS, steps=st.sampled_from([0, 2]), plain=st.booleans())
def test_graph_against_literal_sums_over_the_others(skip: int | list[int] | slice, steps: int, plain: bool) -> None:
    left_out = skipped_of(plain_skip(skip), 4)
    if not 0 < len(left_out) < 4:
        return
    model, x = blocks(), torch.randn(12, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    graph = compute_interaction_graph(
        model, [x], NODE_LAYERS, rtol=1e-11, integration_steps=steps, effort="exact",
        skip_positions=skip, dtype=torch.float64,
    )  # fmt: skip
    kept = torch.ones(12, 4, dtype=torch.bool)
    kept[:, left_out] = False
    expected = transcribe(x, list(model), steps=steps, masks=[kept] * 3)
    for l, basis in enumerate(graph.bases.values()):
        torch.testing.assert_close(basis.mean, expected.mean[l], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(basis.importance, expected.Lambda[l], rtol=1e-7, atol=1e-10)
    for E, reference in zip(graph.edges.values(), expected.E, strict=True):
        torch.testing.assert_close(E, reference, rtol=1e-6, atol=1e-9)
    for A, reference in zip(graph.attributions.values(), expected.A, strict=True):
        torch.testing.assert_close(A, reference, rtol=1e-6, atol=1e-9)


def test_identities_hold_without_the_left_out_positions() -> None:
    """E[fhat] = 0, E[fhat fhat^T] = diag(Lambda), and Jacobians between features are orthonormal."""
    model, x = blocks(), torch.randn(40, 4, 3, dtype=torch.float64)
    graph = compute_interaction_graph(model, [x], NODE_LAYERS, rtol=1e-11, effort="exact", skip_positions=[0, 2])
    kept = [1, 3]
    activations = [x, model[0](x), model(x)]
    before, after = graph.bases["input"], graph.bases["0"]
    fhat = before.encode(x[:, kept]).flatten(0, 1)
    torch.testing.assert_close(fhat.mean(0), torch.zeros(before.n_features).double(), rtol=0, atol=1e-10)
    torch.testing.assert_close(fhat.T @ fhat / len(fhat), before.importance.diag(), rtol=1e-8, atol=1e-10)
    total = torch.zeros(before.n_features, before.n_features, dtype=torch.float64)
    for sample in x:
        J = torch.autograd.functional.jacobian(lambda a: model[0](a[None])[0], sample)
        J = torch.einsum("pi,tpsd,jd->tisj", after.to_features, J[kept][:, :, kept], before.from_features).flatten(0, 1)
        total += torch.einsum("tsi,tsj->ij", J, J)
    torch.testing.assert_close(total / (40 * 2), torch.eye(before.n_features).double(), rtol=1e-8, atol=1e-8)
    assert activations[2].isfinite().all()


def test_left_out_positions_still_flow() -> None:
    """Others attend to them: their content changes the features and edges of the rest, though not the first mean."""
    model, x = blocks(), torch.randn(30, 4, 3, dtype=torch.float64)
    other = x.clone()
    other[:, 0] = 5 * torch.randn(30, 3, dtype=torch.float64)
    one, two = (compute_interaction_graph(model, [a], NODE_LAYERS, skip_positions=1) for a in (x, other))
    torch.testing.assert_close(one.bases["input"].mean, two.bases["input"].mean)
    assert not torch.allclose(one.bases["0"].mean, two.bases["0"].mean)
    assert not torch.allclose(one.bases["input"].importance, two.bases["input"].importance)


def test_in_a_causal_model_the_first_token_takes_nothing_from_the_others() -> None:
    """There the cut is complete: what is left out is a function of itself alone, and no path is missing."""

    class Causal(Block):
        def forward(self, x: Tensor) -> Tensor:
            above = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = (self.q(x) @ x.transpose(-1, -2)).masked_fill(above, -torch.inf)
            x = x + scores.softmax(-1) @ self.v(x)
            return x + self.down(torch.tanh(self.up(x)))

    torch.manual_seed(0)
    model = nn.Sequential(Causal(3), Causal(3)).double()
    x = torch.randn(10, 4, 3, dtype=torch.float64)
    check_node_layers(model, x, NODE_LAYERS, skip_positions=1)
    J = torch.autograd.functional.jacobian(lambda a: model(a[None])[0], x[0])
    assert not J[0][:, 1:].any()
    assert J[1:][:, :, 0].any()


def test_padding_on_either_side_changes_nothing() -> None:
    """The first token is the first that is valid."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block = nn.Linear(3, 3), Block(3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            h = self.embed(x)
            scores = (self.block.q(h) @ h.transpose(-1, -2)).masked_fill(~mask[:, None].bool(), -torch.inf)
            return h + scores.softmax(-1) @ self.block.v(h)

    torch.manual_seed(0)
    model = Masked().double()
    x, mask = torch.randn(20, 3, 3, dtype=torch.float64), torch.ones(20, 3, dtype=torch.int64)
    options = {"node_layers": ["embed", "output"], "mask": "mask", "effort": "exact", "skip_positions": 1}
    graphs = [compute_interaction_graph(model, [{"x": x, "mask": mask}], **options)]
    for pad in ((2, 0), (0, 2)):
        padded = {
            "x": nn.functional.pad(x, (0, 0, *pad), value=7.0),
            "mask": nn.functional.pad(mask, pad),
        }
        graphs.append(compute_interaction_graph(model, [padded], **options))
    for graph in graphs[1:]:
        torch.testing.assert_close(graph.bases["embed"].importance, graphs[0].bases["embed"].importance)
        torch.testing.assert_close(graph.edges["embed", "output"], graphs[0].edges["embed", "output"])


def score(output: Tensor, batch: Tensor) -> Tensor:
    return output.mean((1, 2))


def test_a_file_says_it_and_ablations_follow_it(tmp_path: Path) -> None:
    model, x = blocks(), torch.randn(30, 4, 3, dtype=torch.float64)
    layers = [NodeLayer(["input"], skip_positions=slice(1, 3)), "0", "output"]
    graph = compute_interaction_graph(model, [x], layers, skip_positions=[-1])
    graph.save(tmp_path / "graph.safetensors")
    loaded = InteractionGraph.load(tmp_path / "graph.safetensors")
    assert [layer.skip_positions for layer in loaded.node_layer_specs()] == ["slice(1, 3, None)", (-1,), (-1,)]
    assert loaded.info["settings"]["skip_positions"] == [-1]
    kept = torch.ones(30, 4, dtype=torch.bool)
    kept[:, 1:3] = False
    basis = loaded.bases["input"]
    for m, found in node_ablation_curve(model, [x], loaded, score, "input", counts=[0, 1]).items():
        ablated = keep_features(x, basis.mean, basis.to_features, basis.from_features, range(m), kept)
        assert found == pytest.approx(score(model(ablated), x).mean().item(), abs=1e-10)
    for result in edges_required(model, [x], loaded, score, tolerance=1e9).values():
        assert result.count == 0


def test_labels_and_feature_values_are_zero_there() -> None:
    model, x = blocks(), torch.randn(30, 4, 3, dtype=torch.float64)
    graph = compute_interaction_graph(model, [x], NODE_LAYERS, skip_positions=1)
    seen = []

    def labeller(features: Tensor, inputs: Tensor) -> list[str]:
        seen.append(features)
        return [""] * features.shape[-1]

    label_features(graph, model, [x], labeller)
    assert all(not values[:, 0].any() and values[:, 1:].any() for values in seen)


def test_a_single_position_is_never_left_out() -> None:
    """Of a classifier of sequences only the sequence has a first token."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = Block(3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(x).mean(1))

    graph = compute_interaction_graph(Pooled(), [torch.randn(30, 4, 3)], ["block", "output"], skip_positions=1)
    assert graph.bases["output"].n_features == 2
    assert graph.bases["block"].importance.sum() > 0


def test_joined_streams_have_first_positions_of_their_own() -> None:
    layer = NodeLayer(["a", "b"], join="positions", skip_positions=1)
    valid, kept = layer.masks(None, [torch.zeros(2, 3, 4), torch.zeros(2, 2, 4)])
    assert valid is None
    assert kept is not None
    assert kept.tolist() == [[False, True, True, False, True]] * 2


def test_selected_positions_are_counted_in_the_whole_tensor() -> None:
    tensors = [torch.zeros(1, 4, 2)]
    assert NodeLayer(["a"], positions=[-1, 0], skip_positions=1).masks(None, tensors)[1].tolist() == [[True, False]]
    assert NodeLayer(["a"], positions=-1, skip_positions=1).masks(None, tensors) == (None, None)
    with pytest.raises(NodeLayerError, match=r"leaves out all positions of node layer 'a', which has 4"):
        NodeLayer(["a"], positions=0, skip_positions=1).masks(None, tensors)


def test_a_classifier_without_the_position_it_reads_has_no_features_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    model, batch = ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(20, 3, 8, 8)}
    layers = ["vit.layers.0", "vit.layers.1", "output"]
    graph = compute_interaction_graph(model, [batch], layers)
    assert all(basis.n_features for basis in graph.bases.values())
    assert not graph.info["notes"]
    graph = compute_interaction_graph(model, [batch], layers, skip_positions=1)
    assert [basis.n_features for basis in graph.bases.values()] == [0, 0, 3]
    (note,) = graph.info["notes"]
    assert re.match("'vit.layers.0', 'vit.layers.1': .*positions that skip_positions leaves out", note)
    assert note in caplog.text
    # Up to the last block, the other positions are read by all.
    graph = compute_interaction_graph(model, [batch], layers[:-1], skip_positions=1)
    assert all(basis.n_features for basis in graph.bases.values())


@pytest.mark.parametrize(
    "wrong", [True, "x", "2:10", slice(0, 2, 0), slice("a", 2), "slice(1)", [1.5], 2.5, object(), {1}, "1"]
)
def test_wrong_settings_are_refused_where_they_are_made(wrong: object) -> None:
    for make in (
        lambda: NodeLayer("a", skip_positions=wrong),
        lambda: LIBCallback(["input", "output"], skip_positions=wrong),
    ):
        with pytest.raises(SettingError, match=r"^skip_positions is a number of first positions to leave out"):
            make()


@pytest.mark.parametrize(
    ("skip", "message"), [(4, "leaves out all positions of node layer 'input', which has 4"), ([9], "leaves nothing")]
)
def test_settings_that_do_not_fit_the_model(skip: int | list[int], message: str) -> None:
    with pytest.raises(NodeLayerError, match=message):
        check_node_layers(blocks(), torch.randn(5, 4, 3).double(), NODE_LAYERS, skip_positions=skip)
    with pytest.raises(NodeLayerError, match="leaves nothing out; numbers of positions: 1 at 'input', 1 at 'output'"):
        check_node_layers(nn.Linear(3, 2), torch.randn(5, 3), ["input", "output"], skip_positions=1)


class Training(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = blocks().float()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Tensor) -> Tensor:
        return (self(batch) - 1).square().mean()

    def validation_step(self, batch: Tensor) -> None:
        self.log("val", self.training_step(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-3)


def test_in_a_trainer(tmp_path: Path) -> None:
    x = torch.randn(32, 4, 3)
    callback = LIBCallback(["input", "net.0", "output"], skip_positions=1, baselines=["pca"])
    data = torch.utils.data.DataLoader(x, 16)
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[callback], accelerator="cpu", default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Training(), data, data)
    for graph in callback.graphs.values():
        assert [layer.skip_positions for layer in graph.node_layer_specs()] == [1, 1, 1]
    torch.testing.assert_close(callback.graphs["pca"].bases["input"].mean.float(), x[:, 1:].mean((0, 1)))
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert all(InteractionGraph.load(file).node_layer_specs()[0].skip_positions == 1 for file in files)
    values = [graph.reference_features["input"] for graph in callback.graphs.values()]
    assert all(len(value) for value in itertools.chain(values))


def test_the_page_about_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    page = (Path(__file__).parents[2] / "docs" / "positions.md").read_text()
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    exec(compile(block, "positions.md", "exec"), {})
    assert capsys.readouterr().out == "1\n"
    for file in re.findall(r"`(tests/[^`]+)`", page):
        assert (Path(__file__).parents[2] / file).exists()
    for setting in ("1", "-1", "[0, 4, -1]", "slice(2, 10)"):
        assert f"| `{setting}` |" in page
        plain_skip(eval(setting))
