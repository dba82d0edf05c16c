"""What of the families does not run in generated kernels, with the reason."""

from __future__ import annotations

# Operators that kernels do not do and that families call: `operator` -> why ATen has it.
# `python -m tests.models` names those that no family calls any more: they are to be taken out.
LEFT: dict[str, str] = {
    "aten.topk.default": "a selection",
    "aten.sort.default": "a sort",
    "aten.histc.default": "a histogram: a scatter with collisions",
    "aten.max_pool2d_with_indices_backward.default": "a scatter on a CPU: ATen's walks the outputs alone",
    "aten.upsample_bilinear2d_backward.default": "a large sum channels last on a CPU: ATen's reads each once",
    "aten.linalg_solve_triangular.default": "a solver",
    "aten._fft_c2c.default": "a Fourier transform",
    "aten.polar.default": "a result of complex numbers",
    "aten.view_as_complex.default": "a result of complex numbers",
    "aten.view_as_real.default": "of complex numbers",
    "aten._conj.default": "of complex numbers",
}


def why(op: str, reason: str) -> str | None:
    """Why an operator is left to ATen, where that is known; complex numbers have no kernels, whatever the operator."""
    return "of complex numbers" if "torch.complex" in reason else LEFT.get(op)
