r"""Speed and memory, side by side: each trick of this repository against the same work without it.

    python -m experiments.speed                    # all rows of the first list; half an hour on two cores
    python -m experiments.speed update head        # only these rows
    python -m experiments.speed trl                # needs: pip install trl==1.16.0
    python -m experiments.speed --gpu              # the second list: the step of the paper on a GPU

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
    paper_whole   the whole step of the paper with both objectives, with and without branches; the first step of a real
                  run, in which more rollouts fail; and the whole step in 24 GB of memory
    sharded       one GPU as it is and under fully_shard, with the estimate of trainer/memory.py beside it
    trl           as above

The weights are random. The lengths of responses are drawn beforehand, so that all variants do equal work. They are
log-normal with sigma 0.4, as on GSM8K. Every number is the median of --repeats runs in one process. The variants of a
row alternate, and a first run of each does not count. Memory is the peak above the start of a run. On a CPU a further
run measures it. The column x is the time over that of the first variant. When a row fails, its error is printed and the
next row begins.
"""
import argparse
import ctypes
import gc
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import deep_grpo
import resample
from deep_grpo import Config, Fork, Group, Trajectory, objective, score_groups
from loss import authors_weights, clipped_surrogate, k3_kl, loss_table, paper_weights
from packing import attention_length, batch_tensors, micro_batches, pack, pack_groups, score_rows
from trainer import decoding
from trainer.compiling import compiled_layers, compiled_rows, padded_to, plain_rows
from trainer.memory import estimate, of_row
from trainer.model import Ranks, checkpoint_activations, gathered, precision, shard
from trainer.ranks import device
from trainer.settings import OneLineParser, command_line, count

# layers, width, heads, key/value heads, inner width, vocabulary, in Qwen2.5's proportions. "0.5b" and "1.5b" are its
# own; the vocabulary of the smaller ones is trimmed to 8k.
SIZES = {"test": (1, 32, 4, 1, 96, 64), "5m": (3, 256, 4, 1, 1392, 8192), "12m": (8, 256, 4, 1, 1392, 8192),
         "18m": (8, 320, 5, 1, 1736, 8192), "0.5b": (24, 896, 14, 2, 4864, 151936),
         "1.5b": (28, 1536, 12, 2, 8960, 151936)}
PEAK = 790e12                            # bf16 operations per second, as measured on one H200
BANDWIDTH = 4.3e12                       # bytes per second of its memory, as measured, too


def make_model(size, layers=None):
    """A Qwen2 with random weights, on the GPU if there is one. layers: None is the number that the size has."""
    depth, hidden, heads, kv_heads, inner, vocabulary = SIZES[size]
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, tie_word_embeddings=True,
                         num_hidden_layers=layers or depth, num_attention_heads=heads, num_key_value_heads=kv_heads,
                         max_position_embeddings=16384, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
                         bos_token_id=None, eos_token_id=1, pad_token_id=0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa").float()


