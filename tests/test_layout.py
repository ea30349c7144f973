"""The layout: imports point one way, the root holds the paper and the two commands, every folder says what it is.

The arrows are those of the README of each folder. A file that runs as a demonstration may import anything in its block
`if __name__ == "__main__":`, because nobody who imports the file runs that block.
"""
import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAPER = ["recoverability", "pivot", "resample", "loss", "packing", "deep_grpo"]
COMMANDS = ["train_gsm8k", "eval_math"]
FOLDERS = ["grading", "tasks", "trainer", "variants", "experiments"]
BY_NAME = ["import_module", "run_module", "__import__"]
MAY_IMPORT = {
    "paper": {"paper"},
    "grading": {"grading"},
    "tasks": {"grading", "tasks"},
    "variants": {"paper", "variants"},
    "trainer": {"paper", "grading", "tasks", "variants", "trainer"},
    "commands": {"paper", "grading", "tasks", "variants", "trainer", "commands"},
    "experiments": {"paper", "grading", "tasks", "variants", "trainer", "commands", "experiments"},
    "tests": {"paper", "grading", "tasks", "variants", "trainer", "commands", "experiments", "tests",
              "tests/paper"},
    "tests/paper": {"paper", "tests/paper"},             # `make check` needs the paper's files and nothing else
}


def part_of(path: Path) -> str:
    """The part of the repository that a file, given by its path from the root, belongs to."""
    if len(path.parts) == 1:
        return "paper" if path.stem in PAPER else "commands" if path.stem in COMMANDS else path.name
    if path.parts[0] == "tests":
        return "tests/paper" if path.parts[1] in ("paper", "conftest.py") else "tests"
    return path.parts[0]


def python_files(root: Path) -> dict[Path, str]:
    """All .py files, path from the root -> text, but for those of hidden folders and virtual environments."""
    folders = [p for p in root.iterdir() if p.is_dir() and p.name[0] != "." and not (p / "pyvenv.cfg").exists()]
    files = [*root.glob("*.py"), *(p for folder in folders for p in folder.rglob("*.py"))]
    return {path.relative_to(root): path.read_text() for path in sorted(files)}


