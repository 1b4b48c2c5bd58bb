"""Which axis of a tensor holds features, for modules and layouts of many kinds, against what their authors meant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib_lightning import NodeLayer, compute_interaction_graph, list_node_layers
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.node_layer import as_node_layers, has_known_axis

C, D = 4, 5  # channels, and width of a linear map: no other axis has these sizes


class Permute(nn.Module):
    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class Do(nn.Module):
    """Any function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class First(nn.Module):
    """The first result of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[0]


class ConvNeXtBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.norm, self.up, self.down = nn.LayerNorm(C), nn.Linear(C, D), nn.Linear(D, C)
        self.gamma = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.gamma * self.down(F.gelu(self.up(h)))).permute(0, 3, 1, 2)


class SwinBlock(nn.Module):
    """Windows of 2 x 2 of images with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.mlp = nn.LayerNorm(C), nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        n, H, W, _ = x.shape
        windows = self.norm(x).view(n, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, C)
        mixed = self.mix(torch.softmax(windows @ windows.transpose(1, 2), -1) @ windows)
        x = x + mixed.view(n, H // 2, W // 2, 2, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(n, H, W, C)
        return x + self.mlp(x)


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv1d(C, C, 3, padding=1), nn.Linear(C, D), nn.Linear(D, C)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return h * torch.sigmoid(self.up(F.relu(self.down(h.mean(-1)))))[:, :, None]


class Weights(nn.Module):
    """A product with a matrix of weights, written in several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.W, self.how = nn.Parameter(torch.randn(C, D)), how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "einsum":
            return torch.einsum("nct,cd->ndt", x, self.W)
        if self.how == "...":
            return torch.einsum("...c, cd -> ...d", x, self.W)
        if self.how == "addmm":  # as in GPT-2
            bias = torch.zeros(D)
            return torch.addmm(bias, x.view(-1, C), self.W).view(*x.shape[:-1], D)
        return {"@": lambda: x @ self.W, "matmul": lambda: torch.matmul(x, self.W)}[self.how]()


class RMSNorm(nn.Module):
    """As in Llama: nothing but products and a vector of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


IMAGES, SERIES, VOLUMES = (3, C, 6, 7), (3, C, 6), (3, C, 6, 7, 2)
TOKENS, FRAMES = (3, 6, C), (3, 6, 7, C)
# Modules in a row, the shape of their input, and the axis of features of the input and of each result.
ROWS: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...], list[int]]] = {
    "Conv1d": (lambda: [nn.Conv1d(C, D, 3), nn.ReLU(), nn.Conv1d(D, C, 1)], SERIES, [1, 1, 1, 1]),
    "Conv2d": (lambda: [nn.Conv2d(C, D, 3), nn.ReLU(), nn.Conv2d(D, C, 1)], IMAGES, [1, 1, 1, 1]),
    "Conv3d": (lambda: [nn.Conv3d(C, D, 1), nn.ReLU(), nn.Conv3d(D, C, 1)], VOLUMES, [1, 1, 1, 1]),
    "ConvTranspose1d": (lambda: [nn.ConvTranspose1d(C, D, 3), nn.Tanh()], SERIES, [1, 1, 1]),
    "ConvTranspose3d": (lambda: [nn.ConvTranspose3d(C, D, 1), nn.Tanh()], VOLUMES, [1, 1, 1]),
    "BatchNorm1d": (lambda: [nn.BatchNorm1d(C), nn.GELU(), nn.Dropout()], SERIES, [1, 1, 1, 1]),
    "BatchNorm3d": (lambda: [nn.BatchNorm3d(C), nn.SiLU()], VOLUMES, [1, 1, 1]),
    "InstanceNorm1d": (lambda: [nn.InstanceNorm1d(C), nn.SiLU()], SERIES, [1, 1, 1]),
    "GroupNorm": (lambda: [nn.GroupNorm(2, C), nn.Mish()], SERIES, [1, 1, 1]),
    "GroupNorm, 5 axes": (lambda: [nn.GroupNorm(2, C), nn.Mish()], VOLUMES, [1, 1, 1]),
    "pooling": (
        lambda: [nn.Conv1d(C, D, 1), nn.MaxPool1d(2), nn.Tanh(), nn.AvgPool1d(3), nn.AdaptiveAvgPool1d(1)],
        SERIES, [1, 1, 1, 1, 1, 1],
    ),
    "pooling, 5 axes": (lambda: [nn.MaxPool3d((2, 1, 1)), nn.Tanh(), nn.AdaptiveMaxPool3d(1)], VOLUMES, [1, 1, 1, 1]),
    "upsampling": (lambda: [nn.Conv1d(C, D, 1), nn.Upsample(scale_factor=2), nn.Tanh()], SERIES, [1, 1, 1, 1]),
    "padding": (lambda: [nn.ReflectionPad1d(1), nn.Conv1d(C, D, 3)], SERIES, [1, 1, 1]),
    "PReLU": (lambda: [nn.PReLU(C), nn.Conv1d(C, D, 1), nn.PReLU(D)], SERIES, [1, 1, 1, 1]),
    "GLU": (lambda: [nn.Conv1d(C, 2 * C, 1), nn.GLU(1), nn.Tanh()], SERIES, [1, 1, 1, 1]),
    "Linear, 3 axes": (lambda: [nn.Linear(C, D), nn.ReLU(), nn.Linear(D, C)], TOKENS, [2, 2, 2, 2]),
    "Linear, 4 axes": (lambda: [nn.Linear(C, D), nn.ReLU(), nn.Linear(D, C)], FRAMES, [3, 3, 3, 3]),
    "Linear, 5 axes": (lambda: [nn.Linear(C, D), nn.ReLU()], (3, 2, 6, 7, C), [4, 4, 4]),
    "LayerNorm, channels last": (lambda: [nn.LayerNorm(C), nn.GELU()], FRAMES, [3, 3, 3]),
    "RMSNorm, channels last": (lambda: [nn.RMSNorm(C), nn.GELU()], FRAMES, [3, 3, 3]),
    "RMSNorm of products": (lambda: [RMSNorm(), nn.GELU()], FRAMES, [3, 3, 3]),
    "Embedding": (lambda: [Do(lambda x: x.long()), nn.Embedding(9, D), nn.Dropout()], (3, 6), [1, 1, 2, 2]),
    "LSTM": (lambda: [First(nn.LSTM(C, D, batch_first=True)), nn.Tanh()], TOKENS, [2, 2, 2]),
    "GRU": (lambda: [First(nn.GRU(C, D, batch_first=True)), nn.Tanh()], TOKENS, [2, 2, 2]),
    "RNN": (lambda: [First(nn.RNN(C, D, batch_first=True)), nn.Tanh()], TOKENS, [2, 2, 2]),
    "RNN, sequence first": (
        lambda: [Do(lambda x: x.transpose(0, 1)), First(nn.RNN(C, D)), Do(lambda x: x.transpose(0, 1)), nn.Tanh()],
        TOKENS, [2, 2, 2, 2, 2],
    ),
    "LSTM of a series with channels first": (
        lambda: [Permute(0, 2, 1), First(nn.LSTM(C, D, batch_first=True)), Permute(0, 2, 1), nn.Tanh()],
        SERIES, [1, 2, 2, 1, 1],
    ),
    "TransformerEncoderLayer": (
        lambda: [nn.TransformerEncoderLayer(C, 2, D, batch_first=True), nn.Tanh()], TOKENS, [2, 2, 2],
    ),
    "Linear after permute": (
        lambda: [nn.Conv2d(C, D, 3), Permute(0, 2, 3, 1), nn.Linear(D, C), Permute(0, 3, 1, 2), nn.Conv2d(C, D, 1)],
        IMAGES, [1, 1, 3, 3, 1, 1],
    ),
    "activations after permute": (
        lambda: [nn.Conv2d(C, D, 3), Permute(0, 2, 3, 1), nn.Tanh(), Permute(0, 3, 1, 2), nn.Tanh()],
        IMAGES, [1, 1, 3, 3, 1, 1],
    ),
    "movedim, T and mT": (
        lambda: [nn.Conv1d(C, D, 1), Do(lambda x: x.movedim(1, -1)), nn.Tanh(), Do(lambda x: x.mT), nn.Tanh()],
        SERIES, [1, 1, 2, 2, 1, 1],
    ),
    "ConvNeXt": (lambda: [ConvNeXtBlock(), ConvNeXtBlock(), nn.Tanh()], IMAGES, [1, 1, 1, 1]),
    "Swin": (lambda: [SwinBlock(), SwinBlock(), nn.Tanh()], (3, 6, 8, C), [3, 3, 3, 3]),
    "patches": (
        lambda: [nn.Conv2d(C, D, 2, 2), nn.Flatten(2), Do(lambda x: x.transpose(1, 2)), nn.LayerNorm(D)],
        IMAGES, [1, 1, 1, 2, 2],
    ),
    "frames, each by itself": (
        lambda: [Do(lambda x: x.flatten(0, 1)), nn.Conv2d(C, D, 3), Do(lambda x: x.unflatten(0, (3, 2))), nn.Tanh()],
        (3, 2, C, 6, 7), [2, 1, 1, 2, 2],
    ),
    "slices and parts": (
        lambda: [nn.Conv1d(C, 2 * C, 1), Do(lambda x: x[:, :C, 1:]), Do(lambda x: x.chunk(2, 2)[0]), nn.Tanh()],
        SERIES, [1, 1, 1, 1, 1],
    ),
    "mean over time": (lambda: [nn.Conv3d(C, D, 1), Do(lambda x: x.mean(2)), nn.Tanh()], VOLUMES, [1, 1, 1, 1]),
    "one frame": (lambda: [nn.Conv3d(C, D, 1), Do(lambda x: x[:, :, 0]), nn.Tanh()], VOLUMES, [1, 1, 1, 1]),
    "SqueezeExcite": (lambda: [SqueezeExcite(), nn.Tanh()], SERIES, [1, 1, 1]),
    "x @ W": (lambda: [Weights("@"), nn.Tanh()], FRAMES, [3, 3, 3]),
    "matmul": (lambda: [Weights("matmul"), nn.Tanh()], FRAMES, [3, 3, 3]),
    "addmm": (lambda: [Do(lambda x: x.roll(1, -1)), Weights("addmm"), nn.Tanh()], FRAMES, [3, 3, 3, 3]),
    "einsum, other axes left out": (lambda: [Do(torch.sin), Weights("..."), nn.Tanh()], FRAMES, [3, 3, 3, 3]),
    "einsum": (lambda: [Weights("einsum"), nn.Tanh()], SERIES, [1, 1, 1]),
    "functions": (
        lambda: [Do(lambda x: F.conv1d(x, torch.ones(D, C, 1))), Do(lambda x: F.relu(x + 1).clone())],
        SERIES, [1, 1, 1],
    ),
    "in place": (lambda: [nn.Conv1d(C, D, 1), nn.ReLU(inplace=True), nn.Hardtanh(inplace=True)], SERIES, [1, 1, 1, 1]),
    "PixelShuffle": (lambda: [nn.PixelShuffle(2), nn.Tanh()], IMAGES, [1, 1, 1]),
    "Identity": (lambda: [nn.Identity(), nn.Sequential(nn.Identity()), nn.Conv1d(C, D, 1)], SERIES, [1, 1, 1, 1]),
}  # fmt: skip


