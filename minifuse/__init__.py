"""minifuse: a deep-learning compiler small enough to read.

`torch.compile(model, backend="minifuse")` finds the backend through its entry point.
"""

from __future__ import annotations

from .errors import MinifuseError, OptionError
from .options import Options

__version__ = "0.1.0"
__all__ = ["MinifuseError", "OptionError", "Options", "__version__"]
