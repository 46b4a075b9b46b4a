"""The README's commands parse, and every file and function that it names exists."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

import eval as evaluation
import train

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"python (?:-m )?[a-z][\w./]+[^\n`]*", TEXT)))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_parses(command):
    _, script, *argv = shlex.split(command.replace("--seed S", "--seed 1"))
    if script == "train.py":
        train.parse([*argv, "--device", "cpu"])
    elif script == "eval.py":
        evaluation.parse(argv)
    else:
        assert script == "-m" and argv[0] == "pytest" or (ROOT / script).exists()
        assert all((ROOT / word).exists() for word in argv if word.startswith("tests/"))


def test_every_linked_file_and_named_function_exists():
    assert len(COMMANDS) > 12
    for link in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert link.startswith("http") or (ROOT / link).exists(), link
    names = re.findall(r"`(ipo|judge|data|train|eval)\.(\w+)`", TEXT)
    assert len(names) > 8
    for module, name in names:
        assert hasattr(importlib.import_module(module), name) or name == "py", (module, name)
    for flag in re.findall(r"`(--[\w-]+)", TEXT):
        fields = {*train.Config.__dataclass_fields__, *evaluation.Options.__dataclass_fields__}
        assert flag[2:].replace("-", "_") in fields, flag


def test_the_readme_says_how_many_lines_the_scripts_have():
    scripts = ["ipo.py", "judge.py", "data.py", "train.py", "eval.py"]
    lines = sum(len((ROOT / script).read_text().splitlines()) for script in scripts)
    assert f"{lines:,} lines" in TEXT


@pytest.mark.parametrize("script", ["ipo.py", "judge.py", "data.py", "train.py", "eval.py"])
def test_no_function_is_long_and_no_line_is_wide(script):
    text = (ROOT / script).read_text()
    assert max(map(len, text.splitlines())) <= 100
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    assert max(node.end_lineno - node.lineno + 1 for node in functions) <= 50
