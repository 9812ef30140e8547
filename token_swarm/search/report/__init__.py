"""What a search found, told to people: tables, plots, comparisons, and the true optimum where it is known."""
