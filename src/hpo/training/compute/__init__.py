"""How a training is computed: device, precision, memory, CUDA graphs."""
