r"""Is this model sampled and scored exactly? A check by measurement, once, when a model is loaded.

Rows are packed, layers have windows, and logits are computed by the head alone (packing.score_rows). Samples come from
a cache that is cut and repeated (resample.sample). All of that is right for many architectures and silently wrong for
some. So a few short sequences of random tokens are scored and sampled in our way and by the model's own forward pass,
one sequence at a time. A difference beyond rounding refuses the model before anything is written.

For the check every sliding window is 4 tokens, because a short row would not reach the end of a real one.
"""
from contextlib import contextmanager

import torch

from packing import pack, score_rows
from resample import sample
from trainer import decoding
from trainer.ranks import first_line

WINDOW = 4
# In nats. The likeliest logits of a real model are often above 16, where one unit in the last place of bf16 is .125.
# Two tokens that are equally likely may then differ by that; a wrong mask or position makes differences of nats.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}


def check_model(model, name, training=True) -> None:
    """Raise ValueError when the model is not sampled, or (training) not scored, as its own forward pass says.

    model: on one device, not sharded. name: for the message. The model comes back in the mode it was in.
    """
    tolerance, was_training = TOLERANCE[model.dtype], model.training
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompt, response, first, second = (torch.randint(vocabulary, (n,), generator=generator).tolist()
                                       for n in (6, 9, 7, 5))
    sequences = [(prompt, response), (prompt + response[:4], first), (prompt, second)]

    def measure(what, function):
        try:
            with torch.no_grad():
                found = function()
        except Exception as error:                       # any type: what another architecture does is not ours to say
            raise ValueError(f"model {name!r} ({model.config.model_type}) cannot be used here: {what} fails with "
                             f"{type(error).__name__}: {first_line(error)}") from error
        if not found <= tolerance:                       # also nan
            raise ValueError(f"model {name!r} ({model.config.model_type}) cannot be used here: {what} differs from the "
                             f"model's own forward pass by {found:.2g} nats, more than rounding ({tolerance:.0e})")

    with short_windows(model):
        try:
            model.eval()
            measure("greedy sampling from a cache", lambda: sampling_error(model, [prompt, prompt[:2] + response]))
            if training:
                own = []
                measure("a forward pass of its own", lambda: own.append(own_logps(model, sequences)) or 0.0)
                packed = [pack(prompt, response, [(4, first), (0, second)])]
                separate = [pack(prefix, y) for prefix, y in sequences]
                for what, rows in (("rows that share a prefix", packed), ("plain rows", separate)):
                    measure(f"scoring of {what}", lambda rows=rows: largest(score_rows(model, rows)[0] - own[0]))
                model.train()                            # the mode of gradient checkpointing: anything random shows
                measure("scoring twice in training mode",
                        lambda: largest(score_rows(model, packed)[0] - score_rows(model, packed)[0]))
        finally:
            model.train(was_training)


def choose_sampler(model):
    """The function that samples this model: trainer.decoding.sample, or resample.sample. It prints which, and why.

    The second is for machines without a GPU, and for models that the first does not sample as their own forward pass
    says. model: that of check_model.
    """
    why = "there is no GPU"
    if torch.cuda.is_available():
        try:
            with torch.no_grad(), short_windows(model):
                error = sampling_error(model, [list(range(3, 9)), list(range(10, 19))], sampler=decoding.sample)
            why = None if error <= TOLERANCE[model.dtype] else f"the other loop differs by {error:.2g} nats"
        except Exception as failure:                     # any type, as in check_model
            why = f"the other loop fails with {type(failure).__name__}: {first_line(failure)}"
    print("sampling: " + ("the decoding loop of trainer/decoding.py" if why is None else
                          f"generate of transformers (resample.py), because {why}"))
    return decoding.sample if why is None else sample


def context_of(model) -> float:
    """The most tokens that a sequence of this model may have: inf where its config names no limit."""
    return getattr(model.config, "max_position_embeddings", None) or float("inf")


def check_prompts(model, name, prompts, stop, max_new_tokens) -> None:
    """Raise ValueError when the longest prompt and a response do not fit into the model's context, or when a token id
    of a prompt or a stop id has no embedding."""
    longest, size = max(map(len, prompts)), model.get_input_embeddings().weight.shape[0]
    if longest + max_new_tokens > context_of(model):
        raise ValueError(f"model {name!r} has a context of {context_of(model)} tokens, and the longest prompt has "
                         f"{longest}, a response up to {max_new_tokens}: lower --max-new-tokens or "
                         "--max-prompt-tokens")
    for what, largest_id in (("a prompt has", max(map(max, prompts))), ("the stop ids have", max(stop))):
        if largest_id >= size:
            raise ValueError(f"model {name!r} has embeddings for {size} tokens, and {what} the token {largest_id}: its "
                             "tokenizer is that of another model, or the embeddings were not resized")


def own_logps(model, sequences) -> torch.Tensor:
    """Log-probabilities of every y of (prefix, y) pairs by the model's own forward, one sequence at a time."""
    found = []
    for prefix, y in sequences:
        ids = torch.tensor([prefix + y], device=model.device)
        logp = model(input_ids=ids, use_cache=False).logits[0, len(prefix) - 1:-1].float().log_softmax(-1)
        found.append(logp.gather(-1, ids[0, len(prefix):, None])[:, 0])
    return torch.cat(found)


def sampling_error(model, prefixes, n=7, sampler=None) -> float:
    """How far greedy tokens of resample.sample are from the likeliest, by the model's own forward: nats, the largest.

    Not the tokens are compared but their log-probabilities, because two tokens may be equally likely. sampler: another
    function with the arguments of sample().
    """
    never = model.get_input_embeddings().weight.shape[0]                 # no stop id: every continuation has n tokens
    drawn = (sampler or sample)(model, prefixes, 2, max_new_tokens=n, eos_token_id=never, pad_token_id=0,
                                temperature=0.0)
    worst = [torch.zeros(())]
    for prefix, (y, again) in zip(prefixes, drawn):
        ids = torch.tensor([prefix + y], device=model.device)
        logp = model(input_ids=ids, use_cache=False).logits[0, len(prefix) - 1:-1].float().log_softmax(-1)
        chosen = logp.gather(-1, ids[0, len(prefix):, None])[:, 0]
        worst += [(logp.amax(-1) - chosen).abs().max(), torch.tensor(0.0 if y == again else float("inf"))]
    return torch.stack([error.cpu() for error in worst]).max().item()                # nan where there is one


def largest(difference: torch.Tensor) -> float:
    """The largest absolute value; nan where there is one."""
    return difference.abs().max().item()


@contextmanager
def short_windows(model):
    """Every sliding window is WINDOW tokens until the end of the block, for model and caches alike."""
    owners = {id(part): part for module in model.modules() for part in (module, getattr(module, "config", None))}
    changed = [(part, part.sliding_window) for part in owners.values() if getattr(part, "sliding_window", None)]
    for part, _ in changed:
        part.sliding_window = WINDOW
    try:
        yield
    finally:
        for part, window in changed:
            part.sliding_window = window
