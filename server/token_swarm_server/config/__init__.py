"""Configuration: the settings and their file, addresses, and how processor cores are shared out."""