def axes_found(model: nn.Module, x: Any, taps: list[str]) -> tuple[list[int], list[str]]:
    instrumented = InstrumentedModel(model, as_node_layers(taps))
    captured = instrumented.capture(x)
    assert all(a == b for a, b in zip([c.layer for c in captured], instrumented.layers, strict=True))
    axes = [c.layer.feature_axis(c.outputs[0].ndim) % c.outputs[0].ndim for c in captured]
    return axes, instrumented.axis_notes


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("n", [3, 1])
def test_axis_of_each_tensor(name: str, graph: bool, n: int) -> None:
    if n == 1 and name == "frames, each by itself":
        return  # its module knows the number of samples
    torch.manual_seed(0)
    make, shape, expected = ROWS[name]
    model, x = nn.Sequential(*make()).eval(), torch.rand(n, *shape[1:])
    taps = [f"{i}" for i in range(len(model))]
    if name == "Embedding":
        taps, expected = taps[1:], expected[2:]
    else:
        taps = ["input", *taps]
    one_by_one = {}
    with torch.set_grad_enabled(graph):
        for tap, axis in zip(taps, expected, strict=True):
            partner = taps[-1] if tap != taps[-1] else taps[0]
            order = [tap, partner] if taps.index(tap) < taps.index(partner) else [partner, tap]
            if len(order) < 2 or "sequence first" in name:
                continue
            found, notes = axes_found(model, x, order)
            one_by_one[tap] = found[order.index(tap)]
            assert (one_by_one[tap], notes) == (axis, [])
        if "sequence first" not in name and name not in ("Embedding", "frames, each by itself"):
            assert axes_found(model, x, taps) == (expected, [])


