r"""Train DEEP-GRPO, GRPO or another method on GSM8K or on the embedded task: one command, one run directory.

    python train_gsm8k.py                                  # the embedded task (a minute), or GSM8K on a GPU
    python train_gsm8k.py --preset gsm8k                   # Qwen2.5-0.5B-Instruct, the authors' numbers
    python train_gsm8k.py --preset gsm8k --method grpo     # the baseline: the same code with K = 0
    python train_gsm8k.py --preset gsm8k --method treerl   # another method of variants/
    python train_gsm8k.py --preset gsm8k --model FOLDER --data FILE.jsonl        # your own model and questions
    torchrun --nproc-per-node 8 --shutdown-timeout 600 train_gsm8k.py --preset math-7b     # the same over 8 GPUs
    python train_gsm8k.py --preset math-7b --dry-run --gpus 8          # the memory that this takes on each GPU

The run directory holds

    config.json            all settings, the versions and the git revision
    metrics.jsonl          a line per step
    timing.jsonl           a line per step: what it cost
    samples.jsonl          rollouts and branches as text
    pivots.csv             a line per pivot: where it was, and how many of its branches were correct
    checkpoints/step_N     the newest and the best: a Hugging Face model folder plus trainer.pt, and optimizer/ if the
                           run was started by torchrun
    run.png                the figure of the run

A run that was interrupted or killed goes on with --resume. On the same CPU and number of processes it ends as if it had
not been interrupted; on a GPU that is so up to rounding. With another number of processes it draws other samples.
Exit codes: 0 done (or --max-hours are over), 2 bad input (with one line on stderr), 1 anything else.
"""
import datetime
import os
import resource
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import fields
from functools import partial

import numpy as np
import torch
import transformers
from tqdm import tqdm

import tasks.lock
from deep_grpo import Config, step
from recoverability import Recoverability
from resample import sample
from tasks import SETS, fix_date, load_rows, load_set, make_questions, split_validation, stop_ids
from trainer import compiling, decoding
from trainer.check import check_model, check_prompts, choose_sampler
from trainer.checkpoint import cut_logs, find_checkpoints, load_run, moving_parts, save_run
from trainer.compiling import compiled_layers, compiled_rows, padded_to, plain_rows, stopwatch
from trainer.memory import evaluated_at_once, report, update_warning
from trainer.metrics import summarize
from trainer.model import Ranks, checkpoint_activations, checksum, layers_of, load_model, place
from trainer.plot import last_words, plot_run
from trainer.policy import BadReward, Clock, Policy
from trainer.ranks import (
    agree,
    device,
    distributed,
    end,
    fail,
    first,
    first_line,
    gather,
    rank,
    seed_rank,
    start,
    world_size,
)
from trainer.session import (
    Run,
    check_empty,
    check_questions,
    check_start,
    ended_by,
    keep_changes,
    log,
    name_of,
    owned,
    read_config,
    sample_lines,
    stop_after_this_step,
    why_nothing_is_right,
    write_config,
)
from trainer.settings import parse_args
from variants import METHODS
from variants.goldilocks import Teacher, mean_states, standardized
from variants.maspo import soft_surrogate
from variants.spo import masked
from variants.stapo import silence_spurious
from variants.thin import thinned


def config_of(args) -> Config:
    """The hyper-parameters of a run. Raises ValueError for impossible ones."""
    return Config(**{f.name: getattr(args, f.name) for f in fields(Config)})


