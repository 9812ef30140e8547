"""Measures a server from outside, by its public gRPC service: single streams, load, and where the time goes.

Every figure comes with the machine, the versions and the configuration that it was measured with.
"""
