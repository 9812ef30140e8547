"""The coordinator process: the public service, the engine that decodes requests, and the queues of its experts."""
