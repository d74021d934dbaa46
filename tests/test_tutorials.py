"""What the pages tell a reader to type works: programs are run, every `lwd` line is a command that exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from flows.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    """The page's code blocks of one language, in order, without their indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text(), re.S | re.M)
    return [re.sub(rf"^{indent}", "", text, flags=re.M) for indent, text in found]


def commands(page: Path) -> list[list[str]]:
    """The words of each `lwd` command in the page's shell blocks."""
    found = []
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r";|&&|\|", line.partition(" #")[0]):
                if found_here := re.match(r"\s*(?:[A-Z_]+=\S+ +)*lwd\b(.*)", part):
                    found.append(shlex.split(re.sub(r"<[^>]*>", "X", found_here[1])))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_command_of_a_page_exists_with_its_options(page: Path) -> None:
    for words in commands(page):
        command, context = typer.main.get_command(app), None
        rest = list(words)
        while hasattr(command, "resolve_command"):
            context = command.make_context("lwd", rest, parent=context)
            rest = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else context.args
            if not rest:
                break
            _, command, rest = command.resolve_command(context, rest)
        if "--help" not in rest:
            command.make_context(str(command.name), list(rest), parent=context)


class Page:
    """A page's blocks, run in a folder of their own as the page says."""

    def __init__(self, name: str, folder: Path) -> None:
        self.page = ROOT / "docs" / "tutorials" / name
        self.folder = folder
        clean = {name: value for name, value in os.environ.items() if not name.startswith("LWD_")}
        self.env = clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def program(self, number: int, name: str = "program.py") -> str:
        """Run a Python block; its answers."""
        (self.folder / name).write_text(blocks(self.page, "python")[number])
        done = subprocess.run(
            [sys.executable, name],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def test_your_robot_records_sends_and_is_read_back(tmp_path: Path) -> None:
    page = Page("your-robot.md", tmp_path)
    text = page.page.read_text()
    contracts = tmp_path / "my-robot"
    contracts.mkdir()
    for path in (ROOT / "data_contracts" / "contracts").glob("*.yaml"):
        (contracts / path.name).write_text(path.read_text())
    (task,) = blocks(page.page, "yaml")
    episode = contracts / "episode.odcs.yaml"
    listed = re.compile(r"(property: tasks[^\n]*\n +value:\n)(?: +- \{key: .*\n)+")
    episode.write_text(listed.sub(rf"\g<1>{task.rstrip()}\n", episode.read_text(), count=1))
    transition = contracts / "transition.odcs.yaml"
    for name, size in re.findall(r"set `(\w+_dim)` to `(\d+)`", text):
        said = re.compile(rf"(property: {name}\b[^\n]*\n\s+value: )\d+")
        transition.write_text(said.sub(rf"\g<1>{size}", transition.read_text()))
    shield = re.compile(r"  - property: shield\n    value:\n(?:      .*\n)+")
    transition.write_text(shield.sub("", transition.read_text()))
    page.env["LWD_CONTRACTS"] = str(contracts)

    command = [sys.executable, "-m", "infra.coordinator", "--home", "runs/mine", "--check",
               "data_contracts.checks:default_check"]  # fmt: skip
    coordinator = subprocess.Popen(command, cwd=tmp_path, env=page.env)
    try:
        said = page.program(0, "my_robot.py")
    finally:
        coordinator.terminate()
        coordinator.wait(30)
    assert said.count("success after") == 5 and "0 episodes still wait" in said
    assert page.program(1).count("success (") == 5
    page.program(2)
