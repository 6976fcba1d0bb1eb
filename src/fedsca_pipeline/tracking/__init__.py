"""Write training runs and comparisons to MLflow."""
