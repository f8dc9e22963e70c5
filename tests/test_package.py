"""The package as it is imported, and the guards that conftest.py puts around every test."""

from __future__ import annotations

import importlib
import os
import random
import socket
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.specifiers import SpecifierSet

import mmfuse

ROOT = Path(__file__).parents[1]
LAZY_NAMES = sorted(set(mmfuse.__all__) - {"__version__"})


def test_importing_the_package_costs_no_torch() -> None:
    code = "import sys, mmfuse; dir(mmfuse); print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize("name", LAZY_NAMES)
def test_lazy_name_is_the_object_of_its_module(name: str) -> None:
    value = getattr(mmfuse, name)
    assert value.__module__.startswith("mmfuse.")
    assert value is getattr(importlib.import_module(value.__module__), name)
    assert getattr(mmfuse, name) is value


def test_dir_names_everything_public() -> None:
    assert set(mmfuse.__all__) <= set(dir(mmfuse))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'mmfuse' has no attribute 'TokenMapp'"):
        _ = mmfuse.TokenMapp
    with pytest.raises(ImportError, match="TokenMapp"):
        from mmfuse import TokenMapp  # noqa: F401


def test_package_says_that_it_is_typed() -> None:
    assert (Path(mmfuse.__file__).with_name("py.typed")).exists()


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, capture_output=True, timeout=120, check=True)
    (wheel,) = tmp_path.glob(f"mmfuse-{mmfuse.__version__}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"mmfuse-{mmfuse.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"mmfuse", info}
    package = (path for path in (ROOT / "mmfuse").rglob("*") if path.is_file() and path.suffix != ".pyc")
    assert {path.relative_to(ROOT).as_posix() for path in package} <= names
    assert {
        f"{info}/licenses/LICENSE",
        f"{info}/licenses/THIRD_PARTY.md",
        f"{info}/entry_points.txt",
    } <= names


def test_malicious_lightning_releases_are_excluded() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (versions,) = (spec.removeprefix("lightning") for spec in project["dependencies"] if "lightning" in spec)
    allowed = SpecifierSet(versions)
    assert "2.6.4" in allowed and not {"2.6.2", "2.6.3"} & set(allowed.filter(["2.6.2", "2.6.3", "2.6.4"]))


def test_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text and "limitations under the License." in text


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.org", 443)])
def test_no_test_reaches_another_machine(address: tuple[str, int]) -> None:
    with pytest.raises(RuntimeError, match=f"tests run offline.*{address[0]}"):
        socket.create_connection(address, timeout=1)


def test_loopback_is_allowed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_hub_is_offline_and_torch_has_one_thread() -> None:
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE
    assert (os.environ["OMP_NUM_THREADS"], torch.get_num_threads()) == ("1", 1)


@pytest.mark.parametrize("repeat", [0, 1])
def test_every_test_starts_from_the_same_seed(repeat: int, seed: int) -> None:
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(seed))
    assert random.random() == random.Random(seed).random()
    assert np.random.rand() == np.random.RandomState(seed).rand()  # noqa: NPY002  (the generator that is seeded)
