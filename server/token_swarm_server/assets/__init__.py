"""Files that are fetched from a package index: the demo experts and their conversion, and the evaluation data."""