def test_channels_are_features_without_a_word() -> None:
    """Whole graphs: what was time, depth or width before."""
    torch.manual_seed(0)
    for conv, shape in ((nn.Conv1d, SERIES), (nn.Conv3d, VOLUMES)):
        model = nn.Sequential(conv(C, D, 1), nn.Tanh(), conv(D, 3, 1))
        graph = compute_interaction_graph(model, [torch.randn(20, *shape[1:])], ["input", "1", "output"])
        assert [basis.mean.shape for basis in graph.bases.values()] == [(C,), (D,), (3,)]
        assert graph.info["notes"] == []
        assert [layer.feature_dim for layer in graph.node_layer_specs()] == [1, 1, 1]
        cuts = {cut.tap: (cut.positions, cut.features) for cut in list_node_layers(model, torch.randn(3, *shape[1:]))}
        positions = torch.Size(shape[2:]).numel()
        assert cuts == {"input": (positions, C), "0": (positions, D), "1": (positions, D), "output": (positions, 3)}


def test_a_conv1d_is_the_conv2d_of_images_of_height_one() -> None:
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Conv1d(C, D, 3), nn.Tanh(), nn.Conv1d(D, 2, 3)).double()
    tall = nn.Sequential(nn.Conv2d(C, D, (1, 3)), nn.Tanh(), nn.Conv2d(D, 2, (1, 3))).double()
    tall.load_state_dict({name: t[:, :, None] if t.ndim == 3 else t for name, t in flat.state_dict().items()})
    x = torch.randn(20, C, 8, dtype=torch.float64)
    graphs = [
        compute_interaction_graph(model, [data], ["input", "1", "output"])
        for model, data in ((flat, x), (tall, x[:, :, None]))
    ]
    for pair, E in graphs[0].edges.items():
        torch.testing.assert_close(E, graphs[1].edges[pair], rtol=1e-9, atol=1e-12)


