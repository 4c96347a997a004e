"""docs/improve.md: its blocks are run as they stand, but for the ports: record, train, promote and roll back."""

from __future__ import annotations

import json
import re
from pathlib import Path

from omcda_deploy.estimation import LEAST_EFFECTIVE, MOST_UNSUPPORTED, UNSUPPORTED_NATS
from omcda_deploy.experiments.promotions import LEAST_CLEAR, MOST_HARMFUL
from tests.support.pages import DOCS, run_in_shell

PAGE = (DOCS / "improve.md").read_text()


def test_the_loop_runs(tmp_path: Path) -> None:
    output = run_in_shell(PAGE, tmp_path)
    assert re.search(r"version 2 answers: estimated to earn [\d.]+ more than version 1", output), output
    assert "version 2 had been promoted: estimated to earn" in output
    assert (tmp_path / "releases" / "current").read_text() == "1\n2\n"
    (promoted,) = (line for line in output.splitlines() if "promoted on" in line and "Switch 2 by" in line)
    evidence = json.loads(promoted.partition("promoted on ")[2])
    assert evidence["shadow"]["answers"] > 0
    assert evidence["improvement"]["low"] > evidence["at_least"] == 0.0
    assert f"in place of one promoted on {json.dumps(evidence)}" in output


def test_the_page_says_what_the_code_does() -> None:
    text = " ".join(PAGE.split())
    assert f"at least {LEAST_EFFECTIVE:g} episodes count" in text
    assert f"beyond the data are at most {100 * MOST_UNSUPPORTED:g} %" in text
    assert f"over {UNSUPPORTED_NATS:g} nats from what acted" in text
    assert (
        f"at most {100 * MOST_HARMFUL:g} % and clearly better ones in at least {100 * LEAST_CLEAR:g} %"
        in text
    )
