r"""Speed and memory, side by side: each trick of this repository against the same work without it.

    python bench.py                     # every row, on the device that there is; half an hour on two cores
    python bench.py update head         # these rows
    python bench.py trl                 # needs: pip install trl==1.16.0
    python bench.py --gpu               # the paper's step with the shapes of Qwen2.5-0.5B

update      one packed row per rollout against a row per sequence, and what the rule of packing.py chooses
generation  one prefill per prefix, its cache repeated, against a prefill per branch; blocks against one call
passes      what the reference and old log-probabilities cost where they are needed
head        log-probabilities of loss tokens, in chunks, against logits of everything
step        a whole step against the same with every trick off
growth      how the parts of a step grow with K, G, response length, model size
trl         a GRPO step (K = 0) against TRL's GRPOTrainer
--gpu       decode: milliseconds per step; paper_update: by micro-batch; paper_whole, also in 24 GB; sharded: one GPU as
            it is and under fully_shard, against memory.py; trl

Weights are random, responses have lengths drawn beforehand (log-normal, as on GSM8K: sigma .4), so that all variants
do equal work. Every number is the median of --repeats runs in one process, variants alternating, after one that does
not count; memory is the peak above the start of a run, on a CPU of a further one. `x` is time over that of the first
variant. A row that fails is named, and the next one begins.
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
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, StaticCache

import deep_grpo
import resample
from deep_grpo import Config, Group, Trajectory, objective, score_groups
from loss import sequence_weights, weighted_objective
from packing import attention_length, micro_batches, pack, score_rows
from trainer.memory import estimate
from trainer.model import checkpoint_activations, gathered, precision, shard
from trainer.settings import OneLineParser, command_line, count

# Qwen2.5's proportions. "0.5b" and "1.5b" are its own; the vocabulary of the smaller ones is trimmed to 8k.
SIZES = {"test": (1, 32, 4, 1, 96, 64), "5m": (3, 256, 4, 1, 1392, 8192), "12m": (8, 256, 4, 1, 1392, 8192),
         "18m": (8, 320, 5, 1, 1736, 8192), "0.5b": (24, 896, 14, 2, 4864, 151936),
         "1.5b": (28, 1536, 12, 2, 8960, 151936)}
PEAK = 790e12                            # bf16 operations per second measured on one H200


def make_model(size, layers=None):
    """A Qwen2 with random weights, on the GPU if there is one."""
    depth, hidden, heads, kv_heads, inner, vocabulary = SIZES[size]
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, tie_word_embeddings=True,
                         num_hidden_layers=layers or depth, num_attention_heads=heads, num_key_value_heads=kv_heads,
                         max_position_embeddings=16384, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
                         bos_token_id=None, eos_token_id=1, pad_token_id=0)
    model = Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa").float()
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


class Work:
    """Prompts, lengths and rewards of one step, drawn beforehand: all variants have the same to do."""

    def __init__(self, model, questions, mean, cap, prompt=110, group_size=8, branches=8, failed=0.45, depth=0.7):
        rng = np.random.default_rng(0)
        self.model, self.G, self.K = model, group_size, branches
        self.ids = lambda n: rng.integers(2, model.config.vocab_size, n).tolist()
        self.prompts = [self.ids(int(n)) for n in rng.integers(prompt // 2, prompt * 3 // 2, questions)]
        drawn = rng.lognormal(np.log(mean) - 0.08, 0.4, (questions, group_size))
        self.lengths = drawn.clip(max(1, mean // 8), cap).astype(int)
        self.failed = rng.random((questions, group_size)) < (failed if branches else 0)
        self.pivots = (depth * self.lengths).astype(int)
        self.right = lambda: float(rng.random() < 0.5)

    def rollouts(self, draw):
        """The root rollouts, as groups, failures with their pivot."""
        per_row = [x for x in self.prompts for _ in range(self.G)]
        tails = draw(self.model, per_row, 1, self.lengths.reshape(-1).tolist())
        tails = iter(t for (t,) in tails)
        return [Group(x, [Trajectory(next(tails), 1.0 - f, p if f else None) for f, p in zip(failed, pivots)])
                for x, failed, pivots in zip(self.prompts, self.failed, self.pivots)]

    def branch(self, draw, groups):
        """The same groups with K branches at every pivot, as long as the rest of the failure was."""
        pivoted = [(g, t) for g in groups for t in g.trajectories if t.pivot is not None and self.K]
        if pivoted:
            drawn = draw(self.model, [g.prompt + t.response[:t.pivot] for g, t in pivoted], self.K,
                         [len(t.response) - t.pivot for _, t in pivoted])
            for (_, t), t.branches in zip(pivoted, drawn):
                t.branch_rewards = [self.right() for _ in t.branches]
        return groups

    def draw_random(self, model, prefixes, k, caps):
        """Random tokens where nothing needs to be sampled."""
        return [[self.ids(n) for _ in range(k)] for n in caps]

    def groups(self):
        """Rollouts and branches of random tokens."""
        return self.branch(self.draw_random, self.rollouts(self.draw_random))


# Ours, and the same without tricks

def draw_ours(model, prefixes, k, caps):
    """resample.sample; the stop id is one that no model samples, lengths are given by the caps."""
    with precision(model):
        return resample.sample(model, prefixes, k, max_new_tokens=caps, eos_token_id=model.config.vocab_size,
                               pad_token_id=0)


def draw_plainly(model, prefixes, k, caps):
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


def update_ours(model, groups, config, ref_model=None, tokens=4096):
    """Forward and backward of deep_grpo.objective; returns the loss."""
    with precision(model):
        return objective(model, groups, config, ref_model, None, tokens, backward=True)[0].item()


def update_plainly(model, groups, config, ref_model=None, tokens=4096):
    """The same gradient: a padded row per sequence, logits of all tokens, and a pass for old log-probabilities."""
    sequences = [(prefix, y, w) for g, ws in zip(groups, sequence_weights(groups, config))
                 for t, row in zip(g.trajectories, ws)
                 for prefix, y, w in [(g.prompt, t.response, row[0]),
                                      *((g.prompt + t.response[:t.pivot], y, w) for y, w in zip(t.branches, row[1:]))]]
    total, rows = 0.0, [pack(prefix, y) for prefix, y, _ in sequences]
    for batch in micro_batches(rows, tokens):
        part = [rows[i] for i in batch]
        with precision(model):
            with torch.no_grad():
                old = all_logits(model, part)
                ref = all_logits(ref_model, part) if ref_model is not None else None
            logp = all_logits(model, part)
        repeats = torch.tensor([len(sequences[i][1]) for i in batch], device=logp.device)
        weights = (logp.new_tensor(c).repeat_interleave(repeats) for c in zip(*(sequences[i][2][1:] for i in batch)))
        loss = -weighted_objective(logp, old, ref, *weights)
        loss.backward()
        total += loss.item()
    return total


def all_logits(model, rows):
    """score_rows without its tricks (rows of one sequence): a padding mask, all logits at once."""
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows], device=model.device)
    logp = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
    flat = torch.tensor([b * width + i for b, row in enumerate(rows) for i in row.predictors], device=model.device)
    targets = torch.tensor([t for row in rows for t in row.targets], device=model.device)
    return logp.flatten(0, 1)[flat].gather(-1, targets[:, None])[:, 0]


# Measuring

def peak_memory(run):
    """Megabytes of this process above the start at the worst moment of run(); None where the system does not tell."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")          # Linux: the peak counts from now on
        before = process_status("VmRSS:")
        run()
        return process_status("VmHWM:") - before
    except OSError:
        return None


