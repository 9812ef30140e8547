"""A search as a process: the experts of a configuration or of a running server, and what is learned from them."""
