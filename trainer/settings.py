r"""The settings of a training run: a flag each, presets that fill flags in, and what a resumed run takes over.

A flag that is given wins over the method's settings, these over the preset, that over the default of deep_grpo.Config.
"""
import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

import torch

import tasks.lock
from deep_grpo import Config
from tasks import SETS, TEMPLATES
from trainer.ranks import distributed
from variants import METHODS

EMBEDDED = dict(questions=2, lr=1e-4, steps=40, eval_every=5, eval_rows=128, max_prompt_tokens=64,
                micro_batch_tokens=1024)
# The authors' scripts: 64 questions, G = K = 8, gamma 2, lambda 1, lr 1e-6, beta 1e-4; prompts of at most 512 (MATH:
# 1024) tokens, and with the response 1024 (4096). Here a response has what the longest prompt would leave, 256 of GSM8K
# (MATH: 1024). Ours, too: 256 rows to choose the best checkpoint on; theirs is --select-on-test.
AUTHORS = dict(questions=64, lr=1e-6, eval_every=5, val_rows=256, micro_batch_tokens=16384, save_every=50)
MATH = dict(AUTHORS, steps=1000, max_prompt_tokens=1024, max_new_tokens=3072, data="math_train",
            eval_data="math500", eval_rows=500, gradient_checkpointing=True)
PRESETS = {
    "tiny": dict(EMBEDDED, model=str(tasks.lock.ASSETS / "tiny"), data="tiny", max_new_tokens=96),
    "tiny-deep": dict(EMBEDDED, model=str(tasks.lock.ASSETS / "tiny-deep"), data="tiny-deep", max_new_tokens=160,
                      questions=1, lr=4e-5),
    "gsm8k": dict(AUTHORS, steps=1000, max_prompt_tokens=512, max_new_tokens=768, data="gsm8k_train",
                  eval_data="gsm8k", eval_rows=1319, model="Qwen/Qwen2.5-0.5B-Instruct"),
    "math-1.5b": dict(MATH, model="Qwen/Qwen2.5-Math-1.5B"),
    "math-7b": dict(MATH, model="Qwen/Qwen2.5-Math-7B"),
}


OF_METHODS = {                                       # flags that not every method reads
    ("gamma", "lam", "pivots", "uniform_pivot", "branch_all", "train_prefix", "one_stream"): ("deep_grpo",),
    ("objective",): ("deep_grpo", "grpo"),
    ("std",): ("deep_grpo", "grpo", "rrpo", "srpo"),
    ("segment_tokens",): ("deep_grpo", "attnrl", "rrpo", "srpo"),
}


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage text in front of an error: one line, exit code 2."""

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists all flags)\n")


def count(text) -> int:
    """The type of a flag that is at least 1."""
    try:
        value = int(text)
    except ValueError:                               # in argparse's words: it would name this function, not int
        raise argparse.ArgumentTypeError(f"invalid int value: {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def command_line(program, argv) -> str:
    """What was typed, for a report; argv: that of the program's main()."""
    return " ".join(["python", program, *(sys.argv[1:] if argv is None else argv)])


