"""What all tests share: plans are those of the named CPU, whatever the machine and however busy it is, and each test
compiles what it asks for, whatever an earlier run kept."""

import os

os.environ.setdefault("MINIFUSE_DEVICE_MODEL", "cpu")
os.environ.setdefault("MINIFUSE_PLAN_CACHE", "0")
