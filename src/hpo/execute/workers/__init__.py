"""The code that runs in worker processes and in the job process."""
