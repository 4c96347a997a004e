"""Dataset formats, one file each; :mod:`omcda_deploy.registry` lists this folder.

A format that is read directly defines ``SUFFIXES``, the endings of its files' names, and ``read(path, task) ->
Dataset``. A foreign format is converted once instead (:func:`omcda_deploy.datasets.convert.convert`): it defines
``SOURCE``, ``recognizes(path)`` and ``open_recording(path, claim)``.
"""
