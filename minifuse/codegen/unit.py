"""One C unit a program: its distinct kernels, and one function a run of launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minifuse.ir.index import Expr
from minifuse.ir.plan import Launch
from minifuse.ir.shape import cdiv, product
from minifuse.ir.text import kernel_hash

from .c import kernel_source
from .c_prelude import MathLibrary, prelude
from .c_text import divisions

# A thread is woken for at least this many bytes of a kernel's work.
GRAIN_BYTES = 32_768

DRIVER = """
typedef void (*mf_kernel)(int64_t, int64_t, void* const*, const int64_t*, int64_t*);
typedef struct { mf_kernel run; int64_t count; void* const* P; const int64_t* S; int64_t* err; } mf_task;
%(openmp)s
static void mf_worker(void* data) {
  const mf_task* t = (const mf_task*)data;
  const int64_t id = mf_thread(), threads = mf_threads();
  const int64_t each = t->count / threads, more = t->count %% threads;
  const int64_t lo = id * each + (id < more ? id : more);
  t->run(lo, lo + each + (id < more), t->P, t->S, t->err);
}
static void mf_launch(mf_kernel run, int64_t count, int64_t most, int64_t threads, void* const* P, const int64_t* S,
                      int64_t* err) {
  mf_task task = {run, count, P, S, err};
  if (threads > count) threads = count;
  if (threads > most) threads = most;
  if (threads > 1) mf_parallel(mf_worker, &task, (unsigned)threads);
  else if (count > 0) run(0, count, P, S, err);
}
"""
WITH_OPENMP = """extern void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);
static int64_t mf_thread(void) { return omp_get_thread_num(); }
static int64_t mf_threads(void) { return omp_get_num_threads(); }
static void mf_parallel(void (*f)(void*), void* data, unsigned threads) { GOMP_parallel(f, data, threads, 0); }"""
WITHOUT_OPENMP = """static int64_t mf_thread(void) { return 0; }
static int64_t mf_threads(void) { return 1; }
static void mf_parallel(void (*f)(void*), void* data, unsigned threads) { f(data); }"""


@dataclass(frozen=True)
class KernelText:
    """A distinct kernel: its name by content, its C function and the messages of its checks."""

    name: str
    text: str
    messages: tuple[str, ...]


@dataclass(frozen=True)
class Unit:
    """C source, with what the caller must know to run it.

    `symbols[i]` are the sizes, in order, that run `i` takes; `messages[i]` what its error codes
    mean; `binding[i]` the buffers whose addresses it takes.
    """

    source: str
    functions: tuple[str, ...]
    binding: tuple[tuple[str, ...], ...]
    symbols: tuple[str, ...]
    messages: tuple[tuple[str, ...], ...]


def write_kernel(launch: Launch) -> KernelText:
    """The C of one launch's kernel. Raises CodegenError when C cannot express it."""
    assert launch.schedule is not None
    name = "k_" + kernel_hash(launch.kernel, launch.schedule)
    text, messages = kernel_source(launch.kernel, launch.schedule, name)
    return KernelText(name, text, messages)


def write_unit(
    runs: Sequence[Sequence[tuple[Launch, KernelText]]],
    maths: MathLibrary,
    openmp: bool,
    bytes_of: Callable[[Launch], int],
) -> Unit:
    """The unit of a program. Kernels with one content appear once."""
    symbols = tuple(sorted({s.name for run in runs for launch, _ in run for s in launch.kernel.symbols()}))
    at = {name: k for k, name in enumerate(symbols)}
    kernels: dict[str, str] = {}
    functions: list[str] = []
    bodies: list[str] = []
    bindings: list[tuple[str, ...]] = []
    messages: list[tuple[str, ...]] = []
    for i, run in enumerate(runs):
        binding: dict[str, int] = {}
        said: list[str] = []
        lines = [f"int64_t run{i}(void* const* B, const int64_t* Z, int64_t threads) {{", "  int64_t err[1] = {0};"]
        for launch, kernel in run:
            kernels.setdefault(kernel.name, kernel.text)
            slots = [binding.setdefault(b, len(binding)) for b in launch.binding]
            sizes = [f"Z[{at[s.name]}]" for s in sorted(launch.kernel.symbols(), key=lambda s: s.name)]
            pointers = ", ".join(f"B[{k}]" for k in slots)
            count = grid_count(launch)
            text = count.render(lambda a: f"Z[{at[a.name]}]", *divisions(count))
            hint = max(bytes_of(launch), 1)
            most = max(hint // GRAIN_BYTES, 1)
            lines.append(f"  {{ // {launch.name}")
            lines.append(f"    void* const P[] = {{{pointers}}};")
            lines.append(f"    const int64_t S[] = {{{', '.join(sizes) or '0'}}};")
            lines.append(f"    mf_launch({kernel.name}, {text}, {most}, threads, P, S, err);")
            if kernel.messages:
                lines.append(f"    if (err[0]) return err[0] + {len(said)};")
                said += kernel.messages
            lines.append("  }")
        lines += ["  return 0;", "}"]
        functions.append(f"run{i}")
        bodies.append('__attribute__((visibility("default")))\n' + "\n".join(lines))
        bindings.append(tuple(binding))
        messages.append(tuple(said))
    body = "\n\n".join([*kernels.values(), *bodies])
    driver = DRIVER % {"openmp": WITH_OPENMP if openmp else WITHOUT_OPENMP}
    source = prelude(body, maths) + driver + "\n" + body + "\n"
    return Unit(source, tuple(functions), tuple(bindings), symbols, tuple(messages))


def grid_count(launch: Launch) -> Expr:
    """Points of a launch's grid."""
    assert launch.schedule is not None
    return product(cdiv(loop.axis.size, loop.step) for loop in launch.schedule.grid)
