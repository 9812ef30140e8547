"""The coordinator's end of one expert: the connection to its process, and what stays when that is replaced."""
