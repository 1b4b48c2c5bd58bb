"""Dictionaries of SAELens and sparsify, as these packages make them: `tox -e dictionaries`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import NodeLayer, compute_interaction_graph
from lib_lightning.dictionaries import AdaptedDictionary, Transcoder
from lib_lightning.dictionaries.topk_training import ALPHA, topk_loss
from lib_lightning.errors import SettingError
from lib_lightning.interventions import edit_features, scale
from tests.dictionaries.dense import dense_edges

sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed: tox -e dictionaries")
sparsify = pytest.importorskip("sparsify", reason="sparsify is not installed: tox -e dictionaries")

D, R = 16, 40


def randomized(module: nn.Module, seed: int) -> nn.Module:
    """A dictionary with weights that are not symmetric and biases that are not zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) / (D**0.5 if p.ndim == 2 else 10))
            if "threshold" in name:
                p.abs_().add_(0.3)
    return module


def of_saelens(name: str, seed: int, **options: Any) -> nn.Module:
    from sae_lens.registry import get_sae_class

    kind, config = get_sae_class(name)
    return randomized(kind(config(d_in=D, d_sae=R, dtype="float64", **options)), seed)


def of_sparsify(seed: int, **options: Any) -> nn.Module:
    config = sparsify.SparseCoderConfig(num_latents=R, k=5, **options)
    return randomized(sparsify.SparseCoder(D, config, dtype=torch.float64), seed)


OBJECTS: dict[str, Callable[[int], nn.Module]] = {
    "standard": lambda seed: of_saelens("standard", seed),
    "no bias in the input": lambda seed: of_saelens("standard", seed, apply_b_dec_to_input=False),
    "jumprelu": lambda seed: of_saelens("jumprelu", seed),
    "gated": lambda seed: of_saelens("gated", seed),
    "topk": lambda seed: of_saelens("topk", seed, k=5),
    "rescaled topk": lambda seed: of_saelens("topk", seed, k=5, rescale_acts_by_decoder_norm=True),
    "constant norm": lambda seed: of_saelens("topk", seed, k=5, normalize_activations="constant_norm_rescale"),
    "layer norm": lambda seed: of_saelens("standard", seed, normalize_activations="layer_norm"),
    "heads": lambda seed: of_saelens("topk", seed, k=5, reshape_activations="hook_z"),
    "sparsify": of_sparsify,
    "sparsify groupmax": lambda seed: of_sparsify(seed, activation="groupmax"),
}


