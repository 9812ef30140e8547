"""Optimisers that propose particles and are told their scores, Model Swarms among them."""
