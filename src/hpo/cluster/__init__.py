"""Studies on many machines: SLURM, Kubernetes, and workers that join a shared study."""
