"""One training, as science: data in, epochs out."""
