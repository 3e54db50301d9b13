"""The environment itself: what the other tests rest on is what it should be."""

import torch


def test_the_program_lists_its_commands(trainer):
    assert "generate" in trainer("--help").stdout


def test_smollm2_writes_sensible_english_in_transformers(smollm2, reference):
    """A mistake in how the folder was made (row order, tokenizer) would make nonsense on both sides of a comparison."""
    model, tokenizer = reference(smollm2)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        next_token = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(next_token) == " Paris"
