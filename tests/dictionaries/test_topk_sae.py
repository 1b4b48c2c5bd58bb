"""The top-k autoencoder against its definition, and its training against the paper, on planted dictionaries."""

from __future__ import annotations

import io
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.nn import functional as F

from lib_lightning.dictionaries import topk_training
from lib_lightning.dictionaries.topk_sae import TopKSAE, top_k
from lib_lightning.dictionaries.topk_training import (
    ALPHA,
    BATCH,
    POOL,
    TopKSettings,
    TopKTraining,
    geometric_median,
    topk_loss,
)
from lib_lightning.errors import LIBError, MissingFileError


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weights_of(d: int, r: int) -> dict[str, Tensor]:
    return {
        "W_enc": normal(d, r, seed=1), "b_enc": normal(r, seed=2), "W_dec": normal(r, d, seed=3),
        "b_dec": normal(d, seed=4),
    }  # fmt: skip


class Planted:
    """Activations that are sums of ``k`` directions of many, with coefficients from 1 to 2, about a mean."""

    def __init__(self, d: int = 24, count: int = 48, k: int = 3, scale: float = 10.0) -> None:
        self.directions = F.normalize(normal(count, d, seed=1234, dtype=torch.float32), dim=1)
        self.mean, self.k, self.scale = 2 * normal(d, seed=1, dtype=torch.float32), k, scale
        self.generator = torch.Generator().manual_seed(2)

    def rows(self, n: int) -> Tensor:
        count = len(self.directions)
        chosen = torch.rand(n, count, generator=self.generator).topk(self.k, 1).indices
        size = 1 + torch.rand(n, self.k, generator=self.generator)
        return self.scale * (torch.zeros(n, count).scatter(1, chosen, size) @ self.directions + self.mean)

    def similarity(self, sae: TopKSAE) -> float:
        """For each direction the largest cosine with a latent's, averaged."""
        return float((self.directions @ F.normalize(sae.W_dec, dim=1).T).amax(1).mean())


def trained(planted: Planted, batches: int = 40, **settings: int) -> TopKTraining:
    training = TopKTraining(planted.directions.shape[1], TopKSettings(**settings))
    for _ in range(batches):
        training.add(planted.rows(512))
        training.train()
    return training


def test_encoder_and_decoder_are_those_of_the_paper() -> None:
    w = weights_of(5, 9)
    sae, a = TopKSAE(*w.values(), k=3), normal(4, 2, 5, seed=5)
    f = sae.encode(a)
    for row, found in zip(a.reshape(-1, 5), f.reshape(-1, 9), strict=True):
        h = [float(w["W_enc"][:, j] @ (row - w["b_dec"]) + w["b_enc"][j]) for j in range(9)]
        largest = sorted(range(9), key=lambda j: -h[j])[:3]
        expected = [max(h[j], 0.0) if j in largest else 0.0 for j in range(9)]
        assert found.tolist() == pytest.approx(expected, abs=1e-12)
    expected_a = torch.einsum("npr,rd->npd", f, w["W_dec"]) + w["b_dec"]
    torch.testing.assert_close(sae.decode(f), expected_a, rtol=1e-12, atol=1e-12)
    assert torch.equal(sae(a), sae.decode(f))
    assert (sae.n_latents, sae.k, list(sae.parameters())) == (9, 3, [])


