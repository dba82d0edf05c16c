"""The operators that are meant to go to ATen, each with the reason; every other extern is a fallback."""

from __future__ import annotations

from typing import Any

from minifuse import compat

_MATMUL = "a matrix multiplication: bound by compute, and a tuned library does it best"
_CONVOLUTION = "a convolution: bound by compute, and a tuned library does it best"
_ATTENTION = "fused attention: ATen keeps the scores out of memory"
_GRADIENT_OF_GATHER = "a scatter with collisions: ATen adds the rows of one index in a fixed order"
_HOST = "numbers that are no tensors, and checks of them: done by the host"
_EFFECT = "an effect on torch's state or on other processes: run once, in its place"

# The operator without its overload, as `namespace::name`.
EXPECTED: dict[str, str] = {
    name: reason
    for reason, names in {
        _MATMUL: """aten::mm aten::bmm aten::addmm aten::baddbmm aten::addbmm aten::addmv aten::mv aten::dot aten::vdot
            aten::linear aten::matmul aten::_scaled_mm aten::_grouped_mm aten::_int_mm""",
        _CONVOLUTION: "aten::convolution aten::convolution_backward",
        _ATTENTION: """aten::_scaled_dot_product_flash_attention aten::_scaled_dot_product_flash_attention_backward
            aten::_scaled_dot_product_flash_attention_for_cpu aten::_scaled_dot_product_flash_attention_for_cpu_backward
            aten::_scaled_dot_product_efficient_attention aten::_scaled_dot_product_efficient_attention_backward
            aten::_scaled_dot_product_cudnn_attention aten::_scaled_dot_product_cudnn_attention_backward""",
        _GRADIENT_OF_GATHER: "aten::embedding_dense_backward aten::_embedding_bag_dense_backward",
        _HOST: """aten::_local_scalar_dense aten::item aten::scalar_tensor aten::_assert_async aten::_assert_scalar
            aten::sym_constrain_range aten::sym_constrain_range_for_size""",
        _EFFECT: "minifuse::seed",
    }.items()
    for name in names.split()
}
_EFFECT_NAMESPACES = ("_c10d_functional", "c10d", "_c10d_functional_autograd")


def expected(target: Any) -> str | None:
    """Why an operator is meant to run by ATen (or, where it has one, by its own code); None for a fallback."""
    if getattr(target, "__module__", "") in ("_operator", "math") or getattr(target, "__name__", "").startswith("sym_"):
        return _HOST
    if isinstance(target, compat.OpOverload):
        if target.namespace in _EFFECT_NAMESPACES:
            return _EFFECT
        return EXPECTED.get(target._schema.name)
    return None
