r"""GPU memory of a training run, part by part, computed before anything is downloaded.

    python train_gsm8k.py --preset math-7b --dry-run --gpus 8

The table gives bytes on each of N GPUs. The model has P parameters: B in each of its L layers, and R outside of the
layers. Its hidden size is h, its vocabulary V and the inner size of its MLP I, and q = heads * head_dim. A micro-batch
has T tokens. A chunk of the head has C = min(T, 4096) loss tokens (packing.score_rows).

    weights, gradients, reference   4 P/N each, and moments 8 P/N. There is a reference if beta > 0. Gradients are there
                                    in the update only. With offloading, only the reference is left on the GPU.
    gathered                        bf16 copies of the weights.
                                    Sampling: 2 P, and with compiled layers on one GPU 2 B in each of these.
                                    Update, one GPU: 2 P by autocast, and 6 B in a layer, which are its gradient in bf16
                                    and fp32.
                                    Autocast does not copy an input embedding that is not also the head. It is looked
                                    up, and in no product, so these are 2 (P - V h) then.
                                    Update, sharded: 2 R + 2 V h, which are the weights of R and the gradient of the
                                    head. The backward pass of a layer adds 10 B: its weights and gradients, the weights
                                    of the layer to come, and the gradients of the one before in fp32, which are on
                                    their way to be summed.
    KV cache                        Sampling: 2 L kv_heads head_dim * 2 per token of a row, for prompt and new tokens.
    logits                          Sampling: 14 V per row.
                                    Update: 12 V C, which are log-probabilities and two gradients in fp32.
    activations                     What a layer keeps for its backward pass, per token:
                                    2 norms: fp32 input, normalised, and a bf16 copy for each product that reads it
                                    q, k, v (k and v repeated for all heads), output twice: 5 q * 2
                                    MLP: gate, silu(gate), up, product: 4 I * 2
                                    mask: 2 per token of the longest row (T is an upper bound); none with compiled
                                    layers, whose attention needs none
                                    All L layers keep this. With gradient checkpointing there are L inputs, and one
                                    layer at a time.

Compiled layers also keep less of the rest, by an amount that only a measurement tells. For the two real runs on an
H200 (results/gsm8k) the formulas give 55 and 70 GB. Measured were 46 and 52, the second with compiled layers.

The peak of the update is either at the head, with logits and all that the layers keep, or in the backward pass of the
last layer. A tenth of a GPU's memory is left free for fragments, for CUDA and for NCCL.
"""
from bisect import bisect_left

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from packing import head_dim
from trainer.model import layers_of
from trainer.ranks import first_line
from variants import METHODS

GB = 2**30
USABLE = 0.9


def estimate(model, gpus=1, rows=1, row_tokens=1, micro_batch_tokens=1, reference=True, checkpointing=False,
             offload=False, compute=torch.bfloat16, compiled=False) -> dict:
    """Return {"sampling": {part: bytes}, "update": {part: bytes}} of each GPU, by the formulas at the top of the file.

    model: may be on the meta device. rows: number of sequences that are sampled at a time on a GPU, of row_tokens each.
    compute: the type of the computation, which is float32 on a CPU.
    """
    config, layers = model.config, layers_of(model)
    for name in ("num_key_value_heads", "intermediate_size"):
        if not isinstance(getattr(config, name, None), int):
            raise ValueError(f"a model of type {config.model_type} has no {name} in its config, which its memory is "
                             "computed from: --dry-run cannot size it")
    size = {name: sum(p.numel() for p in part.parameters()) for name, part in (("P", model), ("B", layers[0]))}
    depth, h, inner, vocabulary = len(layers), config.hidden_size, config.intermediate_size, config.vocab_size
    q, P, B = config.num_attention_heads * head_dim(config), size["P"], size["B"]
    R, T, C = P - depth * B, micro_batch_tokens, min(micro_batch_tokens, 4096)
    outside = 2 * R + 2 * vocabulary * h             # not in the layers; gathered once for both passes
    s = compute.itemsize
    sharded = gpus > 1
    autocast = s == 2 and not sharded
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    cast = P if tied or sharded else P - vocabulary * h
    residual = 4 if autocast else s                  # bytes per number that flows from layer to layer
    static = {"weights": 4 * P / gpus, "gradients": 4 * P / gpus, "moments": 8 * P / gpus}
    static = dict.fromkeys(static, 0) if offload else static
    static["reference"] = 4 * P / gpus if reference else 0

    sampling = {"gradients": 0, "gathered": 0 if s == 4 else 2 * cast + 2 * (compiled and autocast) * depth * B,
                **{name: rows * n for name, n in of_row(model, row_tokens, compute).items()}, "activations": 0}

    mask = 0 if compiled else T * s
    layer = T * (2 * (4 + residual) * h + (5 if autocast else 2) * s * h + 5 * q * s + 4 * inner * s + mask)
    kept = depth * (T * residual * h if checkpointing else layer)
    moments = {                                      # points in time of the update, not Adam's moments
        "at the head": {"activations": kept + T * (4 + 3 * residual) * h,
                        "logits": max(12 * C, 6 * h if autocast else 0) * vocabulary,
                        "gathered": sharded * outside + autocast * 2 * cast},
        "in the last layer": {"activations": kept + checkpointing * layer + T * 3 * inner * s, "logits": 0,
                              "gathered": sharded * (outside + 10 * B) + autocast * (2 * cast + 6 * B)}}
    update = max(moments.values(), key=lambda parts: sum(parts.values()))
    return {"sampling": static | sampling, "update": static | {"KV cache": 0} | update}


