"""What minifuse raises. Every error says what was found, what was expected, and where it came from."""

from __future__ import annotations

from collections.abc import Sequence


class MinifuseError(Exception):
    """Base of every error of minifuse."""


class OptionError(MinifuseError, ValueError):
    """An unknown option or mode, or a value that the option does not take."""


class RematError(MinifuseError):
    """A rematerialisation plan that would give wrong results, or a problem that has no plan; names value and rule."""


class CompileError(MinifuseError):
    """The C compiler failed: the command, what it said, and the source that it was given."""

    def __init__(self, command: Sequence[str], stderr: str, source: str) -> None:
        self.command, self.stderr, self.source = tuple(command), stderr, source
        super().__init__(f"the C compiler failed: {' '.join(command)}\n{stderr.strip()}")

    def __reduce__(self) -> tuple:
        return CompileError, (self.command, self.stderr, self.source)


class FallbackError(MinifuseError):
    """With `fallback="error"`: an operator that minifuse would hand to PyTorch, or a kernel that it would interpret;
    names it, the reason and the line."""
