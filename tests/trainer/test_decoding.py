"""The decoding loop of GPUs, on a CPU without graphs: all tests of sampling once more, and what is its own."""
import contextlib
import gc
import math
import weakref

import pytest
import torch
from conftest import EOS, argmax_step_by_step, make_model
from test_check import WINDOWED, random_model
from test_resample import (  # noqa: F401
    RAGGED,
    assert_drawn_from,
    draw,
    drawn_by,
    test_a_cap_for_each_prefix,
    test_bad_arguments_are_named,
    test_ends_are_kept_and_nothing_follows_them,
    test_greedy_equals_argmax_for_ragged_prefixes,
    test_no_prefixes_no_samples,
    test_no_row_goes_beyond_the_last_position,
    test_one_prefill_for_all_branches,
    test_out_of_memory_halves_the_batch_and_goes_on,
    test_pad_equal_to_eos_loses_no_eos,
    test_rows_that_have_ended_leave_the_batch,
    test_same_seed_same_samples_and_branches_differ,
    test_sampled_distribution_is_softmax_of_logits_over_t_whatever_the_checkpoint_says,
    test_the_librarys_own_top_k_does_not_cut_the_vocabulary,
    test_the_model_comes_back_as_it_was,
    test_the_pad_id_inside_a_prefix_is_a_token_like_any_other,
    test_unlikely_tokens_come_up_as_often_as_they_should,
    test_what_the_policy_thought_of_every_token_is_kept,
)
from torch.fx.experimental.proxy_tensor import make_fx

import resample
import train_gsm8k
from trainer import decoding
from trainer.check import choose_sampler, sampling_error
from trainer.compiling import stopwatch
from trainer.memory import of_row
from trainer.settings import parse_args


@pytest.fixture
def path():
    """The imported tests sample with this module."""
    return decoding


def greedy_of(model, k=1, **changes):
    return drawn_by(decoding, model, k=k, **changes)


# ---- the cache and the memory ----

@pytest.mark.parametrize("kind", [*WINDOWED, "llama", "qwen3", "gemma", "mixtral", "phimoe", "gpt2", "opt", "gpt_neox",
                                  "falcon", "persimmon", "gpt_bigcode"])
def test_any_architecture_is_sampled_as_its_own_forward_pass_says(kind):
    """24 tokens are more than the window of 4, and the prefixes have different lengths."""
    dtype = torch.float32 if kind in ("mixtral", "phimoe") else torch.float64        # experts know no float64
    model = random_model(kind, dtype, **{"sliding_window": 4} if kind in WINDOWED else {})
    error = sampling_error(model, [[3, 4, 9, 5, 6, 7], [8, 10]], n=24, sampler=decoding.sample)
    assert error < (1e-4 if dtype == torch.float32 else 1e-6)


def test_prefixes_are_prefilled_in_batches_the_shortest_first(monkeypatch):
    model, shapes = make_model(), []
    expected = greedy_of(model, k=2)
    model.register_forward_pre_hook(lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
                                    with_kwargs=True)
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 13)                  # of lengths 1, 2, 6 and 11
    assert greedy_of(model, k=2) == expected
    assert shapes[:4] == [(2, 1), (1, 5), (1, 10), (8, 1)]               # without the last token of each


def test_what_does_not_fit_into_memory_is_not_tried(monkeypatch, recwarn):
    model, sizes, draw_block = make_model(), [], decoding.draw_block
    expected = greedy_of(model, k=3)
    columns = decoding.columns_for(11, 9)                                # the longest prefix and its continuation
    row = sum(of_row(model, columns, torch.float64).values())

    def watched(model, fixed, *args):
        sizes.append(fixed.shape[0])
        return draw_block(model, fixed, *args)

    monkeypatch.setattr(decoding, "draw_block", watched)
    for rows, parts in ((5.5, [4, 4, 4]), (100, [12]), (0.1, [1] * 12)):             # a tenth is left free
        sizes.clear()
        monkeypatch.setattr(decoding, "free_memory", lambda device, rows=rows: int(rows * row))
        assert greedy_of(model, k=3) == expected and sizes == parts
    assert not recwarn


