"""What a model must be to be sampled and scored exactly, for many architectures: exact, or refused when it is loaded.

The right value is always the model's own forward pass over one sequence at a time.
"""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import eval_math
import tasks.lock
import train_gsm8k
from deep_grpo import Config, Fork, Group, Trajectory, objective
from packing import pack, score_rows
from resample import sample
from trainer.check import check_model, check_prompts, largest, own_logps, sampling_error
from trainer.memory import estimate
from trainer.model import checkpoint_activations, layers_of, load_model, without_noise

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=256, pad_token_id=0, eos_token_id=1, bos_token_id=2)
OWN = {"gpt2": dict(n_embd=32, n_layer=2, n_head=4),
       "opt": dict(ffn_dim=64, word_embed_proj_dim=32),
       "gemma3_text": dict(head_dim=8, layer_types=["full_attention", "sliding_attention"]),
       "olmo3": dict(layer_types=["sliding_attention", "full_attention"]),
       "qwen2": dict(use_sliding_window=True, max_window_layers=1)}
WINDOWED = ["mistral", "phi3", "starcoder2", "gemma3_text", "olmo3", "qwen2"]


def config_of(kind, **overrides):
    vocabulary = len(tasks.lock.make_tokenizer())
    return CONFIG_MAPPING[kind](**{**SMALL, "vocab_size": vocabulary, **OWN.get(kind, {}), **overrides})


def random_model(kind, dtype=torch.float64, **overrides):
    """Weights five times wider than usual, so that outputs are far from uniform and faults far from rounding."""
    torch.manual_seed(0)
    config = without_noise(config_of(kind, **overrides))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    tasks.lock.make_tokenizer().save_pretrained(folder)
    return folder


# ---- sliding windows ----

@pytest.mark.parametrize("kind", WINDOWED)
@pytest.mark.parametrize("window", [2, 5, 16])
def test_packed_rows_respect_the_sliding_window_of_each_layer(kind, window):
    """They once ignored it: a third log-probability of -1.4672 instead of -1.4604 with Mistral and a window of 2."""
    model = random_model(kind, sliding_window=window)
    prompt, response, first, second = [3, 4, 9], [5, 6, 7, 8, 10, 11, 12], [13, 14, 15, 16, 17], [18, 19, 20]
    sequences = [(prompt, response), (prompt + response[:4], first), (prompt, second)]
    with torch.no_grad():
        packed, _ = score_rows(model, [pack(prompt, response, [(4, first), (0, second)])])
        plain, _ = score_rows(model, [pack(prefix, y) for prefix, y in sequences])
        right = own_logps(model, sequences)
    assert torch.allclose(packed.float(), right, atol=2e-6) and torch.allclose(plain.float(), right, atol=2e-6)


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
def test_the_gradient_of_the_objective_is_right_with_a_sliding_window(kind, monkeypatch):
    """With a window of 16 it was wrong by .85 to 1.33."""
    model = random_model(kind, sliding_window=3)
    failed = Trajectory([5, 6, 7, 8, 10, 11], 0.0, [Fork(4, 0.5, [[13, 14, 15], [16, 17]], [1.0, 0.0])])
    groups = [Group([3, 4, 9], [failed, Trajectory([12, 13, 14, 1], 1.0)])]
    gradients = []
    for a in (float("inf"), float("nan")):               # every rollout packed with its branches, and none
        monkeypatch.setattr("deep_grpo.attention_length", lambda model, a=a: a)
        objective(model, groups, Config(beta=0.0), backward=True)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    assert gradients[0].norm() > 1e-3 and largest(gradients[0] - gradients[1]) < 1e-6 * gradients[0].abs().max()


@pytest.mark.parametrize("kind", WINDOWED)
def test_greedy_samples_respect_the_sliding_window(kind):
    assert sampling_error(random_model(kind, sliding_window=4), [[3, 4, 9, 5, 6, 7], [8, 10]], n=24) < 1e-6


# ---- what the check accepts, and what it refuses ----

@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "mixtral", "gpt2", "opt", "gpt_neox", "falcon",
                                  "persimmon", "phimoe", "gpt_bigcode", *WINDOWED])
