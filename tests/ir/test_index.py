"""Index arithmetic: simplification changes no value, and finds what kernels need."""

import itertools
import pickle
import random

import pytest

from minifuse.ir.index import ONE, ZERO, Axis, Expr, Sym, as_expr
from minifuse.ir.shape import cdiv, contiguous_strides, delinearize, linearize, parse, product

SIZES = (1, 2, 3, 4, 6, 8, 12)


class Case:
    """A random expression beside a plain Python function of the same meaning."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.syms = [Sym("s0", 2), Sym("s1", 1, 7)]
        self.signed = Sym("s2", -9, 9)
        sizes = [rng.choice(SIZES) for _ in range(2)]
        self.axes = [Axis("i", sizes[0]), Axis("j", sizes[1]), Axis("k", self.syms[0].expr)]
        self.leaves = [a.expr for a in self.axes] + [s.expr for s in (*self.syms, self.signed)]

    def divisor(self):
        chance = self.rng.random()
        if chance < 0.1:
            return self.signed.expr, lambda env: env["s2"]
        if chance < 0.3:
            s = self.rng.choice(self.syms)
            return s.expr, lambda env, s=s: env[s.name]
        c = self.rng.choice(SIZES)
        return as_expr(c), lambda env, c=c: c

    def build(self, depth: int):
        kind = self.rng.choice(["leaf", "const"]) if depth == 0 else self.rng.choice("+-*/%*+/%")
        if kind == "leaf":
            e = self.rng.choice(self.leaves)
            name = e.atom.name
            return e, lambda env: env[name]
        if kind == "const":
            c = self.rng.randint(-9, 13)
            return as_expr(c), lambda env: c
        a, fa = self.build(depth - 1)
        if kind in "/%":
            b, fb = self.divisor()
            if kind == "/":
                return a // b, lambda env: fa(env) // fb(env)
            return a % b, lambda env: fa(env) % fb(env)
        b, fb = self.build(depth - 1)
        if kind == "+":
            return a + b, lambda env: fa(env) + fb(env)
        if kind == "-":
            return a - b, lambda env: fa(env) - fb(env)
        return a * b, lambda env: fa(env) * fb(env)

    def environments(self, count: int = 24):
        for _ in range(count):
            env = {
                "s0": self.rng.randint(2, 9),
                "s1": self.rng.randint(1, 7),
                "s2": self.rng.choice((-9, -2, -1, 1, 3, 9)),
            }
            for a in self.axes:
                env[a.name] = self.rng.randrange(a.size.evaluate(env))
            yield env


@pytest.mark.parametrize("seed", range(8))
def test_a_simplified_expression_has_the_value_of_what_was_written(seed):
    rng = random.Random(seed)
    for n in range(150):
        case = Case(rng)
        e, meaning = case.build(rng.randint(1, 4))
        for env in case.environments():
            assert e.evaluate(env) == meaning(env), f"seed {seed}, expression {n}: {e} at {env}"


@pytest.mark.parametrize("seed", range(4))
def test_bounds_hold_at_every_point(seed):
    rng = random.Random(100 + seed)
    for _ in range(150):
        case = Case(rng)
        e, _ = case.build(rng.randint(1, 3))
        low, high, top, nonneg = e.lower(), e.upper(), e.max_value(), e.is_nonneg()
        for env in case.environments():
            value = e.evaluate(env)
            assert low is None or low.evaluate(env) <= value
            assert high is None or value <= high.evaluate(env)
            assert top is None or value <= top
            assert not nonneg or value >= 0


@pytest.mark.parametrize("seed", range(4))
def test_substitution_evaluates_as_evaluating_the_parts_first(seed):
    rng = random.Random(200 + seed)
    for _ in range(100):
        case = Case(rng)
        e, _ = case.build(3)
        i, j, _ = case.axes
        p = Axis("p", i.size * j.size)
        replaced = e.substitute({i: p.expr // j.size, j: p.expr % j.size})
        assert not replaced.axes() & {i, j}
        for env in case.environments():
            at = rng.randrange(i.size.value * j.size.value)
            want = e.evaluate({**env, "i": at // j.size.value, "j": at % j.size.value})
            assert replaced.evaluate({**env, "p": at}) == want


@pytest.mark.parametrize("seed", range(4))
def test_what_is_printed_parses_to_the_identical_expression(seed):
    rng = random.Random(300 + seed)
    for _ in range(200):
        case = Case(rng)
        e, _ = case.build(rng.randint(1, 3))
        names = {a.name: a for a in (*case.axes, *case.syms, case.signed)}
        assert parse(str(e), names) is e


def test_delinearize_undoes_linearize_point_by_point():
    rng = random.Random(7)
    for _ in range(40):
        shape = [rng.choice((1, 2, 3, 5)) for _ in range(rng.randint(1, 4))]
        flat = Axis("n", product(shape))
        coordinates = delinearize(flat.expr, shape)
        points = itertools.product(*map(range, shape))
        for n, point in enumerate(points):
            assert tuple(c.evaluate({"n": n}) for c in coordinates) == point


def test_delinearize_of_a_linear_index_gives_the_axes_back():
    s = Sym("s0", 1)
    axes = [Axis("a", 5), Axis("b", s.expr), Axis("c", 768)]
    shape = [a.size for a in axes]
    offset = linearize([a.expr for a in axes], contiguous_strides(shape))
    assert delinearize(offset, shape) == tuple(a.expr for a in axes)


S = Sym("s0", 1)
I, J, K = Axis("i", 32), Axis("j", 768), Axis("k", S.expr)  # noqa: E741
i, j, k, s = I.expr, J.expr, K.expr, S.expr
square = Axis("n", s * s).expr


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ((768 * i + j) // 768, i),
        ((768 * i + j) % 768, j),
        ((768 * i + j) // 384, 2 * i + j // 384),
        ((1536 * i + 2 * j) // 2, 768 * i + j),
        ((i * s + k) // s, i),
        ((i * s + k) % s, k),
        ((i * s - 1) // s, i - 1),
        ((i * s - 1) % s, s - 1),
        ((square // s) % s, square // s),
        (s * ((square // s) % s) + square % s, square),
        (j // 768, ZERO),
        (j % 768, j),
        (j // 1, j),
        (j % 1, ZERO),
        ((j // 4) // 8, j // 32),
        ((j % 64) % 8, j % 8),
        (8 * (j // 8) + j % 8, j),
        (s // s, ONE),
        ((s + 1) // (s + 1), ONE),
        ((i + 1) * (i - 1), i * i - 1),
        (as_expr(-7) // 2, as_expr(-4)),
        (as_expr(-7) % 2, as_expr(1)),
        (cdiv(17, 8), as_expr(3)),
        (i - i, ZERO),
    ],
)
def test_an_expression_simplifies_to_the_identical_one(found, expected):
    assert found is expected


def test_equal_expressions_are_one_object_whatever_the_order_they_were_built_in():
    assert i + j * s is s * j + i
    assert Axis("i", 32) is I
    assert Sym("s0", 1) is S
    assert Axis("i", 33) is not I


def test_expressions_survive_pickling_as_the_same_objects():
    e = (768 * i + j + 5) // 7 % s
    assert pickle.loads(pickle.dumps(e)) is e


def test_a_coefficient_is_found_only_where_the_rest_is_free_of_the_axis():
    assert (768 * i + j).coefficient(I) is as_expr(768)
    assert (s * i + j).coefficient(I) is s
    assert (j + 1).coefficient(I) is ZERO
    assert (i * i).coefficient(I) is None
    assert (i + i // 3).coefficient(I) is None


def test_sizes_of_zero_count_as_one_in_strides():
    assert contiguous_strides((4, 0, 3)) == (as_expr(3), as_expr(3), ONE)
    assert contiguous_strides(()) == ()


def test_symbols_bound_their_expressions():
    wide = Sym("w", 2, 64)
    assert (wide.expr - 2).is_nonneg()
    assert not (wide.expr - 3).is_nonneg()
    assert (wide.expr * 2).max_value() == 128
    assert s.max_value() is None


def test_errors_name_what_was_found():
    with pytest.raises(ZeroDivisionError, match="i // 0"):
        i // 0
    with pytest.raises(ValueError, match="constant size, found i"):
        _ = i.value
    with pytest.raises(KeyError, match="j"):
        (i + j).evaluate({"i": 0})
    with pytest.raises(ValueError, match="unknown name 'q'"):
        parse("q + 1", {"i": I})
    with pytest.raises(ValueError, match="expected integers"):
        parse("i ** 2", {"i": I})


def test_rendering_uses_the_targets_own_division():
    e: Expr = (j + 5) // 7 + (j + 5) % 7 - 3
    text = e.render(lambda a: a.name.upper(), div="fd(", mod="fm(")
    assert "fd(J + 5, 7)" in text
    assert "fm(J + 5, 7)" in text


def test_the_digits_of_a_remainder_are_put_together_again() -> None:
    x = Axis("x", 128).expr
    assert 8 * ((x % 64) // 8) + x % 8 is x % 64
    assert 8 * ((x % 60) // 8) + x % 8 is not x % 60
