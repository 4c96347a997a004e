"""Code that simulators share or run elsewhere: SMAC's process, SMAX's compiled battles, MuJoCo's bodies in step."""
