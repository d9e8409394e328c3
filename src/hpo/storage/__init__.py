"""The study storage: Optuna's database, opened safely, read cheaply, shared by machines."""
