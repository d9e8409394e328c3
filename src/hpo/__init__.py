"""Hyperparameter studies of image classifiers: declare one file, search, compare, use the best."""
