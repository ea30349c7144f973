"""The compiled update gives the numbers of the plain one. On a CPU, FlexAttention has values, but no backward pass."""
import json
import random
from functools import partial

import pytest
import torch
from conftest import VOCABULARY, make_model
from test_check import WINDOWED, random_model
from torch.nn.attention.flex_attention import create_mask

import train_gsm8k
from packing import batch_tensors, pack, score_rows, score_tokens, tree_masks
from trainer import compiling
from trainer.compiling import (
    BLOCK,
    additive_masks,
    attend,
    block_masks,
    compiled,
    compiled_layers,
    compiled_rows,
    dense_masks,
    fused_scores,
    padded_to,
    plain_rows,
    stopwatch,
    warm_up,
)
from trainer.model import checkpoint_activations


def random_rows(n, seed=0, branches=2, longest=30):
    rng = random.Random(seed)

    def ids(least, most):
        return [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(least, most))]

    rows = []
    for _ in range(n):
        response = ids(8, longest)
        rows.append(pack(ids(2, 9), response, [(rng.randint(0, len(response)), ids(1, 9)) for _ in range(branches)]))
    return rows


def learned(model, score, rows):
    logp, entropy = score(model, rows, 0.7)
    logp.sum().backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return logp.detach(), entropy, grads


# ---- masks ----

@pytest.mark.parametrize("window", [None, 2, 16])
def test_the_block_mask_is_the_tree_mask(window):
    """Of packed and of plain rows, to the pair of tokens; and no block is left out that has one."""
    rows = random_rows(3, longest=600) + random_rows(2, seed=1, branches=0)
    config = random_model("mistral", sliding_window=window).config
    _, positions, segments, prefixes, *_ = batch_tensors(rows, "cpu", BLOCK)
    assert segments.shape[1] % BLOCK == 0 and segments.shape[1] >= 2 * BLOCK
    mask = block_masks(rows, config, segments, prefixes, positions)
    dense = tree_masks(config, segments, prefixes, positions)
    assert torch.equal(create_mask(mask.mask_mod, *mask.shape[:1], None, *mask.shape[2:]), dense)
    B, _, L, _ = dense.shape
    some = dense.view(B, 1, L // BLOCK, BLOCK, L // BLOCK, BLOCK).any(5).any(3)
    assert torch.equal(mask.to_dense().bool(), some) and not some.all()


def test_a_model_with_two_kinds_of_layers_has_two_block_masks():
    config, rows = random_model("gemma3_text", sliding_window=4).config, random_rows(2)
    _, positions, segments, prefixes, *_ = batch_tensors(rows, "cpu", BLOCK)
    masks, dense = (make(*args, config, segments, prefixes, positions)
                    for make, args in ((block_masks, [rows]), (tree_masks, [])))
    assert set(masks) == {"full_attention", "sliding_attention"}
    for kind, mask in masks.items():
        assert torch.equal(create_mask(mask.mask_mod, *mask.shape[:1], None, *mask.shape[2:]), dense[kind])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["qwen2 of 3 heads a group", "llama", *WINDOWED])
def test_flex_attention_gives_the_values_of_the_dense_mask(kind, monkeypatch):
    settings = {"num_attention_heads": 6, "hidden_size": 48} if "3 heads" in kind else {}
    settings |= {"sliding_window": 4} if kind in WINDOWED else {}
    model = random_model(kind.split()[0], torch.float32, **settings)
    monkeypatch.setitem(compiling.ALL_ATTENTION_FUNCTIONS, "sdpa", attend)
    for rows in (random_rows(3), random_rows(2, branches=0)):
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled for a CPU, it fails in torch 2.13
            right, _ = score_rows(model, rows)
            found, _ = score_rows(model, rows, masks=block_masks, multiple=BLOCK)
        assert (found - right).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_an_additive_mask_is_made_once_in_the_type_of_the_computation(kind):
    model, seen = random_model(kind, torch.float32, sliding_window=4), []
    monkeypatch, attention = pytest.MonkeyPatch(), compiling.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module, query, key, value, attention_mask, **kwargs):
        seen.append(attention_mask)
        return attention(module, query, key, value, attention_mask, **kwargs)

    rows = random_rows(3)
    with monkeypatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        right, _ = score_rows(model, rows)
        patch.setitem(compiling.ALL_ATTENTION_FUNCTIONS, "sdpa", watched)
        found, _ = score_rows(model, rows, masks=additive_masks, multiple=8)
    assert (found - right).abs().max() < 0.1 and (found - right).abs().mean() < 0.01
    assert {mask.dtype for mask in seen} == {torch.bfloat16} and {mask.shape[-1] % 8 for mask in seen} == {0}
    assert additive_masks(random_rows(2, branches=0), model.config, *[torch.zeros(2, 8)] * 3) is None


