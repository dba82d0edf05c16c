"""What minifuse does not generate runs right by ATen, and the `fallback` option says what it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from minifuse.errors import FallbackError
from minifuse.ir.ops import TABLE, OpRow
from minifuse.ir.value import Op
from minifuse.passes.lower.externs import EXPECTED
from minifuse.passes.lower.pointwise import ROWS, Row, const_like
from minifuse.passes.memory import out_overload
from minifuse.records import RECORDS
from tests.judge import check, compiled, externs, same

_library = torch.library.Library("minifuse_test", "DEF")


@torch.library.custom_op("minifuse_test::twice", mutates_args=())
def twice(x: Tensor, times: int) -> Tensor:
    return x * 2**times


@twice.register_fake
def _(x: Tensor, times: int) -> Tensor:
    return torch.empty_like(x)


torch.library.register_autograd("minifuse_test::twice", lambda ctx, g: (twice(g, ctx.times), None),
                                setup_context=lambda ctx, inputs, output: setattr(ctx, "times", inputs[1]))  # fmt: skip


@torch.library.custom_op("minifuse_test::fill", mutates_args=("x",))
def fill(x: Tensor, value: float) -> None:
    x.fill_(value)


@torch.library.custom_op("minifuse_test::split", mutates_args=())
def split(x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    return x[:1].clone(), x[1:].clone().t().contiguous(), [x + 1, x.sum()]


@split.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    return x[:1].clone(), x.new_empty(x.shape[1], x.shape[0] - 1), [torch.empty_like(x), x.new_empty(())]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@torch.library.custom_op("minifuse_test::midpoint", mutates_args=())
def midpoint(a: Tensor, b: Tensor) -> Tensor:
    return (a + b) / 2 if a.is_floating_point() else (a + b) // 2


midpoint.register_fake(lambda a, b: torch.empty_like(a))


X, AT = torch.randn(6, 8), torch.tensor([3, 1, 5, 0])
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "sort": (lambda x: (x + 1).sort(-1), (X,)),
    "argsort of equal elements": (lambda x: torch.argsort(x.round(), stable=True), (X,)),
    "topk": (lambda x: x.exp().topk(3), (X,)),
    "scatter": (lambda x, i: torch.zeros(6, 8).scatter(0, i.view(1, 4), x[:1, :4]) * 2, (X, AT)),
    "scatter_add": (lambda x, i: (x + 1).scatter_add(0, i.view(-1, 1).expand(4, 8), x[:4]), (X, AT)),
    "scatter_reduce": (lambda x, i: x.scatter_reduce(0, i.view(4, 1), x[:4], "amax"), (X, AT)),
    "index_put": (lambda x, i: x.index_put((i,), x[:4] * 3), (X, AT)),
    "index_put that accumulates": (lambda x: x.index_put((torch.tensor([1, 1, 2]),), x[:3], True), (X,)),
    "index_add": (lambda x, i: x.index_add(0, i, x[:4].sin()), (X, AT)),
    "masked_scatter": (lambda x: x.masked_scatter(x > 0, x.neg()), (X,)),
    "mode and digamma": (lambda x: (x.digamma(), x.mode(0)), (X,)),
    "bucketize": (lambda x: torch.bucketize(x, torch.linspace(-1, 1, 5)), (X,)),
    "einsum": (lambda x: torch.einsum("ij,kj->ik", x, x).relu(), (X,)),
    "bmm of views": (lambda x: (x.view(2, 3, 8) @ x.view(2, 8, 3)).tanh(), (X,)),
    "svd": (lambda x: torch.linalg.svdvals(x @ x.t()), (X,)),
    "cholesky": (lambda x: torch.linalg.cholesky(x @ x.t() + torch.eye(6)), (X,)),
    "fft": (lambda x: torch.fft.rfft(x).abs() + 1, (X,)),
    "complex": (lambda x: (torch.complex(x, x) * torch.complex(x, -x)).real + 1, (X,)),
    "median": (lambda x: x.median(0), (X,)),
    "unfold": (lambda x: F.unfold(x.view(1, 1, 6, 8), 3).sin(), (X,)),
    "interpolate": (lambda x: F.interpolate(x.view(1, 1, 6, 8), scale_factor=2, mode="bilinear"), (X,)),
    "max pool": (lambda x: F.max_pool2d(x.view(1, 1, 6, 8).sin(), 2), (X,)),
    "adaptive pool": (lambda x: F.adaptive_avg_pool2d(x.view(1, 1, 6, 8).sin(), 3), (X,)),
    "attention": (lambda x: F.scaled_dot_product_attention(*[x.view(1, 2, 3, 8)] * 3, is_causal=True) + 1, (X,)),
    "lstm": (nn.LSTM(8, 4), (X,)),
    "grouped convolution": (nn.Conv1d(6, 12, 3, groups=3), (X[None],)),
    "transposed convolution": (nn.ConvTranspose2d(2, 3, 3), (X.view(1, 2, 3, 8),)),
    "embedding bag": (nn.EmbeddingBag(9, 4), (AT, torch.tensor([0, 2]))),
    "unique with counts": (lambda x: torch.histc(x, 5), (X,)),
    "custom operator": (lambda x: twice(x.sin(), 3) + 1, (X,)),
    "bilinear grid": (lambda x: F.grid_sample(x.view(1, 1, 6, 8), torch.zeros(1, 2, 2, 2), align_corners=False), (X,)),
    "ctc loss": (lambda x: F.ctc_loss(x.view(6, 1, 8).log_softmax(-1), torch.tensor([[1, 2]]), (6,), (2,)), (X,)),
    "cosine and pairwise distance": (lambda x: (F.cosine_similarity(x, x[:1]), torch.cdist(x, x[:2])), (X,)),
    "triu and tril": (lambda x: (x.triu(1), x.tril(-1), torch.tril_indices(3, 3)), (X,)),
    "roll and rot": (lambda x: (x.roll((1, -2), (0, 1)), x.rot90(), x.flip(0, 1)), (X,)),
    "take along": (lambda x: x.take_along_dim(x.argsort(1), 1), (X,)),
    "repeat and tile": (lambda x: (x.repeat(2, 3), x.repeat_interleave(2, 0), x.tile(2)), (X,)),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operator_gives_eagers_results_and_gradients(name: str) -> None:
    fn, args = CASES[name]
    grads = [a.clone().requires_grad_() if a.is_floating_point() else a for a in args]
    check(fn, *grads, tolerance=1e-4)


def test_a_custom_operator_that_mutates() -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 2
        fill(y, 3.0)
        fill(x, 5.0)
        return x + y

    check(f, X.clone())


def test_a_result_of_another_dtype_or_shape_than_was_announced_is_not_read_as_what_it_is_not() -> None:
    @torch.library.custom_op("minifuse_test::liar", mutates_args=())
    def liar(x: Tensor, n: int) -> Tensor:
        return x.half()[:n].clone()

    liar.register_fake(lambda x, n: torch.empty_like(x))
    run = compiled(lambda x, n: liar(x, n) + 1, dynamic=False)
    same(run(X.clone(), len(X)), X.half().float() + 1)
    with pytest.raises(RuntimeError, match=r"an operator gave a tensor of \[1, "):
        run(X.clone(), 1)


def test_the_out_overload_takes_what_the_operator_takes() -> None:
    aten = torch.ops.aten
    assert out_overload(aten.any.dims) is aten.any.dims_out and out_overload(aten.any.dim) is aten.any.out
    check(lambda x: torch.complex(x, x).any([0, 1]), X)


def test_a_custom_operator_with_nested_results() -> None:
    check(lambda x: [y + 1 for y in (*split(x * 2)[:2], *split(x)[2])], X)


def test_a_sparse_gradient_of_an_embedding() -> None:
    model = nn.Embedding(10, 4, sparse=True)
    eager = nn.Embedding.from_pretrained(model.weight.detach().clone(), freeze=False, sparse=True)
    compiled(model)(AT).sum().backward()
    eager(AT).sum().backward()
    assert model.weight.grad is not None and model.weight.grad.is_sparse
    torch.testing.assert_close(model.weight.grad.to_dense(), eager.weight.grad.to_dense())


def test_control_flow_operators() -> None:
    def branch(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin() * 2, lambda x: x.cos(), (x + 1,)) * 3

    for sign in (1, -1):
        check(branch, sign * X.abs() * 5)

    def loop(x: Tensor) -> Tensor:
        start = torch.tensor(0), x
        return torch._higher_order_ops.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x * 2), start)[1]

    check(loop, X)


def test_flex_attention() -> None:
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415

    q, k, v = (torch.randn(1, 2, 16, 16) for _ in range(3))

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q.sin(), k, v, score_mod=lambda s, b, h, i, j: s + (i - j)) * 2

    check(f, q, k, v, tolerance=1e-4)


def test_sizes_that_depend_on_data() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):

        def nonzero(x: Tensor) -> tuple[Tensor, Tensor]:
            i = (x > 0).nonzero()
            return i * 2 + 1, x[x > 0].sin()

        def item(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
            k = n.item()
            torch._check(k >= 1)
            return torch.zeros(k) + x.sum(), torch.arange(k).float() * x.mean()

        def head(x: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
            y = (x * 2)[: n.item()]
            return y.sum(0), y.exp()

        run = compiled(nonzero, fullgraph=True)
        for x in (X, -X, torch.zeros(6, 8) - 1):
            same(run(x), nonzero(x))
        run = compiled(item, fullgraph=True)
        for n in (1, 4, 7):
            same(run(X, torch.tensor(n)), item(X, torch.tensor(n)))
        run = compiled(head, fullgraph=True)
        for n in (1, 4, 6, 9):
            same(run(X, torch.tensor(n)), head(X, torch.tensor(n)))


def test_sizes_that_depend_on_data_break_the_graph_by_default() -> None:
    check(lambda x: x[x > 0].sin() * x.max().item(), X)


# -- the option ---------------------------------------------------------------------------------------
def unusual(x: Tensor) -> Tensor:
    return (x.sin() + 2).digamma() * 2


def test_fallback_warn_names_the_operator_the_reason_and_the_line_once() -> None:
    run = compiled(unusual, {"fallback": "warn"})
    with pytest.warns(UserWarning, match=r"aten\.digamma\.default.*a special function.*test_externs\.py:\d+") as caught:
        [run(x) for x in (X, X + 1)]
    assert len([w for w in caught if "digamma" in str(w.message)]) == 1


def test_fallback_error_names_the_operator_the_reason_and_the_line() -> None:
    words = r"aten\.digamma\.default.*a special function.*test_externs\.py:\d+"
    with pytest.raises(BackendCompilerFailed, match=words) as caught:
        compiled(unusual, {"fallback": "error"})(X)
    assert isinstance(caught.value.inner_exception, FallbackError)


def test_fallback_error_lets_the_expected_operators_pass() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4), nn.Dropout(0.5))
    run = compiled(model, {"fallback": "error"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(X.view(1, 1, 6, 8)).sum().backward()
    assert any("convolution" in name for name in externs())


def test_fallback_allow_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(compiled(unusual)(X), unusual(X))
    assert externs() == ["aten.digamma.default"]


def test_every_expected_operator_has_a_reason() -> None:
    assert EXPECTED and all(len(reason.split()) >= 3 for reason in EXPECTED.values())


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the operator table that takes floating dtypes, and the operator that it stands for."""
    text = "(({0} + {1}) / 2)"
    new = OpRow("midpoint", 2, "same", "f", lambda a, b: (a + b) / 2, c=text, triton=text, cost=2)
    monkeypatch.setitem(TABLE, "midpoint", new)
    monkeypatch.setitem(ROWS, torch.ops.minifuse_test.midpoint.default, Row(lambda a, b: Op.of("midpoint", a, b)))


