"""The blocks of code in docs/running.md."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "running.md"


def blocks(needs: str) -> list[str]:
    """The blocks that say after `python` what they need; those that need nothing are run with the other pages."""
    return re.findall(rf"^```python {needs}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
