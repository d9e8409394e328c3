"""A study's side of MLflow, out of one tracking store and into another."""