def mid(x: Tensor) -> Tensor:
    return midpoint(x, x * 3) + 1


@pytest.mark.usefixtures("row")
def test_a_dtype_that_a_row_does_not_take_goes_to_the_operator_itself() -> None:
    for x, calls in ((torch.randn(5), 0), (torch.randn(5).half(), 0), (torch.arange(5), 1)):
        same(compiled(mid)(x), mid(x), tolerance=1e-6)
        assert len(externs()) == calls
    (step,) = RECORDS[-1].stages["memory"].externs
    assert "midpoint takes dtypes of kind 'f', found torch.int64" in step.reason
    with pytest.warns(UserWarning, match=r"hands minifuse_test\.midpoint\.default to PyTorch: midpoint takes dtypes"):
        compiled(mid, {"fallback": "warn"})(torch.arange(6))
    with pytest.raises(BackendCompilerFailed, match=r"FallbackError: .*midpoint takes dtypes"):
        compiled(mid, {"fallback": "error"})(torch.arange(7))


@pytest.mark.usefixtures("row")
def test_a_row_of_an_operator_that_does_not_exist_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TABLE, "midpoint")
    with pytest.raises(BackendCompilerFailed, match="no operator 'midpoint' in the table"):
        compiled(mid)(torch.randn(5))


@torch.library.custom_op("minifuse_test::scale", mutates_args=())
def scale(x: Tensor, *, by: float = 1.0) -> Tensor:
    return x * by


scale.register_fake(lambda x, by=1.0: torch.empty_like(x))


def test_a_row_is_given_arguments_by_keyword(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row(lambda x, by=1.0: Op.of("mul", x, const_like(x, by)))
    monkeypatch.setitem(ROWS, torch.ops.minifuse_test.scale.default, row)
    x = torch.randn(4)
    same(compiled(lambda x: scale(x, by=3.0), {"fallback": "error"})(x), x * 3)
