"""One C unit a program: its distinct kernels, and one function a run of launches."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minifuse.ir.index import Axis, Expr, Sym
from minifuse.ir.plan import Binding, Launch
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
BATCH = """
static int64_t mf_points(int64_t work, int64_t count, int64_t size) {
  return work <= 0 ? 0 : work >= size ? count : (work * count + size - 1) / size;
}
/* A batch: the points of all tensors, N of each, shared out by the elements that they are, W. */
typedef struct {
  mf_kernel run; int64_t tensors, params, sizes, work; const int64_t *N, *W;
  void* const* P; const int64_t* S; int64_t* err;
} mf_batch;
static void mf_share(const mf_batch* t, int64_t lo, int64_t hi) {
  for (int64_t k = 0, at = 0; k < t->tensors && at < hi; at += t->W[k++]) {
    const int64_t first = mf_points(lo - at, t->N[k], t->W[k]), last = mf_points(hi - at, t->N[k], t->W[k]);
    if (first < last) t->run(first, last, t->P + k * t->params, t->S + k * t->sizes, t->err);
  }
}
static void mf_batch_worker(void* data) {
  const mf_batch* t = (const mf_batch*)data;
  const int64_t id = mf_thread(), threads = mf_threads(), each = t->work / threads, more = t->work % threads;
  const int64_t lo = id * each + (id < more ? id : more);
  mf_share(t, lo, lo + each + (id < more));
}
static void mf_launch_batch(mf_batch t, int64_t most, int64_t threads) {
  int64_t count = 0;
  for (int64_t k = 0; k < t.tensors; ++k) count += t.N[k], t.work += t.W[k];
  if (threads > count) threads = count;
  if (threads > most) threads = most;
  if (threads > 1) mf_parallel(mf_batch_worker, &t, (unsigned)threads);
  else mf_share(&t, 0, t.work);
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

# Kernels that are worth a process of the compiler's. A unit of more may be compiled in parts, by as many at once.
PART = 8
PARTS = """
#ifdef MF_PARTS
#define MF_HERE(k) ((k) % MF_PARTS == MF_PART)
#define MF_KERNEL
#else
#define MF_HERE(k) 1
#define MF_KERNEL static
#endif"""


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
    mean; `binding[i]` the buffers whose addresses it takes; `threads[i]` how many threads it has work for.
    """

    source: str
    functions: tuple[str, ...]
    binding: tuple[tuple[str, ...], ...]
    symbols: tuple[str, ...]
    messages: tuple[tuple[str, ...], ...]
    threads: tuple[int, ...]


def part(k: int, text: str) -> str:
    """A kernel where its part of the unit is compiled, and its declaration elsewhere."""
    text = text.replace("static", "MF_KERNEL", 1)
    return f"#if MF_HERE({k})\n{text}\n#else\n{text.partition(chr(10))[0]};\n#endif"


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
    symbols = tuple(sorted({s.name for run in runs for launch, _ in run for s in launch.symbols}))
    at = {name: k for k, name in enumerate(symbols)}
    kernels: dict[str, str] = {}
    functions: list[str] = []
    bodies: list[str] = []
    bindings: list[tuple[str, ...]] = []
    messages: list[tuple[str, ...]] = []
    threads: list[int] = []
    for i, run in enumerate(runs):
        binding: dict[str, int] = {}
        threads.append(1)
        said: list[str] = []
        lines = [f"int64_t run{i}(void* const* B, const int64_t* Z, int64_t threads) {{", "  int64_t err[1] = {0};"]
        for launch, kernel in run:
            kernels.setdefault(kernel.name, kernel.text)
            slots = [binding.setdefault(b, len(binding)) for b in launch.binding]
            most = max(bytes_of(launch) // GRAIN_BYTES, 1)
            threads[-1] = max(threads[-1], most)
            side_by_side = launch.batched and slots == list(range(slots[0], slots[0] + len(slots)))
            pointers = array("void* const P", [f"B[{k}]" for k in slots])
            lines += [
                f"  {{ // {launch.name}",
                f"    {f'void* const* P = B + {slots[0]};' if side_by_side else pointers}",
            ]
            lines += call(launch, kernel, most, lambda a: f"Z[{at[a.name]}]")
            if kernel.messages:
                lines.append(f"    if (err[0]) return err[0] + {len(said)};")
                said += kernel.messages
            lines.append("  }")
        lines += ["  return 0;", "}"]
        functions.append(f"run{i}")
        bodies.append('__attribute__((visibility("default")))\n' + "\n".join(lines))
        bindings.append(tuple(binding))
        messages.append(tuple(said))
    if len(kernels) < 2 * PART:
        body = "\n\n".join([*kernels.values(), *bodies])
    else:
        body = "\n\n".join([PARTS, *map(part, range(len(kernels)), kernels.values()),
                            "#if MF_HERE(0)", *bodies, "#endif"])  # fmt: skip
    driver = DRIVER % {"openmp": WITH_OPENMP if openmp else WITHOUT_OPENMP}
    batches = BATCH if any(launch.batched for run in runs for launch, _ in run) else ""
    source = prelude(body, maths) + driver + batches + "\n" + body + "\n"
    return Unit(source, tuple(functions), tuple(bindings), symbols, tuple(messages), tuple(threads))


def call(launch: Launch, kernel: KernelText, most: int, size: Callable[[Sym | Axis], str]) -> list[str]:
    """The lines that run one launch on at most as many threads, its sizes written by `size`."""
    assert launch.schedule is not None
    grid = launch.schedule.grid
    points = product(cdiv(loop.axis.size, loop.step) for loop in grid)
    work = product(loop.axis.size for loop in grid)

    def text(e: Expr, run: Binding) -> str:
        e = e.substitute(run.sizes)
        return e.render(size, *divisions(e))

    symbols = sorted(launch.kernel.symbols(), key=lambda s: s.name)
    lines = [f"    {array('const int64_t S', [text(s.expr, m) for m in launch.members for s in symbols] or ['0'])}"]
    if not launch.batched:
        return [*lines, f"    mf_launch({kernel.name}, {text(points, launch.members[0])}, {most}, threads, P, S, err);"]
    lines += [f"    {array(f'const int64_t {name}', [text(e, m) for m in launch.members])}"
              for name, e in (("N", points), ("W", work))]  # fmt: skip
    shape = f"{len(launch.members)}, {len(launch.kernel.params)}, {len(symbols)}"
    batch = f"(mf_batch){{{kernel.name}, {shape}, 0, N, W, P, S, err}}"
    return [*lines, f"    mf_launch_batch({batch}, {most}, threads);"]


def array(name: str, items: Sequence[str]) -> str:
    """A C array in lines that can be read."""
    kind = "static " if len(items) > 1 and all(text.isdigit() for text in items) else ""
    whole = f"{kind}{name}[] = {{{', '.join(items)}}};"
    return "\n      ".join(textwrap.wrap(whole, 110, break_long_words=False, break_on_hyphens=False))