def process_status(name):
    """A line of /proc/self/status, in megabytes."""
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) / 1024


def side_by_side(args, row, variants, work=None):
    """One row of the table: {variant: function} -> medians of alternating runs. work: {variant: text}."""
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
    """Wait for the GPU, where there is one: without, a clock there shows when work was handed over."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


ALWAYS, NEVER = np.inf, np.nan           # A in the rule of packing.pack_or_split: pack all rollouts, none (nan <= nan)


def with_length(a, run):
    """run() with this A instead of packing.attention_length."""
    with mock.patch.object(deep_grpo, "attention_length", lambda model: a):
        return run()


def tokens_through(model, groups, a):
    """Tokens that one pass over the groups computes."""
    return with_length(a, lambda: sum(len(row.ids) for row in deep_grpo.pack_groups(model, groups)))


# Rows of the table. Each is a generator of records; SHAPES are prompt + response up to the pivot : suffix, K, rollouts.

SHAPES = [(110, 154, 66, 8, 4), (110, 20, 200, 8, 2), (110, 154, 66, 0, 16), (1000, 2000, 900, 8, 1)]


def update(args):
    """Root-tree rows against one row per sequence: forward and backward of Eq. (J) without KL."""
    for shape in SHAPES:
        yield from update_shape(args, *shape)


def update_shape(args, prompt, prefix, suffix, k, n):
    """The two lines of one of SHAPES."""
    layers = 2 if prompt == 1000 else None                     # the long one would take an hour on a CPU
    model, config = make_model(args.size, layers), Config(beta=0.0)
    ids, scale = Work(model, 1, 8, 8).ids, 10 if args.size == "test" else 1
    groups = [Group(ids(prompt // scale), [
        Trajectory(ids((prefix + suffix) // scale), float(i % 2), prefix // scale,
                   [ids(suffix // scale) for _ in range(k)], [float(j % 2) for j in range(k)], 0.5)
        for i in range(n)])]

    fits = max(4096, (prompt + prefix + (k + 1) * suffix) // scale)

    def run(a):
        with_length(a, lambda: update_ours(model, groups, config, None, fits))
        model.zero_grad()

    packed, separate, chosen = (tokens_through(model, groups, a) for a in (ALWAYS, NEVER, attention_length(model)))
    yield from side_by_side(
        args, f"update {prompt}+{prefix}:{suffix} K={k}" + (f", {layers} layers" if layers else ""),
        {"packed": lambda: run(ALWAYS), "separate": lambda: run(NEVER)},
        {"packed": f"{packed} tokens; the rule takes {'packed' if chosen == packed else 'separate'}",
         "separate": f"{separate} tokens"})


def generation(args):
    """Branches of one pivot per prefix, in lengths as on GSM8K."""
    model = make_model(args.size)
    work = Work(model, args.questions, args.mean, args.cap, failed=1.0)
    groups = work.rollouts(work.draw_random)
    prefixes = [g.prompt + t.response[:t.pivot] for g in groups for t in g.trajectories]
    caps = [len(t.response) - t.pivot for g in groups for t in g.trajectories]

    def one_call():
        with mock.patch.object(resample, "BLOCK", 10**6):
            draw_ours(model, prefixes, work.K, caps)

    yield from side_by_side(args, f"branches of {len(prefixes)} prefixes, K={work.K}", {
        "prefill per prefix, blocks of 16": lambda: draw_ours(model, prefixes, work.K, caps),
        "prefill per branch, blocks of 16": lambda: draw_ours(
            model, [p for p in prefixes for _ in range(work.K)], 1, [c for c in caps for _ in range(work.K)]),
        "prefill per prefix, one call": one_call,
        "plain generate": lambda: draw_plainly(model, prefixes, work.K, caps)},
        {"prefill per prefix, blocks of 16": f"{sum(caps) * work.K} tokens"})


def passes(args):
    """An update with beta = 0 and one step per batch has one pass; what the others add when they are needed."""
    model, ref_model = make_model(args.size), make_model(args.size)
    groups = Work(model, args.questions, args.mean, args.cap).groups()
    runs = {"policy only (beta = 0, one update)": lambda: update_ours(model, groups, Config(beta=0.0)),
            "with the reference (beta > 0)": lambda: update_ours(model, groups, Config(), ref_model),
            "with old log-probabilities (two or more updates)": lambda: (
                score_groups(model, groups, Config(beta=0.0), 4096), update_ours(model, groups, Config(beta=0.0)))}
    yield from side_by_side(args, "update, which passes", runs)


def head(args):
    """Log-probabilities and their gradient, rows without branches: 16 of 110 + 220 tokens."""
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
        "logits of all tokens": lambda: run(lambda: all_logits(model, rows))})


def step(args):
    """Rollouts, branches, update with a reference; all tricks off is draw_plainly and update_plainly."""
    model, ref_model = make_model(args.size), make_model(args.size)
    clock = {}

    def run(name, draw, learn, branches=8):
        work = Work(model, args.questions, args.mean, args.cap, branches=branches)
        start = time.perf_counter()
        groups = work.rollouts(draw)
        times = [time.perf_counter() - start]
        groups = work.branch(draw, groups)
        times.append(time.perf_counter() - start - times[0])
        learn(model, groups, Config(), ref_model)
        synchronize()
        times.append(time.perf_counter() - start - sum(times))
        model.zero_grad()
        clock.setdefault(name, []).append(times)

    for k, title in ((8, "whole step, K=8"), (0, "whole step, K=0 (GRPO)")):
        clock.clear()
        records = side_by_side(args, title, {
            "as shipped": lambda k=k: run("as shipped", draw_ours, update_ours, k),
            "all tricks off": lambda k=k: run("all tricks off", draw_plainly, update_plainly, k)})
        for record in records:
            parts = [statistics.median(column) for column in zip(*clock[record["variant"]][1:args.repeats + 1])]
            record["work"] = "rollouts {:.0%}, branches {:.0%}, update {:.0%}".format(*(p / sum(parts) for p in parts))
        yield from records


def growth(args):
    """Rollouts, branches and update as one thing grows; x is against its first value."""
    yield from sweep(args, "K", [dict(branches=k) for k in (0, 2, 4, 8, 16)])
    yield from sweep(args, "G", [dict(group_size=g) for g in (2, 4, 8, 16)])
    yield from sweep(args, "length", [dict(mean=args.mean * f, cap=args.cap * f) for f in (1, 2, 4)])
    yield from sweep(args, "size", [dict(size=s) for s in {"12m": ("5m", "12m", "18m")}.get(args.size, [args.size])])


def sweep(args, name, settings):
    """A step by each of the settings, which are changes to Work or a size of the model."""
    base = dict(questions=max(1, args.questions // 2), mean=args.mean, cap=args.cap)
    models = {size: make_model(size) for size in {change.get("size", args.size) for change in settings}}

    def run(model, work):
        update_ours(model, work.branch(draw_ours, work.rollouts(draw_ours)), Config(beta=0.0))
        model.zero_grad()

    variants, texts = {}, {}
    for change in settings:
        label = ", ".join(f"{key}={value}" for key, value in change.items())
        changes = base | change
        model = models[changes.pop("size", args.size)]
        variants[label] = lambda model=model, changes=changes: run(model, Work(model, **changes))
        groups = Work(model, **changes).groups()
        generated = sum(len(y) for g in groups for t in g.trajectories for y in (t.response, *t.branches))
        texts[label] = f"{generated} generated, {tokens_through(model, groups, attention_length(model))} in the update"
    yield from side_by_side(args, f"step as {name} grows", variants, texts)


def trl(args):
    """A GRPO step against TRL's GRPOTrainer: same model, prompts, G, caps, beta, precision, rows in a micro-batch.

    Equal, too: T = 1, top_k 0, top_p 1, one update per batch, AdamW, no gradient checkpointing, sequence means
    (loss_type "grpo"), an entropy metric. Not equal: TRL's step includes tokenisation and its logging.
    """
    if importlib.util.find_spec("trl") is None:
        print("row trl left out: pip install trl==1.16.0", file=sys.stderr)
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
            tails = resample.sample(model, prompts, 8, max_new_tokens=cap, eos_token_id=1, pad_token_id=0)
        synchronize()
        ours["generation"].append(time.perf_counter() - start)
        groups = [Group(p, [Trajectory(y, float(j % 2)) for j, y in enumerate(ys)]) for p, ys in zip(prompts, tails)]
        with precision(model):
            deep_grpo.update(model, optimizer, groups, config, ref_model, rows * (prompt + cap))
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
    """GRPOTrainer on the prompts, `rows` in a micro-batch; fills times, and calls between() after each step."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import GRPOConfig, GRPOTrainer

    class Timed(GRPOTrainer):
        def _generate(self, *args, **kwargs):
            start = time.perf_counter()
            out = super()._generate(*args, **kwargs)
            synchronize()
            times["generation"].append(time.perf_counter() - start)
            return out

    class Clock(transformers.TrainerCallback):
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
        Timed(folder, args=settings, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
              callbacks=[Clock()], reward_funcs=lambda completions, **_: [float(j % 2) for j in range(len(completions))]
              ).train()


