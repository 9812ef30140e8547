"""The public messages and stubs, generated from the server's protos; `make proto` writes them again.

A package of its own, so that the server's may be installed beside it. In one process both register the same file
descriptor, which protobuf takes as one.
"""
