"""Studies whose training is a formula, and a kept study."""

from study_fixtures import cluster, kept, kept_template, run_formula  # noqa: F401
