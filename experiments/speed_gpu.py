"""The second list of speed.py (`--gpu`): the step of the paper in the shapes of Qwen2.5-0.5B.

Every function yields the records of its rows. At the size "test" all of them run on a CPU, too.
"""
import statistics
import time

import torch
import torch.distributed as dist

import deep_grpo
from deep_grpo import Config
from experiments.workload import (
    NEVER,
    SAMPLERS,
    Work,
    compiled_models,
    loss_tokens,
    make_model,
    mostly_dead,
    our_ranks,
    paper_step,
    sample_ours,
    side_by_side,
    synchronize,
    tokens_through,
    update_ours,
)
from packing import attention_length
from trainer.compiling import compiled_layers
from trainer.memory import estimate, of_row
from trainer.model import checkpoint_activations, gathered, precision, shard

PEAK = 790e12                            # bf16 operations per second, as measured on one H200
BANDWIDTH = 4.3e12                       # bytes per second of its memory, as measured, too


def time_decoding(args):
    """Milliseconds per token step after prompts of 110 tokens, by each of SAMPLERS: the time of n tokens minus that of
    one, which has the prefill, over n - 1. The largest batch is first, because torch chooses kernels by what it sees
    first."""
    n, sizes = (4, (3, 2)) if args.size == "test" else (128, (1688, 512, 64))
    model, prompt = make_model(args.size), 110
    config, compute = model.config, 2 if torch.cuda.is_available() else 4
    token = of_row(model, 1, torch.bfloat16 if torch.cuda.is_available() else torch.float32)["KV cache"]
    weights = compute * sum(p.numel() for p in model.parameters())

    def run(sampler, prompts, tokens):
        with precision(model):
            sampler(model, prompts, 1, max_new_tokens=tokens, eos_token_id=config.vocab_size, pad_token_id=0)

    for batch in sizes:
        prompts = torch.randint(2, config.vocab_size, (batch, prompt)).tolist()
        read = weights + batch * (prompt + n / 2) * token
        records = side_by_side(args, f"decode, batch {batch}", {
            (name, tokens): lambda sampler=sampler, prompts=prompts, tokens=tokens: run(sampler, prompts, tokens)
            for tokens in (n, 1) for name, sampler in SAMPLERS.items()})
        for record, one in zip(records, records[len(SAMPLERS):]):
            step = (record["seconds"] - one["seconds"]) / (n - 1)
            yield record | {"variant": record["variant"][0],
                            "work": f"{1000 * step:.2f} ms per token step, "
                                    f"{100 * read / step / BANDWIDTH:.0f} % of {BANDWIDTH / 1e12:.1f} TB/s"}


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
    """64 x 8 rollouts, 45 % of them branched at 70 % depth, AdamW, and a reference.

    Then the same with 68 % of failures and longer responses, as in the first steps of a real run, and with the memory
    of a 24 GB card. Three quarters of the questions and pivots have equal rewards. The paper's objective computes all
    of them, and that of the authors leaves them out.
    """
    model, ref_model = make_model(args.size), make_model(args.size)
    optimizer, times = torch.optim.AdamW(model.parameters(), lr=1e-6), []

    def run(tokens, form, **shape):
        config = Config(objective=form)
        work, start = Work(model, **paper_step(args) | shape), time.perf_counter()
        groups = work.rollouts(sample_ours)
        rolled = time.perf_counter()
        groups = mostly_dead(work.branch(sample_ours, groups))
        branched = time.perf_counter()
        with compiled_layers(*compiled_models(model, ref_model)):
            deep_grpo.update(model, optimizer, groups, config, ref_model, tokens, our_ranks())
        synchronize()
        times.append((rolled - start, branched - rolled, time.perf_counter() - branched))

    def measured(title, tokens, form, **shape):
        times.clear()
        for record in side_by_side(args, title, {f"{form} objective": lambda: run(tokens, form, **shape)}):
            whole = f", {torch.cuda.max_memory_allocated() / 2**30:.0f} GB with the models" if cuda else ""
            yield record | {"work": "rollouts {:.2f} s, branches {:.2f} s, update {:.2f} s".format(
                *(statistics.median(column) for column in zip(*times[1:args.repeats + 1]))) + whole}

    cuda = torch.cuda.is_available()
    first = dict(failed=0.68) if args.size == "test" else dict(failed=0.68, mean=320, cap=768)
    for title, shape in (("whole step", {}), ("first real step, 68 % fail", first)):
        for form in ("paper", "authors"):
            yield from measured(f"{title}, K=8", 16384, form, **shape)
            yield from measured(f"{title}, K=0 (GRPO)", 16384, form, branches=0, **shape)
    checkpoint_activations(model)
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
            parts = estimate(models["one device"], 1, rows, width, tokens, False, True, compute=compute,
                             compiled=cuda)

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