@functools.cache
def imported_names(path: Path, text: str) -> list[tuple[int, str]]:
    """(line, dotted name) of all imports of a file, wherever they stand, but for its demonstration."""
    def walk(node):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            children = node.orelse
        else:
            children = ast.iter_child_nodes(node)
        for child in children:
            yield child
            yield from walk(child)

    names = []
    for node in walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.parts[:len(path.parts) - node.level] if node.level else ()
            base = [*package, *([node.module] if node.module else [])]
            names += [(node.lineno, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in BY_NAME:
            if node.args and isinstance(node.args[0], ast.Constant):
                names.append((node.lineno, node.args[0].value))
    return names


def wrong_arrows(files: dict[Path, str]) -> list[str]:
    """'file:line imports name' for every import that points the wrong way."""
    # Where a name leads: by its first part; pytest puts tests/ and its folders on the path, too.
    leads_to = {path.stem: part_of(path) for path in files if path.parts[0] == "tests" or len(path.parts) == 1}
    leads_to |= {path.parts[0]: part_of(path) for path in files if len(path.parts) > 1 and path.parts[0] != "tests"}
    wrong = []
    for path, text in files.items():
        allowed = MAY_IMPORT.get(part_of(path), set())
        for line, name in imported_names(path, text):
            target = leads_to.get(name.split(".")[0])    # None: not of this repository
            if target is not None and target not in allowed:
                wrong.append(f"{path}:{line} imports {name}")
    return wrong


def test_imports_point_one_way():
    assert wrong_arrows(python_files(ROOT)) == []


def test_the_walk_sees_the_imports_there_are():
    """So that the test above does not pass because nothing is looked at."""
    seen = {(path.as_posix(), name) for path, text in python_files(ROOT).items()
            for _, name in imported_names(path, text)}
    assert {("deep_grpo.py", "loss.clipped_surrogate"), ("tasks/datasets.py", "grading.gsm8k_gold"),
            ("trainer/policy.py", "trainer.ranks.share"), ("train_gsm8k.py", "variants.METHODS"),
            ("tests/paper/test_loss.py", "loss.Span")} <= seen
    assert {part_of(path) for path in python_files(ROOT)} == set(MAY_IMPORT)


@pytest.mark.parametrize("file, statement, found", [
    ("loss.py", "import trainer.model", True),
    ("packing.py", "from variants import METHODS", True),
    ("pivot.py", "def f():\n    from tasks.lock import Lock", True),     # a late import is an import
    ("resample.py", "import numpy, grading.latex", True),
    ("deep_grpo.py", "import importlib\nimportlib.import_module('experiments.speed')", True),
    ("deep_grpo.py", "if __name__ == '__main__':\n    pass\nelse:\n    import trainer.ranks", True),
    ("recoverability.py", "import train_gsm8k", True),
    ("grading/gsm8k.py", "from tasks import SETS", True),
    ("grading/latex.py", "from .. import loss", True),
    ("tasks/lock.py", "from loss import k3_kl", True),
    ("variants/stapo.py", "from trainer.ranks import rank", True),
    ("variants/stapo.py", "from ..trainer import ranks", True),
    ("trainer/plot.py", "import train_gsm8k", True),
    ("trainer/policy.py", "from experiments import speed", True),
    ("train_gsm8k.py", "from experiments.demo import main", True),
    ("eval_math.py", "try:\n    import experiments\nexcept ImportError:\n    pass", True),
    ("experiments/demo.py", "from conftest import make_model", True),
    ("tests/paper/test_loss.py", "import trainer.model", True),
    ("tests/paper/test_loss.py", "from test_lock import slow_solve", True),
    ("tests/conftest.py", "import tasks", True),
    ("utils.py", "import loss", True),                                   # there is no such place
    ("helpers/tools.py", "from trainer import ranks", True),
    ("loss.py", "from datasets import load_dataset", False),             # a package, not tasks/datasets.py
    ("loss.py", "if __name__ == '__main__':\n    import trainer.model", False),
    ("loss.py", "import recoverability", False),
    ("trainer/plot.py", "from . import ranks", False),
    ("variants/stapo.py", "from .treerl import mean", False),
    ("experiments/demo.py", "import eval_math", False),
    ("tests/trainer/test_lock.py", "import experiments.demo", False)])
def test_a_forbidden_import_is_found(file, statement, found):
    files = python_files(ROOT)
    before, path = wrong_arrows(files), Path(file)
    files[path] = f"{files.get(path, '')}\n{statement}\n"
    new = [arrow for arrow in wrong_arrows(files) if arrow not in before]
    assert [arrow.split(":")[0] for arrow in new] == [file] * found


def test_the_root_holds_the_paper_and_the_two_commands():
    found = {path.name for path in ROOT.glob("*.py")}
    assert found == {f"{name}.py" for name in PAPER + COMMANDS}, "name a program of your own in COMMANDS, above"


@pytest.mark.parametrize("folder", [*FOLDERS, "results"])
def test_every_folder_says_what_it_is(folder):
    readme, package = ROOT / folder / "README.md", ROOT / folder / "__init__.py"
    said = [readme.read_text()] if readme.exists() else []
    said += [ast.get_docstring(ast.parse(package.read_text())) or ""] if package.exists() else []
    assert any(len(re.findall(r"[.:!?](?:\s|$)", text)) >= 2 for text in said), "a README.md or a package docstring"


def test_nothing_is_installed():
    """The repository is cloned, not installed. Else `pip install .` would put modules named `loss` or `plot` beside
    those of other packages."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"] == {"packages": []}            # an empty list also ends auto-discovery
    assert "scripts" not in settings["project"] and not (ROOT / "setup.cfg").exists()
