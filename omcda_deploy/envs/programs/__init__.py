<<<<<<< HEAD
"""Code that simulators run elsewhere: the process around SMAC and the compiled battles of SMAX."""
=======
"""Programs that simulators run: SMAC's process, SMAX's compiled battles, MuJoCo's bodies in step."""
>>>>>>> 2c9220f (Tests hold MuJoCo environments in step to single ones, to the bit)