def hugging_face(name: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, int]]:
    """A small model with random weights, a batch, and the axes of some of its tensors."""
    import transformers as T

    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    if name == "Wav2Vec2":
        options = {
            "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
        }  # fmt: skip
        axes = {"feature_extractor.conv_layers.0": 1, "feature_extractor.conv_layers.1": 1, "feature_projection": 2}
        return T.Wav2Vec2Model(T.Wav2Vec2Config(**small, **options)), {"input_values": torch.randn(3, 400)}, axes
    if name == "Swin":
        config = T.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4)
        axes = {"embeddings.patch_embeddings.projection": 1, "embeddings": 2, "encoder.layers.0": 2}
        return T.SwinModel(config), {"pixel_values": torch.randn(3, 3, 32, 32)}, axes
    if name == "ConvNeXt":
        config = T.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
        axes = {"embeddings": 1, "encoder.stages.0.layers.0.layernorm": 3, "encoder.stages.0.layers.0.act": 3}
        axes["encoder.stages.0"] = 1
        return T.ConvNextModel(config), {"pixel_values": torch.randn(3, 3, 64, 64)}, axes
    if name == "GPT2":
        config = T.GPT2Config(n_layer=2, n_head=4, n_embd=32, vocab_size=50, bos_token_id=0, eos_token_id=0)
        parts = ("attn.c_attn", "attn.c_proj:input", "ln_2:input", "mlp.c_proj:input")
        return T.GPT2Model(config), {"input_ids": torch.randint(0, 50, (3, 8))}, {f"h.0.{at}": 2 for at in parts}
    config = T.LlamaConfig(**small, vocab_size=50)
    tokens = torch.randint(0, 50, (3, 8))
    return T.LlamaModel(config), {"input_ids": tokens}, {"embed_tokens": 2, "layers.0.mlp.act_fn": 2, "layers.0": 2}


