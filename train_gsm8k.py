r"""Train DEEP-GRPO, GRPO or another method on GSM8K or on the embedded task: one command, one run directory.

    python train_gsm8k.py                                  # no GPU: the embedded task, a minute; a GPU: GSM8K
    python train_gsm8k.py --preset gsm8k                   # Qwen2.5-0.5B-Instruct, the authors' numbers
    python train_gsm8k.py --preset gsm8k --method grpo     # the baseline: the same code with K = 0
    python train_gsm8k.py --preset gsm8k --method treerl   # and the others of baselines.py
    python train_gsm8k.py --model FOLDER --data FILE.jsonl # your own: question, and answer ending in #### n
    torchrun --nproc-per-node 8 train_gsm8k.py --preset math-7b        # the same over 8 GPUs (ranks.py, model.py)
    python train_gsm8k.py --preset math-7b --dry-run --gpus 8          # what that takes of each GPU's memory

The run directory holds config.json (all settings, versions, git revision), metrics.jsonl (a line per step),
timing.jsonl (what the step cost), samples.jsonl (rollouts and branches as text), checkpoints/step_N (a Hugging
Face model folder plus trainer.pt, under torchrun also optimizer/: the newest and the best) and run.png. A run that
was interrupted, or killed, goes on with --resume and ends as if it had not been; on another number of GPUs, too.
Exit codes: 0 done (or --max-hours are over), 2 bad input (one line on stderr), 1 anything else.
"""
import argparse
import json
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

import tasks.lock
from deep_grpo import Config, learn_recoverability, resample, roll_out, summarize, update
from grading import grade_gsm8k, grade_math
from loss import branch_groups
from recoverability import Recoverability
from resample import sample
from tasks import SETS, chat_prompt, load_rows, load_set, make_questions, split_validation, stop_ids
from trainer.checkpoint import append_lines, cut_logs, load_run, moving_parts, save_run, write_whole
from trainer.memory import report
from trainer.model import checkpoint_activations, gathered, load_model, place, precision
from trainer.plot import plot_run
from trainer.ranks import distributed, end, fail, first, gather, imbalance, rank, seed_rank, share, start, world_size
from trainer.settings import parse_args
from variants import METHODS


