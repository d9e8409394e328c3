"""What runs in a worker's process, and in the job process."""
