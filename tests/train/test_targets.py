"""Which modules a setting means, and which models cannot be trained as they are."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
import transformers  # noqa: E402

from llmevo.errors import GenomeError  # noqa: E402
from llmevo.genome.sections import HalvingSpec  # noqa: E402
from llmevo.genome.train import TrainSettings  # noqa: E402
from llmevo.train import adapters, prepare  # noqa: E402

SHAPE = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_the_mlp_of_opt_has_no_module_of_its_own() -> None:
    with torch.device("meta"):
        targets = adapters.Targets(transformers.OPTForCausalLM(transformers.OPTConfig(**SHAPE, ffn_dim=32)))
    assert targets.suffixes(TrainSettings(target_modules="mlp")) == ["fc1", "fc2"]
    attention = ["k_proj", "out_proj", "q_proj", "v_proj"]
    assert targets.suffixes(TrainSettings(target_modules="attn")) == attention


def test_a_model_whose_tokens_see_all_others_is_refused(make_spec: Any, tokenizer: Any) -> None:
    """As a language model it would have each token before it, and learn to copy."""

    def check(**options: Any) -> Any:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(transformers.BertConfig(**SHAPE, **options))
        return prepare(
            make_spec(), model, tokenizer, seed=0, metrics=["validation_loss"], halving=HalvingSpec()
        )

    with pytest.raises(GenomeError, match=r"`train` needs a model .* those of BertLMHeadModel see all"):
        check()
    assert check(is_decoder=True).kind == "causal"
