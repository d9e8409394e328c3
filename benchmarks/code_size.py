"""Count what makes a code base easy or hard to find one's way in; prints one line a measure.

    python benchmarks/code_size.py src/hpo

Import circles count imports inside functions, too: each is a set of modules that reach one another.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

LONG, MANY = 50, 6  # lines of a function, arguments of a function


def main() -> None:
    source = Path(sys.argv[1])
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sorted(source.rglob("*.py"))}
    lines = [len(path.read_text("utf-8").splitlines()) for path in trees]
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]
    counts = [len(arguments_of(node)) for node in functions]
    circles = circles_in(source)
    print(f"files                          {len(trees)}")
    print(f"lines                          {sum(lines)}")
    print(f"lines of a file, median / most {statistics.median(lines):.0f} / {max(lines)}")
    print(f"functions                      {len(functions)}")
    print(f"functions of over {LONG} lines     {sum(length > LONG for length in lengths)} (longest {max(lengths)})")
    print(f"functions of over {MANY} arguments  {sum(count > MANY for count in counts)} (most {max(counts)})")
    print(f"import circles                 {len(circles)} {sorted(map(sorted, circles))}")


def circles_in(source: Path) -> list[set[str]]:
    """The import circles of a package."""
    files = sorted(source.rglob("*.py"))
    return circles_of({module_of(path, source): set(imports_of(ast.parse(path.read_text("utf-8")))) for path in files})


def arguments_of(node: ast.FunctionDef) -> list[str]:
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def module_of(path: Path, source: Path) -> str:
    parts = [source.name, *path.relative_to(source).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.Module) -> Iterator[str]:
    """Every module that is named by an import outside of `if TYPE_CHECKING`, and what is imported from it."""
    skipped = {id(child) for node in ast.walk(tree) if is_type_checking(node) for child in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def circles_of(imports: dict[str, set[str]]) -> list[set[str]]:
    """Sets of two or more modules that reach one another."""
    edges = {module: {target_of(name, imports) for name in names} - {module, ""} for module, names in imports.items()}
    reached = {module: reach(module, edges) for module in edges}
    groups = {frozenset(other for other in reached[module] if module in reached[other]) for module in edges}
    return [set(group) for group in groups if len(group) > 1]


def target_of(name: str, modules: dict[str, set[str]]) -> str:
    """The module that an imported name is of: itself, or what it is taken from."""
    parent = name.rpartition(".")[0]
    return name if name in modules else parent if parent in modules else ""


def reach(module: str, edges: dict[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = [module]
    while waiting:
        following = edges[waiting.pop()] - reached
        reached |= following
        waiting.extend(following)
    return reached


if __name__ == "__main__":
    main()
