"""What all tests share: plans are those of the named CPU, whatever the machine and however busy it is."""

import os

os.environ.setdefault("MINIFUSE_DEVICE_MODEL", "cpu")
