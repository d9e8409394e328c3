"""The search: samplers, pruners, stages and the handle of a running study. Only here and in storage is Optuna used."""
