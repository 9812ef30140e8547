"""Tokenizers: the bytes of every token, prompts, and the order in which an expert numbers its tokens."""