@dataclass
class Run:
    """Everything a step works on; what of it changes from step to step is in its checkpoint."""
    args: argparse.Namespace
    config: Config
    model: torch.nn.Module
    ref_model: torch.nn.Module | None
    tokenizer: object
    stop: list[int]
    questions: list
    eval_questions: list
    val_questions: list
    skipped: int
    optimizer: torch.optim.Optimizer
    recoverability: Recoverability
    pivot_rng: np.random.Generator
    step: int = 0
    rounds: int = 0                                  # batches of questions so far
    generated_total: int = 0
    best_step: int | None = None
    best_accuracy: float = -1.0
    drawn: int = 0                                   # tokens of all draws of this process
    imbalance: float = 1.0                           # of the last draw: generated tokens, most loaded rank over mean

    def draw(self, prefixes, k, *, max_new_tokens, expected_tokens=None, temperature=None):
        """resample.sample from the present policy, at the run's temperature unless another is given.

        Dealt out to the ranks by expected_tokens, how long a continuation of each prefix may become (None: equal).
        """
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stop[0]
        rows = [n for n in range(len(prefixes)) for _ in range(k)]
        caps = [max_new_tokens] * len(prefixes) if isinstance(max_new_tokens, int) else max_new_tokens
        costs = [expected_tokens[n] for n in rows] if expected_tokens else None

        def draw_part(part):
            counts = Counter(part)                   # a prefix may be dealt out to two ranks
            with precision(self.model):
                tails = sample(self.model, [prefixes[n] for n in counts], [*counts.values()],
                               max_new_tokens=[caps[n] for n in counts], eos_token_id=self.stop, pad_token_id=pad,
                               temperature=self.config.temperature if temperature is None else temperature)
            return [y for drawn in tails for y in drawn]

        drawn = share(rows, draw_part, costs)
        self.imbalance = imbalance([len(y) for y in drawn], costs)
        self.drawn += sum(map(len, drawn))
        return [drawn[i:i + k] for i in range(0, len(drawn), k)]

    def text(self, ids):
        """Token ids as text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def encode(self, text):
        """The prompt of one user message."""
        if self.tokenizer.chat_template is None:
            return self.tokenizer(text)["input_ids"]
        return chat_prompt(self.tokenizer, text)

    def reward(self, question, response):
        """1.0 if the response ended within the cap and its final answer is right, else 0.0."""
        grade = grade_math if question.math else grade_gsm8k
        return float(response[-1] in self.stop and grade(self.text(response), question.gold))

    def rewards(self, pairs):
        """The rewards of (question, response) pairs; each is graded on one rank only."""
        return share(pairs, lambda part: [self.reward(*pair) for pair in part])


def prepare(args) -> Run:
    """Load and check everything; nothing is written before that. ValueError or OSError on bad input.

    Rank 0 loads, the others get it from there.
    """
    config = Config(**{f.name: getattr(args, f.name) for f in fields(Config)})
    random.seed(args.seed)
    seed_rank(args.seed)
    weights = []                                     # the model, on rank 0

    def load():
        if args.resume is None and (args.out.is_file() or (args.out / "config.json").exists()):
            raise ValueError(f"{args.out} already holds a run (or is a file): choose another --out, "
                             f"or --resume {args.out}")
        rows = load_questions(args)
        model, tokenizer = load_model(args.model)
        weights.append(model)
        return encode_questions(args, rows, tokenizer), tokenizer, stop_ids(tokenizer, model), model.config

    (questions, eval_questions, val_questions, skipped), tokenizer, stop, model_config = first(load)
    model = place(weights, model_config, args.offload_optimizer)
    ref_model = place(weights, model_config, frozen=True) if config.beta > 0 else None
    if args.gradient_checkpointing:
        checkpoint_activations(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    run = Run(args, config, model, ref_model, tokenizer, stop, questions, eval_questions, val_questions, skipped,
              optimizer, Recoverability(), np.random.default_rng(args.seed))
    if args.resume is not None:
        step = load_run(run)
        print(f"going on after step {step}" if step else "there is no checkpoint yet: the run begins again")
        first(lambda: cut_logs(args.out, step if step else -1))
    return run


def encode_questions(args, rows, tokenizer):
    """(training, evaluation, validation questions, number of rows skipped for their length), from such rows."""
    made = [make_questions(r, tokenizer, args.max_prompt_tokens, args.template) for r in rows]
    (questions, skipped), (eval_questions, eval_skipped), (val_questions, val_skipped) = made
    eval_skipped += val_skipped
    for row in (skipped + eval_skipped)[:5]:
        text = row.get("question", row.get("problem"))
        print(f"skipped, longer than {args.max_prompt_tokens} prompt tokens: {text[:60]!r} ...")
    if skipped or eval_skipped:
        print(f"skipped {len(skipped)} of {len(rows[0])} training and "
              f"{len(eval_skipped)} of {len(rows[1]) + len(rows[2])} evaluation questions")
    if not questions or (args.eval_every and not eval_questions) or (rows[2] and not val_questions):
        raise ValueError(f"no question is left: all are longer than --max-prompt-tokens {args.max_prompt_tokens}")
    return questions, eval_questions, val_questions, len(skipped) + len(eval_skipped)


def load_questions(args):
    """(training rows, evaluation rows, validation rows); the last are held out when there is a test set."""
    def rows_of(source, split):
        if source in tasks.lock.PRESETS:                   # evaluation rows are the same for every --seed
            n, seed = (4096, args.seed + 1) if split == "train" else (args.eval_rows, 0)
            return tasks.lock.make_rows(tasks.lock.PRESETS[source], n, seed)
        return load_set(source) if source in SETS else load_rows(source, split)

    rows = rows_of(args.data, "train")
    if args.eval_data is not None:
        train, val = split_validation(rows, args.val_rows) if args.val_rows else (rows, [])
        return train, rows_of(args.eval_data, "test")[:args.eval_rows], val
    if args.data in tasks.lock.PRESETS:
        return rows, rows_of(args.data, "test"), []
    if len(rows) < 2:
        raise ValueError(f"{args.data} has {len(rows)} row: at least 2 are needed, one to hold out "
                         "(or give --eval-data)")
    return *split_validation(rows, min(args.eval_rows, len(rows) // 2)), []


def batch_at(run, number):
    """Batch 1, 2, ... of questions: a new permutation every epoch, a function of seed and number alone."""
    n, size = len(run.questions), run.args.questions
    at = range((number - 1) * size, number * size)
    epochs = {i // n for i in at}
    order = {epoch: np.random.default_rng((run.args.seed, epoch)).permutation(n) for epoch in epochs}
    return [run.questions[order[i // n][i % n]] for i in at]


def train_step(run) -> tuple[dict, dict, list, list]:
    """Lines 1-8 of deep_grpo.py on the next batch, or as many as --step-tokens asks for.

    Returns (metrics, timing, questions, groups).
    """
    clock = {"rollout": 0.0, "resample": 0.0, "score": 0.0, "update": 0.0}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def timed(name, function, *args, **kwargs):
        start, scored = time.perf_counter(), clock["score"]
        result = function(*args, **kwargs)
        clock[name] += time.perf_counter() - start - (clock["score"] - scored if name != "score" else 0.0)
        return result

    method, before = METHODS[run.args.method], run.drawn
    questions, groups, forwarded, timing = [], [], 0, {"imbalance_rollout": 1.0, "imbalance_resample": 1.0}
    enough = (run.step + 1) * (run.args.step_tokens or 0) - run.generated_total
    with gathered(run.model):
        while not groups or run.drawn - before < enough:
            run.rounds += 1
            batch = batch_at(run, run.rounds)

            def reward(pairs, batch=batch):
                return timed("score", run.rewards, [(batch[x], response) for x, response in pairs])

            drawn = timed("rollout", roll_out, run.draw, [q.prompt for q in batch], reward, run.config)
            timing["imbalance_rollout"] = max(timing["imbalance_rollout"], run.imbalance)
            if method.states:
                with precision(run.model):
                    drawn, cost = timed("resample", method.states, run, drawn, batch)
                forwarded, run.imbalance = forwarded + cost, 1.0         # stays 1 when nothing is branched
                drawn = timed("resample", resample, run.draw, drawn, reward, run.config)
                timing["imbalance_resample"] = max(timing["imbalance_resample"], run.imbalance)
            if run.args.method == "deep_grpo":
                learn_recoverability(drawn, run.recoverability)
            questions, groups = questions + batch, groups + drawn
    with precision(run.model):
        learned = timed("update", update, run.model, run.optimizer, groups, run.config, run.ref_model,
                        run.args.micro_batch_tokens, method.weights)
    timing |= {"imbalance_update": learned.pop("imbalance"), "padding": learned.pop("padding")}
    metrics = summarize(groups, run.stop) | learned | {"w": run.recoverability.w, "b": run.recoverability.b}
    metrics["questions"] = len(questions)
    metrics["generated_tokens"] = run.drawn - before     # with what SRPO asks the model besides
    metrics["forwarded_tokens"] += forwarded
    timing |= {f"seconds_{name}": seconds for name, seconds in clock.items()}
    timing["tokens_per_second"] = metrics["generated_tokens"] / sum(clock.values())
    peak = (torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available()
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    timing["peak_memory_gb"] = max(gather(lambda: peak))
    run.step += 1
    run.generated_total += metrics["generated_tokens"]
    return metrics | {"generated_total": run.generated_total}, timing, questions, groups


def evaluate(run) -> tuple[dict, dict]:
    """(metrics, timing): greedy accuracy on the evaluation and validation questions; notes the best."""
    start, metrics, questions = time.perf_counter(), {}, run.eval_questions + run.val_questions
    with gathered(run.model):                            # all at once: the longest answer takes the time
        answers = run.draw([q.prompt for q in questions], 1, max_new_tokens=run.config.max_new_tokens, temperature=0)
    rewards = run.rewards([(q, y) for q, (y,) in zip(questions, answers)])
    for name, part in (("eval_accuracy", rewards[:len(run.eval_questions)]),
                       ("val_accuracy", rewards[len(run.eval_questions):])):
        if part:
            metrics[name] = sum(part) / len(part)
    accuracy = metrics[selection(run)]
    if run.step and accuracy > run.best_accuracy:
        run.best_step, run.best_accuracy = run.step, accuracy
    return metrics, {"seconds_eval": time.perf_counter() - start}


def selection(run):
    """The metric by which the best checkpoint is chosen."""
    return "val_accuracy" if run.val_questions and not run.args.select_on_test else "eval_accuracy"


def sample_lines(run, batch, groups):
    """For samples.jsonl: the first right and the first failed rollout of every question, a line for each pivot."""
    for question, group in zip(batch, groups):
        for wanted in (1.0, 0.0):
            for t in [t for t in group.trajectories if t.reward == wanted][:1]:
                for pivot, part in branch_groups(t) or [(None, slice(0))]:
                    branches = [{"text": run.text(y), "reward": r}
                                for y, r in zip(t.branches[part], t.branch_rewards[part])]
                    yield {"step": run.step, "question": question.text, "gold": question.gold,
                           "response": run.text(t.response), "reward": t.reward, "pivot": pivot,
                           "prefix": run.text(t.response[:pivot]) if branches else None, "branches": branches}


def write_config(run):
    """config.json: all settings, and what the numbers depend on besides."""
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(run.args).items()
                if k not in ("resume", "max_hours", "dry_run", "gpus")}
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                "transformers": transformers.__version__, "numpy": np.__version__}
    about = {"settings": settings, "training_questions": len(run.questions),
             "evaluation_questions": len(run.eval_questions), "validation_questions": len(run.val_questions),
             "skipped_questions": run.skipped, "parameters": sum(p.numel() for p in run.model.parameters()),
             "device": hardware, "ranks": world_size(), "versions": versions,
             "git_revision": revision.stdout.strip() or None}
    write_whole(run.args.out / "config.json", json.dumps(about, indent=2) + "\n")
    print(" ".join(f"{name}={value}" for name, value in settings.items()))
    print(f"{len(run.questions)} training and {len(run.eval_questions)} evaluation questions, "
          f"{about['parameters'] / 1e6:.1f} M parameters, {world_size()} x {hardware}; writing to {run.args.out}")


def finished(run):
    """Is the run at its last step, or over its budget of generated tokens?"""
    return run.step >= run.args.steps or (run.args.budget_tokens or float("inf")) <= run.generated_total


def log(run, metrics, timing, samples=()):
    """A line to metrics.jsonl and to timing.jsonl, and the samples."""
    append_lines(run.args.out / "samples.jsonl", samples)
    append_lines(run.args.out / "metrics.jsonl", [{"step": run.step, **metrics}])
    append_lines(run.args.out / "timing.jsonl", [{"step": run.step, **timing}])


def stop_after_this_step(signals) -> list:
    """From now on Ctrl-C and SIGTERM put their name into the returned list; a second one ends the process.

    (Under torchrun it does not: torchrun passes on to all ranks what they may have had already, and ends them itself.)
    """
    received = []

    def note(number, frame):
        received.append(signal.Signals(number).name)
        if rank() == 0:
            print(f"\n{received[0]}: ending after this step"
                  + (", if torchrun waits for that: 30 seconds, or its --shutdown-timeout" if distributed()
                     else "; once more to end at once"), file=sys.stderr)
        for number in signals:
            signal.signal(number, signal.SIG_IGN if distributed() else signal.SIG_DFL)

    for number in signals:
        signal.signal(number, note)
    return received


def train(run) -> int:
    """The loop: step, log, evaluate, save. Returns the exit code."""
    args, start, longest = run.args, time.perf_counter(), 0.0
    received = stop_after_this_step((signal.SIGINT, signal.SIGTERM))
    shown = {}
    if run.step == 0 and args.eval_every:
        metrics, timing = evaluate(run)
        first(lambda: log(run, {"generated_total": 0, **metrics}, timing))
        shown["accuracy"] = f"{metrics['eval_accuracy']:.3f}"
    why = None                                           # what ended the run before its last step
    with tqdm(total=args.steps, initial=run.step, desc=args.method, unit="step", disable=rank() > 0) as bar:
        while not finished(run) and not (why := ended_by(args, received, start, longest)):
            began, before = time.perf_counter(), moving_parts(run)
            try:
                metrics, timing, batch, groups = train_step(run)
            except FloatingPointError as error:
                bar.close()
                return blown_up(run, before, error)
            shown |= {"reward": f"{metrics['reward']:.2f}", "tokens/s": f"{timing['tokens_per_second']:.0f}"}
            samples = ()
            if args.eval_every and (run.step % args.eval_every == 0 or finished(run)):
                accuracy, seconds = evaluate(run)
                metrics, timing = metrics | accuracy, timing | seconds
                samples = sample_lines(run, batch, groups)
                shown["accuracy"] = f"{metrics['eval_accuracy']:.3f}"
            first(partial(log, run, metrics, timing, samples))
            bar.set_postfix(shown)
            bar.update()
            if run.best_step == run.step or args.save_every and run.step % args.save_every == 0 or finished(run):
                save_run(run, moving_parts(run))
            longest = max(longest, time.perf_counter() - began)
    return conclude(run, why)


def ended_by(args, received, start, longest):
    """The signal that any rank has received, or "--max-hours", when a step as long as the longest would end later."""
    late = args.max_hours is not None and time.perf_counter() - start + longest > 3600 * args.max_hours
    everyone = gather(lambda: received[:1] + ([f"--max-hours {args.max_hours:g}"] if late else []))
    return next((why for reasons in everyone for why in reasons), None)


def blown_up(run, before, error) -> int:
    """A loss or gradient that is not finite: keep the last good state, say where it is. Returns the exit code."""
    if run.step and "gradient" in str(error):            # the weights are still those of the last good update
        save_run(run, before)
    return fail(f"stopped at step {run.step + 1}: {error}. "
                f"The last good state is in {run.args.out / 'checkpoints'} "
                "(none there: the starting model); try a smaller --lr", 1)


def conclude(run, why) -> int:
    """The last checkpoint, the figure, and where everything is. Returns the exit code."""
    args = run.args
    if not finished(run):
        if run.step:
            save_run(run, moving_parts(run))
        program = f"torchrun --nproc-per-node {world_size()}" if distributed() else "python"
        print(f"{why}: ended after step {run.step} of {args.steps}, everything is saved; "
              f"go on with: {program} train_gsm8k.py --resume {args.out}")
        return 0 if why.startswith("--") else 1
    first(lambda: plot_run(args.out))
    print(f"done after {run.step} steps and {run.generated_total} generated tokens; the model is in "
          f"{args.out / 'checkpoints' / f'step_{run.step}'}, the figure in {args.out / 'run.png'}")
    if run.best_step is not None:
        chosen = ("the test set, as in the authors' code" if args.select_on_test else
                  "held-out questions" if args.val_rows or not args.eval_data else "those of --eval-data")
        print(f"the best checkpoint by {selection(run)} ({chosen}) is step_{run.best_step}: {run.best_accuracy:.3f}")
    return 0


def main(argv=None) -> int:
    """Parse, prepare, train."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()          # of loading and saving: a line per checkpoint otherwise
    start()
    args = first(lambda: parse_args(argv, __doc__))
    try:
        if args.dry_run:
            print(first(lambda: report(args, args.gpus or 1)))
            return 0
        run = prepare(args)
        first(lambda: args.out.mkdir(parents=True, exist_ok=True))
    except (ValueError, OSError) as error:
        return fail(error, 2)
    try:
        if args.resume is None:
            first(lambda: write_config(run))
        code = train(run)
        end()
        return code
    except OSError as error:                             # a full disk, above all
        return fail(f"{error}. What was saved is still there: make room, then --resume {args.out}", 1)


if __name__ == "__main__":
    sys.exit(main())
