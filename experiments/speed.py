r"""Speed and memory, side by side: each trick of this repository against the same work without it.

    python -m experiments.speed                    # all rows of the first list; half an hour on two cores
    python -m experiments.speed update head        # only these rows
    python -m experiments.speed trl                # needs: pip install trl==1.16.0
    python -m experiments.speed --gpu              # the second list: the step of the paper on a GPU
    python -m experiments.speed --gpu decode       # only this row; each takes some minutes of one H200, estimated

Each row is a comparison. The first list is for any device:

    update        one packed row per rollout against a row per sequence, and what the rule of packing.py chooses
    host          what the host does before a pass of the paper's step: rows, micro-batches, tensors, the loss table
    weights       the authors' objective with the sequences that have no weight left out, and computed
    generation    one prefill per prefix against one per branch, and blocks of tokens against one call
    passes        what the reference and the old log-probabilities cost where they are needed
    head          log-probabilities of the loss tokens in chunks against the logits of all tokens
    step          a whole step against the same step with every trick off
    growth        how a step grows with K, with G, with the length of responses and with the model
    trl           a step of GRPO (K = 0) against TRL's GRPOTrainer

The second list has the shapes of Qwen2.5-0.5B and the step of the paper:

    decode        milliseconds per token step, by loop, and the share of the memory's bandwidth
    paper_update  the update of the paper's step, compiled and not, by micro-batch
    paper_whole   the whole step of the paper with both objectives, with and without branches; the same for the first
                  step of a real run, in which more rollouts fail; and the whole step in 24 GB of memory
    sharded       one GPU as it is and under fully_shard, with the estimate of trainer/memory.py beside it

The weights are random. The lengths of responses are drawn beforehand, so that all variants do equal work. They are
log-normal with sigma 0.4, as on GSM8K. Every number is the median of --repeats runs in one process. The variants of a
row alternate, and a first run of each does not count. Memory is the peak above the start of a run. On a CPU a further
run measures it. The column x is the time over that of the first variant. When a row fails, its error is printed and the
next row begins.
"""
import argparse
import json
import statistics
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import torch
import transformers
from tqdm import tqdm

import deep_grpo
import resample
from deep_grpo import Config, Fork, Group, Trajectory, score_groups
from experiments.speed_gpu import time_decoding, time_paper_step, time_paper_update, time_sharding
from experiments.speed_trl import time_trl
from experiments.workload import (
    ALWAYS,
    NEVER,
    SIZES,
    Work,
    loss_tokens,
    make_model,
    mostly_dead,
    paper_step,
    sample_ours,
    sample_plainly,
    score_plainly,
    side_by_side,
    synchronize,
    tokens_through,
    update_ours,
    update_plainly,
    with_length,
)
from loss import authors_weights, loss_table, paper_weights
from packing import attention_length, batch_tensors, micro_batches, pack, pack_groups, score_rows
from trainer.model import Ranks, precision
from trainer.settings import OneLineParser, command_line, count

# The update in four shapes: tokens of prompt, response up to the pivot, and suffix; K; number of rollouts.
SHAPES = [(110, 154, 66, 8, 4), (110, 20, 200, 8, 2), (110, 154, 66, 0, 16), (1000, 2000, 900, 8, 1)]


def time_updates(args):
    """Packed rows against one row per sequence: forward and backward of Eq. (J) without KL."""
    for shape in SHAPES:
        yield from time_update_of(args, *shape)


