"""minifuse: a deep-learning compiler small enough to read.

`torch.compile(model, backend="minifuse")` finds the backend through its entry point. Importing the package imports no
more than Python has: what it offers is imported when it is asked for, and torch's compiler with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .capturing import Capture, capture, captures, saved_report
    from .errors import MinifuseError, OptionError
    from .explain.report import Report, reports
    from .explain.saved import SavedReport
    from .options import Options

__version__ = "0.1.0"
__all__ = ["Capture", "MinifuseError", "OptionError", "Options", "Report", "SavedReport", "__version__",
           "capture", "captures", "reports", "saved_report"]  # fmt: skip
_HOMES = {
    "Capture": "capturing", "capture": "capturing", "captures": "capturing", "saved_report": "capturing",
    "MinifuseError": "errors", "OptionError": "errors", "Options": "options", "Report": "explain.report",
    "reports": "explain.report", "SavedReport": "explain.saved",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOMES[name]}")
    globals().update({n: getattr(module, n) for n, home in _HOMES.items() if home == _HOMES[name]})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
