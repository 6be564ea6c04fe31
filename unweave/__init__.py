"""unweave decompiles a trained neural network into a graph that a person can read, run and falsify."""

__version__ = "0.1.0"
