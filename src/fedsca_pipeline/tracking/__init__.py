"""MLflow runs of training and of comparisons."""
