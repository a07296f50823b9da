"""Training a language model on bytes: settings, data, tokenizer, checkpoints, the Trainer, text from a model.

Importing this package, or its `settings` and `faults`, loads neither transformers nor accelerate; the modules that need
them (the extra `train`) import them at their top.
"""
