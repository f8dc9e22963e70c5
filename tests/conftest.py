"""What every test runs under: one thread, fixed seeds, no network."""

from __future__ import annotations

import os
import random
import sys

# Read when torch and huggingface_hub are first imported; the commands that tests start inherit them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
# Read when triton is first imported: its kernels run as Python, on CPU tensors. TRITON_INTERPRET=0 is for a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci")

LOOPBACK = ("localhost", "::1", "0.0.0.0", "::", "")


class NetworkForbiddenError(RuntimeError):
    """A test tried to reach another machine. No OSError: libraries retry those, and the test would pass."""


def _is_local(host: object) -> bool:
    name = host.decode() if isinstance(host, bytes) else host
    return name is None or (isinstance(name, str) and (name in LOOPBACK or name.startswith("127.")))


def _refuse_network(event: str, args: tuple[object, ...]) -> None:
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in ("socket.connect", "socket.sendto"):
        address = args[1]
        if not isinstance(address, tuple):  # a Unix socket's address is a path
            return
        host = address[0]
    else:
        return
    if not _is_local(host):
        raise NetworkForbiddenError(f"tests run offline, and this one asked for {host!r} ({event})")


# An audit hook sees every socket that Python opens, whoever imported `socket` first and under what name.
sys.addaudithook(_refuse_network)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python, NumPy and torch before each test, so that no test depends on the order of the others."""
    value = 0
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002  (libraries still draw from the legacy global generator)
    torch.manual_seed(value)
    return value
