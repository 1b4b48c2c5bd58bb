"""Detection of closed forms: which sections have one, the same numbers, and sections that only look like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib_lightning.algorithm import jacobian_metric as metric
from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.jacobian.closed_form import ClosedForm
from lib_lightning.jacobian.closed_form_detect import SAMPLES, ClosedFormDetector, _Search
from lib_lightning.jacobian.section import Section
from lib_lightning.model.model_spec import ModelSpec
from tests.cases import Case
from tests.computing import IO, WITHOUT_CLOSED_FORMS, assert_equal, assert_same_without_closed_forms, built, built_of
from tests.conftest import CASES

Kinds = list[str | None]


def kind(form: ClosedForm | None) -> str | None:
    if form is None:
        return None
    return "affine" if form.factors.affine else "residual" if form.factors.residual else "elementwise"


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Kinds:
    """The kinds of closed form of all sections, in the order in which they are matched."""
    found: Kinds = []
    plain = ClosedFormDetector.match

    def noted(self: ClosedFormDetector, section: Section) -> ClosedForm | None:
        form = plain(self, section)
        found.append(kind(form))
        return form

    monkeypatch.setattr(ClosedFormDetector, "match", noted)
    return found


EXPECTED_KINDS: dict[str, list[str | None]] = {
    "mlp_relu": ["elementwise", "elementwise", "affine"],
    "mlp_tanh": ["elementwise", "elementwise", "affine"],
    "mlp_gelu": ["elementwise", "elementwise", "affine"],
    "few_samples": ["elementwise", "affine"],
    "linear_chain": ["affine", "affine", "affine"],
    "positions": [None, "elementwise", "affine"],
    "residual": [None, None, "affine"],
    "transformer": [None, None, None],
    "last_token": [None, None, None],
    "conv": [None, None, None, "affine"],
    "returns_tuple": ["elementwise", "elementwise"],
    "dict_input": [None, "affine"],
    "tied": ["elementwise", "affine"],
    "repeated": [None, None, None, "affine"],
    "norm_and_residual": [None, None, "affine"],
    "padded": [None, None, None],
    "plain_residual": ["residual", "residual", "affine"],
    "before_activations": ["elementwise", "elementwise"],
}


def test_kind_of_every_case(case: Case, kinds: Kinds) -> None:
    built_of(case, (30,))
    assert kinds == EXPECTED_KINDS[case.name]


@pytest.mark.parametrize("name", [name for name, found in EXPECTED_KINDS.items() if any(found)])
@pytest.mark.parametrize(
    "options", [{}, {"final_metric": "fisher"}, {"basis": "pca"}], ids=lambda o: "".join(map(str, o.values())) or "lib"
)
def test_closed_forms_give_the_result_of_automatic_differentiation(name: str, options: dict[str, Any]) -> None:
    general = built_of(CASES[name], shortcuts=WITHOUT_CLOSED_FORMS, plan=MemoryPlan(), **options)
    assert_equal(built_of(CASES[name], **options), general)


def test_closed_form_is_exact_for_any_number_of_probes() -> None:
    exact = built_of(CASES["mlp_tanh"])
    for n_probes in (1, 3):
        probed = built_of(CASES["mlp_tanh"], n_probes=n_probes)
        assert_equal(probed, exact)
        assert set(probed.metric_errors.values()) == {0.0}


class NewGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x).square()


ACTIVATIONS: list[nn.Module] = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.ELU(), nn.SELU(), nn.CELU(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(),
    nn.Mish(), nn.Tanh(), nn.Sigmoid(), nn.Hardtanh(), nn.Hardswish(), nn.Hardsigmoid(), nn.LeakyReLU(), nn.RReLU(),
    nn.LogSigmoid(), nn.PReLU(), nn.PReLU(6), nn.Softplus(), nn.Softshrink(0.1), nn.Hardshrink(0.1), nn.Softsign(),
    nn.Tanhshrink(), nn.Threshold(0.1, 0.2), NewGELU(), SquaredReLU(), nn.Sequential(nn.Dropout(), nn.Tanh()),
    nn.Sequential(nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout()),
]  # fmt: skip


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda m: str(m).replace("\n", ""))
def test_every_elementwise_activation_function_is_found(act: nn.Module, kinds: Kinds) -> None:
    model = nn.Sequential(nn.Linear(4, 6), act, nn.Linear(6, 3)).double()
    with torch.no_grad():
        model[0].weight *= 4  # all branches of each function
    x = torch.randn(30, 4).double()
    assert_same_without_closed_forms(model, [x[:20], x[20:]], ["input", "0", "output"])
    assert kinds == ["affine", "elementwise"] * 2


class Of(nn.Module):
    """A function as a model."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.fn = forward
        self.double()

    def forward(self, *args: Tensor) -> Tensor:
        return self.fn(self, *args)