class Work:
    """The prompts, lengths and rewards of one step. They are drawn beforehand, so all variants have the same to do."""

    def __init__(self, model, questions, mean, cap, prompt=110, group_size=8, branches=8, failed=0.45, depth=0.7):
        rng = np.random.default_rng(0)
        self.model, self.G, self.K = model, group_size, branches
        self.ids = lambda n: rng.integers(2, model.config.vocab_size, n).tolist()
        self.prompts = [self.ids(int(n)) for n in rng.integers(prompt // 2, prompt * 3 // 2, questions)]
        drawn = rng.lognormal(np.log(mean) - 0.08, 0.4, (questions, group_size))
        self.lengths = drawn.clip(max(1, mean // 8), cap).astype(int)
        self.failed = rng.random((questions, group_size)) < failed
        if failed < 1:
            self.failed[:, 0], self.failed[:, -1] = True, False          # no question is without an advantage
        self.pivots = (depth * self.lengths).astype(int)
        self.depth = depth

    def rollouts(self, sampler):
        """The rollouts of all questions, as groups; every failed one has a Fork at its pivot if K > 0."""
        per_row = [x for x in self.prompts for _ in range(self.G)]
        responses = iter(y for (y,) in sampler(self.model, per_row, 1, self.lengths.reshape(-1).tolist()))
        return [Group(x, [Trajectory(next(responses), 1.0 - f, [Fork(int(p), self.depth)] if f and self.K else [])
                          for f, p in zip(failed, pivots)])
                for x, failed, pivots in zip(self.prompts, self.failed, self.pivots)]

    def branch(self, sampler, groups):
        """Give every Fork K branches, each as long as the rest of its rollout; returns the groups."""
        forked = [(g, t, fork) for g in groups for t in g.trajectories for fork in t.forks]
        if forked:
            drawn = sampler(self.model, [g.prompt + t.response[:fork.pivot] for g, t, fork in forked], self.K,
                            [len(t.response) - fork.pivot for _, t, fork in forked])
            for (*_, fork), branches in zip(forked, drawn):
                fork.branches, fork.rewards = branches, [float(j % 2) for j in range(len(branches))]
        return groups

    def sample_nothing(self, model, prefixes, k, caps):
        """Random tokens, where a row of the table does not measure sampling."""
        return [[self.ids(n) for _ in range(k)] for n in caps]

    def groups(self):
        """Rollouts and branches of random tokens."""
        return self.branch(self.sample_nothing, self.rollouts(self.sample_nothing))


# ---- the code of this repository, and the same work without its tricks ----

SAMPLERS = {"generate": resample.sample, "decoding loop": decoding.sample,
            "decoding loop, compiled layers": partial(decoding.sample, compile_layers=True)}


def our_sampler():
    """How a run samples: with the decoding loop and compiled layers, with a GPU."""
    return SAMPLERS["decoding loop, compiled layers" if torch.cuda.is_available() else "generate"]


def sample_ours(model, prefixes, k, caps):
    """As a run samples. The stop id is one that no model samples, so the caps give the lengths."""
    with precision(model):
        return our_sampler()(model, prefixes, k, max_new_tokens=caps, eos_token_id=model.config.vocab_size,
                             pad_token_id=0)


def sample_plainly(model, prefixes, k, caps):
    """One `generate` call for all rows, each prefilled by itself, until the longest has ended."""
    rows = [p for p in prefixes for _ in range(k)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rows], device=model.device)
    model.eval()
    settings = GenerationConfig(max_new_tokens=max(caps), do_sample=True, top_k=0, pad_token_id=0)
    with precision(model), torch.no_grad():
        out = model.generate(ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
    return [[out[n * k + j][:cap] for j in range(k)] for n, cap in enumerate(caps)]


def compiled_models(*models):
    """Those of the models whose layers a run compiles: all with a GPU, none without."""
    return [model for model in models if model is not None and torch.cuda.is_available()]


def our_ranks(compile=True):
    """How a run scores rows: compiled, with a GPU."""
    score = compiled_rows if compile and torch.cuda.is_available() else plain_rows
    return Ranks(score, padded_to(score, device()))


def update_ours(model, groups, config, ref_model=None, tokens=4096, compile=True):
    """The forward and backward pass of deep_grpo.objective, as a run computes it; returns the loss."""
    with compiled_layers(*compiled_models(model, ref_model) if compile else ()):
        return objective(model, groups, config, ref_model, None, tokens, backward=True,
                         ranks=our_ranks(compile))[0].item()


def update_plainly(model, groups, config, ref_model=None, tokens=4096):
    """The same gradient from a padded row per sequence, logits of all tokens, and a pass for log pi_old."""
    sequences = [(g.prompt + t.response[:pivot], y) for g in groups for t in g.trajectories
                 for pivot, y in [(0, t.response), *t.branches]]
    table = loss_table(groups, paper_weights(groups, config))
    of_sequence = table.split([len(y) for _, y in sequences])
    total, rows = 0.0, [pack(prefix, y) for prefix, y in sequences]
    for batch in micro_batches(rows, tokens):
        part = [rows[i] for i in batch]
        with precision(model):
            with torch.no_grad():
                old = score_plainly(model, part)
                ref = score_plainly(ref_model, part) if ref_model is not None else None
            logp = score_plainly(model, part)
        A, w, w_kl, *_ = torch.cat([of_sequence[i] for i in batch]).to(logp).T
        loss = -(w * clipped_surrogate(logp, old, A)).sum()
        if ref is not None:
            loss = loss + (w_kl * k3_kl(logp, ref)).sum()
        loss.backward()
        total += loss.item()
    return total


def score_plainly(model, rows):
    """The log-probabilities of packing.score_rows for rows of one sequence, from a padding mask and all logits."""
    ids, _, segments, _, predictors, targets = batch_tensors(rows, model.device)
    mask = (segments >= 0).long()
    logp = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    return logp.flatten(0, 1)[predictors].gather(-1, targets[:, None])[:, 0]


# ---- measuring ----

def peak_memory(run):
    """The peak of run(), in megabytes of this process above its start; None where the system does not tell."""
    gc.collect()                                               # models of earlier rows are cycles of references
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")          # on Linux the peak counts from now on
        before = process_status("VmRSS:")
        run()
        return process_status("VmHWM:") - before
    except OSError:
        return None


def process_status(name):
    """The value of a line of /proc/self/status, in megabytes."""
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) / 1024


def side_by_side(args, row, variants, work=None):
    """The records of one row of the table, from medians of alternating runs.

    variants: {name: function without arguments}. work: {name: what it had to do}, for the last column.
    """
    seconds, peaks, cuda = {name: [] for name in variants}, {}, torch.cuda.is_available()
    for repeat in range(args.repeats + 1):
        for name, run in variants.items():
            synchronize()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            run()
            synchronize()
            if repeat:                                         # the first one warms up
                seconds[name].append(time.perf_counter() - start)
            if cuda:
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
            args.bar.update()
    peaks = peaks or {name: peak_memory(run) for name, run in variants.items()}
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    first = next(iter(medians.values()))
    return [{"row": row, "variant": name, "x": medians[name] / first, "seconds": medians[name], "runs": seconds[name],
             "peak_mb": peaks[name], "work": (work or {}).get(name, "")} for name in variants]


def synchronize():
    """Wait for the GPU, where there is one. A clock would otherwise show when the work was handed over."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


ALWAYS, NEVER = np.inf, np.nan           # A of packing.pack_or_split: pack all rollouts, or none (nan <= nan is false)


def with_length(a, run):
    """run() with this A instead of packing.attention_length."""
    with mock.patch.object(deep_grpo, "attention_length", lambda model: a):
        return run()


def tokens_through(groups, a):
    """The number of tokens that one pass over the groups computes."""
    return sum(len(row.ids) for row in pack_groups(groups, a))


# ---- rows of the table: each function yields records ----

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
    groups = Work(model, max(4, args.questions), args.mean, args.cap).groups()
    for i, g in enumerate(groups):
        for t in g.trajectories if i % 4 else ():
            t.reward = 0.0
    for i, fork in enumerate(fork for g in groups for t in g.trajectories for fork in t.forks):
        if i % 4:
            fork.rewards = [0.0] * len(fork.rewards)
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
        parts = table[tokens].split([len(row.targets) for row in rows])
        for batch in micro_batches(rows, 16384):
            batch_tensors([rows[i] for i in batch], "cpu")
            torch.cat([parts[i] for i in batch])

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


def loss_tokens(groups):
    """The number of tokens of all rollouts and branches."""
    return sum(len(y) for g in groups for t in g.trajectories for y in t.sequences)


def time_trl(args):
    """A step of GRPO against TRL's GRPOTrainer.

    Equal are model, prompts, G, caps, beta, precision, and the number of rows in a micro-batch. Equal are also T = 1,
    top_k 0, top_p 1, one update per batch, AdamW, no gradient checkpointing, sequence means (loss_type "grpo") and a
    metric of entropy. TRL's step alone includes tokenisation and its logging.
    """
    if importlib.util.find_spec("trl") is None:
        print("the row trl is left out, because TRL is not installed: pip install trl==1.16.0", file=sys.stderr)
        return
    n, prompt, cap, rows = {"0.5b": (64, 100, 256, 32), "test": (2, 10, 8, 8)}.get(args.size, (4, 100, 96, 8))
    model, ref_model = make_model(args.size), make_model(args.size)
    ids = Work(model, 1, 8, 8).ids
    prompts = [ids(prompt) for _ in range(n)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    config = Config(branches=0, max_new_tokens=cap)
    clock = {name: {"generation": [], "update": []} for name in ("this repository", "TRL")}

    def our_step():
        ours, start = clock["this repository"], time.perf_counter()
        with precision(model):
            tails = our_sampler()(model, prompts, 8, max_new_tokens=cap, eos_token_id=1, pad_token_id=0)
        synchronize()
        ours["generation"].append(time.perf_counter() - start)
        groups = [Group(p, [Trajectory(y, float(j % 2)) for j, y in enumerate(ys)]) for p, ys in zip(prompts, tails)]
        with compiled_layers(*compiled_models(model, ref_model)):
            deep_grpo.update(model, optimizer, groups, config, ref_model, rows * (prompt + cap), our_ranks())
        synchronize()
        ours["update"].append(time.perf_counter() - start - ours["generation"][-1])
        args.bar.update()

    train_with_trl(model, prompts, config, rows, args.repeats + 1, clock["TRL"], our_step)
    for part in ("generation", "update"):
        medians = {name: statistics.median(times[part][1:]) for name, times in clock.items()}
        for name, times in clock.items():
            yield {"row": f"GRPO {part}, {n} x 8 x {prompt}+{cap}", "variant": name, "seconds": medians[name],
                   "x": medians[name] / medians["this repository"], "runs": times[part][1:], "peak_mb": None,
                   "work": ""}


def train_with_trl(model, prompts, config, rows, steps, times, between):
    """Run GRPOTrainer on the prompts, `rows` in a micro-batch. Fills `times`, and calls between() after each step."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import GRPOConfig, GRPOTrainer

    class TimedTrainer(GRPOTrainer):
        def _generate(self, *args, **kwargs):
            start = time.perf_counter()
            out = super()._generate(*args, **kwargs)
            synchronize()
            times["generation"].append(time.perf_counter() - start)
            return out

    class StepTimer(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):                # after the optimizer
            synchronize()
            times["update"].append(time.perf_counter() - self.start - times["generation"][-1])
            between()

    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(model.config.vocab_size)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="w1", pad_token="w0", padding_side="left")
    data = [{"prompt": " ".join(f"w{i}" for i in p)} for p in prompts] * steps
    gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        settings = GRPOConfig(
            output_dir=folder, model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"}, bf16=gpu,
            use_cpu=not gpu, per_device_train_batch_size=rows, gradient_accumulation_steps=len(prompts) * 8 // rows,
            num_generations=8, max_completion_length=config.max_new_tokens, beta=config.beta, loss_type="grpo",
            learning_rate=1e-6, lr_scheduler_type="constant", max_steps=steps, gradient_checkpointing=False,
            report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=10**6, shuffle_dataset=False)
        trainer = TimedTrainer(
            folder, args=settings, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
            callbacks=[StepTimer()],
            reward_funcs=lambda completions, **_: [float(j % 2) for j in range(len(completions))])
        trainer.train()


def time_decoding(args):
    """Milliseconds per token step after prompts of 110 tokens, by each of SAMPLERS."""
    n, sizes = (4, (2, 3)) if args.size == "test" else (128, (64, 512, 1688))
    model, prompt = make_model(args.size), 110
    config, compute = model.config, 2 if torch.cuda.is_available() else 4
    token = of_row(model, 1, torch.bfloat16 if torch.cuda.is_available() else torch.float32)["KV cache"]
    weights = compute * sum(p.numel() for p in model.parameters())

    def run(sampler, prompts):
        with precision(model):
            sampler(model, prompts, 1, max_new_tokens=n, eos_token_id=config.vocab_size, pad_token_id=0)

    for batch in sizes:
        prompts = torch.randint(2, config.vocab_size, (batch, prompt)).tolist()
        read = weights + batch * (prompt + n / 2) * token
        for record in side_by_side(args, f"decode, batch {batch}", {
                name: lambda sampler=sampler, prompts=prompts: run(sampler, prompts)
                for name, sampler in SAMPLERS.items()}):
            step = record["seconds"] / n
            yield record | {"work": f"{1000 * step:.2f} ms per token step, {100 * read / step / BANDWIDTH:.0f} % of "
                                    f"{BANDWIDTH / 1e12:.1f} TB/s"}


def time_paper_update(args):
    """The update of the paper's step: compiled and not, DEEP-GRPO and GRPO, by micro-batch, and checkpointed."""
    model, config = make_model(args.size), Config(beta=0.0)
    head_size = model.get_output_embeddings().weight.numel()
    layers_size = sum(p.numel() for p in model.parameters()) - head_size               # tied: counted once

    def measured(title, k, tokens):
        groups = Work(model, **paper_step(args), branches=k).groups()
        scored, through = loss_tokens(groups), tokens_through(groups, attention_length(model))

        def run(compile):
            update_ours(model, groups, config, None, tokens, compile)
            model.zero_grad()

        for record in side_by_side(args, f"{title}, micro-batches of {tokens}", {
                "compiled": lambda: run(True), "not compiled": lambda: run(False)}):
            rate = 6 * (layers_size * through + head_size * scored) / record["seconds"]
            yield record | {"work": f"{scored / record['seconds']:.0f} loss tokens/s, {through} tokens, "
                                    f"{100 * rate / PEAK:.1f} % of {PEAK / 1e12:.0f} TFLOP/s (without attention)"}

    yield from measured("update, K=8", 8, 16384)
    yield from measured("update, K=0 (GRPO)", 0, 16384)
    yield from measured("update, K=8", 8, 32768)
    checkpoint_activations(model)
    yield from measured("update, K=8, gradient checkpointing", 8, 16384)


def time_paper_step(args):
    """64 x 8 rollouts, 45 % of them branched at 70 % depth, AdamW and, for the paper's objective, a reference.

    Then the same with 68 % of failures, as in the first steps of a real run, and with the memory of a 24 GB card.
    """
    model, ref_model = make_model(args.size), make_model(args.size)
    optimizer, times = torch.optim.AdamW(model.parameters(), lr=1e-6), []

    def run(tokens, form, **shape):
        config = Config(objective=form, beta=1e-4 if form == "paper" else 0.0)
        work, start = Work(model, **paper_step(args) | shape), time.perf_counter()
        groups = work.rollouts(sample_ours)
        rolled = time.perf_counter()
        groups = work.branch(sample_ours, groups)
        branched = time.perf_counter()
        with compiled_layers(*compiled_models(model, ref_model)):
            deep_grpo.update(model, optimizer, groups, config, ref_model if config.beta else None, tokens, our_ranks())
        synchronize()
        times.append((rolled - start, branched - rolled, time.perf_counter() - branched))

    def measured(title, tokens, form, **shape):
        times.clear()
        for record in side_by_side(args, title, {f"{form} objective": lambda: run(tokens, form, **shape)}):
            yield record | {"work": "rollouts {:.2f} s, branches {:.2f} s, update {:.2f} s".format(
                *(statistics.median(column) for column in zip(*times[1:args.repeats + 1])))}

    for form in ("paper", "authors"):
        yield from measured("whole step, K=8", 16384, form)
        yield from measured("whole step, K=0 (GRPO)", 16384, form, branches=0)
    yield from measured("first real step, 68 % fail", 16384, "paper", failed=0.68)
    checkpoint_activations(model)
    cuda = torch.cuda.is_available()
    try:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(24 * 2**30 / torch.cuda.mem_get_info()[1])
        yield from measured("whole step in 24 GB, gradient checkpointing", 8192, "paper")
    finally:
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)


def time_sharding(args):
    """Sampling and update on one device, as they are and under `fully_shard` with no other process.

    This shows what FSDP costs where it gains nothing. The last column has what trainer/memory.py expects as the peak
    above the weights. There are 16 questions, and gradients are checkpointed.
    """
    cuda = torch.cuda.is_available()
    shape = paper_step(args) | ({} if args.size == "test" else dict(questions=16, cap=256))
    compute = torch.bfloat16 if cuda else torch.float32
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for size in ("test",) if args.size == "test" else ("0.5b", "1.5b"):
            models = {"one device": make_model(size), "fully_shard": shard(make_model(size), compute)}
            work = Work(models["one device"], **shape)
            groups, rows = work.groups(), len(work.prompts) * work.G
            tokens = min(8192, tokens_through(groups, NEVER))
            width = max(map(len, work.prompts)) + int(work.lengths.max())
            parts = estimate(models["one device"], 1, rows, width, tokens, False, True, compute=compute)

            def sampling(model):
                with gathered(model):
                    Work(model, **shape).rollouts(sample_ours)

            def learning(model, groups=groups, tokens=tokens):
                update_ours(model, groups, Config(beta=0.0), None, tokens)
                model.zero_grad()

            for model in models.values():
                checkpoint_activations(model)
            for phase, run, before in (("sampling", sampling, ("weights", "gradients", "moments")),
                                       ("update", learning, ("weights", "moments"))):
                computed = sum(n for name, n in parts[phase].items() if name not in before)
                yield from side_by_side(args, f"{size}, {phase}", {
                    name: lambda model=model, run=run: run(model) for name, model in models.items()},
                    {"one device": f"trainer/memory.py: {computed / 2**20:.0f} MB"})
    finally:
        dist.destroy_process_group()


def paper_step(args):
    """The questions and lengths of the paper's step on GSM8K; few and short ones for a test."""
    small = args.size == "test"
    return dict(questions=2, mean=12, cap=16) if small else dict(questions=64, mean=220, cap=512)


COMPARISONS = {"update": time_updates, "host": time_host, "weights": time_weights, "generation": time_generation,
               "passes": time_passes, "head": time_head, "step": time_steps, "growth": time_growth, "trl": time_trl}
GPU_COMPARISONS = {"decode": time_decoding, "paper_update": time_paper_update, "paper_whole": time_paper_step,
                   "sharded": time_sharding, "trl": time_trl}


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
