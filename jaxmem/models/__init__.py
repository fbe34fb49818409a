"""Language models, and their Hugging Face checkpoints."""