def halves(d: int, *then: nn.Module) -> nn.Module:
    return Of(lambda m, x: m.c(m.a(x) * m.b(x)), a=nn.Linear(d, 6), b=nn.Linear(d, 6), c=nn.Sequential(*then))


# None of them is affine or linear - elementwise - linear at each position separately.
SIMILAR: dict[str, Callable[[int], nn.Module]] = {
    "layer norm": lambda d: nn.Sequential(nn.Linear(d, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double(),
    "softmax": lambda d: nn.Sequential(nn.Linear(d, 6), nn.Softmax(-1), nn.Linear(6, 3)).double(),
    "GLU": lambda d: nn.Sequential(nn.Linear(d, 6), nn.GLU(), nn.Linear(3, 3)).double(),
    "bilinear": lambda d: halves(d, nn.Linear(6, 3)),
    "gate": lambda d: halves(d, nn.Sigmoid()),
    "maximum": lambda d: Of(lambda m, x: torch.maximum(m.a(x), m.b(x)), a=nn.Linear(d, 3), b=nn.Linear(d, 3)),
    "max pool": lambda d: nn.Sequential(nn.Linear(d, 6), nn.MaxPool1d(2)).double(),
    "normalize": lambda d: Of(lambda m, x: F.normalize(m.a(x), dim=-1), a=nn.Linear(d, 3)),
    "two activations": lambda d: nn.Sequential(nn.Linear(d, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU()).double(),
    "linear skip": lambda d: Of(lambda m, x: torch.relu(m.a(x)) + m.b(x), a=nn.Linear(d, 3), b=nn.Linear(d, 3)),
    "sums over positions": lambda d: Of(lambda m, x: m.a(x).cumsum(1), a=nn.Linear(d, 3)),
    "mixes positions": lambda d: Of(lambda m, x: m.b(m.a(x.mT).mT), a=nn.Linear(2, 2), b=nn.Linear(d, 3)),
    "attends": lambda d: Of(lambda m, x: (x @ x.mT / d).softmax(-1) @ m.a(x), a=nn.Linear(d, 3)),
}


@pytest.mark.parametrize("d", [5, 520])
@pytest.mark.parametrize("name", SIMILAR)
def test_similar_sections_have_no_closed_form(name: str, d: int, kinds: Kinds) -> None:
    x = torch.randn(12, 2, d).double()
    assert_same_without_closed_forms(SIMILAR[name](d), [x[:7], x[7:]], IO)
    assert kinds == [None, None]


def weights_by_batch(d: int, activation: bool) -> nn.Module:
    def forward(m: Any, x: Tensor, task: Tensor) -> Tensor:
        h = F.linear(x, m.w[int(task[0])])
        return m.c(torch.tanh(h)) if activation else h

    return Of(forward, w=nn.ParameterList([torch.randn(6, d) / d**0.5 for _ in range(2)]), c=nn.Linear(6, 3))


def overwritten(m: Any, x: Tensor, task: Tensor) -> Tensor:
    m.a.weight.data.copy_(m.b.weight.data * int(task[0]))  # without a change of the version counter
    return m.a(x)


# Models with one closed form for the samples that it is fitted to and another one, or none, for others. Each takes a
# second input, which is 1 for the first 70 samples.
CHANGING: dict[str, Callable[[int], nn.Module]] = {
    "weights by batch": lambda d: weights_by_batch(d, False),
    "weights by batch, then an activation": lambda d: weights_by_batch(d, True),
    "weights by sample": lambda d: Of(
        lambda m, x, t: (torch.stack(list(m.w))[t.clamp(0, 1).long()] @ x[..., None])[..., 0],
        w=nn.ParameterList([torch.randn(3, d) for _ in range(2)]),
    ),
    "scale by sample": lambda d: Of(lambda m, x, t: m.a(x * t[:, None]), a=nn.Linear(d, 3)),
    "scale by sample, then an activation": lambda d: Of(
        lambda m, x, t: torch.tanh(m.a(x * t[:, None])), a=nn.Linear(d, 3)
    ),
    "order by batch": lambda d: Of(
        lambda m, x, t: m.a(x if t[0] == 1 else x.view(-1, 2, d // 2).mT.reshape(-1, d)), a=nn.Linear(d, 3)
    ),
    "order by batch, then an activation": lambda d: Of(
        lambda m, x, t: torch.tanh(m.a(x if t[0] == 1 else x.flip(1))), a=nn.Linear(d, 3)
    ),
    "weights written over": lambda d: Of(overwritten, a=nn.Linear(d, 3), b=nn.Linear(d, 3)),
    "another function by batch": lambda d: Of(
        lambda m, x, t: torch.tanh(m.a(x)) if t[0] == 1 else m.a(x).softmax(-1), a=nn.Linear(d, 3)
    ),
    "another order by batch, after an activation": lambda d: Of(
        lambda m, x, t: torch.tanh(m.a(x))[..., [0, 1, 2] if t[0] == 1 else [2, 0, 1]], a=nn.Linear(d, 3)
    ),
    "rolled by batch, after an activation": lambda d: Of(
        lambda m, x, t: torch.tanh(m.a(x)).roll(0 if t[0] == 1 else 1, -1), a=nn.Linear(d, 3)
    ),
    "nothing read in the second batch": lambda d: Of(
        lambda m, x, t: m.a(x if t[0] == 1 else torch.zeros_like(x)), a=nn.Linear(d, 3)
    ),
    "fewer positions looked at": lambda d: Of(lambda m, x, t: m.a(x.view(len(x), -1, d)[:, 0]), a=nn.Linear(d, 3)),
}


@pytest.mark.parametrize("d", [6, 520])
@pytest.mark.parametrize("name", CHANGING)
def test_closed_form_may_change_from_batch_to_batch(name: str, d: int) -> None:
    torch.manual_seed(1)
    x, t = torch.randn(90, d).double(), torch.cat([torch.ones(70), 2 * torch.rand(20)]).double()
    batches = [(x[:70], t[:70]), (x[70:], t[70:])]
    assert_same_without_closed_forms(CHANGING[name](d), batches, IO, spec=ModelSpec(lambda batch: batch))
    assert_same_without_closed_forms(CHANGING[name](d), [(x, t)], IO, spec=ModelSpec(lambda batch: batch))


@pytest.mark.parametrize("d", [6, 520])
@pytest.mark.parametrize("layers", [1, 2])
def test_relu_that_is_active_for_all_fitted_samples(d: int, layers: int, kinds: Kinds) -> None:
    blocks = [m for _ in range(layers) for m in (nn.Linear(5, 5), nn.ReLU())]
    model = nn.Sequential(nn.Linear(d, 5), nn.ReLU(), *blocks[:-1]).double()
    for p in model.parameters():
        p.data.abs_()
    x = torch.cat([torch.rand(70, d), torch.randn(20, d)]).double()
    assert_same_without_closed_forms(model, [x[:70], x[70:]], IO)
    assert kinds == ["affine", "elementwise" if layers == 1 else None]


def test_entries_that_have_the_length_of_the_batch_by_chance() -> None:
    # 64 rows of the second entry are an affine section as well, to fewer features.
    model = Of(lambda m, x, W: F.linear(m.a(x), W), a=nn.Linear(4, 4))
    batch = torch.randn(80, 4).double(), torch.randn(80, 4).double()
    assert_same_without_closed_forms(model, [batch], ["a", "output"], spec=ModelSpec(lambda batch: batch))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].data * 2


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.body, x, use_reentrant=False)


MLP = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
SHARED = nn.Linear(5, 5)
PARAMETRISED = [
    nn.utils.parametrizations.weight_norm(nn.Linear(5, 6)), nn.ReLU(),
    nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3)),
]  # fmt: skip
COMMON: dict[str, tuple[nn.Module, str | None]] = {
    "custom derivative": (Of(lambda m, x: m.a(StraightThrough.apply(m.a(x))), a=nn.Linear(5, 5)), "affine"),
    "checkpointed": (Checkpointed(), "elementwise"),
    "shared weights": (nn.Sequential(SHARED, nn.Tanh(), SHARED), "elementwise"),
    "parametrised weights": (nn.Sequential(*PARAMETRISED), "elementwise"),
    "batch norm": (nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)), "affine"),
    "view": (Of(lambda m, x: m.a(x).view(-1, 1, 3)[:, 0], a=nn.Linear(5, 3)), "affine"),
    "written in place": (Of(lambda m, x: m.a(x).mul_(2).add_(1).tanh_(), a=nn.Linear(5, 3)), "elementwise"),
    "compiled": (torch.compile(MLP, backend="eager"), "elementwise"),
    "minus": (Of(lambda m, x: x - m.b(torch.tanh(m.a(x))), a=nn.Linear(5, 6), b=nn.Linear(6, 5)), "residual"),
    "subtracted input": (Of(lambda m, x: m.b(torch.tanh(m.a(x))) - x, a=nn.Linear(5, 6), b=nn.Linear(6, 5)), None),
}


