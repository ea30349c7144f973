"""The estimate against real allocations: those of this process, on the CPU, as the profiler sees them."""
import argparse
import gc
import re
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from conftest import make_model
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import Qwen2Config, Qwen2ForCausalLM

import deep_grpo
import train_gsm8k
from deep_grpo import ALONE, Config, Fork, Group, Trajectory, objective, sampled_logps
from loss import loss_table, sequence_weights
from packing import attention_length, pack_groups
from resample import sample
from trainer import memory
from trainer.memory import GB, KNOWN, estimate, largest, load_geometry, of_row
from trainer.model import Ranks, checkpoint_activations, fsdp_modules, gathered, layers_of, shard
from trainer.settings import parse_args


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Several threads have buffers of their own. And what is there already need not be looked at by the collector."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def peak(run):
    """Bytes allocated above the start at the worst moment of run().

    Models of earlier tests are reference cycles. Python's collector once freed one of them in the middle of a
    measurement, which then came out smaller by the gradients of that model. Whether this happened depended on all that
    the process had done before. So the collector runs first, and not during the measurement.
    """
    gc.collect()
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            run()
    finally:
        gc.enable()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def make(hidden=64, depth=3, inner=128, vocabulary=256, tied=True, checkpointing=False):
    config = Qwen2Config(hidden_size=hidden, num_hidden_layers=depth, intermediate_size=inner, vocab_size=vocabulary,
                         num_attention_heads=hidden // 32, num_key_value_heads=1, tie_word_embeddings=tied)
    model = Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    if checkpointing:
        checkpoint_activations(model)
    return model


def update_peak(model, tokens, n, autocast=False):
    """Of objective() over n micro-batches, each a row of so many tokens, nearly all of them in the loss."""
    ids = [3 + i % 20 for i in range(tokens)]
    fork = Fork(tokens * 5 // 8 - 8, 0.5, [ids[:tokens // 8]] * 2, [0.0, 1.0])
    groups = [Group(ids[:8], [Trajectory(ids[8:tokens * 3 // 4], 0.0, [fork])]) for _ in range(n)]
    assert [len(row.ids) for row in pack_groups(groups, attention_length(model), tokens)] == [tokens] * n

    mine, config = Ranks() if fsdp_modules(model) else ALONE, Config(beta=0.0)
    # The table and what is gathered of all ranks are in host memory, so no part of a GPU's. Rollouts without an
    # advantage would be left out.
    table, all_of_it = loss_table(groups, sequence_weights(groups, config)), (None, slice(None))
    sampled = sampled_logps(groups)

    def run():
        with (torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
              patch.object(deep_grpo, "loss_table", return_value=table),
              patch.object(Ranks, "total", lambda self, value: value),
              patch.object(deep_grpo, "sampled_logps", return_value=sampled),
              patch.object(deep_grpo, "needed_sequences", return_value=all_of_it)):
            objective(model, groups, config, None, None, tokens, backward=True, ranks=mine)

    run()                                            # what is allocated once and kept is not the question
    model.zero_grad()
    return peak(run) - 24 * len(table)               # of every token an index and two scores: next to a model, nothing


def update_estimate(model, tokens, gpus, compute, checkpointing):
    parts = estimate(model, gpus, 1, 1, tokens, False, checkpointing, compute=compute)["update"]
    return sum(parts[name] for name in ("gradients", "gathered", "activations", "logits"))


# In each of them another term is the largest: the MLP, the logits, the attention, the mask, layer inputs, copies.
SHAPES = {"inner": (dict(inner=1024), 512), "vocabulary": (dict(vocabulary=4096), 256),
          "hidden": (dict(hidden=256), 256),
          "mask": (dict(hidden=32, inner=64), 512), "untied": (dict(tied=False, hidden=192, vocabulary=1024), 64),
          "inputs": (dict(depth=12, inner=64, vocabulary=32, hidden=128), 512)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_update_on_one_device(shape, compute, checkpointing):
    settings, tokens = SHAPES[shape]
    model = make(**settings, checkpointing=checkpointing)
    measured = update_peak(model, tokens, 2, compute == torch.bfloat16)
    assert 0.85 < update_estimate(model, tokens, 1, compute, checkpointing) / measured < 1.15


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_sampling_on_one_device(compute):
    model = make(depth=6, vocabulary=32)
    parts = estimate(model, 1, 48, 128, 1, compute=compute)["sampling"]

    def run():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute == torch.bfloat16):
            sample(model, [[5, 6, 7] * 32] * 6, 8, max_new_tokens=32, eos_token_id=33, pad_token_id=0)

    run()
    expected = parts["gathered"] + parts["KV cache"] + parts["logits"]
    assert parts["KV cache"] > 0.8 * expected and 0.8 < expected / peak(run) < 1.2


@pytest.fixture(params=[2, 8])
def fake_ranks(request):
    """N ranks as one of them sees it: collectives are called and buffers allocated, only nothing is sent.

    Of real ones on a CPU the peak is not to be had: gloo copies what it sums (NCCL does not), and its threads give
    memory back where the profiler does not see it.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_update_sharded(shape, checkpointing, fake_ranks):
    settings, tokens = SHAPES[shape]
    model = make(**settings, checkpointing=checkpointing)
    expected = update_estimate(model, tokens, fake_ranks, torch.bfloat16, checkpointing)
    assert 0.85 < expected / update_peak(shard(model, torch.bfloat16), tokens, 2 * fake_ranks) < 1.25


@pytest.mark.parametrize("tied, vocabulary", [(True, 4096), (False, 2048)])
def test_the_weights_of_the_sharded_update(tied, vocabulary, fake_ranks):
    """With next to no tokens there is nothing else: 10 B of a layer, and 2 R + 2 V h."""
    model = make(hidden=256, inner=1024, vocabulary=vocabulary, tied=tied, checkpointing=True)
    gathered = estimate(model, fake_ranks, micro_batch_tokens=16)["update"]["gathered"]
    gradients = sum(4 * p.numel() / fake_ranks for p in model.parameters())
    peak = update_peak(shard(model, torch.bfloat16), 16, 2 * fake_ranks) - gradients
    assert 0.95 < gathered / peak < 1


def test_sampling_sharded(fake_ranks):
    model = make(hidden=192, inner=512)
    parts = estimate(model, fake_ranks, 96, 64, 1)["sampling"]
    model = shard(model, torch.bfloat16)

    def run():
        with gathered(model):
            sample(model, [[5, 6, 7] * 8] * 12, 8, max_new_tokens=40, eos_token_id=300, pad_token_id=0)

    run()
    assert 0.8 < (parts["gathered"] + parts["KV cache"] + parts["logits"]) / peak(run) < 1.2


def test_what_is_there_all_the_time_is_exact():
    model, ref = make(), make()
    optimizer = torch.optim.AdamW(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    real = {"weights": model.parameters(), "gradients": [p.grad for p in model.parameters()], "moments": moments,
            "reference": ref.parameters()}
    real = {name: sum(x.nbytes for x in tensors) for name, tensors in real.items()}
    for phase, parts in estimate(model).items():     # gradients live from the backward pass to the end of the update
        assert {name: parts[name] for name in real} == real | ({"gradients": 0} if phase == "sampling" else {})
    sharded = estimate(model, gpus=8, reference=False)["update"]
    assert [sharded[name] for name in real] == [*(real[name] / 8 for name in ("weights", "gradients", "moments")), 0]
    offloaded = estimate(model, gpus=8, offload=True)["sampling"]
    assert [offloaded[name] for name in real] == [0, 0, 0, real["reference"] / 8]


def test_the_presets_models_have_their_published_numbers_of_parameters():
    numbers = [sum(p.numel() for p in load_geometry(name).parameters()) for name in KNOWN]
    assert numbers == [494_032_768, 1_543_714_304, 7_615_616_512]


def test_the_kv_cache_of_the_7b_model_by_hand():
    # 2 (keys and values) * 28 layers * 4 heads * 128 * 2 bytes = 57,344 per token.
    parts = estimate(load_geometry("Qwen/Qwen2.5-Math-7B"), 8, rows=64, row_tokens=4096)["sampling"]
    assert parts["KV cache"] == 57_344 * 64 * 4096 == 14 * GB


def test_largest_by_hand():
    assert largest(lambda n: 3 * n, 300) == 100 and largest(lambda n: 3 * n + 1, 300) == 99
    assert largest(lambda n: 301 + n, 300) == 0


def test_the_dry_run_prints_and_writes_nothing(tmp_path, capsys):
    flags = ["--preset", "math-7b", "--dry-run", "--gpus", "8", "--out", str(tmp_path / "run")]
    assert train_gsm8k.main(flags) == 0 and not (tmp_path / "run").exists()
    text = capsys.readouterr().out
    table = text.split("rollouts    branches  evaluation      update\n")[1].split("\n\n")[0].splitlines()
    rows = {line[:14].strip(): line[14:].split() for line in table}
    assert rows["moments"] == ["7.1"] * 4 and rows["gradients"] == ["0.0", "0.0", "0.0", "3.5"]
    # 64 * 8 rollouts on 8 GPUs, 8 branches of each, and 500 + 256 evaluation questions, at .21875 GB each
    assert rows["KV cache"] == ["14.0", "112.0", "20.8", "0.0"]
    for column in range(4):
        assert sum(float(cells[column]) for name, cells in rows.items() if name != "sum") == pytest.approx(
            float(rows["sum"][column]), abs=0.3)
    assert f"the largest phase: branches, {rows['sum'][1]} GB" in text
    assert "branches: 512 sequences of a GPU at a time, 4096 tokens each, at the most" in text
    assert "rollouts: 64 sequences" in text and "evaluation: 95 sequences" in text
    assert "24 GB: no" in text
    fits = int(text.split("80 GB: ")[1].split()[0])
    model = load_geometry("Qwen/Qwen2.5-Math-7B")
    used = [sum(estimate(model, 8, n, 4096, 1)["sampling"].values()) for n in (fits, fits + 1)]
    assert used[0] <= memory.USABLE * 80 * GB < used[1]


@pytest.mark.parametrize("flags, rows", [
    ([], {"rollouts": 512, "branches": 4096, "evaluation": 1575}),
    (["--questions", "8", "--branches", "4"], {"rollouts": 64, "branches": 256, "evaluation": 256}),
    (["--method", "grpo"], {"rollouts": 512, "evaluation": 512}),        # in parts
    (["--method", "grpo", "--questions", "1"], {"rollouts": 8, "evaluation": 128}),    # not in 197 small parts
    (["--eval-every", "0"], {"rollouts": 512, "branches": 4096}),
    # 6 x 6 nodes of a question get 5 more leaves each; a response of 768 tokens has at most 154 boundaries.
    (["--method", "spo_tree", "--eval-every", "0"], {"rollouts": 384, "branches": 64 * 36 * 5}),
    (["--method", "spo_chain", "--eval-every", "0"], {"rollouts": 512, "branches": 512 * 154 * 4}),
    (["--method", "treerl", "--eval-every", "0"], {"rollouts": 384, "branches": 384 * 2 * 2})])
def test_the_dry_run_has_the_rows_of_every_phase(flags, rows, capsys):
    assert train_gsm8k.main(["--preset", "gsm8k", "--dry-run", *flags]) == 0
    text = capsys.readouterr().out
    assert {phase: int(n) for phase, n in re.findall(r"^(\w+): (\d+) sequences of a GPU", text, re.M)} == rows
    header = re.search(r"^ {14}.*$", text, re.M)[0].split()
    assert header == [*rows, "update"]


def test_a_model_without_a_geometry_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert train_gsm8k.main(["--preset", "tiny", "--model", str(tmp_path / "none"), "--dry-run"]) == 2
    line, = capsys.readouterr().err.splitlines()
    assert line.startswith("error: model ") and "config.json" in line


def test_a_local_model_needs_no_table(capsys):
    assert train_gsm8k.main(["--preset", "tiny", "--dry-run"]) == 0
    assert train_gsm8k.main(["--preset", "tiny", "--dry-run", "--group-size", "0"]) == 2      # as a run does
    assert "assets/tiny: 0.00 G parameters on 1 GPU;" in capsys.readouterr().out


def test_compiled_layers_need_no_mask():
    model, T = make(depth=3), 512
    for checkpointing in (False, True):                              # of checkpointed layers one keeps it at a time
        dense, none = (estimate(model, micro_batch_tokens=T, checkpointing=checkpointing, compiled=compiled)["update"]
                       for compiled in (False, True))
        assert dense["activations"] - none["activations"] == (3 if not checkpointing else 1) * T * T * 2


def test_compiled_layers_have_copies_of_their_weights_while_sampling():
    model = make(depth=3)
    plain, compiled = (estimate(model, compiled=compiled)["sampling"]["gathered"] for compiled in (False, True))
    assert compiled - plain == 2 * 3 * sum(p.numel() for p in layers_of(model)[0].parameters())
    assert estimate(model, gpus=2)["sampling"] == estimate(model, gpus=2, compiled=True)["sampling"]


@pytest.mark.parametrize("flags, gb, said", [
    ([], 80, None), ([], 24, "may need 43 GB, and a GPU has 24: --micro-batch-tokens 3328 should fit"),
    (["--micro-batch-tokens", "3328"], 24, None), (["--gradient-checkpointing"], 24, None),
    ([], 8, "may need 43 GB, and a GPU has 8: --gradient-checkpointing, or more GPUs, may help")])
def test_a_run_warns_where_the_update_may_not_fit(flags, gb, said):
    """The numbers are those of --dry-run, which computes with compiled layers, too."""
    args = parse_args(["--preset", "gsm8k", "--compile", *flags])
    got = memory.update_warning(args, load_geometry(args.model), 1, gb * GB)
    assert got is None if said is None else said in got
    if not flags:
        assert "24 GB: " in (text := memory.report(args, 1)) and "--micro-batch-tokens 3328" in text


def test_the_estimate_of_seconds_by_hand():
    args = argparse.Namespace(questions=32, group_size=8, branches=8, max_new_tokens=400, objective="authors",
                              beta=1e-4, gradient_checkpointing=False, steps=5000)
    rollouts, branches = 256 * 160, 128 * 8 * 160 / 3
    steps = 400 * (2.1e-3 + 2 * 0.494e9 / 4.3e12)
    expected = [steps + 11.8e-6 * rollouts, steps + 11.8e-6 * branches, 2.4e-6 * (rollouts + branches),
                0.4 * (rollouts + branches) / 70_000]
    line = memory.seconds_line(args, 0.494e9, 1)
    assert f"about {sum(expected):.0f} s on 1 H200, a rough estimate" in line
    assert f"; 5000 steps: about {5000 * sum(expected) / 3600:.0f} hours" in line
    for name, value in zip(("rollouts", "branches", "grading", "update"), expected):
        assert f"{name} {value:.1f}" in line
    args.branches, args.objective, args.beta = 0, "paper", 0.0
    line = memory.seconds_line(args, 0.988e9, 4)
    assert "branches" not in line and f"update {2 * 0.75 * rollouts / 4 / 70_000:.1f}" in line
    assert f"rollouts {400 * (2.1e-3 + 4 * 0.494e9 / 4.3e12) + 2 * 11.8e-6 * rollouts / 4:.1f}" in line


def test_memory_of_a_row_by_hand():
    """2 layers, 2 heads of keys and values, and a head_dim that is not 32 / 4; then the logits."""
    model = make_model(head_dim=16)
    assert of_row(model, 5, torch.bfloat16) == {"KV cache": 5 * 2 * 2 * 2 * 16 * 2, "logits": 23 * (2 + 12)}
