"""The flags: where their values come from, what a resumed run takes over, and what --help says."""
import json
from argparse import SUPPRESS
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eval_math
import train_gsm8k
from deep_grpo import Config
from trainer.session import keep_changes, write_config
from trainer.settings import PRESETS, OneLineParser, parse_args
from variants import METHODS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("gpu, preset, why", [(False, "tiny", "no GPU is here"), (True, "gsm8k", "a GPU is here")])
def test_without_flags_the_machine_decides_and_the_first_line_says_so(gpu, preset, why, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    args = parse_args([])
    first = capsys.readouterr().out.splitlines()[0]
    assert args.preset == preset and first.startswith(f"preset {preset}: {why}")
    assert args.method == "deep_grpo" and args.out == Path("runs") / f"{preset}-deep_grpo-0"


@pytest.mark.parametrize("preset, own", [("gsm8k", dict(objective="authors", answer="last")),
                                         ("gsm8k-paper", dict(objective="paper", answer="hash"))])
def test_the_gsm8k_preset_is_the_authors_script(preset, own):
    args = parse_args(["--preset", preset])
    expected = dict(questions=64, group_size=8, branches=8, gamma=2.0, lam=1.0, lr=1e-6, beta=1e-4, clip_low=0.2,
                    clip_high=0.2, temperature=1.0, max_prompt_tokens=512, max_new_tokens=768, eval_every=25, updates=1,
                    max_grad_norm=1.0, model="Qwen/Qwen2.5-0.5B-Instruct", data="gsm8k_train", eval_data="gsm8k",
                    eval_rows=1319, val_rows=256, steps=2000, **own)
    assert {name: getattr(args, name) for name in expected} == expected


def test_a_flag_wins_over_the_method_this_over_the_preset_and_this_over_config(monkeypatch):
    preset = dict(PRESETS["tiny"], clip_low=0.3, clip_high=0.4, beta=0.5, gamma=0.6)
    monkeypatch.setitem(PRESETS, "tiny", preset)
    method = METHODS["rrpo"].settings
    assert "clip_low" in method and "clip_high" in method and "beta" not in method
    args = parse_args(["--preset", "tiny", "--method", "rrpo", "--clip-low", "0.1", "--beta", "0.2"])
    assert (args.clip_low, args.clip_high) == (0.1, method["clip_high"])         # flag, method
    assert (args.beta, args.gamma, args.lam) == (0.2, 0.6, Config.lam)           # flag, preset, Config


@pytest.mark.parametrize("flags, expected", [
    ("--data my.jsonl", (None, 0, 256)), ("--data my.jsonl --eval-data mine.jsonl", ("mine.jsonl", 256, 1319)),
    ("--data gsm8k_train", ("gsm8k", 256, 1319)), ("--data my.jsonl --eval-rows 50", (None, 0, 50))])
def test_data_of_your_own_is_not_evaluated_on_gsm8k(flags, expected):
    args = parse_args(["--preset", "gsm8k", *flags.split()])
    assert (args.eval_data, args.val_rows, args.eval_rows) == expected


@pytest.mark.parametrize("flags, answer, objective", [
    ("", "last", "authors"), ("--answer boxed", "boxed", "authors"), ("--data my.jsonl", None, "authors"),
    ("--data my.jsonl --answer hash", "hash", "authors"), ("--method treerl", "last", "paper"),
    ("--method grpo", "last", "authors"), ("--objective paper", "last", "paper")])
def test_what_of_the_gsm8k_preset_goes_with_what(flags, answer, objective, capsys):
    """Other rows are asked in their own way, which is said, and another method has an objective of its own."""
    args = parse_args(["--preset", "gsm8k", *flags.split()])
    assert (args.answer, args.objective) == (answer, objective)
    said = capsys.readouterr().out
    assert ("--answer follows the rows of my.jsonl" in said) == (answer is None)
    assert ("the objective is that of --method treerl" in said) == (flags == "--method treerl")


@pytest.mark.parametrize("flags, said", [
    ("", None), ("--clip-high .3", "--clip-high"), ("--maspo", "--maspo"), ("--maspo --updates 2", None),
    ("--clip-low .1 --lag 1 --steps 3", None)])
def test_what_acts_on_the_ratio_has_no_part_where_it_is_1(flags, said, capsys):
    parse_args(["--preset", "tiny", *flags.split()])
    out = capsys.readouterr().out
    assert f"{said} changes nothing with one update" in out if said else "changes nothing" not in out


# ---- a resumed run ----

@pytest.fixture
def saved(tmp_path):
    """saved(changes) -> the folder of a run whose config.json has these settings, and lacks those that are None."""
    def saved(**changes):
        args = parse_args(["--preset", "tiny", "--steps", "3", "--gamma", "3", "--out", str(tmp_path)])
        write_config(SimpleNamespace(args=args, policy=SimpleNamespace(model=torch.nn.Linear(1, 1)), questions=[],
                                     eval_questions=[], val_questions=[], skipped=0, date=None, start={}))
        about = json.loads((tmp_path / "config.json").read_text())
        about["settings"] |= {"out": "elsewhere", **changes}
        for name in [name for name, value in changes.items() if value is None]:
            del about["settings"][name]
        (tmp_path / "config.json").write_text(json.dumps(about))
        return tmp_path

    return saved


def test_a_resumed_run_takes_over_its_settings_and_may_be_prolonged(saved):
    args = parse_args(["--resume", str(saved()), "--steps", "9", "--max-hours", "2"])
    assert (args.gamma, args.steps, args.max_hours, args.preset) == (3.0, 9, 2.0, "tiny")
    assert args.out == args.resume                   # its folder may have been moved
    assert parse_args(["--resume", str(args.out)]).steps == 3


def test_a_run_that_goes_on_may_get_other_sizes_in_memory_and_keeps_them(saved):
    """As after it ran out of memory. What it is given is written, so that it goes on with it the next time, too."""
    folder = saved(offload_optimizer=True)
    flags = ["--micro-batch-tokens", "77", "--gradient-checkpointing", "--compile", "--steps", "9"]
    args = parse_args(["--resume", str(folder), *flags])
    before = json.loads((folder / "config.json").read_text())
    keep_changes(args)
    after = json.loads((folder / "config.json").read_text())
    assert after["settings"] == before["settings"] | {
        "micro_batch_tokens": 77, "gradient_checkpointing": True, "compile": True, "steps": 9}
    assert {k: v for k, v in after.items() if k != "settings"} == {k: v for k, v in before.items() if k != "settings"}
    again = parse_args(["--resume", str(folder), "--no-compile"])
    assert (again.micro_batch_tokens, again.gradient_checkpointing, again.compile, again.steps) == (77, True, False, 9)
    assert again.offload_optimizer                       # started by torchrun, it may go on alone


def test_to_offload_needs_torchrun_also_in_a_run_that_goes_on(saved, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_args(["--resume", str(saved()), "--offload-optimizer"])
    assert "start with torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "null", '{"settings": null}', '{"settings": {"gamma": 2}}', "{"])
def test_a_damaged_configuration_is_one_line(text, saved, capsys):
    folder = saved()
    (folder / "config.json").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        parse_args(["--resume", str(folder)])
    assert f"argument --resume: {folder} does not hold a run" in capsys.readouterr().err


@pytest.mark.parametrize("changes, flags", [({"lam": None, "std": True}, "lam, std"), ({"stapo": None}, "stapo")])
def test_a_run_of_a_version_with_other_flags_is_refused(changes, flags, saved, capsys):
    """What a flag that one of the two lacks would have meant cannot be known."""
    folder = saved(**changes)
    commit = json.loads((folder / "config.json").read_text())["git_revision"]
    with pytest.raises(SystemExit, match="2"):
        parse_args(["--resume", str(folder)])
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith("error: argument --resume: ") and f"whose flags differ in {flags}: " in error
    assert f"the code of the commit {commit}" in error


# ---- --help ----

def parser_of(program, monkeypatch):
    """The parser of a command, caught when it begins to parse."""
    caught = []

    def catch(self, *args, **kwargs):
        caught.append(self)
        self.exit()

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(OneLineParser, "parse_args", catch)
        program.parse_args([])
    return caught[0]


@pytest.mark.parametrize("program", [train_gsm8k, eval_math])
def test_help_says_of_every_flag_what_it_does_and_its_default(program, monkeypatch):
    parser = parser_of(program, monkeypatch)
    flags = [action for action in parser._actions if action.dest != "help"]
    assert len(flags) >= 10 and not any(action.help in (None, "", SUPPRESS) for action in flags)
    silent = [action.option_strings[0] for action in flags if "default: " not in action.help and not action.required]
    assert silent == []
    for action in flags:                             # a default that stands in the parser is the one that is told
        if type(action.default) in (int, float, str):
            told = action.help.rpartition("default: ")[2].split(",")[0]
            assert told == (action.default if isinstance(action.default, str) else f"{action.default:.15g}")


def test_help_tells_the_defaults_of_config(monkeypatch):
    """Of a field of Config that no preset sets, the number in the help is that of the field."""
    helps = {action.dest: action.help for action in parser_of(train_gsm8k, monkeypatch)._actions}
    by_preset = set().union(*PRESETS.values())
    checked = [f for f in fields(Config) if f.name not in by_preset and f.name not in ("group_size", "branches")]
    assert len(checked) >= 8
    for f in checked:
        told = helps[f.name].rpartition("default: ")[2]
        assert told.split(",")[0] == (f.default if isinstance(f.default, str) else f"{f.default:g}"), f.name


def test_help_tells_the_caps_of_training(monkeypatch):
    """The evaluation once named a cap of 512 tokens, with which no preset trains."""
    told = {action.dest: action.help for action in parser_of(eval_math, monkeypatch)._actions}["max_new_tokens"]
    for name, n in (("tiny", 96), ("tiny-deep", 160), ("gsm8k", 768), ("math-1.5b", 3072), ("math-7b", 3072)):
        assert f"{n} for {name}" in told and PRESETS[name]["max_new_tokens"] == n


@pytest.mark.parametrize("program, flags", [
    (train_gsm8k, ("preset", "method", "model", "data", "steps", "out", "seed", "resume", "save-every", "eval-every",
                   "budget-tokens", "gamma", "lam", "beta", "objective", "micro-batch-tokens")),
    (eval_math, ("model", "sets", "data-dir", "out", "samples", "temperature"))])
def test_help_shows_the_description_and_every_flag(program, flags, capsys):
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    shown = capsys.readouterr().out
    assert program.__doc__.strip().splitlines()[0] in shown
    for flag in flags:
        assert f"--{flag} " in shown


def test_the_presets_of_math_and_of_the_embedded_task():
    args = parse_args(["--preset", "math-7b"])
    expected = dict(questions=64, group_size=8, branches=8, gamma=2.0, lam=1.0, lr=1e-6, beta=1e-4,
                    objective="authors", max_prompt_tokens=1024, max_new_tokens=3072, data="math_train",
                    eval_data="math500", eval_rows=500, val_rows=256, steps=1000, model="Qwen/Qwen2.5-Math-7B")
    assert {name: getattr(args, name) for name in expected} == expected
    assert (PRESETS["tiny"]["lr"], PRESETS["tiny-deep"]["lr"]) == (1e-4, 4e-5)
