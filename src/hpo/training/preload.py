"""Imports of the fork server, which every worker forked from it shares."""

import signal

import hpo.training.device
import hpo.training.system_metrics
import hpo.training.trial  # noqa: F401

# Schedulers send SIGTERM to every process of a job. As with Ctrl-C, what it means is for the supervisor to decide, who
# needs workers and server to put away what they train; they end when it does. What is forked inherits this.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
