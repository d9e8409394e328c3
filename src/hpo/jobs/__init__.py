"""One file a job that a user asks for, other than running a study."""
