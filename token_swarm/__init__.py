"""Token Swarm: mixes the next-token distributions of several language models, whatever their tokenizers.

This package runs an ensemble in one process and never does network I/O; `token_swarm_server` adds processes.
"""
