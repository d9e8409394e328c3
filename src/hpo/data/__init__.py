"""Data sets: found, checked, prepared once as arrays, split; the test part sealed."""