@pytest.mark.parametrize("name", ["Wav2Vec2", "Swin", "ConvNeXt", "GPT2", "Llama"])
def test_models_of_transformers(name: str) -> None:
    model, batch, expected = hugging_face(name)
    assert axes_found(model.eval(), batch, list(expected)) == (list(expected.values()), [])


class TestGuesses:
    def test_images_that_are_flattened(self) -> None:
        """No axis has features of its own."""
        model = nn.Sequential(nn.Flatten(), nn.Linear(28, 3))
        graph = compute_interaction_graph(model, [torch.randn(50, 4, 7)], ["input", "output"])
        assert graph.info["notes"] == [
            "Which axis of 'input' has the features cannot be told from the modules around it; axis 2 was taken, of "
            "samples of shape (4, 7) (axis 0 is the batch). NodeLayer(['input'], feature_dim=...) sets it."
        ]
        layers = [NodeLayer("input", feature_dim=1), "output"]
        assert compute_interaction_graph(model, [torch.randn(50, 4, 7)], layers).info["notes"] == []

    def test_as_many_votes_for_two_axes(self) -> None:
        """A linear map of time beside one of channels, of the same tensor."""

        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.time, self.channels = nn.Linear(6, 6), nn.Linear(C, C)

            def forward(self, x: Tensor) -> Tensor:
                return self.time(x) + self.channels(x.transpose(1, 2)).transpose(1, 2)

        axes, notes = axes_found(Both(), torch.randn(3, C, 6), ["input", "output"])
        assert axes == [2, 2]
        assert [note.split("'")[1] for note in notes] == ["input", "output"]

    def test_a_mixer_has_more_evidence_for_its_channels(self) -> None:
        class Mixer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm, self.tokens, self.norm_2, self.channels = (
                    nn.LayerNorm(C), nn.Linear(6, 6), nn.LayerNorm(C), nn.Linear(C, C),
                )  # fmt: skip

            def forward(self, x: Tensor) -> Tensor:
                x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
                return x + self.channels(self.norm_2(x))

        model = nn.Sequential(nn.Linear(C, C), Mixer(), Mixer(), nn.Linear(C, 2))
        axes, notes = axes_found(model, torch.randn(3, 6, C), ["0", "1", "2", "output"])
        assert (axes, notes) == ([2, 2, 2, 2], [])

    def test_a_matrix_has_no_other_axis(self) -> None:
        axes, notes = axes_found(nn.Sequential(Do(torch.tanh), Do(torch.sin)), torch.randn(3, 6), ["0", "1"])
        assert (axes, notes) == ([1, 1], [])


def test_a_given_axis_is_kept() -> None:
    layers = [NodeLayer("input", feature_dim=2), NodeLayer("output", feature_dim=-1)]
    instrumented = InstrumentedModel(nn.Conv1d(C, D, 1), layers)
    assert [c.layer.feature_dim for c in instrumented.capture(torch.randn(3, C, 6))] == [2, -1]


def test_files_say_it_and_are_read_without_looking_again() -> None:
    model = nn.Sequential(nn.Conv1d(C, D, 1), nn.Tanh(), nn.Flatten(), nn.Linear(D * 6, 2))
    graph = compute_interaction_graph(model, [torch.randn(30, C, 6)], ["0", "1", "output"])
    layers = graph.node_layer_specs()
    assert [layer.feature_dim for layer in layers] == [1, 1, None]
    assert all(map(has_known_axis, layers))
    # One of an earlier version, which took the last axis.
    graph.info["node_layers"][0]["feature_dim"] = None
    captured = InstrumentedModel(model, graph.node_layer_specs()).capture(torch.randn(3, C, 6))
    assert [layer.a.shape[2] for layer in captured] == [6, D, 2]


def test_what_fails_while_operations_are_followed_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not end the forward pass."""

    def fail(*_: Any) -> Any:
        raise RuntimeError

    monkeypatch.setattr("lib_lightning.model.feature_axis._name", fail)
    axes, notes = axes_found(nn.Sequential(nn.Conv1d(C, D, 1), nn.Tanh()), torch.randn(3, C, 6), ["0", "1"])
    assert axes == [2, 2]
    assert len(notes) == 2
