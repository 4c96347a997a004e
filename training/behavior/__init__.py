"""Behaviour policies that datasets are recorded with, one module per simulator.

Each module holds PPO's configuration and training, the arrays of a checkpoint, the actor that a bundle is exported
from, and the episodes that the export is checked on. :mod:`omcda_deploy.training.behavior.checkpoint` has what the
modules share; :mod:`omcda_deploy.experiments.tiers` makes tiers of the checkpoints.
"""
