"""Instructions that the hot kernels execute, counted by callgrind: a record that noise cannot hide a regression from.

    python -m benchmarks.instructions [--quick] [--json FILE] [--check]

Each case of `benchmarks.memory_roof` is compiled for AVX2, which valgrind knows, as the C that a program runs; its unit
is linked with a main that calls each run once, on one thread. `an element` are instructions over the case's elements,
the target what `benchmarks/results/instructions.json` has, and 2%: a compiler of another version writes other code.
Needs valgrind and gcc.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from minifuse.ir.plan import Plan
from minifuse.records import RECORDS
from minifuse.runtime import toolchain

from . import harness
from .harness import Board, Column, ProbeError, Target
from .memory_roof import CASES

ELEMENTS = 2**18
SLACK = 1.02
RECORD = harness.ROOT / "benchmarks/results/instructions.json"
FOR_AVX2 = {"MINIFUSE_CC": "gcc -mno-avx512f", "MINIFUSE_DEVICE_MODEL": "cpu", "MINIFUSE_PLAN_CACHE": "0"}

MAIN = """
extern void* aligned_alloc(unsigned long, unsigned long);
static void* block(unsigned long bytes, int floats) {
  float* p = aligned_alloc(64, (bytes + 127) / 64 * 64);
  for (unsigned long k = 0; k < (bytes + 3) / 4; ++k) p[k] = floats ? 1.0f + (float)(k % 7) : 0.0f;
  return p;
}
int main(void) {
  const long long Z[] = {0};
CALLS
  return 0;
}
"""


def number(value: float) -> str:
    return f"{value:.3f}"


def probe(name: str) -> dict[str, Any]:
    """Instructions of one case's runs, and its kernels. Run it through `fresh`, for another compiler."""
    case = next(c for c in CASES if c.name == name)
    torch.manual_seed(0)
    torch.compile(case.run, backend="minifuse", dynamic=False)(*case.inputs(ELEMENTS))
    (record,) = RECORDS
    plan, unit = record.stages["memory"], record.stages["unit"]
    tools = toolchain.find()
    if tools is None or tools.isa != "avx2":
        raise RuntimeError(f"expected gcc for AVX2, found {tools}")
    with tempfile.TemporaryDirectory() as folder:
        program = built(plan, unit, tools, Path(folder))
        counted = subprocess.run(
            [
                "valgrind",
                "--tool=callgrind",
                "--toggle-collect=run*",
                f"--callgrind-out-file={folder}/out",
                str(program),
            ],
            capture_output=True,
            text=True,
        )
    found = re.search(r"Collected : (\d+)", counted.stderr)
    if counted.returncode or found is None:
        raise RuntimeError(f"valgrind ended with {counted.returncode}:\n{counted.stderr[-2000:]}")
    return {"instructions": int(found[1]), "kernels": len(plan.launches)}


def built(plan: Plan, unit: Any, tools: toolchain.Toolchain, folder: Path) -> Path:
    """The program that calls each run of a unit once. Raises CalledProcessError where it does not compile."""
    program = folder / "program"
    program.with_suffix(".c").write_text(unit.source + main_of(plan, unit))
    without = [flag for flag in tools.flags if flag not in ("-shared", "-fPIC")]
    libs = [*tools.libs, "-lmvec", "-lm", "-lgomp"]
    command = [*tools.compiler, *without, str(program.with_suffix(".c")), "-o", str(program), *libs]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program


def main_of(plan: Plan, unit: Any) -> str:
    """A main that gives each run of a unit buffers of their sizes, and calls it."""
    made: dict[str, str] = {}
    calls = []
    for function, binding in zip(unit.functions, unit.binding, strict=True):
        for name in binding:
            buffer = plan.buffers[name]
            nbytes = plan.hint(buffer.extent) * buffer.dtype.itemsize
            home = buffer.reuses or name
            made.setdefault(name, made.get(home, f"block({max(nbytes, 4)}, {int(buffer.dtype.is_floating_point)})"))
        calls.append(f"  void* const {function}_B[] = {{{', '.join(made[name] for name in binding)}}};")
        calls.append(f"  {function}({function}_B, Z, 1);")
    return MAIN.replace("CALLS", "\n".join(calls))


def recorded() -> dict[str, float]:
    """Instructions an element of each row of the record; empty where there is none."""
    if not RECORD.exists():
        return {}
    rows = json.loads(RECORD.read_text())["rows"]
    return {name: row["an element"] for name, row in rows.items() if "an element" in row}


def main() -> int:
    options = harness.arguments(__doc__).parse_args()
    if not shutil.which("valgrind") or not shutil.which("gcc"):
        print("benchmarks.instructions needs valgrind and gcc (Debian: apt-get install valgrind gcc)", file=sys.stderr)
        return 2
    table = Board(
        f"Instructions of generated kernels for AVX2, {ELEMENTS} elements",
        [Column("kernels"), Column("instructions"), Column("an element", number)],
    )
    before = recorded()
    for case in CASES:
        if options.quick and not case.quick:
            continue
        try:
            found = harness.fresh(probe, case.name, env=FOR_AVX2)
        except ProbeError as error:
            table.fail(case.name, error)
            continue
        table.add(case.name, **found, an_element=found["instructions"] / ELEMENTS)
        if case.name in before:
            table.hold(case.name, {"an element": Target("<=", SLACK * before[case.name])})
    return harness.finish(table, options)


if __name__ == "__main__":
    sys.exit(main())
