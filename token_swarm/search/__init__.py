"""Learning a particle: optimisers that propose mixtures, and utilities that judge them on data.

Likelihoods are judged from a cache that is filled once per expert, generated text by running the ensemble.
"""