def test_rows_padded_to_a_multiple_are_scored_alike():
    model = make_model()
    for rows in (random_rows(3), random_rows(3, branches=0)):
        right, found = learned(model, score_rows, rows), learned(model, lambda *a: score_rows(*a, multiple=128), rows)
        for a, b in zip(right, found):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


# ---- the head ----

@pytest.mark.parametrize("entropies", [True, False])
def test_the_fused_head_is_the_plain_one(entropies):
    torch.manual_seed(0)
    head, targets = torch.nn.Linear(16, 50, dtype=torch.float64), torch.randint(50, (7,))
    results = []
    for score in (score_tokens, fused_scores):
        hidden = torch.randn(7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
        hidden.requires_grad_()
        logp, entropy = score(head, hidden, targets, temperature=0.7, entropies=entropies)
        (logp * torch.arange(7)).sum().backward()
        assert (entropy is None) == (not entropies) and (entropy is None or not entropy.requires_grad)
        results.append([logp.detach(), hidden.grad, head.weight.grad.clone(), *([entropy] if entropies else [])])
        head.zero_grad()
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# ---- compiled layers ----

@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_give_the_same_and_nothing_is_compiled_after_the_warm_up(checkpointing):
    torch._dynamo.reset_code_caches()
    model, ref_model = make_model(0, torch.float32), make_model(1, torch.float32).requires_grad_(False)
    if checkpointing:
        checkpoint_activations(model)
    before = stopwatch.seconds
    assert warm_up(model, ref_model, 0.7, scores=True) is None and stopwatch.seconds > before
    before = stopwatch.seconds
    # The last two are scored in chunks, as the head of a large micro-batch is.
    in_chunks = partial(score_rows, masks=dense_masks, score_tokens=compiled(fused_scores), chunk=40)

    def all_but_one(model, rows, *args, **options):      # the last chunk has one token
        return in_chunks(model, rows, *args, chunk=sum(len(row.targets) for row in rows) - 1, **options)

    for n, branches, score in ((3, 2, compiled_rows), (1, 2, compiled_rows), (1, 0, compiled_rows),
                               (5, 0, compiled_rows), (2, 3, compiled_rows), (5, 2, in_chunks), (4, 2, all_but_one)):
        rows = random_rows(n, n, branches)
        right = learned(model, score_rows, rows)
        with compiled_layers(model, ref_model):
            found = learned(model, lambda *args, score=score: score(*args, entropies=False), rows)
            with torch.no_grad():
                own, _ = score(ref_model, rows, 0.7, entropies=False)
                scores = score(model, rows, 0.7)
        assert (found[0] - right[0]).abs().max() < 1e-4
        assert (found[2] - right[2]).norm() < 1e-5 * right[2].norm()
        assert (own - score_rows(ref_model, rows, 0.7)[0]).abs().max() < 1e-4
        for a, b in zip(scores, score_rows(model, rows, 0.7)):
            assert (a - b).abs().max() < 1e-4
    assert stopwatch.seconds == before
    assert "forward" not in model.model.layers[0].__dict__                           # as they were


def test_a_run_goes_on_without_what_cannot_be_compiled(monkeypatch):
    model = make_model(0, torch.float32)

    def fails(function):
        raise RuntimeError("no compiler here\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(compiling, "compiled", fails)
        assert warm_up(model, None, 1.0) == "RuntimeError: no compiler here"
    monkeypatch.setattr(compiling, "compiled", lambda function: function)
    for shift, why in ((lambda y: y + 0.01, r"log-probabilities differ by 0.01 nats"),
                       (lambda y: y + 0.01 * (y - y.detach()), "gradients by 1.0 %"),
                       (lambda y: y * float("nan"), "differ by nan nats")):
        def wrong(*args, shift=shift, **options):
            logp, entropy = plain_rows(*args, **options)
            return shift(logp), entropy

        monkeypatch.setattr(compiling, "compiled_rows", wrong)
        assert why in warm_up(model, None, 1.0)
    assert all(p.grad is None for p in model.parameters())


def test_the_bound_of_the_warm_up_is_that_of_the_device_also_where_weights_are_offloaded(monkeypatch):
    """The weights are in host memory, and .05 nats are rounding of a GPU."""
    def rounded(*args, **options):
        logp, entropy = plain_rows(*args, **options)
        return logp + 0.05, entropy

    model = make_model(0, torch.float32)
    monkeypatch.setattr(compiling, "compiled", lambda function: function)
    monkeypatch.setattr(compiling, "compiled_rows", rounded)
    assert "differ by 0.05 nats" in warm_up(model, None, 1.0)
    monkeypatch.setattr(compiling, "device_of", lambda model: torch.device("cuda"))
    assert warm_up(model, None, 1.0) is None


def test_rows_are_padded_as_micro_batches_reckon():
    found = {kind: [padded_to(score, torch.device(kind)) for score in (plain_rows, compiled_rows)]
             for kind in ("cpu", "cuda")}
    assert found == {"cpu": [1, 1], "cuda": [8, 128]}


def test_rows_of_one_block_get_one_more_without_a_loss():
    model, rows = make_model(0, torch.float32), random_rows(3, 1, 2)
    assert max(len(row.ids) for row in rows) <= BLOCK
    more = compiling.of_several_blocks(rows)
    assert len(more) == 4 and len(more[-1].ids) > BLOCK and compiling.of_several_blocks(more) is more
    for a, b in zip(score_rows(model, rows), score_rows(model, more)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    alone = compiling.of_several_blocks([])                              # of a rank without rows
    assert len(score_rows(model, alone)[0]) == 0 and len(alone[0].ids) > BLOCK


@pytest.mark.slow
def test_a_compiled_run_makes_the_steps_of_a_plain_one(tmp_path, capsys):
    lines = []
    for flag in ("--compile", "--no-compile"):
        out = tmp_path / flag
        flags = ["--preset", "tiny", "--steps", "4", "--eval-every", "0", "--branches", "2", "--out", str(out), flag,
                 "--temperature", "1.3"]
        assert train_gsm8k.main(flags) == 0
        assert ("the update: compiled in" in capsys.readouterr().out) == (flag == "--compile")
        lines.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
        timing = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
        assert [step["seconds_compile"] for step in timing[1:]] == [0.0] * 3
    for ours, plain in zip(*lines):
        assert ours["reward"] == plain["reward"] and ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)


def test_masks_and_queries_have_the_type_of_the_computation(monkeypatch):
    rows, seen = random_rows(2), []
    _, positions, segments, prefixes, *_ = batch_tensors(rows, "cpu", BLOCK)
    batch = make_model().config, segments, prefixes, positions
    assert additive_masks(rows, *batch).dtype == torch.bool                          # without autocast
    monkeypatch.setattr(compiling, "flex_attention_forward", lambda module, *parts, **_: seen.extend(parts[:3]))
    q, k = torch.zeros(2, 4, 8, 8), torch.zeros(2, 2, 8, 8)
    attend(None, q, k, k.bfloat16(), block_masks(rows, *batch))
    assert len(seen) == 3 and {x.dtype for x in seen} == {torch.bfloat16}


def test_the_warm_up_has_every_kind_of_pass(monkeypatch):
    model, calls = make_model(0, torch.float32), []

    def watched(model, rows, temperature=1.0, **options):
        tokens = sum(len(row.targets) for row in rows)
        calls.append((len(rows), "one token" if tokens == 1 else temperature, torch.is_grad_enabled()))
        return plain_rows(model, rows, temperature, **options)

    monkeypatch.setattr(compiling, "compiled", lambda function: function)
    monkeypatch.setattr(compiling, "compiled_rows", watched)
    assert warm_up(model, make_model(1, torch.float32), 0.7) is None
    one, no_gradient = (1, "one token", True), (1, "one token", False)
    assert calls == [(3, 0.7, True), one, (3, 0.7, False), no_gradient,
                     (1, 0.7, True), one, (1, 0.7, False), no_gradient]
    calls.clear()
    assert warm_up(model, None, 1.0, scores=True) is None
    assert calls == [(3, 1.0, True), one, (3, 1.0, False), no_gradient,
                     (1, 1.0, True), one, (1, 1.0, False), no_gradient]
    monkeypatch.setattr(compiling, "device_of", lambda model: torch.device("cuda"))      # a large micro-batch first
    for tokens, rows in ((4096, 8), (2048, 3)):          # not 4, which would be as many as the blocks of a row
        calls.clear()
        assert warm_up(model, None, 1.0, tokens=tokens) is None
        assert calls == [(rows, 1.0, True), one, (3, 1.0, True), one, (1, 1.0, True), one]
