"""What to try and when to stop; Optuna is imported here and nowhere else."""
