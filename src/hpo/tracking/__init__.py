"""What to remember: runs, models and openings of the test set, in MLflow."""
