"""What all tests share: plans are those of the named CPU, whatever the machine and however busy it is, and each test
compiles what it asks for, whatever an earlier run kept."""

import os
from importlib.metadata import entry_points

os.environ.setdefault("MINIFUSE_DEVICE_MODEL", "cpu")
os.environ.setdefault("MINIFUSE_PLAN_CACHE", "0")

import torch

if not entry_points(group="torch_dynamo_backends", name="minifuse"):  # a checkout that is not installed
    from minifuse.backend import minifuse_backend

    torch._dynamo.register_backend(minifuse_backend, name="minifuse")
