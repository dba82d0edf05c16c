"""minifuse: a deep-learning compiler small enough to read.

`torch.compile(model, backend="minifuse")` finds the backend through its entry point.
"""

from __future__ import annotations

from .capture import Capture, capture
from .errors import MinifuseError, OptionError
from .explain.report import Report, reports
from .options import Options

__version__ = "0.1.0"
__all__ = ["Capture", "MinifuseError", "OptionError", "Options", "Report", "__version__", "capture", "reports"]
