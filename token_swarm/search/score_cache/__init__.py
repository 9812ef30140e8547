"""What experts gave every text of a data set, kept so that any particle is scored without a model."""
