"""The computation of a training: device, precision, memory, CUDA graphs."""
