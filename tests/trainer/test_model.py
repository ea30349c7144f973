"""The trainer's model: activations that are computed twice instead of kept change nothing but memory."""
import pytest
from conftest import EOS, argmax_step_by_step, make_model
from test_packing import check_against_separate_rows
from test_resample import RAGGED, drawn_by
from transformers import Gemma3Config, GenerationConfig

import resample
from trainer import decoding
from trainer.model import checkpoint_activations, savable, without_noise


@pytest.mark.parametrize("chunk", [3, 4096])
def test_checkpointed_activations_give_the_same_log_probabilities_and_gradients(chunk):
    model = make_model()
    checkpoint_activations(model)
    assert model.training
    assert check_against_separate_rows(model, make_model(), chunk) == 2          # a layer was really computed again


@pytest.mark.parametrize("path", [resample, decoding])
@pytest.mark.parametrize("training", [True, False])
def test_sampling_from_a_model_with_checkpointed_activations_leaves_it_as_it_was(training, path):
    """In training mode checkpointing switches the cache off; sampling turns to evaluation mode and back."""
    model = make_model(attention_dropout=0.5)
    checkpoint_activations(model)
    model.train(training)
    greedy = drawn_by(path, model)
    assert model.training == training
    assert getattr(model, "is_activation_checkpointing", None) or model.is_gradient_checkpointing
    assert greedy == [[argmax_step_by_step(model.eval(), p, 9, {EOS})] for p in RAGGED]      # and without dropout


# ---- generation_config.json ----

@pytest.mark.parametrize("settings, dropped", [
    (dict(do_sample=False, temperature=0.9), {"temperature"}),
    (dict(do_sample=True, temperature=0.9, top_p=0.5), set()),
    (dict(do_sample=True, temperature=0.9, num_beams=1, early_stopping=True), {"early_stopping"}),
    (dict(do_sample=False, top_p=0.5, min_p=0.1), {"top_p", "min_p"}), (dict(pad_token_id=-1), {"pad_token_id"})])
def test_only_what_cannot_be_saved_is_left_out_of_a_generation_config(settings, dropped, tmp_path, capsys):
    config = GenerationConfig(eos_token_id=[2, 3], **settings)
    kept = savable(config, "mine")
    kept.save_pretrained(tmp_path)
    for name, value in settings.items():
        assert name in dropped or getattr(kept, name) == value
    assert kept.eos_token_id == [2, 3] and not dropped & kept.to_diff_dict().keys()
    out = capsys.readouterr().out
    assert (f"generation_config.json of mine has settings that are not valid together; checkpoints leave out "
            f"{', '.join(sorted(dropped, key=list(settings).index))}\n" == out) if dropped else out == ""


def test_a_generation_config_that_is_valid_or_missing_stays_the_same_object():
    config = GenerationConfig(do_sample=True, temperature=0.5)
    assert savable(config, "mine") is config and savable(None, "mine") is None


def test_all_parts_of_a_composite_model_are_without_dropout():
    config = without_noise(Gemma3Config(text_config=dict(attention_dropout=0.3),
                                        vision_config=dict(attention_dropout=0.2)))
    assert config.text_config.attention_dropout == config.vision_config.attention_dropout == 0.0
