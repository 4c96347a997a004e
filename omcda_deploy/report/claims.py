"""Claims about methods, as data, that :mod:`omcda_deploy.report.judgement` judges by the numbers.

A claim is a table of a file of results::

    says = "Influence shares the budget better than equal parts"   # the words of the page
    rule = "better"
    method = "omcda"             # names of rows
    than = ["w/o-CDA"]
    on = ["smax/*"]              # datasets TASK/TIER; all when omitted
    by = "the paper"             # whose claim it is; the paper's when omitted

====================  =============================================================================================
rule                  holds where
====================  =============================================================================================
``better``            the method is ahead of each row of ``than`` over all datasets, and behind none on any
``correlated``        the interval of the mean rank correlation over agents of the two curves that the algorithm
                      draws against each other (OMCDA: influence and weighted reward value) is above 0
``sensitive``         on every dataset, the best and the worst value of the setting that the algorithm scans differ
``hindsight``         on every dataset, the value of the scanned setting that it chose from the data gives away
                      at most a tenth of what the fixed value with the largest mean returns
``converges``         no run failed, and none's reward values left the range of the data's returns
``steady``            the median over datasets of the spread between a run's policies, relative to its mean, is not
                      above that of each row of ``than``, and neither is any dataset's
====================  =============================================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

from omcda_deploy.errors import ConfigError, UnknownNameError

RULES = ("better", "correlated", "sensitive", "hindsight", "converges", "steady")
COMPARING = ("better", "steady")  # those with ``than``
_LISTS = ("than", "on")


@dataclass(frozen=True)
class Claim:
    """A claim, as the module describes it."""

    says: str
    rule: str
    method: str
    than: tuple[str, ...] = ()
    on: tuple[str, ...] = ("*",)
    by: str = "the paper"


def claim_of(values: object, where: str, methods: Collection[str]) -> Claim:
    """Make a claim about rows of ``methods`` from a table; ``where`` names the table in errors.

    Raises :class:`ConfigError` for entries that are missing or wrong, :class:`UnknownNameError` for unknown names.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a table [[claims]], got {values!r}")
    entries = [field.name for field in fields(Claim)]
    for name, value in values.items():
        if name not in entries:
            raise UnknownNameError(f"entry of {where}", name, entries)
        _require_words(f"{where}: {name}", value, several=name in _LISTS)
    for name in ("says", "rule", "method"):
        if name not in values:
            raise ConfigError(f"{where}: expected an entry {name}, there is none")
    listed: dict[str, Any] = {
        name: tuple(value) if name in _LISTS else value for name, value in values.items()
    }
    claim = Claim(**listed)
    if claim.rule not in RULES:
        raise UnknownNameError(f"rule of {where}", claim.rule, RULES)
    if (claim.rule in COMPARING) != bool(claim.than):
        expected = "one or more rows" if claim.rule in COMPARING else "none"
        raise ConfigError(
            f"{where}: than: expected {expected} with the rule {claim.rule}, got {list(claim.than)}"
        )
    for method in (claim.method, *claim.than):
        if method not in methods:
            raise UnknownNameError(f"row of {where}", method, methods)
    return claim


def _require_words(name: str, value: Any, several: bool) -> None:
    if several and not (isinstance(value, list) and all(isinstance(word, str) for word in value)):
        raise ConfigError(f"{name}: expected a list of texts, got {value!r}")
    if not several and not isinstance(value, str):
        raise ConfigError(f"{name}: expected a text, got {value!r}")


def fits(label: str, patterns: Iterable[str]) -> bool:
    """Test if a name, as TASK/TIER, is one of the patterns or fits one; brackets in one are a class of signs."""
    return any(label == pattern or fnmatchcase(label, pattern) for pattern in patterns)
