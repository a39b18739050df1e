"""The README's commands run; every command in the docs is one that exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from src.cli import COMMANDS, main

import click
import pytest

from .helpers import ROOT, missing, run

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# Of what takes minutes by default, fewer of the same.
QUICKER = {"adaround-optimize": ["--iters", "2", "--refine", "2"]}
MODULES = {module: name for name, module in COMMANDS.items()}


def shell_lines(page: Path) -> list[str]:
    """Lines of the page's sh blocks, continuation lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


def commands(page: Path) -> list[list[str]]:
    """Arguments of every ditq or `python -m src.…` command on the page, in blocks and in text."""
    text = page.read_text()
    candidates = shell_lines(page) + re.findall(r"`([^`\n]+)`", text)
    found = []
    for line in candidates:
        words = shlex.split(line, comments=True) if line.count('"') % 2 == 0 else []
        if "python" in words and "-m" in words:
            module = words[words.index("-m") + 1]
            if module.startswith("src."):
                found.append([MODULES[module[4:]], *words[words.index("-m") + 2 :]])
        elif words[:1] == ["ditq"] and len(words) > 1:
            found.append(words[1:])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_in_the_docs_exists_with_its_options(page):
    for name, *arguments in commands(page):
        command = main.get_command(click.Context(main), name)
        assert command is not None, f"{page.name}: ditq {name}"
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        for word in arguments:
            assert not word.startswith("--") or word.split("=")[0] in options, (
                f"{page.name}: {word}"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_and_make_target_exists(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in shell_lines(page) + re.findall(r"`(make [\w-]+)`", page.read_text()):
        if line.startswith("make "):
            assert line.split()[1] in targets, f"{page.name}: {line}"


@pytest.mark.slow
def test_the_readmes_own_commands_run(tmp_path):
    """In their order, in an empty folder; make's targets are what runs this test."""
    ran = [c for c in commands(ROOT / "README.md") if "--help" not in c]
    assert ["doctor"] in ran and any(c[0] == "generate" for c in ran)
    for name, *arguments in ran:
        quicker = QUICKER.get(name, [])
        result = run(f"src.{COMMANDS[name]}", *arguments, *quicker, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "picture.png").exists()
    assert (tmp_path / "report" / "report.html").exists()


@pytest.mark.slow
def test_the_commands_about_int8_run(tmp_path):
    """As they stand, in a folder beside the package."""
    (tmp_path / "src").symlink_to(ROOT / "src")
    ran = [c for c in commands(ROOT / "docs" / "int8.md") if len(c) > 1]
    assert {c[0] for c in ran} == {"generate", "evaluate", "convert-to-int8"}
    for name, *arguments in ran:
        result = run(f"src.{COMMANDS[name]}", *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "int8.png").exists()


@pytest.mark.skipif(not os.environ.get("VIRTUAL_ENV") and sys.prefix == sys.base_prefix, reason="")
def test_the_console_command_is_installed(tmp_path):
    ditq = Path(sys.executable).parent / "ditq"
    if not ditq.exists():
        missing("the package is not installed in this environment")
    out = subprocess.run([ditq, "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.startswith("ditq, version ")
