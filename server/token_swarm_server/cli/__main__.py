"""`python -m token_swarm_server.cli`: how the launcher starts experts with another interpreter."""

from token_swarm_server.cli import main

main()