def time_update_of(args, prompt, prefix, suffix, k, n):
    """The two records of one of SHAPES."""
    layers = 2 if prompt == 1000 else None                     # the long shape would take an hour on a CPU
    model, config = make_model(args.size, layers), Config(beta=0.0)
    ids, scale = Work(model, 1, 8, 8).ids, 10 if args.size == "test" else 1

    def rollout(i):
        response = ids((prefix + suffix) // scale)
        branches = [ids(suffix // scale) for _ in range(k)]
        forks = [Fork(prefix // scale, 0.5, branches, [float(j % 2) for j in range(k)])] if k else []
        return Trajectory(response, float(i % 2), forks)

    groups = [Group(ids(prompt // scale), [rollout(i) for i in range(n)])]
    fits = max(4096, (prompt + prefix + (k + 1) * suffix) // scale)

    def run(a):
        with_length(a, lambda: update_ours(model, groups, config, None, fits))
        model.zero_grad()

    packed, separate, chosen = (tokens_through(groups, a) for a in (ALWAYS, NEVER, attention_length(model)))
    yield from side_by_side(
        args, f"update {prompt}+{prefix}:{suffix} K={k}" + (f", {layers} layers" if layers else ""),
        {"packed": lambda: run(ALWAYS), "separate": lambda: run(NEVER)},
        {"packed": f"{packed} tokens; the rule takes {'packed' if chosen == packed else 'separate'}",
         "separate": f"{separate} tokens"})


def time_weights(args):
    """The authors' objective where three quarters of the questions and of the pivots teach nothing."""
    model, config = make_model(args.size), Config(objective="authors")
    groups = mostly_dead(Work(model, max(4, args.questions), args.mean, args.cap).groups())
    needed, _ = deep_grpo.needed_sequences(groups, loss_table(groups, authors_weights(groups, config)), False)

    def left_out():
        update_ours(model, groups, config)
        model.zero_grad()

    def computed():
        with mock.patch.object(deep_grpo, "needed_sequences", lambda groups, table, has_kl: (None, slice(None))):
            left_out()

    a = attention_length(model)
    yield from side_by_side(args, "update, authors' objective", {"left out": left_out, "computed": computed}, {
        "left out": f"{sum(len(row.ids) for row in pack_groups(groups, a, 4096, needed))} tokens",
        "computed": f"{sum(len(row.ids) for row in pack_groups(groups, a, 4096))} tokens"})


def time_host(args):
    """What is done on the host before a pass over the paper's step: the device waits for it, so it must be short.

    The rows of Qwen2.5-0.5B with 64 questions; no model is needed.
    """
    groups = Work(make_model("test"), **paper_step(args)).groups()
    config, a = Config(), 7100.0                               # packing.attention_length of Qwen2.5-0.5B
    branches = sum(len(t.branches) for g in groups for t in g.trajectories)

    def host():
        table = loss_table(groups, paper_weights(groups, config))
        needed, tokens = deep_grpo.needed_sequences(groups, table, True)
        rows = pack_groups(groups, a, 16384, needed)
        constants, _ = table[tokens], deep_grpo.sampled_logps(groups)[tokens]
        of_row = torch.arange(len(constants)).split([len(row.targets) for row in rows])
        for batch in micro_batches(rows, 16384):
            batch_tensors([rows[i] for i in batch], "cpu")
            constants[torch.cat([of_row[i] for i in batch])]

    for record in side_by_side(args, "host time of a pass", {"as shipped": host}):
        yield record | {"work": f"{1000 * record['seconds']:.0f} ms, {tokens_through(groups, a)} tokens, "
                                f"{branches} branches"}


def time_generation(args):
    """Branches of one pivot per prefix, in lengths as on GSM8K."""
    model = make_model(args.size)
    work = Work(model, args.questions, args.mean, args.cap, failed=1.0)
    groups = work.rollouts(work.sample_nothing)
    forked = [(g.prompt, t.response, fork.pivot) for g in groups for t in g.trajectories for fork in t.forks]
    prefixes = [prompt + response[:pivot] for prompt, response, pivot in forked]
    caps = [len(response) - pivot for _, response, pivot in forked]

    def one_call():
        with mock.patch.object(resample, "BLOCK", 10**6):
            sample_ours(model, prefixes, work.K, caps)

    yield from side_by_side(args, f"branches of {len(prefixes)} prefixes, K={work.K}", {
        "prefill per prefix, blocks of 16": lambda: sample_ours(model, prefixes, work.K, caps),
        "prefill per branch, blocks of 16": lambda: sample_ours(
            model, [p for p in prefixes for _ in range(work.K)], 1, [c for c in caps for _ in range(work.K)]),
        "prefill per prefix, one call": one_call,
        "plain generate": lambda: sample_plainly(model, prefixes, work.K, caps)},
        {"prefill per prefix, blocks of 16": f"{sum(caps) * work.K} tokens"})


def time_passes(args):
    """An update with beta = 0 and one step per batch has one pass; what the others add where they are needed."""
    model, ref_model = make_model(args.size), make_model(args.size)
    groups = Work(model, args.questions, args.mean, args.cap).groups()
    config = Config(beta=0.0)
    runs = {"policy only (beta = 0, one update)": lambda: update_ours(model, groups, config),
            "with the reference (beta > 0)": lambda: update_ours(model, groups, Config(), ref_model),
            "with old log-probabilities (two or more updates)": lambda: (
                score_groups(model, groups, config, 4096, Ranks()), update_ours(model, groups, config))}
    yield from side_by_side(args, "update, which passes", runs)


def time_head(args):
    """Log-probabilities and their gradient, for 16 rows of 110 + 220 tokens without branches."""
    model = make_model(args.size)
    ids, n = Work(model, 1, 8, 8).ids, 16 if args.size != "test" else 2
    rows = [pack(ids(110), ids(220)) for _ in range(n)]

    def run(score):
        with precision(model):
            score().sum().backward()
        model.zero_grad()

    yield from side_by_side(args, f"log-probabilities of {n} x 110+220 tokens", {
        "loss tokens, chunks of 4,096 (as shipped)": lambda: run(lambda: score_rows(model, rows)[0]),
        "loss tokens, chunks of 512": lambda: run(lambda: score_rows(model, rows, chunk=512)[0]),
        "logits of all tokens": lambda: run(lambda: score_plainly(model, rows))})


def time_steps(args):
    """Rollouts, branches, and an update with a reference. All tricks off is sample_plainly and update_plainly."""
    model, ref_model = make_model(args.size), make_model(args.size)
    clock = {}

    def run(name, sampler, learn, branches=8):
        work = Work(model, args.questions, args.mean, args.cap, branches=branches)
        start = time.perf_counter()
        groups = work.rollouts(sampler)
        times = [time.perf_counter() - start]
        groups = work.branch(sampler, groups)
        times.append(time.perf_counter() - start - times[0])
        learn(model, groups, Config(), ref_model)
        synchronize()
        times.append(time.perf_counter() - start - sum(times))
        model.zero_grad()
        clock.setdefault(name, []).append(times)

    for k, title in ((8, "whole step, K=8"), (0, "whole step, K=0 (GRPO)")):
        clock.clear()
        records = side_by_side(args, title, {
            "as shipped": lambda k=k: run("as shipped", sample_ours, update_ours, k),
            "all tricks off": lambda k=k: run("all tricks off", sample_plainly, update_plainly, k)})
        for record in records:
            parts = [statistics.median(column) for column in zip(*clock[record["variant"]][1:args.repeats + 1])]
            record["work"] = "rollouts {:.0%}, branches {:.0%}, update {:.0%}".format(*(p / sum(parts) for p in parts))
        yield from records


def time_growth(args):
    """Rollouts, branches and update while one quantity grows; x compares with its first value."""
    yield from time_growth_of(args, "K", [dict(branches=k) for k in (0, 2, 4, 8, 16)])
    yield from time_growth_of(args, "G", [dict(group_size=g) for g in (2, 4, 8, 16)])
    yield from time_growth_of(args, "length", [dict(mean=args.mean * f, cap=args.cap * f) for f in (1, 2, 4)])
    sizes = ("5m", "12m", "18m") if args.size == "12m" else (args.size,)
    yield from time_growth_of(args, "size", [dict(size=size) for size in sizes])


def time_growth_of(args, name, settings):
    """A step with each of the settings, which are arguments of Work or a size of the model."""
    base = dict(questions=max(1, args.questions // 2), mean=args.mean, cap=args.cap)
    models = {size: make_model(size) for size in {change.get("size", args.size) for change in settings}}

    def run(model, work):
        update_ours(model, work.branch(sample_ours, work.rollouts(sample_ours)), Config(beta=0.0))
        model.zero_grad()

    variants, texts = {}, {}
    for change in settings:
        label = ", ".join(f"{key}={value}" for key, value in change.items())
        changes = base | change
        model = models[changes.pop("size", args.size)]
        variants[label] = lambda model=model, changes=changes: run(model, Work(model, **changes))
        groups = Work(model, **changes).groups()
        generated = loss_tokens(groups)
        texts[label] = f"{generated} generated, {tokens_through(groups, attention_length(model))} in the update"
    yield from side_by_side(args, f"step as {name} grows", variants, texts)


COMPARISONS = {"update": time_updates, "host": time_host, "weights": time_weights, "generation": time_generation,
               "passes": time_passes, "head": time_head, "step": time_steps, "growth": time_growth, "trl": time_trl}
GPU_COMPARISONS = {"decode": time_decoding, "paper_update": time_paper_update, "paper_whole": time_paper_step,
                   "sharded": time_sharding}


def main(argv=None) -> int:
    """Print the rows that are asked for as a Markdown table; --json keeps every run."""
    known = COMPARISONS | GPU_COMPARISONS
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW",
                        help=f"Names a row of the table: {', '.join(known)}. The default is all rows of the first "
                        "list, and with --gpu all of the second.")
    parser.add_argument("--gpu", action="store_true",
                        help="Takes the second list and the shapes of Qwen2.5-0.5B. The default is the first list.")
    parser.add_argument("--size", choices=SIZES,
                        help="Chooses the model. The default is 12m, and 0.5b where there is a GPU or with --gpu.")
    parser.add_argument("--repeats", type=count,
                        help="Sets the number of runs that count. The default is 5, and 3 with --gpu.")
    parser.add_argument("--json", type=Path, help="Names a file for all records, with hardware and versions. The "
                        "default is to write no file.")
    args = parser.parse_args(argv)
    args.repeats = args.repeats or (3 if args.gpu else 5)
    rows = args.rows or [*(GPU_COMPARISONS if args.gpu else COMPARISONS)]
    for name in rows:
        if name not in known:
            parser.error(f"argument ROW: {name!r} is not one of {', '.join(known)}")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"argument --json: there is no folder {args.json.parent}")
    cuda = torch.cuda.is_available()
    args.size = args.size or ("0.5b" if cuda or args.gpu else "12m")
    args.questions, args.mean, args.cap = {"0.5b": (64, 220, 512), "test": (2, 12, 16)}.get(args.size, (2, 110, 256))
    transformers.logging.set_verbosity_error()
    about = {"device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
             "torch": torch.__version__, "transformers": transformers.__version__, "size": args.size,
             "command": command_line("-m experiments.speed", argv)}
    print(", ".join(f"{name} {value}" for name, value in about.items()), end="\n\n")
    print("| row | variant | x | seconds | peak MB | work |\n|---|---|---|---|---|---|")
    records, failed = [], []

    def keep(record):
        records.append(record)
        peak = "" if record["peak_mb"] is None else f"{record['peak_mb']:.0f}"
        args.bar.write(f"| {record['row']} | {record['variant']} | {record['x']:.2f} | {record['seconds']:.3f} "
                       f"| {peak} | {record['work']} |", file=sys.stdout)
        if args.json:
            args.json.write_text(json.dumps(about | {"records": records}, indent=1) + "\n")

    with tqdm(desc="runs", unit="run") as args.bar:
        for name in rows:
            try:
                for record in known[name](args):
                    keep(record)
            except Exception:                        # the other rows are worth having
                failed.append(name)
                args.bar.write(traceback.format_exc(), file=sys.stderr)
    if failed:
        print(f"error: failed, see above: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
