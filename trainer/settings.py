r"""The settings of a training run: a flag each, presets that fill flags in, and what a resumed run takes over.

A flag that is given wins over the method's settings, these over the preset, that over the default of deep_grpo.Config.
"""
import argparse
import sys
from dataclasses import fields
from pathlib import Path

import torch

import tasks.lock
from deep_grpo import Config
from grading import GRADERS
from tasks import SETS, TEMPLATES
from trainer.ranks import distributed
from trainer.session import MAY_CHANGE, OF_THIS_START, read_config
from variants import METHODS

EMBEDDED = dict(questions=2, lr=1e-4, steps=40, eval_every=5, eval_rows=128, max_prompt_tokens=64,
                micro_batch_tokens=1024)
# The authors' scripts: 64 questions, G = K = 8, gamma 2, lambda 1, lr 1e-6, beta 1e-4, their form of J; prompts of at
# most 512 (MATH: 1024) tokens, and with the response 1024 (4096). Here a response has what the longest prompt would
# leave, 256 of GSM8K (MATH: 1024). Ours, too: 256 rows to choose the best checkpoint on; theirs is --select-on-test.
AUTHORS = dict(questions=64, lr=1e-6, val_rows=256, micro_batch_tokens=16384, save_every=50)
GSM8K = dict(AUTHORS, steps=2000, eval_every=25, max_prompt_tokens=512, max_new_tokens=768, data="gsm8k_train",
             eval_data="gsm8k", eval_rows=1319, model="Qwen/Qwen2.5-0.5B-Instruct")
MATH = dict(AUTHORS, objective="authors", steps=1000, eval_every=25, max_prompt_tokens=1024, max_new_tokens=3072,
            data="math_train", eval_data="math500", eval_rows=500, gradient_checkpointing=True)
PRESETS = {
    "tiny": dict(EMBEDDED, model=str(tasks.lock.ASSETS / "tiny"), data="tiny", max_new_tokens=96),
    "tiny-deep": dict(EMBEDDED, model=str(tasks.lock.ASSETS / "tiny-deep"), data="tiny-deep", max_new_tokens=160,
                      questions=1, lr=4e-5),
    "gsm8k": dict(GSM8K, objective="authors", answer="last"),        # near the run behind the published number
    "gsm8k-paper": dict(GSM8K, objective="paper", answer="hash"),    # the paper's equations, and the strict rule
    "math-1.5b": dict(MATH, model="Qwen/Qwen2.5-Math-1.5B"),
    "math-7b": dict(MATH, model="Qwen/Qwen2.5-Math-7B"),
}


