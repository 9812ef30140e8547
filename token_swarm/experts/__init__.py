"""Experts: the contract between an ensemble and a model, its laws as reusable assertions, and the backends."""
