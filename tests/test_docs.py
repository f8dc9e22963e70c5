"""The documentation says what the code does: pictures of masks, commands, examples."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import yaml

from mmfuse.cli import COMMANDS
from mmfuse.data import StreamSettings
from mmfuse.fusion import FUSIONS
from mmfuse.models.connectors import build_connector
from mmfuse.models.encoders import build_encoder
from mmfuse.models.media import MEDIA
from mmfuse.sequence import TokenMap

ROOT = Path(__file__).parents[1]
LAYOUTS = {
    "README.md": [("text", 1), ("image", 2), ("text", 2), ("answer", 2)],
    "docs/fusion.md": [("text", 1), ("image", 2), ("text", 2), ("answer", 2), ("text", 1), ("answer", 1)],
}


def pictures(page: str) -> list[tuple[str, str]]:
    return re.findall(r'```text title="(\w+)"\n(.*?)\n```', (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", LAYOUTS)
def test_mask_pictures_are_what_print_shows(page: str) -> None:
    drawn = pictures(page)
    assert drawn
    for name, picture in drawn:
        _, shown = str(FUSIONS[name]().visibility(TokenMap.from_layout(LAYOUTS[page]))).split("\n", 1)
        assert picture == shown, name


def test_every_strategy_has_a_picture() -> None:
    assert {name for name, _ in pictures("docs/fusion.md")} == set(FUSIONS)


def test_commands_are_documented_in_their_own_words() -> None:
    page = (ROOT / "docs/cli.md").read_text()
    for name, command in COMMANDS.items():
        assert f"| `{name}` | {command.help} |" in page


def example() -> tuple[str, str, str, str]:
    """What the page tells to write: the file, the import, the entry of the table, the config."""
    page = (ROOT / "docs/add_a_strategy.md").read_text()
    file, imported, entry = re.findall(r"```python\n(.*?)\n```", page, flags=re.DOTALL)
    (config,) = re.findall(r"```yaml\n(.*?)\n```", page, flags=re.DOTALL)
    return file, imported, entry, config


def test_example_strategy_does_what_its_picture_says() -> None:
    source = example()[0]
    namespace: dict[str, object] = {"__name__": "image_prefix"}
    exec(compile(source, "image_prefix.py", "exec"), namespace)  # noqa: S102  # safe: our own page
    tokens = TokenMap.from_layout([("text", 1), ("image", 2), ("text", 1), ("answer", 1)])
    rows = re.findall(r"^      [SIQA] (.*)$", source, flags=re.MULTILINE)
    drawn = [[column < len(row) and row[column] == "#" for column in range(0, 2 * len(tokens), 2)] for row in rows]
    assert namespace["ImagePrefix"]().visibility(tokens).dense()[0].tolist() == drawn  # type: ignore[operator]


@pytest.mark.slow
def test_following_the_page_adds_a_strategy_that_keeps_the_contracts(tmp_path: Path) -> None:
    file, imported, entry, config = example()
    for name in ("mmfuse", "tests/contracts", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests/conftest.py", "tests/test_configs.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "mmfuse/fusion/image_prefix.py").write_text(file + "\n")
    (tmp_path / "configs/image_prefix.yaml").write_text(config + "\n")
    table = tmp_path / "mmfuse/fusion/__init__.py"
    text = table.read_text().replace('    "causal": Causal,', f'    "causal": Causal,\n{entry}')
    table.write_text(text.replace("from mmfuse.fusion.base import", f"{imported}\nfrom mmfuse.fusion.base import", 1))
    # The module path comes before an installed package.
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = ["tests/contracts", "tests/test_configs.py", "-k", "image_prefix or every_strategy_has_a_config", "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, "-p", "no:cacheprovider"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 100


def test_settings_of_streams_are_those_of_the_data_page() -> None:
    page = (ROOT / "docs/data.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)\n```", page, flags=re.DOTALL)]
    (given,) = (block["data"]["init_args"]["stream"] for block in blocks if "stream" in str(block.get("data")))
    assert StreamSettings(**given).pack_to == 2048
    table = dict(re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", page.split("| key of `stream` |")[1], flags=re.MULTILINE))
    for field in fields(StreamSettings):
        if field.default is MISSING:
            assert field.name in table
            continue
        default = {"None": "–", "False": "false"}.get(
            str(field.default), f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
        )
        assert table[field.name].strip("`") in (default, "pack_to"), field.name


def test_features_of_the_data_page_fit_their_connector() -> None:
    page = (ROOT / "docs/data.md").read_text()
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)\n```", page, flags=re.DOTALL)]
    (network,) = (block["model"]["network"] for block in blocks if "model" in block)
    for name, spec in network["encoders"].items():
        encoder = build_encoder(spec)
        connector = build_connector(network["connectors"][name], encoder.hidden_size, 32, encoder.grid)
        assert connector.num_tokens(encoder.num_tokens) == 10
    for name, medium in MEDIA.items():
        for word in (name, medium.placeholder, medium.features):
            assert f"`{word}`" in page
