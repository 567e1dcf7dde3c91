"""The crash simulator: the engine over simulated media, recorded once, crashed everywhere."""