@pytest.mark.parametrize("name", COMMON)
def test_common_ways_to_write_a_model(name: str, kinds: Kinds) -> None:
    model, expected = COMMON[name]
    x = torch.randn(15, 5).double()
    assert_same_without_closed_forms(model.double(), [x[:8], x[8:]], IO)
    assert kinds == [expected] * 2


def test_half_precision_has_no_closed_form(kinds: Kinds) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).bfloat16()
    built(model, [torch.randn(15, 5).bfloat16()], IO)
    assert kinds == [None]


@pytest.mark.parametrize("filler", [0.0, torch.nan])
def test_closed_forms_ignore_masked_positions(filler: float, kinds: Kinds) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, mask = torch.randn(20, 4, 5).double(), torch.rand(20, 4) > 0.4
    batches = [(x[s].masked_fill(~mask[s][..., None], filler), mask[s]) for s in (slice(0, 12), slice(12, None))]
    assert_same_without_closed_forms(model, batches, ["input", "0", "output"], spec=ModelSpec(mask=1))
    assert kinds == ["affine", "elementwise"] * 2


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_single_precision_far_from_zero(scale: float, kinds: Kinds) -> None:
    model = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 3))
    x = (100 + torch.randn(200, 5)) * scale
    with torch.no_grad():
        model[0].weight /= scale
        model[0].bias.normal_(0, 0.3)
        model[0].bias -= 100 * scale * model[0].weight.sum(1)
    single = built(model, [x], IO, rtol=1e-6)
    assert kinds == ["elementwise"]
    double = built(model.double(), [x.double()], IO, shortcuts=WITHOUT_CLOSED_FORMS, rtol=1e-6)
    assert_equal(single, double, rtol=1e-3)


