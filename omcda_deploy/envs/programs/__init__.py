"""Code that simulators run elsewhere: the process around SMAC and the compiled battles of SMAX."""
