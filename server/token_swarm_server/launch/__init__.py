"""Starting experts as processes: the command and environment of each, and starting again those that ended."""