def test_derivatives_of_the_encoder_at_active_latents() -> None:
    sae, a = TopKSAE(*weights_of(5, 9).values(), k=3), normal(6, 5, seed=5)
    assert torch.autograd.gradcheck(sae.encode, (a.requires_grad_(),))
    # In torch.func, as well.
    jacobians = torch.func.vmap(torch.func.jacrev(sae.encode))(a.detach())
    for row, J in zip(a.detach(), jacobians, strict=True):
        torch.testing.assert_close(J, (sae.W_enc * (sae.encode(row) > 0)).T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_activations_of_any_type(dtype: torch.dtype) -> None:
    sae = TopKSAE(*(w.float() for w in weights_of(5, 9).values()), k=3)
    assert sae(normal(4, 5).to(dtype)).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def slow_loss(x: np.ndarray, w: dict[str, np.ndarray], k: int, dead: np.ndarray) -> float:
    """The loss of a batch, number by number."""
    m, d = x.shape
    mean = x.mean(0)
    variation = sum((x[i, j] - mean[j]) ** 2 for i in range(m) for j in range(d))
    error = auxiliary = 0.0
    k_aux = d // 2
    for i in range(m):
        h = w["W_enc"].T @ (x[i] - w["b_dec"]) + w["b_enc"]
        x_hat = w["b_dec"] + sum(max(h[j], 0) * w["W_dec"][j] for j in np.argsort(-h)[:k])
        e = x[i] - x_hat
        error += e @ e
        of_dead = [j for j in np.argsort(-h) if dead[j]][:k_aux]
        e_hat = sum((h[j] * w["W_dec"][j] for j in of_dead), start=np.zeros(d))
        auxiliary += (e - e_hat) @ (e - e_hat)
    share = min(1.0, dead.sum() / k_aux)
    return error / variation + (ALPHA * share * auxiliary / variation if dead.any() else 0.0)


@pytest.mark.parametrize("dead", [[], [2], [0, 3, 4, 8]])
def test_the_loss_is_that_of_the_paper(dead: list[int]) -> None:
    w, x = weights_of(5, 9), normal(7, 5, seed=6)
    mask = torch.zeros(9, dtype=torch.bool)
    mask[dead] = True
    loss, f = topk_loss(x, w, 3, mask)
    expected = slow_loss(x.numpy(), {name: t.numpy() for name, t in w.items()}, 3, mask.numpy())
    assert float(loss) == pytest.approx(expected, rel=1e-12)
    assert torch.equal(f, top_k((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], 3))


def test_dead_latents_do_not_change_the_gradients_of_others() -> None:
    w, x = weights_of(5, 9), normal(7, 5, seed=6)
    for j in (7, 8):  # never among the largest
        w["b_enc"][j] = -50.0
    w = {name: t.requires_grad_() for name, t in w.items()}
    with_dead, without = (
        dict(zip(w, torch.autograd.grad(topk_loss(x, w, 3, mask)[0], [*w.values()]), strict=True))
        for mask in (torch.arange(9) >= 7, torch.zeros(9, dtype=torch.bool))
    )
    assert with_dead["W_enc"][:, 7:].abs().amin() > 0
    assert without["W_enc"][:, 7:].abs().amax() == 0
    torch.testing.assert_close(with_dead["W_enc"][:, :7], without["W_enc"][:, :7], rtol=0, atol=1e-12)
    torch.testing.assert_close(with_dead["W_dec"][:7], without["W_dec"][:7], rtol=0, atol=1e-12)


def test_geometric_median() -> None:
    rows = normal(40, 3) ** 3 + 2
    expected = minimize(lambda p: np.linalg.norm(rows.numpy() - p, axis=1).sum(), rows.mean(0).numpy(), tol=1e-12).x
    np.testing.assert_allclose(geometric_median(rows).numpy(), expected, atol=1e-3)
    assert torch.equal(geometric_median(torch.zeros(5, 2)), torch.zeros(2))


def test_a_planted_dictionary_is_found() -> None:
    planted = Planted()
    training = trained(planted, 80, n_latents=64, k=3)
    assert planted.similarity(TopKTraining(24, TopKSettings(n_latents=64, k=3)).sae) < 0.6, "by chance"
    assert planted.similarity(training.sae) > 0.95
    found = training.measure(planted.rows(2000))
    assert found.unexplained < 0.12
    assert found.l0 == pytest.approx(3, abs=0.1)
    # The directions have norm 1, so that latents are lengths in the unit of the activations.
    torch.testing.assert_close(training.sae.W_dec.norm(dim=1), torch.ones(64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("unit", [2.0**-12, 2.0**12])
def test_the_unit_of_the_activations_does_not_matter(unit: float) -> None:
    one, other = (trained(Planted(scale=scale), 4, n_latents=64, k=3).sae for scale in (1.0, unit))
    for name, factor in {"W_enc": 1.0, "W_dec": 1.0, "b_enc": unit, "b_dec": unit}.items():
        expected = getattr(one, name) * factor
        torch.testing.assert_close(getattr(other, name), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_unit_may_change_in_the_middle() -> None:
    training = trained(Planted(scale=1.0), 4, n_latents=64, k=3)
    b_dec = training.sae.b_dec
    training.add(Planted(scale=3.0).rows(2048))
    training._set_unit(training._pool)
    torch.testing.assert_close(training.sae.b_dec, b_dec)


def test_what_is_measured() -> None:
    planted = Planted()
    training = trained(planted, 8, n_latents=64, k=3)
    a, b = planted.rows(100), planted.rows(150)
    found, rows = training.measure(a) + training.measure(b), torch.cat([a, b]).double()
    sae = training.sae
    error = (rows - sae(rows.float()).double()).square().sum()
    assert found.unexplained == pytest.approx(float(error / (rows - rows.mean(0)).square().sum()), rel=1e-6)
    assert found.l0 == float((sae.encode(rows.float()) > 0).sum(1).double().mean())
    assert found.count == 250
    assert math.isnan(training.measure(torch.zeros(3, 24)).unexplained)


def test_dead_latents_are_revived(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead_in_the_end(alpha: float) -> tuple[int, int]:
        monkeypatch.setattr(topk_training, "ALPHA", alpha)
        planted = Planted()
        training = TopKTraining(24, TopKSettings(n_latents=64, k=3))
        training.add(planted.rows(512))
        training.train()
        # Half of the latents can no longer become active by themselves.
        with torch.no_grad():
            training._parameters["b_enc"][:32] = -3.0
        training.since_active[:32] = 10**6
        before = int(training.dead.sum())
        for _ in range(24):
            training.add(planted.rows(512))
            training.train()
        return before, int(training.dead[:32].sum())

    before, without = dead_in_the_end(0.0)
    assert before >= without >= 30
    assert dead_in_the_end(ALPHA)[1] <= 18


def test_a_state_continues_with_the_same_weights() -> None:
    planted = Planted()
    batches = [planted.rows(300) for _ in range(12)]
    whole = TopKTraining(24, TopKSettings(n_latents=64, k=3, seed=5))
    for rows in batches:
        whole.add(rows)
        whole.train()
    part = TopKTraining(24, TopKSettings(n_latents=64, k=3, seed=5))
    for k, rows in enumerate(batches):
        if k in (0, 6):  # before the first step, and after some
            file = io.BytesIO()
            torch.save(part.state_dict(), file)
            file.seek(0)
            part = TopKTraining(24, TopKSettings(n_latents=64, k=3, seed=99))
            part.load_state_dict(torch.load(file, weights_only=True))
        part.add(rows)
        part.train()
    assert part.n_steps == whole.n_steps > 40
    assert all(torch.equal(a, b) for a, b in zip(part.sae.buffers(), whole.sae.buffers(), strict=True))
    with pytest.raises(LIBError, match="64 latents for 24 dimensions, not of 32 for 24"):
        TopKTraining(24, TopKSettings(n_latents=32)).load_state_dict(part.state_dict())


def test_each_activation_is_used_four_times_on_average_and_the_oldest_are_forgotten() -> None:
    training = TopKTraining(3, TopKSettings())
    rows = normal(2 * POOL + 100, 3, dtype=torch.float32)
    training.add(rows[: BATCH - 1])
    training.train()
    assert not training.is_ready
    training.add(rows[BATCH - 1 : POOL])
    training.train()
    assert training.n_steps == 4 * POOL // BATCH
    training.add(rows[POOL : POOL + 100])
    assert torch.equal(training._pool[:100], rows[POOL : POOL + 100])
    assert torch.equal(training._pool[100:], rows[100:POOL])
    # Of more than the pool holds, some; of those that are not finite, none.
    training.add(torch.cat([rows, torch.full((5, 3), math.nan)]))
    assert {tuple(row) for row in training._pool.tolist()} <= {tuple(row) for row in rows.tolist()}
    assert training.n_seen == POOL + 100 + POOL


def test_constant_activations_are_no_error() -> None:
    training = TopKTraining(3, TopKSettings())
    training.add(torch.ones(1000, 3))
    training.train()
    assert (training.is_ready, training.n_steps) == (False, 0)


def test_no_random_numbers_but_its_own() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first, second = (trained(Planted(), 4, n_latents=64, k=3) for _ in range(2))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert all(torch.equal(a, b) for a, b in zip(first.weights(), second.weights(), strict=True))


def test_files(tmp_path: Path) -> None:
    sae = TopKSAE(*(w.float() for w in weights_of(5, 9).values()), k=3)
    path = tmp_path / "fc1.safetensors"
    path.write_bytes(sae.to_bytes({"node_layer": "fc1", "step": 3}))
    loaded = TopKSAE.load(path)
    assert loaded.k == 3
    assert all(torch.equal(a, b) for a, b in zip(loaded.buffers(), sae.buffers(), strict=True))
    with pytest.raises(MissingFileError, match="no file"):
        TopKSAE.load(tmp_path / "other.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LIBError, match="not a sparse autoencoder"):
        TopKSAE.load(path)


def test_shapes_are_checked() -> None:
    w = weights_of(5, 9)
    with pytest.raises(LIBError, match=r"For W_enc of shape \(5, 9\), b_enc, W_dec and b_dec have the shapes"):
        TopKSAE(w["W_enc"], w["b_enc"], w["W_dec"].T, w["b_dec"], k=3)
    with pytest.raises(LIBError, match="k is a number of latents from 1 to 9; got 10"):
        TopKSAE(*w.values(), k=10)
    with pytest.raises(LIBError, match="k=5 latents cannot be active among n_latents=4"):
        TopKTraining(5, TopKSettings(n_latents=4, k=5))
