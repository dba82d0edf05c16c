"""Private names of triton, each with the versions it was seen in, beside `compat`, which has torch's.

triton 3.6 to 3.9 is supported. It is imported where it is used: it is not there on every system.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .forks import renewed

_parsing = renewed(sys.modules[__name__], "_parsing")


def triton_interprets() -> bool:
    """Whether `@triton.jit` gives interpreted functions: TRITON_INTERPRET=1 when triton was imported. 3.6-3.9."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def triton_version() -> str:
    """The version of triton."""
    import triton

    return triton.__version__


def triton_compile(
    function: Any, signature: Mapping[str, str], divisible: Sequence[int], warps: int, target: Any = None,
    constants: Mapping[str, int] | None = None,
) -> Any:  # fmt: skip
    """A compiled kernel; arguments at `divisible` are multiples of 16, those that the signature has as "constexpr" are
    given by `constants`. Without fused multiply-adds. 3.6-3.9.

    `compiled[(x, y, z)]` is a function of all arguments and `stream=`.
    """
    import triton

    target = target or current_target()
    attributes = {(k,): [["tt.divisibility", 16]] for k in divisible}
    source = _source()(function, dict(signature), dict(constants or {}), attributes)
    warps = max(warps * 32 // target.warp_size, 1)
    return triton.compile(source, target=target, options={"num_warps": warps, "enable_fp_fusion": False})


@functools.cache
def _source() -> Any:
    """Triton's source of a kernel, whose text one thread at a time turns into IR: Python 3.11 counts the depth of the
    trees that it parses for all threads together, and raises SystemError where two parse at once. 3.6-3.9."""
    from triton.compiler import ASTSource

    class OneAtATime(ASTSource):
        def make_ir(self, *args: Any, **kwargs: Any) -> Any:
            with _parsing:
                return super().make_ir(*args, **kwargs)

        def hash(self) -> str:
            with _parsing:
                return str(super().hash())

    return OneAtATime


def current_target() -> Any:
    """The GPU that kernels are compiled for: this thread's. 3.6-3.9."""
    import triton

    return triton.runtime.driver.active.get_current_target()


def triton_errors() -> tuple[type[BaseException], ...]:
    """What compiling a kernel raises when it cannot be: in the front end, the passes, or the assembler. 3.6-3.9."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return CompilationError, OutOfResources, PTXASError, RuntimeError


@dataclass(frozen=True)
class Handle:
    """A compiled kernel as the driver knows it: its function, threads of a program, bytes of shared memory."""

    function: int
    threads: int
    shared: int


def triton_handle(compiled: Any) -> Handle | None:
    """The driver's handle of a compiled kernel, loaded on the current device; None for one that Triton's own launcher
    alone can start (clusters, scratch memory). 3.6-3.9."""
    compiled._init_handles()
    m = compiled.metadata
    scratch = (getattr(m, f"{kind}_scratch_size", 0) for kind in ("global", "profile"))
    if m.num_ctas != 1 or m.launch_cooperative_grid or any(scratch):
        return None
    return Handle(int(compiled.function), m.num_warps * m.target.warp_size, m.shared)


def driver_launch() -> int:
    """The address of the driver's function that starts a kernel: CUDA's, or HIP's of the same arguments.

    Raises OSError where there is no driver.
    """
    library, name = ("libcuda.so.1", "cuLaunchKernel")
    if torch.version.hip:
        library, name = ("libamdhip64.so", "hipModuleLaunchKernel")
    return ctypes.cast(getattr(ctypes.CDLL(library), name), ctypes.c_void_p).value or 0


def mend_triton_interpreter() -> None:
    """Let a scalar comparison stay a bool when the interpreter spreads it over a block: it takes the dtype of what was
    compared, which a mask may not have. 3.6-3.9."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if getattr(InterpreterBuilder.create_splat, "mended", False):
        return

    def create_splat(self: Any, kind: Any, arg: Any) -> Any:
        return TensorHandle(np.full(kind.shape, arg.data.reshape(-1)[0], dtype=arg.data.dtype), arg.dtype.scalar)

    create_splat.mended = True  # type: ignore[attr-defined]
    InterpreterBuilder.create_splat = create_splat


def is_triton_tensor(x: Any) -> bool:
    """Whether a value is a tensor of Triton's language."""
    import triton.language

    return isinstance(x, triton.language.tensor)


def triton_array(x: Any) -> Any:
    """The numpy array of an interpreted tensor. 3.6-3.9."""
    return x.handle.data


def triton_tensor(array: Any, dtype: Any) -> Any:
    """An interpreted tensor over a numpy array, of a block's scalar dtype; a number is an array of one. 3.6-3.9."""
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    shape = [int(n) for n in array.shape]
    kind = tl.block_type(dtype.scalar, shape) if shape else dtype.scalar
    return tl.tensor(TensorHandle(array.reshape(shape or [1]), dtype.scalar), kind)