def test_attention_of_one_token_is_that_of_torch():
    torch.manual_seed(0)
    for heads, groups in ((14, 2), (4, 4), (3, 1)):
        query = torch.randn(5, 1, heads, 8, dtype=torch.float64).transpose(1, 2)
        key, value = torch.randn(2, 5, groups, 9, 8, dtype=torch.float64)
        mask = torch.rand(5, 1, 1, 9) < 0.6
        mask[..., 3] = True
        for scaling in (None, 0.3):
            found, _ = decoding.attend(None, query, key, value, mask, scaling=scaling, sliding_window=4)
            right = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scaling,
                                                                     enable_gqa=True)
            torch.testing.assert_close(found, right.transpose(1, 2), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="softcap"):
        decoding.attend(None, query, key, value, mask, softcap=30.0)


@pytest.mark.parametrize("width, new, columns", [(11, 9, 32), (1, 1, 16), (5, 4, 16), (5, 5, 24)])
def test_columns_are_a_multiple_of_eight_and_some_are_never_read(width, new, columns):
    assert decoding.columns_for(width, new) == columns
    fixed = decoding.FixedCache(2, columns, torch.device("cpu"))
    for column in range(width - 1, width + new - 1):
        fixed.begin_block(column, width + new - 1 - column)
        assert fixed.length % 8 == 0 and width + new - 1 <= fixed.length < columns


