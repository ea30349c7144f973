"""The work that speed.py measures: models of random weights, the samples of one step, and a clock.

sample_ours and update_ours do the work as a run does it, sample_plainly and update_plainly without any trick. Both give
the same result. Lengths and rewards are drawn beforehand, so that all variants of a row have equal work.
"""
import ctypes
import gc
import statistics
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

import deep_grpo
import resample
from deep_grpo import Fork, Group, Trajectory, objective
from loss import clipped_surrogate, k3_kl, loss_table, paper_weights
from packing import batch_tensors, micro_batches, pack, pack_groups
from trainer import decoding
from trainer.compiling import compiled_layers, compiled_rows, padded_to, plain_rows
from trainer.model import Ranks, precision
from trainer.ranks import device

# layers, width, heads, key/value heads, inner width, vocabulary, in Qwen2.5's proportions. "0.5b" and "1.5b" are its
# own; the vocabulary of the smaller ones is trimmed to 8k.
SIZES = {"test": (1, 32, 4, 1, 96, 64), "5m": (3, 256, 4, 1, 1392, 8192), "12m": (8, 256, 4, 1, 1392, 8192),
         "18m": (8, 320, 5, 1, 1736, 8192), "0.5b": (24, 896, 14, 2, 4864, 151936),
         "1.5b": (28, 1536, 12, 2, 8960, 151936)}


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
    """The prompts, lengths and rewards of one step. They are drawn beforehand, so all variants have the same to do.

    Every rollout has a length of its own, so a prompt is prefilled for each of them, and in a run only once.
    """

    def __init__(self, model, questions, mean, cap, prompt=110, group_size=8, branches=8, failed=0.45, depth=0.7):
        rng = np.random.default_rng(0)
        self.model, self.G, self.K = model, group_size, branches
        self.ids = lambda n: rng.integers(2, model.config.vocab_size, n).tolist()
        self.prompts = [self.ids(int(n)) for n in rng.integers(prompt // 2, prompt * 3 // 2, questions)]
        drawn = rng.lognormal(np.log(mean) - 0.08, 0.4, (questions, group_size))
        self.lengths = drawn.clip(max(1, mean // 8), cap).astype(int)
        # The first rollout of a question fails and the last one does not, so none is without an advantage. The others
        # fail at the rate that makes `failed` the share of all.
        others = (failed * group_size - 1) / max(1, group_size - 2)
        self.failed = rng.random((questions, group_size)) < (others if failed < 1 else 1)
        if failed < 1:
            self.failed[:, 0], self.failed[:, -1] = True, False
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


def mostly_dead(groups):
    """The groups, where three quarters of the questions and of the pivots now have equal rewards, as in real runs."""
    for i, g in enumerate(groups):
        for t in g.trajectories if i % 4 else ():
            t.reward = 0.0
    for i, fork in enumerate(fork for g in groups for t in g.trajectories for fork in t.forks):
        if i % 4:
            fork.rewards = [0.0] * len(fork.rewards)
    return groups


def loss_tokens(groups):
    """The number of tokens of all rollouts and branches."""
    return sum(len(y) for g in groups for t in g.trajectories for y in t.sequences)


def paper_step(args):
    """The questions and lengths of the paper's step on GSM8K; few and short ones for a test."""
    small = args.size == "test"
    return dict(questions=2, mean=12, cap=16) if small else dict(questions=64, mean=220, cap=512)


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
