"""A study on many machines: SLURM, Kubernetes, and workers that join."""
