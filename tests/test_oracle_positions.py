"""The most tokens of a model, against what its own forward takes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from rlaif_fast.oracle.positions import learned_positions


@pytest.mark.parametrize("family", ["roberta", "gpt2", "opt", "llama"])
def test_the_table_of_positions_is_found(family):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    more = {"opt": {"word_embed_proj_dim": 32}}.get(family, {})
    config = AutoConfig.for_model(family, vocab_size=32, num_labels=1, pad_token_id=1, **sizes, **more)
    config.eos_token_id = 2
    model = AutoModelForSequenceClassification.from_config(config).eval()
    most = learned_positions(model)
    assert most == {"roberta": 62, "llama": None}.get(family, 64)
    model(input_ids=torch.full((1, most or 65), 7))
    if most is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 7))
