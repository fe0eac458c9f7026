"""Whether a file can be a user's Python file with ``task()``, without running it: that takes
PyTorch, which the server itself does without."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from paredown.core.errors import UserError

ANY = "*"  # of an import that brings names which are not written there


def check_task_file(file: Path) -> None:
    """Refuse a file that has no ``task``.

    Raises:
        UserError: it is not there, no Python, or nothing in it is named ``task``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = Path(folder) / "mine.py"
        ...     _ = made.write_text("def task(): ...")
        ...     check_task_file(made)
    """
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except OSError as error:
        raise UserError(f"task: {file}: cannot be read: {error.strerror or error}.") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(
            f"task: {file}: expected a Python file with task(), but it is no Python: {error}."
        ) from error
    if not {"task", ANY} & set(_names(tree)):
        raise UserError(f"task: {file}: expected a Python file with task(), which it has not.")


def _names(tree: ast.AST) -> Iterator[str]:
    """What a file gives a name, inside of conditions too, but not inside of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.alias):
            yield node.asname or node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        else:
            yield from _names(node)