def decode_static(model, ids, n):
    """n sampled tokens after ids [B, L] from a static cache; on a GPU one step is a CUDA graph, replayed n times.

    The fastest way to decode that needs no other library, and no part of resample.py: it is here to show what is
    left on the table. Returns [B, n] (on a GPU after three tokens of warm-up).
    """
    batch, width = ids.shape
    cache = StaticCache(config=model.config, max_cache_len=width + n + 4)
    token, position = ids[:, -1:].clone(), torch.tensor([[width - 1]], device=ids.device)
    slots, out = torch.arange(width + n + 4, device=ids.device), []

    def one():
        logits = model(input_ids=token, position_ids=position.expand(batch, 1), past_key_values=cache, use_cache=True,
                       attention_mask=(slots <= position)[None, None]).logits[:, -1].float()
        noise = torch.empty_like(logits).exponential_()        # argmax p / noise is a draw from p, without a sync
        token.copy_((logits.softmax(-1) / noise).argmax(-1, keepdim=True))
        position.add_(1)

    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        replay = one
        if ids.is_cuda:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    one()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                one()
            replay = graph.replay
        for _ in range(n):
            replay()
            out.append(token.clone())
    return torch.cat(out, 1)


def decode(args):
    """Milliseconds per decode step after a prompt of 110 tokens, in bf16."""
    n, sizes = (4, (2, 3)) if args.size == "test" else (128, (64, 512, 1840))
    model = make_model(args.size).to(torch.bfloat16 if torch.cuda.is_available() else torch.float32).eval()

    def generate(ids, **extra):
        settings = GenerationConfig(max_new_tokens=n, do_sample=True, top_k=0, pad_token_id=0, **extra)
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)

    for batch in sizes:
        ids = torch.randint(2, model.config.vocab_size, (batch, 110), device=model.device)
        for record in side_by_side(args, f"decode, batch {batch}", {
                "generate": lambda ids=ids: generate(ids),
                "generate, static cache": lambda ids=ids: generate(ids, cache_implementation="static"),
                "static cache, CUDA graph": lambda ids=ids: decode_static(model, ids, n)}):
            yield record | {"work": f"{1000 * record['seconds'] / n:.2f} ms per step"}
    if torch.cuda.is_available():                              # graphs keep their memory
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def paper_update(args):
    """The update of the paper's step: packed and separate, DEEP-GRPO and GRPO; by micro-batch; with checkpointing."""
    model, config = make_model(args.size), Config(beta=0.0)
    head_size = model.get_output_embeddings().weight.numel()
    layers_size = sum(p.numel() for p in model.parameters()) - head_size               # tied: counted once

    def measured(title, k, tokens, lengths):
        groups = Work(model, **paper_step(args), branches=k).groups()
        loss_tokens = sum(len(y) for g in groups for t in g.trajectories for y in (t.response, *t.branches))

        def run(a):
            with_length(a, lambda: update_ours(model, groups, config, None, tokens))
            model.zero_grad()

        variants = {name: lambda a=a: run(a) for name, a in lengths.items()}
        for record in side_by_side(args, f"{title}, micro-batches of {tokens}", variants):
            through = tokens_through(model, groups, lengths[record["variant"]])
            rate = 6 * (layers_size * through + head_size * loss_tokens) / record["seconds"]
            yield record | {"work": f"{loss_tokens / record['seconds']:.0f} loss tokens/s, {through} tokens, "
                                    f"{100 * rate / PEAK:.1f} % of {PEAK / 1e12:.0f} TFLOP/s (without attention)"}

    packed, both = {"packed": ALWAYS}, {"packed": ALWAYS, "separate": NEVER}
    yield from measured("update, K=8", 8, 16384, both)
    yield from measured("update, K=0 (GRPO)", 0, 16384, both)
    for tokens in (8192, 32768):
        yield from measured("update, K=8", 8, tokens, packed)
    checkpoint_activations(model)
    for tokens in (8192, 16384, 32768):
        yield from measured("update, K=8, gradient checkpointing", 8, tokens, packed)