def prepare(args) -> Run:
    """Load and check everything. Nothing is written before that. Raises ValueError or OSError on bad input.

    Rank 0 loads, and the other ranks get everything from it.
    """
    config = config_of(args)
    seed_rank(args.seed)
    weights = []                                     # the model, on rank 0

    def load():
        if args.resume is None:
            check_empty(args.out)
        before = {} if args.resume is None else read_config(args.out)
        rows = load_questions(args)
        model, tokenizer = load_model(args.model)
        date = fix_date(tokenizer, before.get("date") or datetime.date.today().isoformat())
        check_model(model, args.model)
        sampler = choose_sampler(model)
        if distributed():
            layers_of(model)
        weights.append(model)
        asked = encode_questions(args, rows, tokenizer)
        stop = stop_ids(tokenizer, model)
        prompts = [q.prompt for part in asked[:3] for q in part]
        check_prompts(model, args.model, prompts, stop, config.max_new_tokens)
        check_questions(args.out, before, asked[:3])
        start = {"stop_ids": stop, "weights": checksum(model), "reward": name_of(Policy.reward)}
        check_start(args.out, before, start)
        return asked, tokenizer, model.config, date, start, sampler

    (questions, eval_questions, val_questions, skipped), tokenizer, model_config, date, start, sampler = first(load)
    model = place(weights, model_config, args.offload_optimizer)
    ref_model = place(weights, model_config, frozen=True) if config.beta > 0 else None
    weights.clear()                                  # under torchrun a whole model in the memory of rank 0
    if args.gradient_checkpointing:
        checkpoint_activations(model)
    warn_of_memory(args, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    score = plain_rows
    if args.compile and compiles("the update", lambda: compiling.warm_up(
            model, ref_model, config.temperature, config.updates > 1 or args.stapo or args.method == "vcpo",
            args.micro_batch_tokens)):
        score = compiled_rows
    if sampler is decoding.sample:
        if args.compile and compiles("sampling", lambda: decoding.warm_up(model, True)):
            sampler = partial(decoding.sample, compile_layers=True)
        elif not compiles("the draw", lambda: decoding.warm_up(model, False)):
            sampler = sample
    policy = Policy(model, tokenizer, start["stop_ids"], config, args.micro_batch_tokens, sampler)
    run = Run(args, policy, ref_model, optimizer, Recoverability(), np.random.default_rng(args.seed),
              questions, eval_questions, val_questions, skipped, date, start, score)
    if args.select is not None:                          # before a checkpoint is loaded: it sees the starting model
        prompts = [q.prompt for q in questions]
        features = standardized(policy.of_prompts(partial(mean_states, tokens=args.micro_batch_tokens), prompts))
        run.teacher = Teacher(features, prompts, args.epsilon, args.teacher_window, args.teacher_lr)
    if args.resume is not None:
        last = load_run(run)
        print(f"going on after step {last}" if last else "there is no checkpoint yet: the run begins again")
        first(lambda: cut_logs(args.out, last if last else -1))
    return run


def warn_of_memory(args, model) -> None:
    """Say before a run that its update may not fit into the GPU."""
    if device().type == "cuda":
        card = torch.cuda.get_device_properties(device()).total_memory
        if warning := update_warning(args, model, world_size(), card):
            print(warning)


def compiles(what, warm_up) -> bool:
    """Compile for the update, or for sampling, and try it: does it work? warm_up() says why it does not, or None."""
    before = stopwatch.seconds
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):                 # the run draws what it draws without compilation
        why = next((why for why in gather(warm_up) if why is not None), None)
    print(f"{what}: " + (f"compiled in {stopwatch.seconds - before:.0f} s" if why is None else f"not compiled: {why}"))
    return why is None


