"""Trainers of other libraries, each importable only with its library: `lightning` and `huggingface`."""
