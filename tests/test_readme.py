"""The README: every path, function, flag and command that it names exists; order and length are those intended."""
import functools
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train_gsm8k

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.M | re.S)
TREE = BLOCKS[-1]
COMMANDS = re.findall(r"^(?:python|make|torchrun) .*", "\n".join(BLOCKS[:-1]), re.M)
COMMANDS += re.findall(r"`((?:python|make) [^`]+)`", README)


@functools.cache
def help_of(program):
    command = [sys.executable, program, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_every_path_exists():
    named = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    named += re.findall(r"`([\w/.-]+\.(?:py|md|txt|toml|png|jsonl?))`", README)
    named += [line.split()[0] for line in TREE.splitlines()]
    written_by_a_run = {"metrics.jsonl", "samples.jsonl", "timing.jsonl"}
    assert len(named) >= 25
    assert not [path for path in named if not (ROOT / path).exists() and path not in written_by_a_run]


def test_every_module_is_in_the_tree():
    modules = {path.name for path in ROOT.glob("*.py")}
    assert modules == {line.split()[0] for line in TREE.splitlines() if line.split()[0].endswith(".py")}
    assert modules == {f"{name}.py" for name in re.findall(r'"(\w+)"', re.search(r"py-modules = \[(.*?)\]",
                                                           (ROOT / "pyproject.toml").read_text(), re.S)[1])}


def test_every_function_exists():
    named = re.findall(r"`(\w+)\.(\w+)`", README)
    named = [(module, name) for module, name in named if (ROOT / f"{module}.py").exists() and name != "py"]
    assert len(named) >= 10
    for module, name in named:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize("command", sorted({c.split("#")[0].strip() for c in COMMANDS}))
def test_every_command_exists_with_its_flags(command):
    program, *words = command.split()
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    if program == "torchrun":
        assert words.pop(0) == "--nproc-per-node" and words.pop(0).isdigit()
    assert (ROOT / words[0]).exists()
    flags = [word for word in words if word.startswith("--")]
    if flags:
        assert not [flag for flag in flags if f"{flag} " not in help_of(words[0])]


def test_flags_in_the_text_exist():
    shown = help_of("train_gsm8k.py")
    named = re.findall(r"`(--[\w-]+)", README)
    assert named and not [flag for flag in named if not re.search(rf"{flag}[ \n]", shown)]


def test_the_glossary_holds_the_metrics_of_a_step_and_no_other(tmp_path):
    code = train_gsm8k.main(["--preset", "tiny", "--steps", "1", "--group-size", "2", "--branches", "2",
                             "--eval-rows", "2", "--out", str(tmp_path / "run")])
    logged = {name for log in ("metrics.jsonl", "timing.jsonl")
              for name in json.loads((tmp_path / "run" / log).read_text().splitlines()[-1])}
    table = re.search(r"\| metric \|.*?(?=\n\n)", README, re.S)[0]
    named = set(re.findall(r"`([\w*]+)`", "".join(line.split("|")[1] for line in table.splitlines())))
    assert code == 0 and {re.sub("^(seconds|imbalance)_.*", r"\1_*", name) for name in logged} == named


def test_order_and_length():
    titles = re.findall(r"^## (.*)", README, re.M)
    assert titles == ["Two commands", "GSM8K on one GPU", "Several GPUs", "At equal budget",
                      "From the paper to the code to the test", "Departures",
                      "Metrics, and what a healthy run looks like", "Questions", "Speed", "Files"]
    assert README.index("assets/demo.png") < README.index("## Two commands")
    assert 900 <= len(README.split()) <= 1300
