"""What the README says of commands, exit codes and settings is what the code says."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from cotune.shared import errors
from cotune.shared.cli import COMMANDS
from cotune.shared.jobfile import parse_job

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def _section(title: str) -> str:
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert match, f"the README has no section {title!r}"
    return match[1]


def test_the_table_of_commands_is_the_programs_own() -> None:
    assert re.findall(r"^\| `cotune ([a-z]+)", _section("Commands"), re.M) == list(COMMANDS)


def test_every_command_line_in_the_readme_names_a_known_command() -> None:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]
    used = [match[1] for line in lines if (match := re.match(r"cotune ([a-z]+)", line))]
    assert used
    assert set(used) <= set(COMMANDS)


def test_the_table_of_exit_codes_is_complete() -> None:
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", _section("Exit codes"), re.M)}
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.CotuneError)]
    ours = {c.exit_code for c in classes}
    assert told == ours | {0, errors.INTERNAL_EXIT_CODE, errors.INTERRUPTED_EXIT_CODE}


def test_every_job_file_in_the_readme_is_valid() -> None:
    jobs = re.findall(r"```toml\n(.*?)```", README, re.S)
    assert jobs
    for text in jobs:
        parse_job(tomllib.loads(text), origin="README.md", text=text)
