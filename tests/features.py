"""The table docs/features.md and the `row` marks of the tests: read both, write the one from the other.

`python -m tests.features` brings the table's last column up to date.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "features.md"

_LINE = re.compile(r"^\| (?P<row>[A-Z]+\d+) \| (?P<feature>[^|]+) \|(?P<shown_by>[^|]*)\|$")
_COMMAND = re.compile(r"`(make|python) [^`]+`")


class FeatureError(ValueError):
    """The table or a mark that cannot be read."""


def rows(text: str) -> dict[str, str]:
    """Return what the table shows each row by, which may be nothing.

    Raises:
        FeatureError: if a row is listed twice.
    """
    found: dict[str, str] = {}
    for match in filter(None, map(_LINE.match, text.splitlines())):
        if match["row"] in found:
            raise FeatureError(f"docs/features.md: row {match['row']} is listed twice")
        found[match["row"]] = match["shown_by"].strip()
    return found


def marks(files: Iterable[Path], root: Path) -> dict[str, list[str]]:
    """Return the node ids of the tests that mark each row, sorted."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in files:
        for row, test in _marks_of(path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()):
            found[row].add(test)
    return {row: sorted(tests) for row, tests in found.items()}


def fill(text: str, shown: Mapping[str, list[str]]) -> str:
    """Return the table with its last column written anew; a command stays where no test marks the row."""
    return "".join(_filled(line, shown) for line in text.splitlines(keepends=True))


def problems(text: str, shown: Mapping[str, list[str]]) -> list[str]:
    """Return what is wrong between the table and the marks, one sentence each."""
    listed, found = rows(text), []
    if missing := [row for row, cell in listed.items() if row not in shown and not _COMMAND.search(cell)]:
        found.append(f"{len(missing)} of {len(listed)} rows have no test: {', '.join(missing)}")
    for row in sorted(set(shown) - set(listed)):
        found.append(f"row {row} is not in docs/features.md, but marked by {', '.join(shown[row])}")
    if fill(text, shown) != text:
        found.append("docs/features.md is not current: run python -m tests.features")
    return found


def test_files() -> list[Path]:
    """Return all files of the repository that may hold tests."""
    return sorted((ROOT / "tests").rglob("test_*.py"))


def _marks_of(source: str, path: str) -> Iterator[tuple[str, str]]:
    """Yield (row, node id) for marks on functions, on their parameters, on classes and on the whole file."""
    tree = ast.parse(source, path)
    whole_file = [row for node in tree.body if _is_pytestmark(node) for row in _row_ids(node, path)]
    for owner, test in _tests(tree):
        own = [
            row
            for node in (*(owner.decorator_list if owner else ()), *test.decorator_list)
            for row in _row_ids(node, path)
        ]
        name = f"{path}::{owner.name}::{test.name}" if owner else f"{path}::{test.name}"
        yield from ((row, name) for row in (*whole_file, *own))


def _tests(tree: ast.Module) -> Iterator[tuple[ast.ClassDef | None, ast.FunctionDef]]:
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for member in members:
            if isinstance(member, ast.FunctionDef) and member.name.startswith("test"):
                yield (node if isinstance(node, ast.ClassDef) else None), member


def _is_pytestmark(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id == "pytestmark" for target in node.targets
    )


def _row_ids(node: ast.AST, path: str) -> Iterator[str]:
    for call in ast.walk(node):
        if not (isinstance(call, ast.Call) and ast.unparse(call.func).endswith("mark.row")):
            continue
        for argument in call.args:
            if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                raise FeatureError(f"{path}:{call.lineno}: write the row's id as text, such as row('X1')")
            yield argument.value


def _filled(line: str, shown: Mapping[str, list[str]]) -> str:
    match = _LINE.match(line.rstrip("\n"))
    if match is None:
        return line
    cell = match["shown_by"].strip()
    if tests := shown.get(match["row"]):
        cell = "<br>".join(f"`{test}`" for test in tests)
    elif not _COMMAND.search(cell):
        cell = ""
    return f"| {match['row']} | {match['feature']} | {cell} |\n".replace("|  |\n", "| |\n")


def main() -> int:
    """Write the table and return 1 while a row lacks a test."""
    text, shown = TABLE.read_text(encoding="utf-8"), marks(test_files(), ROOT)
    TABLE.write_text(fill(text, shown), encoding="utf-8")
    for problem in (left := problems(TABLE.read_text(encoding="utf-8"), shown)):
        print(problem, file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    raise SystemExit(main())
