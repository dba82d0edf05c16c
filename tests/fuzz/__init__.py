"""Random graphs: made (`generate`), compiled in batches and compared (`check`), shrunk when they fail."""