def test_rows_are_counted_in_the_type_of_the_computation_beside_the_copies_of_the_weights(monkeypatch):
    model = make_model(dtype=torch.float32)
    P = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(decoding, "free_memory", lambda device: 10**7)
    assert decoding.rows_that_fit(model, 24) == int(0.9 * 10**7 // sum(of_row(model, 24, torch.float32).values()))
    assert decoding.rows_that_fit(model, 24, True) == decoding.rows_that_fit(model, 24)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    row = sum(of_row(model, 24, torch.bfloat16).values())
    for layers, copies in ((False, 2 * P), (True, 4 * P)):
        assert decoding.rows_that_fit(model, 24, layers) == int((0.9 * 10**7 - copies) // row)


@pytest.mark.parametrize("fraction, free", [(1.0, 100 + 70 - 30), (0.15, 150 - 30)])
def test_free_memory_is_what_the_driver_has_and_torch_holds_in_reserve(monkeypatch, fraction, free):
    """And not more than the part of it that this process may have."""
    for name, value in (("mem_get_info", (100, 1000)), ("memory_reserved", 70), ("memory_allocated", 30),
                        ("get_per_process_memory_fraction", fraction)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert decoding.free_memory(torch.device("cuda")) == free


@pytest.mark.parametrize("fails", [False, True])
def test_the_cache_is_gone_when_the_call_ends(monkeypatch, fails):
    """On a GPU it has gigabytes. Python's collector of cycles would look for it much later, so it is off here."""
    tensors, initialize = [], decoding.FixedLayer.lazy_initialization

    def watched(layer, *states):
        initialize(layer, *states)
        tensors.extend(weakref.ref(x) for x in (layer.keys, layer.values))

    monkeypatch.setattr(decoding.FixedLayer, "lazy_initialization", watched)
    model, draw_block, calls = make_model(), decoding.draw_block, []

    def out_of_memory(*args):
        calls.append(sum(x() is not None for x in tensors))
        if len(calls) == 1:
            raise torch.OutOfMemoryError
        return draw_block(*args)

    monkeypatch.setattr(decoding, "draw_block", out_of_memory if fails else draw_block)
    gc.collect()
    gc.disable()
    try:
        with pytest.warns(UserWarning, match="out of memory") if fails else contextlib.nullcontext():
            assert greedy_of(model, k=2)
        assert len(tensors) == (4 if not fails else 12) and not any(x() is not None for x in tensors)
        assert calls in ([], [4] * 3)                                    # those of the own attempt, and no others
    finally:
        gc.enable()


def test_a_batch_of_prefixes_may_have_all_of_its_tokens(monkeypatch):
    for tokens, batches in ((18, [[1, 2, 0], [3]]), (17, [[1, 2], [0], [3]])):       # of lengths 6, 1, 2 and 11
        monkeypatch.setattr(decoding, "PREFILL_TOKENS", tokens)
        assert decoding.prefill_batches(RAGGED, range(4)) == batches


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_under_autocast_the_loop_has_a_cache_in_half_precision(temperature, monkeypatch):
    model, types, update = make_model(dtype=torch.float32), set(), decoding.FixedLayer.update

    def watched(*args, **kwargs):
        found = update(*args, **kwargs)
        types.update(states.dtype for states in found)
        return found

    monkeypatch.setattr(decoding.FixedLayer, "update", watched)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        drawn = drawn_by(decoding, model, k=20, temperature=temperature)
    assert types == {torch.bfloat16}
    for prefix, tails in zip(RAGGED, drawn):
        for tail in tails:
            logits = model(input_ids=torch.tensor([prefix + tail])).logits[0, len(prefix) - 1:-1]
            logp = (logits / temperature).log_softmax(-1)[range(len(tail)), tail]
            assert (torch.tensor(tail.logps) - logp).abs().mean() < 0.2


def test_scores_and_draws_are_computed_in_fp32():
    torch.manual_seed(0)
    scores = (torch.randn(4, 2, 3, 50) * 5).bfloat16()
    p = decoding.masked_softmax(scores, torch.ones(4, 1, 1, 50, dtype=torch.bool), 0.3)
    torch.testing.assert_close(p, (scores.float() * 0.3).softmax(-1), rtol=0, atol=1e-6)
    logits = (torch.randn(64, 50) * 5).bfloat16()
    token, logp, entropy = decoding.draw(logits, 0.7)
    right = (logits.float() / 0.7).log_softmax(-1)
    assert entropy.dtype == torch.float32
    torch.testing.assert_close(logp, right[range(64), token], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_attend_cannot_do_it_refuses(name):
    x, mask = torch.zeros(1, 2, 1, 4), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    decoding.attend(None, x, x, x, mask, **{name: None})
    with pytest.raises(ValueError, match=name):
        decoding.attend(None, x, x, x, mask, **{name: 3.0})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_named_without_a_prefill(temperature):
    model = make_model()
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        drawn_by(decoding, model, [[3]], temperature=temperature)


# ---- the draw ----

def test_the_noise_is_exponential_for_every_uniform_number():
    """All 2^24 numbers that torch.rand gives. An unlikely token wins with an E of about its probability."""
    E = decoding.exponential(torch.arange(2**24, dtype=torch.float32) / 2**24).double()
    assert 0 < E.min() < 2**-24 and E.log().isfinite().sum() >= 2**24 - 1
    for x in (1e-6, 1e-5, 1e-4, 0.01, 1.0, 10.0):
        assert abs((E < x).double().mean() - (1 - math.exp(-x))) <= 2**-24


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_million_draws_of_unlikely_tokens(temperature):
    """20 tokens of probability 1e-4, 10 of 1e-5 and one that is nearly always drawn."""
    p = torch.tensor([1e-4] * 20 + [1e-5] * 10 + [1 - 2.1e-3], dtype=torch.float64)
    torch.manual_seed(0)
    logits, counts = (p.log() * temperature).float().expand(100_000, -1), torch.zeros(31)
    for _ in range(10):
        token, logp, entropy = decoding.draw(logits, temperature)
        counts += torch.bincount(token, minlength=31)
    assert_drawn_from(counts.tolist(), p.tolist(), 30)
    torch.testing.assert_close(logp.double(), p.log()[token], rtol=0, atol=2e-6)
    assert entropy[0].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-6)


@pytest.mark.slow
def test_compiled_functions_give_the_same_and_are_compiled_once():
    torch._dynamo.reset_code_caches()
    torch._dynamo.utils.counters.clear()
    for n, length in ((40, 70), (33, 128), (7, 192)):
        torch.manual_seed(0)
        scores, mask = torch.randn(n, 2, 7, length), torch.rand(n, 1, 1, length) < 0.7
        mask[..., 0] = True
        torch.testing.assert_close(decoding.compiled(decoding.masked_softmax)(scores, mask, 0.125),
                                   decoding.masked_softmax(scores, mask, 0.125), rtol=1e-5, atol=1e-7)
        logits = torch.randn(n, 500) * 3
        token, logp, entropy = decoding.compiled(decoding.draw)(logits, 0.7)
        right = (logits / 0.7).log_softmax(-1)
        torch.testing.assert_close(logp, right[range(n), token], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy, -(right.exp() * right).sum(-1), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    logits, counts = torch.tensor([0.1, 0.2, 0.7]).log().expand(30_000, -1), torch.zeros(3)
    counts += torch.bincount(decoding.compiled(decoding.draw)(logits, 1.0)[0], minlength=3)
    assert_drawn_from(counts.tolist(), [0.1, 0.2, 0.7], 2)


# ---- graphs ----

def test_a_token_step_can_be_replayed(monkeypatch):
    """A CUDA graph repeats the same kernels on the same tensors. So does a trace of the step, on a CPU."""
    model, blocks = make_model(2), []
    expected = drawn_by(decoding, model, k=2, max_new_tokens=40)
    draw_block = decoding.draw_block

    def traced(step):
        state = [t for t in blocks[-1] if isinstance(t, torch.Tensor)]
        fixed = blocks[-1][1]
        state += [fixed.column, *(states for layer in fixed.layers for states in (layer.keys, layer.values))]
        before = [t.clone() for t in state]
        graph = make_fx(step, tracing_mode="real")()                     # this runs the step once ...
        for now, then in zip(state, before):                             # ... which a capture does not
            now.copy_(then)
        step.__closure__[step.__code__.co_freevars.index("index")].cell_contents.fill_(1)
        return graph

    def watched(*args):
        blocks.append(args)
        return draw_block(*args)

    monkeypatch.setattr(decoding, "draw_block", watched)
    monkeypatch.setattr(decoding, "makes_graphs", lambda model: True)
    monkeypatch.setattr(decoding, "captured", traced)
    monkeypatch.setitem(decoding.ASKS_THE_HOST, model, False)
    monkeypatch.setattr(decoding, "BLOCK", 8)
    assert drawn_by(decoding, model, k=2, max_new_tokens=40) == expected
    assert len(blocks) == 5 and len({len(args[3]) for args in blocks}) > 1           # rows have left


@pytest.fixture
def like_a_gpu(monkeypatch):
    """The loop makes graphs, which here are functions that run anew. Returns what it did, in order."""
    did, graph_step = [], decoding.captured
    monkeypatch.setattr(decoding, "makes_graphs", lambda model: True)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", did.append)
    monkeypatch.setattr(decoding, "captured", lambda step: did.append("capture") or step)
    return did, graph_step


def test_a_model_that_asks_the_host_is_found_before_a_capture(like_a_gpu, monkeypatch):
    """It is sampled step by step, and nothing is captured. The step that broke off is made again."""
    did, _ = like_a_gpu
    model, calls = make_model(), []
    expected = [[argmax_step_by_step(model, p, 9, {EOS})] for p in RAGGED]

    def synchronizes(*_):
        calls.append(did[-1:])
        if did[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation\nmore")

    handle = model.base_model.layers[1].register_forward_hook(synchronizes)
    with pytest.warns(UserWarning, match="sampling is slower: called a synchronizing CUDA operation$"):
        assert greedy_of(model) == expected
    assert did == ["error", 0] and calls.count(["error"]) == 1
    assert greedy_of(model) == expected and did == ["error", 0]          # it is asked once
    handle.remove()


def test_a_model_that_does_not_ask_is_captured_once_a_block(like_a_gpu, monkeypatch):
    did, _ = like_a_gpu
    monkeypatch.setattr(decoding, "BLOCK", 4)
    model = make_model()
    expected = [[argmax_step_by_step(model, p, 9, {EOS})] for p in RAGGED]
    assert greedy_of(model) == expected and greedy_of(model) == expected
    assert did[:3] == ["error", 0, "capture"] and set(did[3:]) == {"capture"} and len(did) > 4


def test_a_capture_that_fails_costs_the_graph_and_not_the_loop(like_a_gpu, monkeypatch):
    """What was captured has not run, so the same tokens come without a graph, and it is not tried again."""
    model, tries = make_model(), []
    expected = [[argmax_step_by_step(model, p, 9, {EOS})] for p in RAGGED]

    def fails(step):
        tries.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(decoding, "captured", fails)
    with pytest.warns(UserWarning, match="sampling is slower: operation not permitted when stream is capturing$"):
        assert greedy_of(model) == expected
    assert greedy_of(model) == expected and len(tries) == 1


@pytest.mark.parametrize("hidden", [False, True])
def test_no_memory_for_a_graph_is_no_other_failure(like_a_gpu, monkeypatch, recwarn, hidden):
    """It reaches resample.sample, which halves the rows, and the stream is the one of before. hidden: the end of the
    capture fails, too, with another error."""
    did, captured = like_a_gpu
    streams = []

    class Graph:
        def __init__(self, *_):
            self.replay = None

        def __enter__(self):
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                if hidden:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

        def __exit__(self, *_):
            return False

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "mine")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(decoding, "captured", captured)
    with pytest.raises(torch.OutOfMemoryError):
        greedy_of(make_model())
    assert streams == ["mine"] * 3 and ["generating 4" in str(w.message) for w in recwarn] == [True, False]


def test_what_was_tried_is_halved_and_not_what_was_asked_for(monkeypatch):
    """Of 16 rows, memory should hold 5, and holds 2."""
    tried, draw_block = [], decoding.draw_block

    def two_rows(model, fixed, *others):
        tried.append(fixed.rows)
        if fixed.rows > 2:
            raise torch.OutOfMemoryError("no room")
        return draw_block(model, fixed, *others)

    expected, model = greedy_of(make_model(), k=4), make_model()
    monkeypatch.setattr(decoding, "rows_that_fit", lambda *_: 5)
    monkeypatch.setattr(decoding, "draw_block", two_rows)
    with pytest.warns(UserWarning, match="generating 5 sequences at once; going on with 2"):
        assert greedy_of(model, k=4) == expected
    assert tried[0] == 5 and max(tried[1:]) == 2


def test_no_memory_in_the_step_that_is_tried_is_no_question_to_the_host(like_a_gpu, recwarn):
    did, _ = like_a_gpu
    model = make_model()

    def full(*_):
        if did[-1:] == ["error"]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.base_model.layers[1].register_forward_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        greedy_of(model)
    assert did == ["error", 0] * 3 and model not in decoding.ASKS_THE_HOST
    assert all("out of memory while generating" in str(w.message) for w in recwarn)


# ---- which loop a run has ----

def test_which_loop_samples_and_why(monkeypatch, capsys):
    model = make_model(dtype=torch.float32)
    assert choose_sampler(model) is resample.sample and "because there is no GPU" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_sampler(model) is decoding.sample and "trainer/decoding.py" in capsys.readouterr().out

    def broken(*args, **settings):
        raise KeyError("no keys\nhere")

    wrong = lambda *args, **settings: [[[5] * 7] * 2] * 2                # noqa: E731
    for loop, reason in ((broken, "fails with KeyError: 'no keys"), (wrong, "differs by ")):
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "sample", loop)
            assert choose_sampler(model) is resample.sample
        line, = capsys.readouterr().out.splitlines()
        assert "generate of transformers" in line and reason in line


def test_the_loop_is_not_chosen_for_an_error_without_words(monkeypatch, capsys):
    def broken(*args, **settings):
        raise NotImplementedError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(decoding, "sample", broken)
    assert choose_sampler(make_model(dtype=torch.float32)) is resample.sample
    assert "NotImplementedError" in capsys.readouterr().out


def test_windows_are_short_when_the_loop_is_chosen(monkeypatch):
    model, seen, sample = random_model("mistral", torch.float32, sliding_window=100), [], decoding.sample
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(decoding, "sample",
                        lambda *a, **k: seen.append(model.config.sliding_window) or sample(*a, **k))
    choose_sampler(model)
    assert seen == [4] and model.config.sliding_window == 100


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neox", "falcon", "persimmon", "gpt_bigcode"])
def test_a_model_that_names_no_key_heads_has_a_size(kind):
    model = random_model(kind)
    if hasattr(model.config, "num_key_value_heads"):
        del model.config.num_key_value_heads
    assert of_row(model, 5, torch.float32)["KV cache"] >= 5 * 2 * 2 * 8 * 4


@pytest.mark.slow
def test_a_step_and_an_evaluation_of_the_embedded_task_on_both_loops(tmp_path, monkeypatch):
    """Greedy answers are the same, token for token. The sampler and the update are one policy, to rounding."""
    answers = []
    for loop in (resample, decoding):
        monkeypatch.setattr(train_gsm8k, "choose_sampler", lambda model, loop=loop: loop.sample)
        flags = ["--preset", "tiny", "--eval-rows", "40", "--lr", "1e-3"]
        run = train_gsm8k.prepare(parse_args([*flags, "--out", str(tmp_path / loop.__name__)]))
        answers.append(run.policy.sample([q.prompt for q in run.eval_questions], 1, 96, temperature=0))
        run.policy.rewards = lambda pairs: [float(i % 2) for i in range(len(pairs))]
        for _ in range(2):                                               # the second one on changed weights
            metrics = train_gsm8k.train_step(run)[0]
            assert 0 < metrics["sampler_gap"] < metrics["sampler_gap_max"] < 1e-4 and 0 < metrics["entropy"] < 2
    assert answers[0] == answers[1] and len({len(y) for (y,) in answers[0]}) > 1


# ---- compiled layers ----

@pytest.mark.slow
def test_compiled_layers_draw_the_same_and_nothing_is_compiled_after_the_warm_up():
    torch._dynamo.reset_code_caches()
    model, before = make_model(2, torch.float32), stopwatch.seconds
    assert decoding.warm_up(model, True) is None and stopwatch.seconds > before
    before = stopwatch.seconds
    for prefixes, k in ((RAGGED, 9), (RAGGED[:2], 2), (RAGGED[:1], 1), ([[3]], 2)):      # at times one row is left
        plain, compiled = (drawn_by(decoding, model, prefixes, k, max_new_tokens=70, compile_layers=compile_layers)
                           for compile_layers in (False, True))
        assert plain == compiled
        drawn = drawn_by(decoding, model, prefixes, k, max_new_tokens=70, temperature=1.0, compile_layers=True)
        for prefix, tails in zip(prefixes, drawn):
            for tail in tails:
                logp = model(input_ids=torch.tensor([prefix + tail])).logits[0, len(prefix) - 1:-1].log_softmax(-1)
                torch.testing.assert_close(torch.tensor(tail.logps), logp[range(len(tail)), tail], rtol=0, atol=1e-4)
    assert stopwatch.seconds == before
    assert "forward" not in model.model.layers[0].__dict__


def test_under_autocast_the_weights_are_cast_once_and_come_back(monkeypatch):
    """Those of the linear layers of a layer, as autocast casts them, and no others: norms and embeddings stay."""
    monkeypatch.setattr("trainer.compiling.compiled", lambda function: function)
    model, seen = make_model(dtype=torch.float32), []
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    draw_block = decoding.draw_block
    monkeypatch.setattr(decoding, "draw_block", lambda model, *args: seen.append(
        {name: p.dtype for name, p in model.named_parameters()}) or draw_block(model, *args))
    drawn = []
    for compile_layers in (True, False):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            drawn.append(drawn_by(decoding, model, k=20, temperature=1.0, compile_layers=compile_layers))
        for name, p in model.named_parameters():
            assert p.data_ptr() == before[name][0] and torch.equal(p, before[name][1]) and p.requires_grad
    assert drawn[0] == drawn[1]
    assert {name for name, dtype in seen[0].items() if dtype == torch.bfloat16} == {
        name for name in before if "_proj." in name}
    with pytest.raises(RuntimeError, match="broken"), torch.autocast("cpu", dtype=torch.bfloat16):
        with decoding.compiled_for_one_token(model):
            raise RuntimeError("broken")
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_sampling_goes_on_without_what_cannot_be_compiled(monkeypatch):
    model, sample = make_model(), decoding.sample

    def fails(*args, **settings):
        raise RuntimeError("no compiler here\nand more")

    def wrong(*args, compile_layers, **settings):
        drawn = sample(*args, **settings)
        drawn[0][0].logps += 0.1
        return drawn

    monkeypatch.setattr(decoding, "sample", fails)
    assert decoding.warm_up(model, True) == "RuntimeError: no compiler here"
    monkeypatch.setattr(decoding, "sample", wrong)
    assert "differ by 0.05 nats" in decoding.warm_up(model, True)              # of one of two rows
    monkeypatch.setattr(decoding, "sample", lambda *args, compile_layers, **settings: sample(*args, **settings))
    assert decoding.warm_up(model, True) is None


def test_the_bound_of_the_warm_up_is_that_of_the_device_also_where_weights_are_offloaded(monkeypatch):
    """The weights are in host memory, and .05 nats are rounding of a GPU."""
    model, sample = make_model(), decoding.sample

    def rounded(*args, compile_layers, **settings):
        drawn = sample(*args, **settings)
        for response, *_ in drawn:
            response.logps += 0.05
        return drawn

    monkeypatch.setattr(decoding, "sample", rounded)
    assert "differ by 0.05 nats" in decoding.warm_up(model, True)
    monkeypatch.setattr(decoding, "device_of", lambda model: torch.device("cuda"))
    assert decoding.warm_up(model, True) is None


def test_nan_is_not_a_healthy_gap(monkeypatch):
    model, sample = make_model(), decoding.sample

    def broken(*args, compile_layers, **settings):
        drawn = sample(*args, **settings)
        drawn[0][0].logps[3] = float("nan")
        return drawn

    monkeypatch.setattr(decoding, "sample", broken)
    assert "differ by nan nats" in decoding.warm_up(model, True)


def test_the_warm_up_draws_two_blocks_of_several_rows_and_of_one(monkeypatch):
    model, calls, sample = make_model(0, torch.float32), [], decoding.sample

    def watched(model, prefixes, k, *, compile_layers, **settings):
        calls.append((len(prefixes), compile_layers, settings["max_new_tokens"] > decoding.BLOCK))
        return sample(model, prefixes, k, **settings)

    monkeypatch.setattr(decoding, "sample", watched)
    for compile_layers in (True, False):
        assert decoding.warm_up(model, compile_layers) is None
    assert calls == [(2, True, True), (1, True, True), (2, False, True), (1, False, True)]


def test_the_smallest_draws_are_those_of_the_middle_of_their_interval():
    E = decoding.exponential(torch.tensor([0.0, 2.0**-24]))
    torch.testing.assert_close(E, torch.tensor([2.0**-25, 1.5 * 2**-24]), rtol=1e-6, atol=0)
