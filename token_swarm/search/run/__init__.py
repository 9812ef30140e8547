"""The run of a search: iterations, racing, and the checkpoint that it goes on from."""
