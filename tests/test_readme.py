"""The README and its neighbours: every path, function, flag and command that they name exists, and quotes are exact."""
import contextlib
import functools
import importlib
import inspect
import io
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import test_loss

import deep_grpo
import tasks.lock
import train_gsm8k
from tasks.lock import Lock

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("[!.]*/README.md")), *sorted(ROOT.glob("results/**/*.md"))]
WRITTEN_BY_A_RUN = {"metrics.jsonl", "samples.jsonl", "timing.jsonl", "run.png", "config.json", "note.md", "RUN_DIR"}
COMMAND = r"(?:python(?! -c)|torchrun|make) [^\n`#]+"
BLOCK = r"```bash\n(.*?)```|^    (\S.*?)$|`([^`\n]+)`"
COMMANDS = sorted({command.strip() for page in PAGES for block in re.findall(BLOCK, page.read_text(), re.S | re.M)
                   for command in re.findall(rf"^{COMMAND}", "\n".join(block), re.M)})


@functools.cache
def help_of(*program):
    """What `python PROGRAM --help` prints. The program runs in this process, where torch is imported already."""
    module, shown = program[-1].removesuffix(".py"), io.StringIO()
    imported = sys.modules.pop(module, None)             # it is the program here, and not a module
    try:
        with mock.patch.object(sys, "argv", [program[-1], "--help"]), contextlib.redirect_stdout(shown):
            runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        assert not end.code, f"{program} --help ended with {end.code}"
    finally:
        if imported:
            sys.modules[module] = imported
    return shown.getvalue()


def flags_of(*program):
    """The flags that the help lists. Those that only its introduction names do not count."""
    return {flag for line in re.findall(r"^ +(-.*)", help_of(*program), re.M)
            for flag in re.findall(r"--[\w-]+", line.split("  ")[0])}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_exists(page):
    text = page.read_text()
    linked = [path for path in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", text)]
    assert not [path for path in linked if not (page.parent / path).exists()]
    named = re.findall(r"`([\w/.-]+\.(?:py|md|txt|toml|png|svg|patch|jsonl?))`", text)
    missing = [path for path in named if not (ROOT / path).exists() and not (page.parent / path).exists()]
    missing = [path for path in missing if "NAME" not in path and not path.startswith("runs/")]      # NAME: any of many
    assert not [path for path in missing if Path(path).name not in WRITTEN_BY_A_RUN]


def test_the_readme_quotes_the_algorithm_word_for_word():
    assert f"```python\n{inspect.getsource(deep_grpo.step)}```" in README


def test_the_readme_shows_the_five_equations():
    blocks = re.findall(r"^```math\n(.*?)^```", README, re.M | re.S)
    assert len(blocks) >= 5
    for name in "QPALJ":
        assert f"**({name})**" in README
    assert not [block for block in blocks if block.count("{") != block.count("}")]


def test_the_reward_of_the_readme_grades_the_last_word():
    block, = [block for block in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S) if "Policy.reward" in block]
    found = {}
    exec("from trainer.policy import Policy\n" + re.search(r"def reward.*?\n\n", block, re.S)[0], found)
    policy = SimpleNamespace(stop=[1], text=lambda ids: {2: "it is 14", 3: "it is 4", 4: ""}[ids[0]])
    question = SimpleNamespace(gold="4")
    assert [found["reward"](policy, question, [ids, 1]) for ids in (2, 3, 4)] == [0.0, 1.0, 0.0]
    assert found["reward"](policy, question, [3]) == 0.0                 # it is not finished


def test_every_function_exists():
    named = re.findall(r"`(\w+)\.(\w+)`", README)
    named = [(module, name) for module, name in named if (ROOT / f"{module}.py").exists() and name != "py"]
    assert len(named) >= 10
    for module, name in named:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_there_are_commands():
    assert len(COMMANDS) >= 15


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.replace("/", "_")[:80])
def test_every_command_exists_with_its_flags(command):
    program, *words = command.split()
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    if program == "torchrun":
        while words[0].startswith("--"):                 # its own flags, each with a number
            assert words.pop(0) in ("--nproc-per-node", "--shutdown-timeout") and words.pop(0).isdigit()
    if words[0] == "-m":
        module = words.pop(0) and words[0]
        if module == "venv":
            return
        assert (ROOT / (module.replace(".", "/") + ".py")).exists()
        program = ["-m", module]
    else:
        assert (ROOT / words[0]).exists()
        program = [words[0]]
    flags = [word for word in words if word.startswith("--")]
    if flags:
        assert not set(flags) - flags_of(*program)
    if "--method" in flags:
        assert words[words.index("--method") + 1] in train_gsm8k.METHODS


def test_a_command_can_be_typed():
    """One program is a process of its own. help_of() runs all others in this one."""
    typed = subprocess.run([sys.executable, "train_gsm8k.py", "--help"], cwd=ROOT, capture_output=True, text=True,
                           check=True)
    shown = help_of("train_gsm8k.py")
    assert typed.stdout.split() == shown.split() and "--group-size" in shown


def test_flags_in_the_text_exist():
    named = set(re.findall(r"`(--[\w-]+)", README)) - {"--index-url"}
    assert named and not named - flags_of("train_gsm8k.py")


def test_every_test_that_is_named_exists():
    named = {name for page in PAGES for name in re.findall(r"`(test_\w+)`", page.read_text())}
    defined = {name for path in ROOT.glob("tests/**/*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert named and not named - defined


def test_the_glossary_holds_the_metrics_of_a_step_and_no_other(tmp_path, monkeypatch):
    make_rows = tasks.lock.make_rows
    monkeypatch.setattr(tasks.lock, "make_rows", lambda lock, n, seed: make_rows(Lock((3, 3)), min(n, 16), seed))
    monkeypatch.setattr(train_gsm8k, "plot_run", lambda run_dir: None)
    logged = set()
    for run, more in (("a", ["--branches", "2", "--select", "goldilocks", "--stapo"]), ("b", ["--method", "vcpo"])):
        assert train_gsm8k.main(["--preset", "tiny", "--steps", "1", "--group-size", "2", "--eval-rows", "2", *more,
                                 "--out", str(tmp_path / run)]) == 0
        logged |= {name for log in ("metrics.jsonl", "timing.jsonl")
                   for name in json.loads((tmp_path / run / log).read_text().splitlines()[-1])}
    table = re.search(r"\| metric \|.*", (ROOT / "trainer" / "README.md").read_text(), re.S)[0]
    named = set(re.findall(r"`([\w*]+)`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line)))
    assert {re.sub("^(seconds|imbalance)_.*", r"\1_*", name) for name in logged} == named


def test_the_planted_bug_applies_and_is_one_that_a_test_catches(tmp_path, monkeypatch):
    """Exercise 4: the patch must keep up with the code, and the test named there must fail with it."""
    name = "test_groups_and_siblings_are_never_mixed"
    assert name in (ROOT / "exercises" / "README.md").read_text()
    (tmp_path / "loss.py").write_text((ROOT / "loss.py").read_text())

    def run_the_test():
        copy = runpy.run_path(str(tmp_path / "loss.py"))
        monkeypatch.setattr(test_loss, "sequence_weights", copy["sequence_weights"])
        getattr(test_loss, name)()

    run_the_test()
    subprocess.run(["git", "apply", str(ROOT / "exercises" / "planted_bug.patch")], cwd=tmp_path, check=True)
    with pytest.raises(AssertionError):
        run_the_test()
