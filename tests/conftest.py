"""Small models for all tests. float64: equal is then equal to 1e-10, and no wrong sign hides in noise."""
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""                  # equal bit for bit is a promise of CPUs
import pytest  # noqa: E402
import torch  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

VOCABULARY, EOS, PAD = 23, 1, 0


class ExactNorm(Qwen2RMSNorm):
    """Without the detour of transformers through float32, which would limit all comparisons to 1e-6."""

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def make_model(seed=0, dtype=torch.float64, **overrides):
    """A random Qwen2 with far from uniform outputs (weights are drawn 10 times wider than usual)."""
    torch.manual_seed(seed)
    settings = dict(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                    initializer_range=0.2, tie_word_embeddings=True,
                    eos_token_id=EOS, pad_token_id=PAD, bos_token_id=None)
    config = Qwen2Config(**(settings | overrides))
    model = Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa").to(dtype).eval()
    for norm in (m for m in model.modules() if isinstance(m, Qwen2RMSNorm)):
        norm.__class__ = ExactNorm
    return model


def argmax_step_by_step(model, prefix, n, stop):
    """The slow twin: no cache, no padding, one full forward per token."""
    tokens = list(prefix)
    for _ in range(n):
        tokens.append(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax().item())
        if tokens[-1] in stop:
            break
    return tokens[len(prefix):]


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def ref_model():
    return make_model(seed=1).requires_grad_(False)