def of_row(model, tokens, compute) -> dict:
    """{part: bytes} of one row of so many tokens while it is sampled. compute: that of estimate()."""
    config, s = model.config, compute.itemsize
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return {"KV cache": tokens * 2 * config.num_hidden_layers * kv_heads * head_dim(config) * s,
            "logits": config.vocab_size * (s + 12)}


QWEN = dict(num_key_value_heads=2, vocab_size=151_936, tie_word_embeddings=True)
KNOWN = {                                            # models of the presets, which need no download
    "Qwen/Qwen2.5-0.5B-Instruct": Qwen2Config(**QWEN, num_hidden_layers=24, hidden_size=896, num_attention_heads=14,
                                              intermediate_size=4864),
    "Qwen/Qwen2.5-Math-1.5B": Qwen2Config(**QWEN, num_hidden_layers=28, hidden_size=1536, num_attention_heads=12,
                                          intermediate_size=8960),
    "Qwen/Qwen2.5-Math-7B": Qwen2Config(num_key_value_heads=4, vocab_size=152_064, tie_word_embeddings=False,
                                        num_hidden_layers=28, hidden_size=3584, num_attention_heads=28,
                                        intermediate_size=18_944)}


def load_geometry(name):
    """Return a model on the meta device, which has shapes and no numbers.

    name: a folder or a name on the hub. Raises ValueError when there is no such model.
    """
    try:
        config = KNOWN.get(name) or AutoConfig.from_pretrained(name)
    except Exception as error:                       # it may have many types, and the user needs one line
        raise ValueError(f"model {name!r}: no config.json could be read: {first_line(error)}") from error
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def seconds_line(args, parameters, gpus) -> str:
    """A rough estimate of the seconds of a step on H200 GPUs. The line says that it is one.

    It assumes responses of 40 % of the cap, failures of half of the rollouts, and branches of a third of a response.
    The rates are about those of the second real run (results/gsm8k/second-run.md), of prototypes with 0.494 G
    parameters: 2.1 ms for each token step, in which the weights are read once at 4.3 TB/s, 11.8 us for each sampled
    token, 2.4 us for grading it, and 70,000 tokens of the update a second with the reference pass. Of the authors'
    objective 40 % of the tokens have a weight. Rates of sampling and update are scaled by the number of parameters.
    """
    response, rollouts, size = 0.4 * args.max_new_tokens, args.questions * args.group_size, parameters / 0.494e9
    sampled = {"rollouts": rollouts * response, "branches": rollouts / 2 * args.branches * response / 3}
    token_step = 2.1e-3 + 2 * parameters / 4.3e12
    seconds = {name: token_step * args.max_new_tokens + size * 11.8e-6 * n / gpus for name, n in sampled.items() if n}
    tokens, share = sum(sampled.values()) / gpus, 0.4 if args.objective == "authors" else 1.0
    passes = (3 + (args.beta > 0) + args.gradient_checkpointing) / 4
    seconds |= {"grading": 2.4e-6 * tokens, "update": size * passes * share * tokens / 70_000}
    step = sum(seconds.values())
    return (f"a step: about {step:.0f} s on {gpus} H200, a rough estimate from a run of prototypes ("
            + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
            + f"); {args.steps} steps: about {args.steps * step / 3600:.0f} hours, without evaluations")


def largest(cost, limit) -> int:
    """The largest n with cost(n) <= limit, found by bisection. It is 0 if there is none."""
    return bisect_left(range(1, 2**24), True, key=lambda n: cost(n) > limit)