def test_what_is_loaded_is_exact_or_refused(kind, tmp_path):
    """Falcon and Persimmon once ended in a TypeError; the others with dropout or jitter were scored with noise."""
    config = config_of(kind)
    for name in ("attention_dropout", "residual_dropout", "embedding_dropout", "hidden_dropout", "dropout",
                 "resid_pdrop", "attn_pdrop", "embd_pdrop", "router_jitter_noise", "input_jitter_noise"):
        if hasattr(config, name):
            setattr(config, name, 0.3)
    model, _ = load_model(str(saved(AutoModelForCausalLM.from_config(config), tmp_path)))
    check_model(model, kind)
    assert not model.training


@pytest.mark.parametrize("kind", ["modernbert-decoder", "cohere", "cohere2", "falcon_h1", "qwen3_next",
                                  "qwen3_5_text", "deepseek_v3", "recurrent_gemma"])
def test_a_model_that_is_not_exact_is_refused_with_what_was_measured(kind):
    """modernbert-decoder, whose logits are not head(backbone(x)), was once wrong by 3.3 nats, and nothing was said."""
    model = random_model(kind, torch.float32)
    with pytest.raises(ValueError, match=rf"model 'x' \({kind}\) cannot be used here: .*(differs|fails)"):
        check_model(model, "x")


def test_the_check_sees_every_kind_of_fault(monkeypatch):
    model = random_model("llama", torch.float32)
    check_model(model, "x")
    head = model.lm_head.forward
    for name, broken, what in (
            ("score_rows", lambda *a: tuple(x + 0.01 for x in score_rows(*a)), "rows that share a prefix"),
            ("sample", lambda *a, **k: [[[5] * 7] * 2] * 2, "greedy sampling")):
        with monkeypatch.context() as patch:
            patch.setattr(f"trainer.check.{name}", broken)
            with pytest.raises(ValueError, match=what):
                check_model(model, "x")
    monkeypatch.setattr(model.lm_head, "forward", lambda x: (y := head(x)) + model.training * torch.randn_like(y))
    with pytest.raises(ValueError, match="scoring twice in training mode"):
        check_model(model.train(), "x")
    assert model.training


def test_windows_are_short_for_the_check_only():
    """A window of thousands of tokens would not be reached by a short row: a fault beyond it would not be seen."""
    model = random_model("mistral", torch.float32, sliding_window=100)
    windows = []
    model.model.layers[0].register_forward_hook(lambda *_: windows.append(model.config.sliding_window))
    check_model(model, "x")
    assert set(windows) == {4} and model.config.sliding_window == 100


def test_nothing_random_is_left_in_a_config():
    config = without_noise(config_of("starcoder2", residual_dropout=0.1, embedding_dropout=0.1, attention_dropout=0.2))
    assert config.residual_dropout == config.embedding_dropout == config.attention_dropout == 0.0
    assert config.hidden_size == 32


def test_with_activation_checkpointing_a_loaded_model_scores_one_row_alike(tmp_path):
    """starcoder2 with a dropout of .1 scored one token -4.67, -4.61 and -4.62."""
    model = AutoModelForCausalLM.from_config(config_of("starcoder2", residual_dropout=0.5, embedding_dropout=0.5))
    model, _ = load_model(str(saved(model, tmp_path)))
    checkpoint_activations(model)
    row = [pack([3, 4], [5, 6, 7])]
    assert torch.equal(score_rows(model, row)[0], score_rows(model, row)[0])


# ---- checkpoints that do not fit ----

def rename(folder, change):
    path = folder / "model.safetensors"
    save_file({new: tensor for name, tensor in load_file(path).items() if (new := change(name))}, path,
              metadata={"format": "pt"})


