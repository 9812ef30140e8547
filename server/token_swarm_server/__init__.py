"""The processes around `token_swarm`: coordinator, expert servers, transport, launcher, configuration and CLI."""
