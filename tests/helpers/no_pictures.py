"""Stands in for job_process.draw_study in tests that run a study many times; job processes import it fast."""


def draw_nothing(study, folder):
    """No picture at all."""
    return []
