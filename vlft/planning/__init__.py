"""What a run takes, before a model is loaded: samples, steps, memory, disk."""