def paper_whole(args):
    """64 x 8 rollouts, 45 % branched at 70 % depth, AdamW, reference: as it is, and where 24 GB is all there is."""
    model, ref_model = make_model(args.size), make_model(args.size)
    optimizer, times = torch.optim.AdamW(model.parameters(), lr=1e-6), []

    def run(tokens):
        work, start = Work(model, **paper_step(args)), time.perf_counter()
        groups = work.rollouts(draw_ours)
        rolled = time.perf_counter()
        groups = work.branch(draw_ours, groups)
        branched = time.perf_counter()
        with precision(model):
            deep_grpo.update(model, optimizer, groups, Config(), ref_model, tokens)
        synchronize()
        times.append((rolled - start, branched - rolled, time.perf_counter() - branched))

    def measured(title, tokens):
        times.clear()
        for record in side_by_side(args, title, {"as shipped": lambda: run(tokens)}):
            yield record | {"work": "rollouts {:.2f} s, branches {:.2f} s, update {:.2f} s".format(
                *(statistics.median(column) for column in zip(*times[1:args.repeats + 1])))}

    yield from measured("whole step", 16384)
    checkpoint_activations(model)
    cuda = torch.cuda.is_available()
    try:
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(24 * 2**30 / torch.cuda.mem_get_info()[1])
        yield from measured("whole step in 24 GB, gradient checkpointing", 8192)
    finally:
        if cuda:
            torch.cuda.set_per_process_memory_fraction(1.0)


