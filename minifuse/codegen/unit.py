"""One C unit a program: its distinct kernels, and one function a run of launches."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

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
/* What threads share, each by its number; a section runs its parts one behind the other with the same threads. */
typedef struct { void (*share)(const void*, int64_t, int64_t); const void* data; int64_t most; } mf_part;
typedef struct { const mf_part* parts; int64_t count; } mf_section;
static int64_t mf_least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t mf_first(int64_t count, int64_t id, int64_t threads) {
  return id * (count / threads) + mf_least(id, count %% threads);
}
static void mf_share_task(const void* data, int64_t id, int64_t threads) {
  const mf_task* t = data;
  t->run(mf_first(t->count, id, threads), mf_first(t->count, id + 1, threads), t->P, t->S, t->err);
}
static void mf_worker(void* data) {
  const mf_section* s = data;
  const int64_t id = mf_thread(), threads = mf_threads();
  for (int64_t k = 0; k < s->count; ++k) {
    const int64_t n = mf_least(s->parts[k].most, threads);
    if (id < n) s->parts[k].share(s->parts[k].data, id, n);
    if (k + 1 < s->count) mf_barrier();
  }
}
static void mf_run(const mf_part* parts, int64_t count, int64_t threads) {
  mf_section section = {parts, count};
  int64_t most = 0;
  for (int64_t k = 0; k < count; ++k) most = parts[k].most > most ? parts[k].most : most;
  if (mf_least(most, threads) > 1) mf_parallel(mf_worker, &section, (unsigned)mf_least(most, threads));
  else for (int64_t k = 0; k < count; ++k) if (parts[k].most > 0) parts[k].share(parts[k].data, 0, 1);
}
"""
TILES = """
/* Launches tile by tile: of each the same one of equal parts of its points, then the next. */
typedef struct { const mf_task* tasks; int64_t launches, tiles; } mf_region;
static void mf_share_tiles(const void* data, int64_t id, int64_t threads) {
  const mf_region* r = data;
  for (int64_t k = mf_first(r->tiles, id, threads); k < mf_first(r->tiles, id + 1, threads); ++k)
    for (const mf_task* t = r->tasks; t < r->tasks + r->launches; ++t)
      t->run(t->count / r->tiles * k, t->count / r->tiles * (k + 1), t->P, t->S, t->err);
}
"""
BATCH = """
static int64_t mf_points(int64_t work, int64_t count, int64_t size) {
  return work <= 0 ? 0 : work >= size ? count : (work * count + size - 1) / size;
}
/* A batch: the points of all tensors, N of each, shared out by the elements that they are, W. */
typedef struct {
  mf_kernel run; int64_t tensors, params, sizes; const int64_t *N, *W;
  void* const* P; const int64_t* S; int64_t* err;
} mf_batch;
static int64_t mf_sum(const int64_t* x, int64_t n) {
  int64_t all = 0;
  for (int64_t k = 0; k < n; ++k) all += x[k];
  return all;
}
static void mf_share_batch(const void* data, int64_t id, int64_t threads) {
  const mf_batch* t = data;
  const int64_t work = mf_sum(t->W, t->tensors), lo = mf_first(work, id, threads), hi = mf_first(work, id + 1, threads);
  for (int64_t k = 0, at = 0; k < t->tensors && at < hi; at += t->W[k++]) {
    const int64_t first = mf_points(lo - at, t->N[k], t->W[k]), last = mf_points(hi - at, t->N[k], t->W[k]);
    if (first < last) t->run(first, last, t->P + k * t->params, t->S + k * t->sizes, t->err);
  }
}
"""
WITH_OPENMP = """extern void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
extern void GOMP_barrier(void);
extern int omp_get_thread_num(void);
extern int omp_get_num_threads(void);
static int64_t mf_thread(void) { return omp_get_thread_num(); }
static int64_t mf_threads(void) { return omp_get_num_threads(); }
static void mf_barrier(void) { GOMP_barrier(); }
static void mf_parallel(void (*f)(void*), void* data, unsigned threads) { GOMP_parallel(f, data, threads, 0); }"""
WITHOUT_OPENMP = """static int64_t mf_thread(void) { return 0; }
static int64_t mf_threads(void) { return 1; }
static void mf_barrier(void) {}
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
        section = Section(binding, lambda a: f"Z[{at[a.name]}]")
        for _, group in groupby(run, lambda pair: pair[0].region or id(pair[0])):
            members = list(group)
            kernels.update((kernel.name, kernel.text) for _, kernel in members)
            most = max(max(bytes_of(launch) // GRAIN_BYTES, 1) for launch, _ in members)
            threads[-1] = max(threads[-1], most)
            section.add(members, most)
            for _, kernel in members:
                if kernel.messages:
                    lines += [*section.end(), f"  if (err[0]) return err[0] + {len(said)};"]
                    said += kernel.messages
        lines += section.end()
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
    launches = [launch for run in runs for launch, _ in run]
    batches = BATCH if any(launch.batched for launch in launches) else ""
    tiles = TILES if any(launch.region for launch in launches) else ""
    source = prelude(body, maths) + driver + tiles + batches + "\n" + body + "\n"
    return Unit(source, tuple(functions), tuple(bindings), symbols, tuple(messages), tuple(threads))


class Section:
    """The C of launches that one team of threads runs, one behind the other, until an error would be asked for."""

    def __init__(self, binding: dict[str, int], size: Callable[[Sym | Axis], str]) -> None:
        self.binding, self.size = binding, size
        self.lines: list[str] = []
        self.parts: list[str] = []
        self.serial = 0

    def add(self, members: Sequence[tuple[Launch, KernelText]], most: int) -> None:
        """A launch, or those of a region, on at most so many threads."""
        tasks = [self.task(*pair) for pair in members]
        region = members[0][0].region
        if region is not None and len(members) > 1:
            name = f"R{self.serial}"
            made = ", ".join(f"{{{data}}}" for data, _ in tasks)
            self.lines.append(f"  const mf_task {name}[] = {{{made}}};")
            tiles = f"&(mf_region){{{name}, {len(members)}, {region.tiles}}}"
            self.parts.append(f"{{mf_share_tiles, {tiles}, mf_least({region.tiles}, {most})}}")
            return
        ((launch, _),), ((data, count),) = members, tasks
        kind = "batch" if launch.batched else "task"
        self.parts.append(f"{{mf_share_{kind}, &(mf_{kind}){{{data}}}, mf_least({count}, {most})}}")

    def task(self, launch: Launch, kernel: KernelText) -> tuple[str, str]:
        """What a launch is in C, and how many points it has; declares what that needs."""
        assert launch.schedule is not None
        slots = [self.binding.setdefault(b, len(self.binding)) for b in launch.binding]
        k, self.serial = self.serial, self.serial + 1
        grid = launch.schedule.grid
        points = product(cdiv(loop.axis.size, loop.step) for loop in grid)
        work = product(loop.axis.size for loop in grid)

        def text(e: Expr, run: Binding) -> str:
            e = e.substitute(run.sizes)
            return e.render(self.size, *divisions(e))

        symbols = sorted(launch.kernel.symbols(), key=lambda s: s.name)
        sizes = [text(s.expr, m) for m in launch.members for s in symbols]
        self.lines.append(f"  // {launch.name}")
        if launch.batched and slots == list(range(slots[0], slots[0] + len(slots))):
            pointers = f"B + {slots[0]}"
        else:
            pointers = f"P{k}"
            self.lines.append(f"  {array(f'void* const {pointers}', [f'B[{b}]' for b in slots])}")
        if sizes:
            self.lines.append(f"  {array(f'const int64_t S{k}', sizes)}")
        given = f"{pointers}, {f'S{k}' if sizes else '0'}, err"
        if not launch.batched:
            count = text(points, launch.members[0])
            return f"{kernel.name}, {count}, {given}", count
        self.lines += [f"  {array(f'const int64_t {name}{k}', [text(e, m) for m in launch.members])}"
                       for name, e in (("N", points), ("W", work))]  # fmt: skip
        shape = f"{len(launch.members)}, {len(launch.kernel.params)}, {len(symbols)}, N{k}, W{k}"
        return f"{kernel.name}, {shape}, {given}", f"mf_sum(N{k}, {len(launch.members)})"

    def end(self) -> list[str]:
        """The lines that run what was added."""
        if not self.parts:
            return []
        made = ",\n    ".join(self.parts)
        lines = [*self.lines, f"  mf_run((const mf_part[]){{\n    {made}}}, {len(self.parts)}, threads);"]
        self.lines, self.parts = [], []
        return lines


def array(name: str, items: Sequence[str]) -> str:
    """A C array in lines that can be read."""
    kind = "static " if len(items) > 1 and all(text.isdigit() for text in items) else ""
    whole = f"{kind}{name}[] = {{{', '.join(items)}}};"
    return "\n      ".join(textwrap.wrap(whole, 110, break_long_words=False, break_on_hyphens=False))
