"""Experiments composed of training, export and play, as a library without a command line."""