@pytest.mark.parametrize("name", ["linear", "linear, positions", "mlp", "residual mlp"])
def test_unchanged_weights_need_no_second_check(name: str, monkeypatch: pytest.MonkeyPatch, kinds: Kinds) -> None:
    agrees = _Search.matches_autograd

    def not_again(self: _Search, form: ClosedForm) -> bool:
        assert self.section.n <= SAMPLES, "compared with autograd again"
        return agrees(self, form)

    monkeypatch.setattr(_Search, "matches_autograd", not_again)
    mlp = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
    model = {
        "linear": nn.Linear(6, 6), "linear, positions": nn.Linear(6, 6), "mlp": mlp,
        "residual mlp": Of(lambda m, x: x + m.mlp(x), mlp=mlp),
    }[name].double()  # fmt: skip
    x = torch.randn(3, 70, *([4] if "positions" in name else []), 6).double()
    assert_same_without_closed_forms(model, list(x), IO)
    assert kinds == 3 * [{"mlp": "elementwise", "residual mlp": "residual"}.get(name, "affine")]


def test_closed_form_needs_no_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        metric.JacobianMetric, "add", lambda *args: pytest.fail("a product with the Jacobian was computed")
    )
    built_of(CASES["mlp_relu"])


@pytest.mark.parametrize("layers", [["input", "2", "output"], ["input", "0", "2", "output"]])
def test_head_of_zeros_leaves_no_features(layers: list[str], kinds: Kinds) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    nn.init.zeros_(model[4].weight)
    found = built(model, [torch.randn(50, 5).double()], layers)
    assert [basis.n_features for basis in found.bases] == [0] * (len(layers) - 1) + [4]
    assert "elementwise" in kinds


@pytest.mark.parametrize("function", ["path_nodes", "shape_of", "saved_names", "gradient_edge"])
def test_missing_torch_internals_cost_only_speed(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = built_of(CASES["mlp_tanh"])

    def missing(*args: object) -> None:
        raise AttributeError("of another version of torch")

    monkeypatch.setattr(f"lib_lightning.jacobian.closed_form_detect.{function}", missing)
    assert_equal(built_of(CASES["mlp_tanh"]), expected)
