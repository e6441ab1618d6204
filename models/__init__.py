"""Models: configuration, files, tokenizer, transformer."""
