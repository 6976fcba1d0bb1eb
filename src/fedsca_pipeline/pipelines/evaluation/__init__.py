"""Each site's models on its own test split: scores, tables, figures."""
