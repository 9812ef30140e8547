"""Python code generated from `protos/token_swarm/v1`: the messages and stubs of the two gRPC services.

Nothing here is written by hand; `make proto` writes it again.
"""
