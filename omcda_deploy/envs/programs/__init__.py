"""Programs that simulators run: the process around SMAC, the compiled battles of SMAX."""