TEACHER = dict(candidates=4, epsilon=0.1, teacher_window=1024, teacher_lr=0.05)           # of --select goldilocks


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage text in front of an error: one line, exit code 2."""

    def error(self, message):
        """Print the message on one line and exit with code 2."""
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
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                           allow_abbrev=False)
    add_first_flags(parser.add_argument_group("the flags that most people need"))
    add_run_flags(parser.add_argument_group("length of a run, evaluation and checkpoints"))
    add_data_flags(parser.add_argument_group("questions and prompts"))
    add_method_flags(parser.add_argument_group("the method (the paper's letters; deep_grpo.Config)"))
    add_memory_flags(parser.add_argument_group("the update, and memory"))
    args = parser.parse_args(argv)
    if args.offload_optimizer and not distributed() and not args.dry_run:
        parser.error("argument --offload-optimizer: FSDP does it, so start with torchrun --nproc-per-node N")
    if args.resume is not None:
        restore_settings(parser, args)
    else:
        fill_settings(parser, args)
    for name in ("lr", "max_hours", "teacher_lr"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < float("inf"):
            parser.error(f"argument --{name.replace('_', '-')}: must be positive, got {getattr(args, name)}")
    return args


def add_first_flags(group):
    """The flags of every day. Where a preset fills a flag in, its default is that of the preset."""
    group.add_argument("--preset", choices=PRESETS, help="fill in all flags that are not given; default: gsm8k with a "
                       "GPU, tiny without")
    group.add_argument("--method", choices=METHODS, metavar="METHOD", help="the method that trains, one of "
                       f"{', '.join(METHODS)}; default: deep_grpo")
    group.add_argument("--model", help="the model to start from, a hub name or a local folder; default: the preset's")
    sets = ", ".join([*tasks.lock.LOCKS, *SETS])
    group.add_argument("--data", help="the training questions, a local .jsonl, a hub name, or one of "
                       f"{sets}; default: the preset's")
    group.add_argument("--out", type=Path, help="the run directory, new or empty; default: runs/PRESET-METHOD-SEED")
    group.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on from the last checkpoint of a run; "
                       "default: start a new run")
    group.add_argument("--seed", type=int, help="the seed of everything random; default: 0")
    group.add_argument("--steps", type=count, help="the number of steps to train; default: the preset's")
    group.add_argument("--questions", type=count, help="questions x in a step; default: the preset's")
    group.add_argument("--group-size", type=int, help="G, rollouts per question; default: the method's, "
                       f"{Config.group_size} for deep_grpo and grpo")
    group.add_argument("--branches", type=int, help="K, continuations per pivot; default: the method's, "
                       f"{Config.branches} for deep_grpo")
    group.add_argument("--gamma", type=float, help=f"the exponent of depth in Eq. (Q); default: {Config.gamma:g}")
    group.add_argument("--lam", type=float, help="lambda, the weight of the branch stream in Eq. (J); default: "
                       f"{Config.lam:g}")
    group.add_argument("--lr", type=float, help="the learning rate of AdamW, which stays constant (its betas are .9 "
                       "and .999, its weight decay is .01); default: the preset's")
    group.add_argument("--max-new-tokens", type=int, help="the cap of a response, in tokens; a longer one has reward "
                       "0; default: the preset's")


def add_run_flags(group):
    """When a run ends, evaluates and saves."""
    group.add_argument("--budget-tokens", type=count, help="end after the step that reaches this many generated "
                       "tokens; default: no such end")
    group.add_argument("--step-tokens", type=count, help="draw batches of --questions in step n until the run has "
                       "generated n times this many tokens; default: one batch")
    group.add_argument("--eval-every", type=int, help="evaluate greedily every N steps, and before and after the run; "
                       "0: never; default: the preset's")
    group.add_argument("--save-every", type=int, help="save a checkpoint every N steps, besides the best one and "
                       "the last; 0: only those; default: the preset's")
    group.add_argument("--max-hours", type=float, help="save and end before this many hours since the start are "
                       "over, to go on with --resume; default: no such end")
    group.add_argument("--dry-run", action="store_true", help="print the GPU memory that each phase takes, and end; "
                       "default: train")
    group.add_argument("--gpus", type=count, help="the number of GPUs that --dry-run reckons with; default: 1")


def add_data_flags(group):
    """Which questions are evaluated and which are asked, and how a prompt is made."""
    group.add_argument("--eval-data", help="the evaluation questions, named as for --data; default: the preset's test "
                       "set, or --eval-rows rows of --data that are drawn at random and held out")
    group.add_argument("--eval-rows", type=count, help="the number of evaluation questions; default: the preset's")
    group.add_argument("--val-rows", type=int, help="with --eval-data: hold out this many rows of --data, drawn at "
                       "random but the same for every seed, to choose the best checkpoint on; default: the preset's")
    group.add_argument("--select-on-test", action="store_true", help="choose the best checkpoint on --eval-data, as "
                       "the authors do; default: on the held-out rows")
    group.add_argument("--select", choices=["goldilocks"], help="let a teacher choose the questions of a step by their "
                       "predicted utility (variants/goldilocks.py); composes with every method; default: every "
                       "question in turn")
    group.add_argument("--candidates", type=count, help="with --select: C, the random candidates from which each "
                       f"question is chosen; default: {TEACHER['candidates']}")
    group.add_argument("--epsilon", type=float, help="with --select: how often a random one of the candidates is "
                       f"asked; default: {TEACHER['epsilon']:g}")
    group.add_argument("--teacher-window", type=count, help="with --select: the number of questions, those asked last, "
                       f"from which the teacher learns; default: {TEACHER['teacher_window']}")
    group.add_argument("--teacher-lr", type=float, help="with --select: the learning rate of the teacher; default: "
                       f"{TEACHER['teacher_lr']:g}")
    group.add_argument("--template", choices=TEMPLATES, help="the prompt around a question; default: chat, the model's "
                       "own chat template")
    group.add_argument("--answer", choices=GRADERS, help="how an answer is asked for and read, in training and "
                       "evaluation: hash, the number after ####; last, that or else the last number; boxed, the last "
                       "\\boxed{}; default: the preset's, or hash for GSM8K rows and boxed for MATH rows")
    group.add_argument("--max-prompt-tokens", type=count, help="name and skip the questions whose prompt is longer; "
                       "default: the preset's")


def add_method_flags(group):
    """The other fields of Config, and the options that compose with every method."""
    group.add_argument("--objective", choices=["paper", "authors"], help="the form of J, that of the paper or that of "
                       f"the authors' code (loss.py); default: {Config.objective}")
    group.add_argument("--beta", type=float, help="the weight of the KL term; 0 needs no reference model; default: "
                       f"{Config.beta:g}")
    group.add_argument("--clip-low", type=float, help=f"eps_low of the clip; default: {Config.clip_low:g}")
    group.add_argument("--clip-high", type=float, help=f"eps_high of the clip; default: {Config.clip_high:g}")
    group.add_argument("--temperature", type=float, help="T of the policy, in rollouts, branches and loss; default: "
                       f"{Config.temperature:g}")
    group.add_argument("--segment-tokens", type=int, help="put a state after every N tokens of a response; "
                       "default: 0, a state after every sentence, or 30 for spo_tree, whose nodes have N tokens")
    group.add_argument("--updates", type=int, help=f"optimizer steps on one batch; default: {Config.updates}")
    group.add_argument("--lag", type=int, metavar="K", help="train the batch that was drawn K steps ago, as with an "
                       "asynchronous sampler (variants/vcpo.py); composes with every method; default: 0")
    group.add_argument("--branch-share", type=float, help="branch only this share of a step's failures, drawn at "
                       "random (variants/thin.py); default: 1, all of them")
    group.add_argument("--prob-mask", type=float, metavar="P", help="train only the tokens that were drawn with a "
                       "probability below P (variants/spo.py); composes with every method; default: .9 for spo_chain "
                       "and spo_tree, else all tokens")
    group.add_argument("--stapo", action="store_true", default=None, help="leave spurious tokens out of the loss "
                       "(variants/stapo.py); composes with every method; default: off")
    group.add_argument("--maspo", action="store_true", default=None, help="use a soft trust region instead of the clip "
                       "(variants/maspo.py); composes with every method; default: off")


def add_memory_flags(group):
    """The clip of the gradient, and what changes memory and time alone."""
    group.add_argument("--max-grad-norm", type=float, help="clip the gradient to this norm; default: "
                       f"{Config.max_grad_norm:g}")
    group.add_argument("--micro-batch-tokens", type=count, help="padded tokens in one forward pass of the update; "
                       "changes memory, not the result; default: the preset's")
    group.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction,
                       help="compute activations twice instead of keeping them; default: the preset's")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compile the layers for sampling "
                       "and for the update, before the first step; default: on with a GPU, off without")
    group.add_argument("--offload-optimizer", action="store_true", help="under torchrun, keep weights, gradients and "
                       "moments in host memory; default: on the GPU")


def fill_settings(parser, args):
    """Preset and defaults into the flags that were not given; checks that a flag has a part in the run."""
    gpu = torch.cuda.is_available()
    why = "asked for"
    if args.preset is None:
        args.preset = "gsm8k" if gpu else "tiny"
        why = ("a GPU is here; --preset tiny is the embedded task" if gpu
               else "no GPU is here; --preset gsm8k is the full run")
    print(f"preset {args.preset}: {why}")
    if args.gpus is not None and not args.dry_run:
        parser.error("argument --gpus: is for --dry-run; a run has as many as torchrun --nproc-per-node N starts")
    args.method = args.method or "deep_grpo"
    settings = METHODS[args.method].settings
    if settings.get("branches") == 0 and args.branches not in (None, 0):
        parser.error(f"argument --branches: --method {args.method} is K = 0, got {args.branches}")
    if settings.get("branches") != 0 and args.branches == 0:
        parser.error("argument --branches: K = 0 is GRPO, ask for it with --method grpo")
    for name in dict.fromkeys(flag for method in METHODS.values() for flag in method.flags):
        if getattr(args, name) is not None and name not in METHODS[args.method].flags:
            known = ", ".join(other for other, method in METHODS.items() if name in method.flags)
            flag = f"--{name.replace('_', '-')}"
            parser.error(f"argument {flag}: has no part in --method {args.method}, only in {known}")
    if args.maspo and (args.clip_low, args.clip_high) != (None, None):
        parser.error("argument --maspo: has no clip, leave out --clip-low and --clip-high")
    of_ratio = [name for name in ("clip_low", "clip_high", "maspo") if getattr(args, name) is not None]
    for name in TEACHER:
        if getattr(args, name) is not None and args.select is None:
            parser.error(f"argument --{name.replace('_', '-')}: has a part only with --select goldilocks")
    preset = PRESETS[args.preset]
    if "objective" not in METHODS[args.method].flags and "objective" in preset:
        print(f"the objective is that of --method {args.method}, and not that of the preset, --objective "
              f"{preset['objective']}")
        preset = {name: value for name, value in preset.items() if name != "objective"}
    if args.data not in (None, preset["data"]):      # other rows have a way to answer of their own, and no test set
        if preset.get("answer") and args.answer is None:
            print(f"--answer follows the rows of {args.data}, because they are not the preset's; the preset's own is "
                  f"--answer {preset['answer']}")
        preset = preset | dict(answer=None)
        if args.eval_data is None:
            preset = preset | dict(eval_data=None, val_rows=0, eval_rows=preset.get("val_rows", preset["eval_rows"]))
    defaults = {f.name: f.default for f in fields(Config)}
    defaults |= dict(seed=0, template="chat", stapo=False, maspo=False, budget_tokens=None, step_tokens=None,
                     answer=None, branch_share=1.0, lag=0, compile=gpu or args.dry_run, save_every=0, eval_data=None,
                     val_rows=0, gradient_checkpointing=False, prob_mask=METHODS[args.method].prob_mask)
    defaults |= TEACHER if args.select is not None else {}
    for name, value in (defaults | preset | settings).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if of_ratio and args.updates == 1 and args.lag == 0:
        print(f"--{of_ratio[0].replace('_', '-')} changes nothing with one update on every fresh batch, where rho is "
              "1; --updates 2 or --lag 1 would give it a part")
    check_together(parser, args)


def check_together(parser, args):
    """What flags say together, and ranges that argparse does not know; --out where it was not given."""
    if args.steps <= args.lag:
        parser.error(f"argument --lag: none of the {args.steps} steps would train anything, got {args.lag}")
    if not 0 < args.branch_share <= 1:
        parser.error(f"argument --branch-share: must be above 0 and at most 1, got {args.branch_share}")
    if args.epsilon is not None and not 0 <= args.epsilon <= 1:
        parser.error(f"argument --epsilon: must be between 0 and 1, got {args.epsilon}")
    if args.prob_mask is not None and not 0 < args.prob_mask <= 1:
        parser.error(f"argument --prob-mask: must be above 0 and at most 1, got {args.prob_mask}")
    if args.branches == 1 and METHODS[args.method].two_streams:
        parser.error("argument --branches: one branch has no siblings to be compared with, so its advantage is 0; at "
                     "least 2 are needed")
    if args.branches == 0 and args.group_size == 1:
        parser.error("argument --group-size: one rollout has no others to be compared with, so its advantage is 0; at "
                     "least 2 are needed")
    if "segment_tokens" in METHODS[args.method].settings and args.segment_tokens == 0:
        parser.error(f"argument --segment-tokens: --method {args.method} has nodes of at least 1 token, got 0")
    args.out = args.out or Path("runs") / f"{args.preset}-{args.method}-{args.seed}"
    if args.select_on_test and args.eval_data is None:
        parser.error("argument --select-on-test: only with --eval-data; without, --eval-rows rows are held out")
    if args.val_rows and args.eval_data is None:
        parser.error("argument --val-rows: only with --eval-data; without, --eval-rows rows are held out, and choose")
    for name in ("eval_every", "save_every", "val_rows", "seed", "lag"):
        if getattr(args, name) < 0:
            parser.error(f"argument --{name.replace('_', '-')}: must be 0 or more, got {getattr(args, name)}")


def restore_settings(parser, args):
    """The settings of the run that goes on. Only --max-hours and those of MAY_CHANGE may be others."""
    asked = vars(args).copy()
    try:
        about = read_config(args.resume)
    except ValueError as error:
        parser.error(f"argument --resume: {error}")
    if other := sorted(about["settings"].keys() ^ (asked.keys() - OF_THIS_START)):
        parser.error(f"argument --resume: {args.resume} was made by another version, whose flags differ in "
                     f"{', '.join(other)}: go on with the code of the commit {about['git_revision']}, or start a new "
                     "run")
    for name, value in (about["settings"] | {"out": args.resume}).items():       # a folder may be moved
        new = asked.get(name) not in (None, parser.get_default(name), value)
        if new and name not in MAY_CHANGE:
            parser.error(f"argument --{name.replace('_', '-')}: the run that goes on has {value}, not {asked[name]}; "
                         f"only {', '.join(f'--{other}' for other in MAY_CHANGE).replace('_', '-')} and --max-hours "
                         "may change")
        setattr(args, name, asked[name] if new else value)
    print(f"preset {args.preset}: that of the run {args.out}, which goes on")
