"""What the user declares: one YAML file a study, validated before anything runs."""