def sharded(args):
    """Sampling and update on one device, as they are and under `fully_shard` with nobody to share with.

    What FSDP costs where it gains nothing, and peak memory above that of weights beside the estimate of memory.py.
    16 questions, with gradient checkpointing.
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
            tokens = min(8192, tokens_through(models["one device"], groups, NEVER))
            width = max(map(len, work.prompts)) + int(work.lengths.max())
            parts = estimate(models["one device"], 1, rows, width, tokens, False, True, compute=compute)

            def sampling(model):
                with gathered(model):
                    Work(model, **shape).rollouts(draw_ours)

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
                    {"one device": f"memory.py: {computed / 2**20:.0f} MB"})
    finally:
        dist.destroy_process_group()


def paper_step(args):
    """The questions and lengths of GSM8K in the paper's step; few and short for a test."""
    small = args.size == "test"
    return dict(questions=2, mean=12, cap=16) if small else dict(questions=64, mean=220, cap=512)


ROWS = {row.__name__: row for row in (update, generation, passes, head, step, growth, trl)}
GPU_ROWS = {row.__name__: row for row in (decode, paper_update, paper_whole, sharded, trl)}


def main(argv=None) -> int:
    """The rows asked for, as a Markdown table; --json keeps every run."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS | GPU_ROWS)}; default: all of the "
                        "first seven")
    parser.add_argument("--gpu", action="store_true", help="the rows of the paper's step, Qwen2.5-0.5B's shapes")
    parser.add_argument("--size", choices=SIZES, help="model; default: 12m, with a GPU or --gpu 0.5b")
    parser.add_argument("--repeats", type=count, help="runs that count; 5, with --gpu 3")
    parser.add_argument("--json", type=Path, help="write all records, with hardware and versions")
    args = parser.parse_args(argv)
    args.repeats = args.repeats or (3 if args.gpu else 5)
    rows = args.rows or [*(GPU_ROWS if args.gpu else ROWS)]
    for name in rows:
        if name not in ROWS | GPU_ROWS:
            parser.error(f"argument ROW: {name!r} is not one of {', '.join(ROWS | GPU_ROWS)}")
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
                for record in (ROWS | GPU_ROWS)[name](args):
                    keep(record)
            except Exception:                        # the others are worth having
                failed.append(name)
                args.bar.write(traceback.format_exc(), file=sys.stderr)
    if failed:
        print(f"error: failed, see above: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
