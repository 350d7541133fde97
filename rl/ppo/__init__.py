"""The algorithm: tensors in, tensors out. It knows no environment, no process and no disk."""
