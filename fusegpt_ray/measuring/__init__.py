"""What a model is worth: perplexities, samples, zero-shot tasks and speed."""