def largest_draw(args) -> int:
    """The most sequences that a step draws at a time: its rollouts, or K branches from every state of each that the
    method may branch."""
    return args.questions * args.group_size * max(1, args.branches * METHODS[args.method].forks(args))


def evaluated_at_once(args) -> int:
    """The most evaluation questions that are answered at a time: as many sequences as a step draws at a time, but 128
    at least. With steps of few sequences, evaluations in parts as small would take most of the time."""
    return max(128, largest_draw(args))


def estimate_run(args, model, gpus, rows=0, tokens=0) -> dict:
    """estimate() with the settings of a run."""
    return estimate(model, gpus, rows, args.max_prompt_tokens + args.max_new_tokens, tokens, args.beta > 0,
                    args.gradient_checkpointing, args.offload_optimizer, compiled=args.compile)


def update_warning(args, model, gpus, card) -> str | None:
    """What to say before a run whose update may need more than the `card` bytes of a GPU; None where it should fit."""
    def needed(tokens):
        return sum(estimate_run(args, model, gpus, tokens=tokens)["update"].values())

    try:
        if needed(args.micro_batch_tokens) <= card:
            return None
    except ValueError:                               # a model that cannot be sized
        return None
    tokens = largest(needed, USABLE * card) // 256 * 256
    fits = tokens >= args.max_prompt_tokens + args.max_new_tokens
    return (f"warning: the update may need {needed(args.micro_batch_tokens) / GB:.0f} GB, and a GPU has "
            f"{card / GB:.0f}: " + (f"--micro-batch-tokens {tokens} should fit" if fits else
                                    "--gradient-checkpointing, or more GPUs, may help") + " (--dry-run has the sums)")


def report(args, gpus) -> str:
    """Return what --dry-run prints for the settings of a run (trainer.settings.parse_args)."""
    model, width = load_geometry(args.model), args.max_prompt_tokens + args.max_new_tokens
    rollouts = args.questions * args.group_size
    rows = {"rollouts": rollouts, "branches": largest_draw(args) if args.branches else 0,
            "evaluation": min(args.eval_rows + args.val_rows, evaluated_at_once(args)) if args.eval_every else 0}
    rows = {phase: -(-n // gpus) for phase, n in rows.items() if n}

    def parts(phase, rows=0, tokens=0):
        return estimate_run(args, model, gpus, rows, tokens)[phase]

    phases = {phase: parts("sampling", n) for phase, n in rows.items()}
    phases["update"] = parts("update", tokens=args.micro_batch_tokens)
    sums = {phase: sum(memory.values()) for phase, memory in phases.items()}
    largest_phase = max(sums, key=sums.get)
    parameters = sum(p.numel() for p in model.parameters())

    def line(name, values):
        return f"{name:14}" + "".join(f"{value / GB:12.1f}" for value in values)

    host = f", {16 * parameters / gpus / GB:.1f} per GPU offloaded" if args.offload_optimizer else ""
    lines = [f"{args.model}: {parameters / 1e9:.2f} G parameters on {gpus} GPU{'s' * (gpus > 1)}; GB (2^30 bytes) on "
             "each, computed", "", " " * 14 + "".join(f"{phase:>12}" for phase in phases),
             *(line(name, [memory[name] for memory in phases.values()]) for name in phases["update"]),
             line("sum", sums.values()), "",
             f"the largest phase: {largest_phase}, {sums[largest_phase] / GB:.1f} GB",
             *(f"{phase}: {n} sequences of a GPU at a time, {width} tokens each"
               + ", at the most" * (phase == "branches") for phase, n in rows.items()),
             f"update: micro-batches of {args.micro_batch_tokens} tokens",
             f"host memory: {4 * parameters / GB:.1f} on rank 0 to load the model{host}",
              seconds_line(args, parameters, gpus),
              "", f"the largest sizes that fit, with {100 * (1 - USABLE):.0f} % of the memory left free:"]
    for card in (24, 40, 80, 141):
        limit = USABLE * card * GB
        batch = largest(lambda n: sum(parts("sampling", n).values()), limit)
        tokens = largest(lambda n: sum(parts("update", tokens=n).values()), limit)
        lines.append(f"{card} GB: {batch} rows at a time (more are split), --micro-batch-tokens {tokens // 256 * 256}"
                     if batch and tokens >= width else f"{card} GB: no ({width} tokens must fit in a micro-batch)")
    return "\n".join(lines)
