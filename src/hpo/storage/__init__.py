"""The study storage: Optuna's database, which supervisors on several machines may share, and its read-only views."""