@pytest.mark.parametrize("change, what", [
    (lambda name: None if name.endswith("layers.1.mlp.up_proj.weight") else name, "1 tensors are missing"),
    (lambda name: f"_orig_mod.{name}", "missing"),
    pytest.param(lambda name: f"module.{name}", "missing", marks=pytest.mark.slow),
    pytest.param(lambda name: f"base_model.model.{name}", "missing", marks=pytest.mark.slow),
], ids=["deleted", "_orig_mod", "module", "base_model.model"])
def test_missing_and_renamed_tensors_are_refused_everywhere(change, what, tmp_path, capsys):
    """transformers makes random numbers of them: such a checkpoint once loaded, evaluated and resumed in silence."""
    folder = saved(random_model("llama", torch.float32), tmp_path / "model")
    run = tmp_path / "run"
    flags = ["--preset", "tiny", "--steps", "1", "--questions", "1", "--group-size", "2", "--branches", "2",
             "--eval-every", "0", "--max-new-tokens", "4", "--model", str(folder), "--out", str(run)]
    assert train_gsm8k.main(flags) == 0
    rename(folder, change)
    rename(run / "checkpoints" / "step_1", change)
    capsys.readouterr()
    with pytest.raises(ValueError, match=what):
        load_model(str(folder))
    new = str(tmp_path / "new")
    for main, arguments in ((train_gsm8k.main, [*flags[:-1], new]),
                            (train_gsm8k.main, ["--resume", str(run), "--steps", "2"]),
                            (eval_math.main, ["--model", str(folder), "--sets", "tiny", "--out", new])):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "does not fit its config.json" in error and not (tmp_path / "new").exists()


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    folder = saved(random_model("llama", torch.float32), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(ValueError, match="shape|mismatch"):
        load_model(str(folder))


def test_an_adapter_is_not_silently_left_out(tmp_path):
    saved(random_model("llama", torch.float32), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(ValueError, match="adapters are not applied here"):
        load_model(str(tmp_path))


# ---- context, layers ----

@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_response_must_fit_into_the_context(kind, tmp_path, capsys):
    """GPT-2 once ended in an IndexError in the first rollout, and a model with rotary positions went on in silence."""
    folder = saved(random_model(kind, max_position_embeddings=90), tmp_path / "model")
    flags = ["--preset", "tiny", "--model", str(folder), "--out", str(tmp_path / "run"), "--max-new-tokens", "80"]
    assert train_gsm8k.main(flags) == 2
    assert "has a context of 90 tokens" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_last_token_that_fits_is_allowed():
    model = random_model("llama", torch.float32, max_position_embeddings=90)
    check_prompts(model, "x", [[1], [1] * 10], [2], 80)
    with pytest.raises(ValueError, match="lower --max-new-tokens"):
        check_prompts(model, "x", [[1], [1] * 11], [2], 80)


def test_gpt2_is_trained_on_one_gpu_but_neither_sharded_nor_sized():
    """It once ended in an AttributeError under torchrun, after the rollouts, and with --dry-run."""
    model = random_model("gpt2", torch.float32)
    check_model(model, "x")
    for function in (layers_of, estimate):
        with pytest.raises(ValueError, match="neither sharded .* nor sized"):
            function(model)


def test_sampling_is_checked_where_nothing_is_scored():
    """eval_math.py only samples: a head of its own is exact there, a model without an attention cache is not."""
    check_model(random_model("modernbert-decoder", torch.float32), "x", training=False)
    with pytest.raises(ValueError, match="greedy sampling"):
        check_model(random_model("falcon_h1", torch.float32), "x", training=False)
    assert sample(random_model("llama"), [[3]], 1, max_new_tokens=2, eos_token_id=99, pad_token_id=0)


def test_nan_is_refused(monkeypatch):
    monkeypatch.setattr("trainer.check.score_rows", lambda *a: tuple(x * float("nan") for x in score_rows(*a)))
    with pytest.raises(ValueError, match="rows that share a prefix differs .* by nan nats"):
        check_model(random_model("llama", torch.float32), "x")


def test_a_second_continuation_that_differs_is_refused(monkeypatch):

    def second_differs(*args, **options):
        return [[y, [*y[:-1], y[-1] ^ 1]] for y, _ in sample(*args, **options)]

    monkeypatch.setattr("trainer.check.sample", second_differs)
    with pytest.raises(ValueError, match="greedy sampling .* differs"):
        check_model(random_model("llama", torch.float32), "x")


def test_token_ids_without_an_embedding_are_refused(model):
    size = model.get_input_embeddings().weight.shape[0]
    check_prompts(model, "x", [[1], [2, size - 1]], [size - 1], 1)
    for prompts, stop, what in (([[1], [size]], [1], "a prompt has"), ([[1]], [1, size], "the stop ids have")):
        with pytest.raises(ValueError, match=f"has embeddings for {size} tokens, and {what} the token {size}: "):
            check_prompts(model, "x", prompts, stop, 1)
