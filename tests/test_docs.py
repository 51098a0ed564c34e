"""Every shell block of these pages is run as it stands, in order, in a folder that has what a checkout has."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ultravox.files import ultravox_home

ROOT = Path(__file__).parent.parent
PAGES = "\n".join((ROOT / "docs" / name).read_text() for name in ("data.md", "diagnose.md"))


def blocks() -> list[tuple[str, str]]:
    """Heading and content of each shell block."""
    found, heading = [], ""
    for match in re.finditer(
        r"^#+ (?P<heading>[^\n]*)$|^```bash\n(?P<block>.*?)^```", PAGES, flags=re.MULTILINE | re.DOTALL
    ):
        heading = match["heading"] or heading
        if match["block"]:
            found.append((heading, match["block"]))
    return found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A folder with configs, examples and .venv, and a cache of its own whose models and data are the shared ones."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("ultravox", "python"):
        os.symlink(Path(sys.executable).with_name(name), folder / ".venv" / "bin" / name)
    for name in ("configs", "examples", "benchmarks"):
        os.symlink(ROOT / name, folder / name)
    (folder / "home").mkdir()
    for name in ("models", "data", "wheels"):
        os.symlink(ultravox_home() / name, folder / "home" / name)
    return folder


def test_each_action_has_an_example():
    from ultravox.cli.main import ACTIONS

    shown = {match for _, block in blocks() for match in re.findall(r"ultravox data (\w+)", block)}
    assert shown >= set(ACTIONS["data"]) - {"list", "fetch"}, "these stand in the README"


@pytest.mark.parametrize(("heading", "block"), blocks(), ids=[f"{i}-{h}" for i, (h, _) in enumerate(blocks())])
def test_block(heading: str, block: str, checkout: Path):
    environment = {**os.environ, "ULTRAVOX_HOME": str(checkout / "home"), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{heading}\n{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
