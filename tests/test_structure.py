"""The limits that keep the package readable, as tests: sizes, direction of imports, where private names stand."""

from __future__ import annotations

import ast
import importlib.metadata
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "minifuse"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE = 500
WHOLE = 20_940
# The design aims at 9,000 for the core; the two targets, the capture surface, an allocator and vector maths of our own,
# scans, scatters, joins, batches and the lowering of all of core ATen take it past that.
CORE = 18_280
# Lines of code a folder may have; the policies of rematerialisation, `explain` and the command line are no core.
BUDGETS = {"ir": 2_850, "passes": 9_991, "codegen": 3_560, "runtime": 2_020, "explain": 1_100}
POLICIES = set(
    """baselines policies blocks search mincut priced chen korthikanti knapsack default budget rotor
    checkmate stages milp""".split()
)
# What each layer may import, itself aside. Leaves are data that every layer reads.
LEAVES = {"compat", "compat_triton", "errors", "forks", "options", "records"}
LAYERS = ("ir", "passes", "codegen", "runtime", "explain", "dump", "warm", "backend", "capturing", "remat", "cli", "")
OPTIONAL = {"transformers", "triton", "numpy", "matplotlib"}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk(node: ast.AST, in_function: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements, and whether each stands inside a function; those for types alone are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, in_function
        elif not is_for_types_only(child):
            inside = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, inside)


KNOWN = {module_of(path) for path in FILES}


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports at its top."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    found: set[str] = set()
    for node, _ in walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            base = node.module or ""
            if node.level:
                up = package.split(".") if package else []
                up = up[: len(up) - (node.level - 1)]
                base = ".".join(["minifuse", *up, *([base] if base else [])])
            names = [f"{base}.{a.name}" for a in node.names]
        for name in names:
            if name == "minifuse" or name.startswith("minifuse."):
                inner = name.removeprefix("minifuse").lstrip(".")
                found.add(inner if inner in KNOWN else inner.rpartition(".")[0])
    return found - {module_of(path)}


GRAPH = {module_of(path): imported(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_stays_under_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LONGEST_FILE


def code_lines(path: Path) -> int:
    """Lines of code: no blank line, comment or docstring, which a limit must not discourage."""
    text = path.read_text()
    prose: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and first.end_lineno:
                prose |= set(range(first.lineno, first.end_lineno + 1))
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in silent:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - prose)


def lines(folder: str) -> int:
    return sum(code_lines(path) for path in FILES if layer(module_of(path)) == folder)


@pytest.mark.parametrize("folder", BUDGETS)
def test_a_folder_stays_within_its_lines(folder: str) -> None:
    assert lines(folder) <= BUDGETS[folder]


def test_the_core_and_the_package_stay_within_their_lines() -> None:
    sizes = {module_of(path): code_lines(path) for path in FILES}

    def in_core(module: str) -> bool:
        policy = module.startswith("passes.remat.") and module.rpartition(".")[2] in POLICIES
        return layer(module) not in ("explain", "cli") and not policy

    core = sum(n for module, n in sizes.items() if in_core(module))
    assert core <= CORE, f"the core has {core} lines"
    assert sum(sizes.values()) <= WHOLE, f"the package has {sum(sizes.values())} lines"


def test_imports_go_one_way() -> None:
    wrong = []
    for module, names in GRAPH.items():
        for name in names:
            mine, other = layer(module), layer(name)
            if mine == other or other in LEAVES:
                continue
            if mine in LEAVES:
                if other != "ir":
                    wrong.append(f"{module} imports {name}")
            elif LAYERS.index(other) > LAYERS.index(mine):
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_leaves_and_the_ir_import_no_pass() -> None:
    assert {layer(n) for m, names in GRAPH.items() if layer(m) == "ir" for n in names} <= {"ir", "errors"}


def test_only_what_shows_the_compiler_imports_explain() -> None:
    readers = {layer(m) for m, names in GRAPH.items() if any(layer(n) == "explain" for n in names)}
    assert readers <= {"explain", "dump", "capturing", "cli", ""}


def test_no_imports_make_a_cycle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in sorted(GRAPH[module]):
                # A package's own `__init__` runs before its modules: reaching it from inside is no cycle of files.
                if name and not module.startswith(f"{name}."):
                    visit(name, (*path, module))
            done.add(module)

    for module in GRAPH:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_an_import_inside_a_function_is_of_an_optional_package(path: Path) -> None:
    for node, inside in walk(tree(path)):
        if inside:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert {name.split(".")[0] for name in names} <= OPTIONAL, ast.unparse(node)


PRIVATE = re.compile(r"\b(?:torch|triton|functorch)(?:\.\w+)*\._[a-zA-Z]\w*")


@pytest.mark.parametrize("path", [p for p in FILES if not module_of(p).startswith("compat")], ids=module_of)
def test_private_names_of_torch_and_triton_stand_only_in_compat(path: Path) -> None:
    found = []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("torch", "triton", "functorch"):
            parts = [*(node.module or "").split("."), *(a.name for a in node.names)]
            found += [ast.unparse(node)] if any(p.startswith("_") for p in parts) else []
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            # `torch.ops` holds operators, whose own names may start with an underscore
            if PRIVATE.fullmatch(text) and not text.startswith("torch.ops."):
                found.append(text)
    assert not found


@pytest.mark.parametrize("name", ["passes", "codegen"])
def test_the_links_at_the_top_lead_into_the_package(name: str) -> None:
    assert (ROOT / name).is_symlink()
    assert (ROOT / name).resolve() == PACKAGE / name


def test_the_package_holds_one_importable_tree() -> None:
    tops = importlib.metadata.packages_distributions()
    assert "minifuse" in tops
    assert not {"passes", "codegen"} & {t for t, names in tops.items() if "minifuse" in names}
