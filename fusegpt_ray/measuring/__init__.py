"""What a finished model is worth beside others: zero-shot tasks, and speed."""
