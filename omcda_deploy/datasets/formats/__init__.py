"""Dataset formats, one file each; :mod:`omcda_deploy.registry` lists this folder."""
