"""Parts of a training: the phases of a method, the optimiser, the learning rate."""