def parse_args(argv=None, description=None):
    """The settings of a run: flags, filled up by the preset, filled up by the defaults of Config."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=description, formatter_class=raw, allow_abbrev=False)
    run = parser.add_argument_group("run")
    run.add_argument("--preset", choices=PRESETS, help="fills in the flags; default: gsm8k with a GPU, tiny without")
    run.add_argument("--method", choices=METHODS, help="deep_grpo; grpo: K = 0; others: baselines.py")
    run.add_argument("--out", type=Path, help="run directory, a new one; default: runs/PRESET-METHOD-SEED")
    run.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on from the last checkpoint of a run")
    run.add_argument("--seed", type=int, help="0")
    run.add_argument("--steps", type=count, help="batches of questions to train on")
    run.add_argument("--budget-tokens", type=count, help="end after the step that reaches this many generated ones")
    run.add_argument("--step-tokens", type=count, help="as many batches of --questions per step as generate this many")
    run.add_argument("--eval-every", type=int, help="greedy evaluation every N steps, before and after; 0: never")
    run.add_argument("--save-every", type=int, help="checkpoint every N steps; also the best so far, and the last")
    run.add_argument("--max-hours", type=float, help="save and end in time; --resume goes on")
    run.add_argument("--dry-run", action="store_true", help="print the GPU memory that this takes (memory.py), and end")
    run.add_argument("--gpus", type=count, help="for --dry-run; 1")
    data = parser.add_argument_group("model and data")
    data.add_argument("--model", help="hub name or local folder")
    sets = ", ".join([*tasks.lock.PRESETS, *SETS])
    data.add_argument("--data", help=f"training questions: local .jsonl, hub name, or one of {sets}")
    data.add_argument("--eval-data", help="the same, to evaluate on; default: the last --eval-rows rows of --data")
    data.add_argument("--eval-rows", type=count, help="questions to evaluate on")
    data.add_argument("--val-rows", type=int, help="with --eval-data: last rows of --data, to choose a checkpoint on")
    data.add_argument("--select-on-test", action="store_true", help="choose it on --eval-data, as the authors do")
    data.add_argument("--template", choices=TEMPLATES, help="chat: the model's own, the default")
    data.add_argument("--max-prompt-tokens", type=count, help="longer questions are named and skipped")
    add_method_flags(parser)
    optim = parser.add_argument_group("optimizer (AdamW, betas .9/.999, weight decay .01) and memory")
    optim.add_argument("--lr", type=float, help="learning rate, constant")
    optim.add_argument("--max-grad-norm", type=float)
    optim.add_argument("--micro-batch-tokens", type=count, help="padded, per forward pass of the update")
    optim.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
                       help="compute activations twice instead of keeping them")
    optim.add_argument("--offload-optimizer", action="store_true",
                       help="torchrun only: weights, gradients and moments in host memory")
    args = parser.parse_args(argv)
    if args.resume is not None:
        restore_settings(parser, args)
    else:
        fill_settings(parser, args)
    for name in ("lr", "max_hours"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < float("inf"):
            parser.error(f"argument --{name.replace('_', '-')}: must be positive, got {getattr(args, name)}")
    return args


def add_method_flags(parser):
    """The fields of Config as flags."""
    method = parser.add_argument_group("method (the paper's letters; deep_grpo.Config)")
    method.add_argument("--questions", type=count, help="questions x per step")
    method.add_argument("--group-size", type=int, help="G, rollouts per question")
    method.add_argument("--branches", type=int, help="K, continuations per pivot")
    method.add_argument("--gamma", type=float, help="exponent of depth in Eq. (Q)")
    method.add_argument("--lam", type=float, help="lambda, weight of the branch stream")
    method.add_argument("--beta", type=float, help="weight of the KL term; 0 needs no reference model")
    method.add_argument("--clip-low", type=float, help="eps_low")
    method.add_argument("--clip-high", type=float, help="eps_high")
    method.add_argument("--temperature", type=float, help="T, of rollouts and branches")
    method.add_argument("--objective", choices=["paper", "authors"], help="Eq. (J), or as in the authors' code")
    method.add_argument("--segment-tokens", type=int, help="states every N tokens instead of by sentence (0)")
    method.add_argument("--max-new-tokens", type=int, help="cap of a response; unfinished: reward 0")
    method.add_argument("--updates", type=int, help="optimizer steps per batch")
    method.add_argument("--stapo", action="store_true", default=None, help="silence spurious tokens; any method")
    method.add_argument("--maspo", action="store_true", default=None, help="soft trust region, no clip; any method")
    ablation = parser.add_argument_group("ablations (of deep_grpo)")
    ablation.add_argument("--no-std", dest="std", action="store_false", default=None, help="A = R - mean; grpo, too")
    ablation.add_argument("--pivots", type=int, help="different pivots per failed rollout, K branches each; 1")
    for flag, text in {"--uniform-pivot": "any state alike, instead of Q(t)", "--branch-all": "right rollouts, too",
                       "--train-prefix": "the prefix of a branch is not masked",
                       "--one-stream": "rollouts and branches are one group, one mean"}.items():
        ablation.add_argument(flag, action="store_true", default=None, help=text)


def fill_settings(parser, args):
    """Preset and defaults into the flags that were not given; checks what no other module checks."""
    gpu = torch.cuda.is_available()
    why = "asked for"
    if args.preset is None:
        args.preset = "gsm8k" if gpu else "tiny"
        why = ("a GPU is here; --preset tiny is the embedded task" if gpu
               else "no GPU is here; --preset gsm8k is the full run")
    print(f"preset {args.preset}: {why}")
    if args.gpus is not None and not args.dry_run:
        parser.error("argument --gpus: is for --dry-run; a run has as many as torchrun --nproc-per-node N starts")
    if args.offload_optimizer and not distributed() and not args.dry_run:
        parser.error("argument --offload-optimizer: FSDP does it, so start with torchrun --nproc-per-node N")
    args.method = args.method or "deep_grpo"
    settings = METHODS[args.method].settings
    if settings.get("branches") == 0 and args.branches not in (None, 0):
        parser.error(f"argument --branches: --method {args.method} is K = 0, got {args.branches}")
    if settings.get("branches") != 0 and args.branches == 0:
        parser.error("argument --branches: K = 0 is GRPO, ask for it with --method grpo")
    for names, methods in OF_METHODS.items():
        for name in names:
            if getattr(args, name) is not None and args.method not in methods:
                flag = "no-std" if name == "std" else name.replace("_", "-")
                parser.error(f"argument --{flag}: has no part in --method {args.method}, only in {', '.join(methods)}")
    preset = PRESETS[args.preset]
    if args.eval_data is None and args.data not in (None, preset["data"]):       # others than it has a test set for
        preset = preset | dict(eval_data=None, val_rows=0, eval_rows=preset.get("val_rows", preset["eval_rows"]))
    defaults = {f.name: f.default for f in fields(Config)}
    defaults |= dict(seed=0, template="chat", budget_tokens=None, step_tokens=None, save_every=0, eval_data=None,
                     val_rows=0, gradient_checkpointing=False)
    for name, value in (defaults | preset | settings).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or Path("runs") / f"{args.preset}-{args.method}-{args.seed}"
    if args.val_rows and args.eval_data is None:
        parser.error("argument --val-rows: only with --eval-data; without, --eval-rows rows are held out, and choose")
    for name in ("eval_every", "save_every", "val_rows", "seed"):
        if getattr(args, name) < 0:
            parser.error(f"argument --{name.replace('_', '-')}: must be 0 or more, got {getattr(args, name)}")


def restore_settings(parser, args):
    """The settings of the run that goes on; only --steps, --budget-tokens and --max-hours may change."""
    asked = vars(args).copy()
    try:
        settings = json.loads((args.resume / "config.json").read_text())["settings"]
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"argument --resume: {args.resume} does not hold a run: {error}")
    if missing := [f.name for f in fields(Config) if f.name not in settings]:
        parser.error(f"argument --resume: {args.resume} was made by an older version, which had no {missing[0]}: "
                     "its meaning may have changed, so it has to begin again")
    for name, value in (settings | {"out": args.resume}).items():        # a folder may be moved
        new = asked.get(name) not in (None, parser.get_default(name), value)
        if new and name not in ("steps", "budget_tokens"):
            parser.error(f"argument --{name.replace('_', '-')}: the run that goes on has {value}, not {asked[name]}; "
                         "only --steps, --budget-tokens and --max-hours may change")
        setattr(args, name, asked[name] if new else value)
    print(f"preset {args.preset}: that of the run {args.out}, which goes on")