def functions(one: Any, at: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Encoder and decoder of an object as plain functions, in the state of some activations ``(S, d)``."""

    def shaped(x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, D // 2)) if getattr(one, "hook_z_reshaping_mode", False) else x

    def encode(x: Tensor) -> Tensor:
        found = one.encode(shaped(x))
        if isinstance(found, Tensor):
            return found
        # Of sparsify's own functions, autograd only knows first derivatives: the same with those of torch.
        pre = torch.relu((x - one.b_dec) @ one.encoder.weight.T + one.encoder.bias)
        chosen = torch.zeros_like(pre).scatter(-1, found.top_indices, 1.0)
        return pre * chosen

    def decode(f: Tensor) -> Tensor:
        if hasattr(one, "num_latents"):
            return f @ one.W_dec + one.b_dec
        with torch.no_grad():
            one.encode(shaped(at))
        return one.decode(f).reshape(*f.shape[:-1], D)

    return encode, decode


def network() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, D), nn.GELU(), nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3)).double().eval()
    return model, torch.randn(24, 5).double(), model[2:4]


@pytest.mark.parametrize("name", OBJECTS)
def test_edges_and_edits(name: str) -> None:
    model, x, section = network()
    before, after = OBJECTS[name](0), OBJECTS[name](1)
    attributes = [dict(vars(m)) for m in before.modules()]
    graph = compute_interaction_graph(model, [x], ["1", "3"], {"1": before, "3": after}, effort="exact")
    assert [dict(vars(m)) for m in before.modules()] == attributes  # as it was
    a = model[:2](x).detach()
    E = A = torch.zeros(R + 1, R + 1).double()
    for sample in a[:, None]:
        next_sample = section(sample).detach()
        one = dense_edges(section, sample[None], functions(before, sample), functions(after, next_sample))
        E, A = E + one[0].detach() / len(a), A + one[1].detach() / len(a)
    i, j = graph.lineages["3"].ids, graph.lineages["1"].ids
    assert 4 < len(j) <= R + 1
    for found, wanted in ((graph.edges["1", "3"], E), (graph.attributions["1", "3"], A)):
        assert (found - wanted[i][:, j]).abs().max() <= 1e-8 * wanted.abs().max()
    basis = graph.bases["1"]
    with torch.no_grad():
        assert (basis.from_coordinates(basis.coordinates(a), a) - a).abs().max() < 1e-10
        with edit_features(model, graph, {f"1/{R}": scale(0.0)}):
            found = model(x)
        recons = torch.stack([functions(before, s)[1](functions(before, s)[0](s)) for s in a[:, None]])[:, 0]
        assert torch.allclose(found, model[2:](recons), rtol=1e-8)


def test_transcoders() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stream, self.norm = nn.Identity(), nn.LayerNorm(D)
            self.mlp = nn.Sequential(nn.Linear(D, 32), nn.GELU(), nn.Linear(32, D))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stream(x)
            return x + self.mlp(self.norm(x))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, D), Block(), nn.Linear(D, 3)).double()
    x = torch.randn(30, 5).double()
    layers = ["0", NodeLayer(taps=["1.stream", "1.mlp"], name="mlp"), "output"]
    both = of_saelens("transcoder", 0, d_out=D, apply_b_dec_to_input=False), of_sparsify(0, transcode=True)
    for transcoder in both:
        with pytest.raises(SettingError, match="transcoder"):
            compute_interaction_graph(model, [x], ["0", "1", "output"], {"1": transcoder})
        wrapped = Transcoder(transcoder, slice(0, D), slice(D, 2 * D), before=model[1].norm)
        graph = compute_interaction_graph(model, [x], layers, {"mlp": wrapped}, effort="exact")
        basis = graph.bases["mlp"]
        a = torch.cat([model[0](x), model[1].mlp(model[1].norm(model[0](x)))], 1).detach()
        with torch.no_grad():
            found = transcoder.encode(model[1].norm(a[:, :D]))
            f = found if isinstance(found, Tensor) else torch.zeros(30, R).double().scatter(1, found[1], found[0])
            assert torch.allclose(basis.encode(a)[:, :-1], f[:, basis.latents])
            # The last section is linear: edges of latents are squares of what they write to the logits.
            W = transcoder.W_dec[basis.latents] @ model[2].weight.T
            wanted = (f[:, basis.latents, None] * W).square().mean(0).T
        assert torch.allclose(graph.edges["mlp", "output"][:, :-1], wanted, rtol=1e-8)


def test_hashes_are_those_of_the_weights() -> None:
    one, same, other = (AdaptedDictionary(of_sparsify(seed), torch.randn(5, D).double(), "x") for seed in (0, 0, 1))
    assert one.hash == same.hash != other.hash


@pytest.mark.parametrize("n_dead", [0, 3, 20])
def test_the_loss_that_is_trained_with_is_that_of_sparsify(n_dead: int) -> None:
    coder, x = of_sparsify(0), torch.randn(50, D).double()
    dead = torch.arange(R) < n_dead
    with torch.no_grad():  # so that they are positive: sparsify has them after the ReLU, ours before it
        coder.encoder.bias[dead] += 20.0
    weights = {"W_enc": coder.encoder.weight.T, "b_enc": coder.encoder.bias, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
    loss, f = topk_loss(x, weights, k=5, dead=dead)
    found = coder(x, dead_mask=dead)
    torch.testing.assert_close(loss, found.fvu + ALPHA * found.auxk_loss, rtol=1e-10, atol=0)
    dense = torch.zeros(50, R).double().scatter(1, found.latent_indices, found.latent_acts)
    torch.testing.assert_close(f, dense, rtol=1e-10, atol=1e-12)
