"""README.md names only commands, files and keys that exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"^(?:\| `| {4})((?:make|python) [^`#\n]+)", README, re.M)))
TREE = re.findall(r"^    ([\w./-]+) {2,}\S", README.split("## What is where")[1].split("##")[0], re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_exists(command: str) -> None:
    program, *words = command.split()
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    elif words[0] == "-m":
        found = importlib.util.find_spec(words[1])
        assert found
        assert not found.submodule_search_locations or importlib.util.find_spec(f"{words[1]}.__main__")
    else:
        assert (ROOT / words[0]).is_file()


@pytest.mark.parametrize("path", TREE)
def test_each_file_and_folder_exists(path: str) -> None:
    assert (ROOT / path).exists()
    assert (ROOT / path).is_dir() == path.endswith("/")


@pytest.mark.parametrize("link", re.findall(r"\]\(([^):]+)\)", README))
def test_each_link_leads_somewhere(link: str) -> None:
    assert (ROOT / link).is_file()


def test_no_command_or_file_was_overlooked() -> None:
    assert len(COMMANDS) >= 14
    assert len(TREE) >= 13


def test_the_sample_question_is_accepted(tmp_path: Path) -> None:
    from search import spec_file

    question = tmp_path / "sample.yaml"
    question.write_text(README.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    assert spec_file.load(str(question)).search.trials == 16


def test_a_run_folder_is_as_drawn() -> None:
    from search.record import StudyPaths

    drawn = README.split("    runs/<study>/\n")[1].split("\n\n")[0]
    paths = StudyPaths(Path("runs/study"))
    for path in (paths.leaderboard, paths.report, paths.promotion, paths.table, paths.spec, paths.journal):
        assert f"      {path.name} " in drawn
    for path in (paths.model("7"), paths.evaluation("7"), paths.trial(7)):
        assert f"      {path.parent.name}/" in drawn