def encode_questions(args, rows, tokenizer):
    """Return (training, evaluation, validation questions, number of rows skipped for their length).

    rows: (training rows, evaluation rows, validation rows). Raises ValueError when no question is left.
    """
    made = [make_questions(r, tokenizer, args.max_prompt_tokens, args.template, args.answer) for r in rows]
    (questions, skipped), (eval_questions, eval_skipped), (val_questions, val_skipped) = made
    eval_skipped += val_skipped
    for row in (skipped + eval_skipped)[:5]:
        text = row.get("question", row.get("problem"))
        print(f"skipped, longer than {args.max_prompt_tokens} prompt tokens: {text[:60]!r} ...")
    if skipped or eval_skipped:
        print(f"skipped {len(skipped)} of {len(rows[0])} training and "
              f"{len(eval_skipped)} of {len(rows[1]) + len(rows[2])} evaluation questions")
    unknown = {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    if unreadable := sum(not unknown.isdisjoint(q.prompt) for q in questions):
        print(f"warning: the tokenizer has no token for a part of {unreadable} of {len(questions)} training prompts: "
              f"the model sees {tokenizer.unk_token} there")
    if not questions or (args.eval_every and not eval_questions) or (rows[2] and not val_questions):
        raise ValueError(f"no question is left: all are longer than --max-prompt-tokens {args.max_prompt_tokens}")
    return questions, eval_questions, val_questions, len(skipped) + len(eval_skipped)


def load_questions(args):
    """Return (training rows, evaluation rows, validation rows). The last are held out when there is a test set."""
    def rows_of(source, split):
        if source in tasks.lock.LOCKS:                   # evaluation rows are the same for every --seed
            n, seed = (4096, args.seed + 1) if split == "train" else (args.eval_rows, 0)
            return tasks.lock.make_rows(tasks.lock.LOCKS[source], n, seed)
        return load_set(source) if source in SETS else load_rows(source, split)

    rows = rows_of(args.data, "train")
    if args.eval_data is not None:
        train, val = split_validation(rows, args.val_rows) if args.val_rows else (rows, [])
        test = rows_of(args.eval_data, "test")
        if len(test) > args.eval_rows:
            print(f"evaluations have the first {args.eval_rows} of {len(test)} rows of {args.eval_data} (--eval-rows)")
        return train, test[:args.eval_rows], val
    if args.data in tasks.lock.LOCKS:
        return rows, rows_of(args.data, "test"), []
    if len(rows) < 2:
        raise ValueError(f"{args.data} has {len(rows)} row: at least 2 are needed, one to hold out "
                         "(or give --eval-data)")
    return *split_validation(rows, min(args.eval_rows, len(rows) // 2)), []


def batch_at(run, number):
    """Return batch 1, 2, ... of questions. Every epoch has a new permutation.

    The batch is a function of the seed and of its number alone. With --select it also depends on the teacher, which
    chooses every question among the next C of the permutation.
    """
    n, size = len(run.questions), run.args.questions * (run.args.candidates or 1)
    at = range((number - 1) * size, number * size)
    epochs = {i // n for i in at}
    order = {epoch: np.random.default_rng((run.args.seed, epoch)).permutation(n) for epoch in epochs}
    drawn = [order[i // n][i % n] for i in at]
    if run.teacher is not None:                          # a third number makes it another generator than the above
        rng = np.random.default_rng((run.args.seed, number, 1))
        drawn = agree(run.teacher.choose(np.reshape(drawn, (run.args.questions, -1)), rng))
    return [run.questions[i] for i in drawn]


def train_step(run) -> tuple[dict, dict, list, list]:
    """One deep_grpo.step on the next batch of questions. Returns (metrics, timing, questions, groups)."""
    policy, method, asked = run.policy, METHODS[run.args.method], []
    policy.clock, policy.imbalance = Clock(), {}
    generated, forwarded, compiled_before = policy.generated, policy.forwarded, stopwatch.seconds
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()

    def batches():                                       # one, or enough to generate --step-tokens
        enough = (run.step + 1) * (run.args.step_tokens or 0) - run.generated_total
        while not asked or policy.generated - generated < enough:
            run.rounds += 1
            batch = batch_at(run, run.rounds)
            asked.extend(batch)
            yield batch

    def choose_pivots(*args):
        with policy.clock.phase("resample"):
            return agree(thinned(method.choose_pivots, run.args.branch_share)(*args))

    def update(model, optimizer, groups, *args, **options):
        run.waiting.append(groups)                       # with --lag K, the batch of K steps ago is trained
        trained = run.waiting.pop(0) if len(run.waiting) > run.args.lag else []
        models = [model for model in (policy.model, run.ref_model) if model is not None]
        with policy.clock.phase("update"), compiled_layers(*models if run.score is compiled_rows else ()):
            return method.update(model, optimizer, trained, *args, stale=run.args.lag > 0, **options)

    silenced = []
    groups, learned = step(policy, batches(), policy.config, run.recoverability if method.fits_p else None,
                           run.pivot_rng, run.optimizer, run.ref_model, choose_pivots, update,
                           **loss_options(run, silenced))
    if not all(gather(lambda: finite(policy.model))):
        raise FloatingPointError("the update made weights that are not finite")

    timing = {f"imbalance_{phase}": policy.imbalance.get(phase, 1.0) for phase in ("rollout", "resample")}
    timing |= {"imbalance_update": learned.pop("imbalance"), "padding": learned.pop("padding")}
    metrics = summarize(groups, policy.stop) | learned | {"w": run.recoverability.w, "b": run.recoverability.b}
    metrics |= run.teacher.learn(groups) if run.teacher is not None else {}
    metrics["questions"] = len(asked)
    metrics |= {"silenced_tokens": sum(silenced)} if run.args.stapo else {}
    metrics["generated_tokens"] = policy.generated - generated               # SRPO's answers included
    metrics["forwarded_tokens"] += policy.forwarded - forwarded
    seconds = {phase: policy.clock.seconds[phase] for phase in ("rollout", "resample", "score", "update")}
    timing |= {f"seconds_{phase}": value for phase, value in seconds.items()}
    timing["seconds_compile"] = stopwatch.seconds - compiled_before
    timing["tokens_per_second"] = metrics["generated_tokens"] / sum(seconds.values())
    peak = (torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available()
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(30 if sys.platform == "darwin" else 20))
    timing["peak_memory_gb"] = max(gather(lambda: peak))
    run.step += 1
    run.generated_total += metrics["generated_tokens"]
    return metrics | {"generated_total": run.generated_total}, timing, asked, groups


def loss_options(run, silenced) -> dict:
    """The options of deep_grpo.objective for this run. silenced: a list, to which --stapo adds a number per update."""
    args, method = run.args, METHODS[run.args.method]
    options = {"micro_batch_tokens": args.micro_batch_tokens, "ranks": Ranks(run.score, padded_to(run.score, device())),
               "weights": method.weights}

    def silence(table, logp, entropy):
        changed = silence_spurious(table, logp, entropy)
        silenced.append(int(((table[:, 1] != 0) & (changed[:, 1] == 0)).sum()))
        return changed

    if args.prob_mask is not None:
        options["weights"] = masked(method.weights, args.prob_mask, method.two_streams)
    if args.maspo:
        options["surrogate"] = soft_surrogate
    if args.stapo:
        options["reweigh"] = silence
    return options


def finite(model) -> bool:
    """Are all weights finite? Of a sharded model, those of this rank."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return bool(torch.stack([torch.isfinite(p.detach()).all() for p in local]).all())


def evaluate(run) -> tuple[dict, dict]:
    """Return (metrics, timing): the greedy accuracy on the evaluation and validation questions.

    Notes the step with the best accuracy in the run.
    """
    start, metrics, questions = time.perf_counter(), {}, run.eval_questions + run.val_questions
    answers, size = [], evaluated_at_once(run.args)
    for i in range(0, len(questions), size):
        prompts = [q.prompt for q in questions[i:i + size]]
        answers += run.policy.sample(prompts, 1, run.policy.config.max_new_tokens, temperature=0)
    rewards = run.policy.rewards([(q, y) for q, (y,) in zip(questions, answers)])
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


def train(run, start) -> int:
    """Run the loop: step, log, evaluate, save. start: when the program began. Returns the exit code."""
    args, longest, saving = run.args, 0.0, 0.0           # the last two: seconds of a step, and of writing a checkpoint
    received = stop_after_this_step(run, (signal.SIGINT, signal.SIGTERM))
    shown, warned, unread = {}, False, []
    if run.step == 0 and args.eval_every:
        metrics, timing = evaluate(run)
        first(lambda: log(run, {"generated_total": 0, **metrics}, timing))
        shown["accuracy"] = f"{metrics['eval_accuracy']:.3f}"
    why = None                                           # what ended the run before its last step
    with tqdm(total=args.steps, initial=run.step, desc=args.method, unit="step", disable=rank() > 0) as bar:
        while not run.finished and not (why := ended_by(args, received, start, longest + saving)):
            began, before, updates = time.perf_counter(), moving_parts(run), updates_of(run.optimizer)
            try:
                metrics, timing, batch, groups = train_step(run)
                if args.eval_every and (run.step % args.eval_every == 0 or run.finished):
                    accuracy, seconds = evaluate(run)
                    metrics, timing = metrics | accuracy, timing | seconds
                    shown["accuracy"] = f"{metrics['eval_accuracy']:.3f}"
            except FloatingPointError as error:
                bar.close()
                return blown_up(run, before, updates, error)
            shown |= {"reward": f"{metrics['reward']:.2f}", "tokens/s": f"{timing['tokens_per_second']:.0f}"}
            read = run.step == 1 or run.step % (args.eval_every or 25) == 0 or run.finished
            samples = sample_lines(run, batch, groups) if read else ()
            if run.step <= 2:
                unread += zip(batch, groups)
            if run.step == 2 and not any(t.reward for _, g in unread for t in g.trajectories):
                bar.write(first(partial(why_nothing_is_right, run, unread)))
            if not warned and not args.lag and (metrics["sampler_gap"] or 0) > decoding.HEALTHY_GAP:
                warned = True
                bar.write(f"warning: what is sampled is not what is trained: their log-probabilities differ by "
                          f"{metrics['sampler_gap']:.3f} nats on average (sampler_gap in trainer/README.md)")
            first(partial(log, run, metrics, timing, samples, groups))
            bar.set_postfix(shown)
            bar.update()
            longest = max(longest, time.perf_counter() - began)
            if run.best_step == run.step or args.save_every and run.step % args.save_every == 0 or run.finished:
                began = time.perf_counter()
                save_run(run, moving_parts(run))
                saving = max(saving, time.perf_counter() - began)
    return conclude(run, why)


def updates_of(optimizer) -> int:
    """How many steps the optimizer has made so far."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def blown_up(run, before, updates, error) -> int:
    """End a run whose loss, gradient or logits are not finite: keep the last good state and say where it is.

    before, updates: the moving parts and the optimizer's steps at the end of the step before. Returns the exit code.
    """
    # The error must come from the update, because weights that cannot be sampled are not good. And it must come from
    # the first update on this batch, because after one the weights are no longer those of a step's end.
    if before["step"] and updates_of(run.optimizer) == updates and "gradient" in str(error):
        save_run(run, before)
    found = first(lambda: find_checkpoints(run.args.out))
    last = found[-1][1] if found else run.args.model
    return fail(f"stopped at step {before['step'] + 1}: {error}. A run that goes on would stop there again. Start a "
                f"new one with a smaller --lr; with --model {last} it goes on from the last good weights", 1)


def conclude(run, why) -> int:
    """Write the last checkpoint and the figure, and print where everything is. Returns the exit code."""
    args = run.args
    if not run.finished:
        if run.step:
            save_run(run, moving_parts(run))
        per_node = os.environ.get("LOCAL_WORLD_SIZE", world_size())
        program = f"torchrun --nproc-per-node {per_node}" if distributed() else "python"
        script = sys.argv[0] if sys.argv[0].endswith(".py") else "train_gsm8k.py"        # it may be a fork's own
        print(f"{why}: ended after step {run.step} of {args.steps}, everything is saved; "
              f"go on with: {program} {script} --resume {args.out}")
        return 0 if why.startswith("--") else 1
    first(lambda: plot_run(args.out))
    for line in first(lambda: last_words(args.out)):
        print(line)
    print(f"done after {run.step} steps and {run.generated_total} generated tokens; the model is in "
          f"{args.out / 'checkpoints' / f'step_{run.step}'}, the figure in {args.out / 'run.png'}")
    if run.best_step is not None:
        chosen = ("the test set, as in the authors' code" if args.select_on_test else
                  "held-out questions" if args.val_rows or not args.eval_data else "those of --eval-data")
        print(f"the best checkpoint by {selection(run)} ({chosen}) is step_{run.best_step}: {run.best_accuracy:.3f}")
    return 0


def main(argv=None) -> int:
    """Parse the flags, prepare the run, train. Returns the exit code."""
    began = time.perf_counter()                          # --max-hours are counted from here
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()          # it would print a line per checkpoint
    start()
    args = first(lambda: parse_args(argv, __doc__))
    with ExitStack() as stack:
        def own():
            stack.enter_context(owned(args.out))
            if args.resume is None:
                check_empty(args.out)                    # another process may have begun a run here meanwhile

        try:
            if args.dry_run:
                config_of(args)
                print(first(lambda: report(args, args.gpus or 1)))
                return 0
            if args.resume is not None:                  # its logs are cut when it is loaded
                first(own)
            run = prepare(args)
            if args.resume is None:
                first(own)
        except (ValueError, OSError) as error:
            return fail(error, 2)
        except torch.OutOfMemoryError as error:          # the other ranks may not know of it, here and below
            print(f"error: the model does not fit into the memory of the GPU: {first_line(error)} --dry-run says what "
                  "fits, torchrun divides the model among several GPUs, and --beta 0 needs no reference model",
                  file=sys.stderr)
            return 1
        try:
            first(lambda: write_config(run) if args.resume is None else keep_changes(args))
            code = train(run, began)
            end()
            return code
        except torch.OutOfMemoryError as error:          # torchrun ends the other ranks
            print(f"error: the memory of the GPU is full: {first_line(error)} Lower --micro-batch-tokens (it is "
                  f"{args.micro_batch_tokens}), or add --gradient-checkpointing; --dry-run says what fits. Go on with "
                  f"--resume {args.out} and these flags", file=sys.stderr)
            return 1
        except BadReward as error:
            return fail(f"{error}. A run keeps the reward that it began with, so a corrected one is a new run: remove "
                        f"{args.out}, or name another --out", 1)
        except OSError as error:                         # most often a full disk
            return fail(f"{error}. What was saved is still there: make room, then --resume {args.out}", 1)


if __name__ == "__main__":
    sys.exit(main())
