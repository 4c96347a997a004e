"""Behaviour policies that datasets are recorded with, one file per simulator."""
