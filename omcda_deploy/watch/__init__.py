"""A page that shows what a team's servers do, from their metrics, for those who have no Grafana.

:mod:`.scrapes` reads metrics, :mod:`.figures` makes numbers by agent of them, and :mod:`.site` serves the page.
"""
