"""The README's blocks run as they stand, but for the sizes of the run, the ports and the processes of ``serve``."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from omcda_deploy import cli
from omcda_deploy.bundle import read_bundle
from omcda_deploy.envs import mamujoco
from tests.support.server_process import server_process

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text()
SMALLER = {
    "--transitions 200000": "--transitions 300",
    "--steps 20000": "--steps 20 --behavior-steps 20 --set hidden=16 --set batch_size=16",
    "--report report.html": "--episodes 1 --report report.html",
    "--bundle bundle": "--bundle bundle --episodes 1",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


def pipeline() -> list[str]:
    """Lines of the block that leads from a simulator to a served team."""
    [block] = [block for block in blocks("bash") if "train data.hdf5" in block]
    return block.splitlines()


def mentions() -> list[str]:
    """Commands within the text, with or without all their arguments."""
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)
    codes = [" ".join(code.split()).removeprefix("omcda-deploy ") for code in re.findall(r"`([^`]+)`", prose)]
    return [code for code in codes if code.split()[0] in command_line().commands]


def arguments(line: str) -> list[str]:
    return shlex.split(line.removeprefix("omcda-deploy ").removesuffix("&"))


@cache
def command_line() -> Any:
    """The commands of ``omcda-deploy``, whose callbacks do nothing: what is left is the parsing."""

    def silence(command: Any) -> None:
        command.callback = lambda **values: None
        for subcommand in getattr(command, "commands", {}).values():
            silence(subcommand)

    command = typer.main.get_command(cli.app)
    silence(command)
    return command


def test_the_pipeline_and_the_python_block_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command in this process and real physics, in episodes of 50 steps, against one server of all agents.

    ``serve`` with its process per agent runs in ``make demo`` and in tests/serve/test_supervisor.py.
    """
    monkeypatch.setattr(mamujoco, "EPISODE_LIMIT", 50)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    [python] = blocks("python")
    text = "\n".join(pipeline())
    for original, smaller in SMALLER.items():
        assert original in text
        text = text.replace(original, smaller)
    with ExitStack() as stack:
        endpoint = ""
        for line in text.splitlines():
            words = arguments(line)
            if words[0] == "serve":
                bundle = read_bundle(Path(words[1]))
                endpoint = stack.enter_context(server_process(bundle, *bundle.spec.names)).endpoint
                continue
            words = [endpoint if word == "127.0.0.1:8500-8502" else word for word in words]
            monkeypatch.setattr(sys, "argv", ["omcda-deploy", *words])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert ended.value.code == 0, capsys.readouterr().err
        capsys.readouterr()
        ports = "range(8500, 8503)"
        assert ports in python
        exec(python.replace(ports, f"({endpoint.rpartition(':')[2]},)"), {})
    assert re.fullmatch(r"return -?\d+\.\d, divergence now \d+\.\d+ nats\n", capsys.readouterr().out)
    assert (tmp_path / "report.html").stat().st_size > 10_000


def judged(claim: str) -> dict[str, tuple[str, int]]:
    """Verdict of the overview on each row that a claim names, and its number of datasets: 0 where it is not run."""
    page = README.parent / "docs" / "results" / "README.md"
    [line] = [line for line in page.read_text().splitlines() if f"): {claim}" in line]
    rows = {}
    for group in line.partition(claim)[2].split("; "):
        if words := re.search(
            r"(?:^|\. )(ahead of|behind|not told apart from|not run:) (.*)", group, re.IGNORECASE
        ):
            for row in re.split(r", (?=\w)", words[2]):
                name, number = row.split(" ")[0], re.search(r" on (\d+)$", row)
                rows[name] = words[1].lower(), int(number[1]) if number else 0
    return rows


def test_what_the_text_says_of_the_comparison_is_what_its_pages_say() -> None:
    """Rows of the page have mean ± std behind the selected temperature."""
    page = README.parent / "docs" / "results" / "comparison" / "mamujoco-hopper-3x1-medium-expert.md"
    values = []
    for name in ("omcda, d_tot 0.1", "omcda", "omiga", "comadice"):
        [row] = re.findall(
            rf"(?m)^\| {name} \| 20 000 \| 10, 11, 12, 13, 14 \| 5 \|.*$",
            page.read_text().replace("\u202f", " "),
        )
        mean, std = row.split(" | ")[5].replace(" ", "").split("±")
        values += [f"{float(mean):,.0f}", f"{float(std):,.0f}"]
    ours, spread, recipe, recipe_spread, omiga, _, comadice, _ = values
    text = " ".join(TEXT.split())
    assert (
        f"Five other seeds return {ours} ± {spread} with this budget and {recipe} ± {recipe_spread} with the "
        f"recipe's, where OMIGA has {omiga} and ComaDICE {comadice}." in text
    )

    mujoco = judged("OMCDA earns more than every rival on MuJoCo")
    smax = judged("OMCDA earns more than every rival on StarCraft")
    words = {3: "three", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight", 9: "nine"}
    assert {mujoco[name][0] for name in ("omiga", "comadice", "icq")} == {"ahead of"}
    assert mujoco["omiga"] == mujoco["comadice"] == mujoco["icq"]
    assert {mujoco[name] for name in ("cql", "omar", "cfcql", "bcq")} == {("ahead of", 1)}
    assert (
        f"On MuJoCo OMCDA is ahead of OMIGA, ComaDICE and ICQ over {words[mujoco['omiga'][1]]} datasets, and "
        "of CQL, OMAR, CFCQL and BCQ on the one that they are run on, where a setting of each was chosen "
        "as OMCDA's was." in text
    )
    assert smax["comadice"][0] == "ahead of"
    assert {smax[name][0] for name in ("omiga", "cfcql", "bcq")} == {"not told apart from"}
    assert (
        f"On SMAX it is ahead of ComaDICE over {words[smax['comadice'][1]]} datasets, and not told apart from "
        "OMIGA, CFCQL and BCQ." in text
    )
    [(verdict, datasets)] = judged("OMCDA earns more than the clone").values()
    assert verdict == "ahead of"
    overview = (README.parent / "docs" / "results" / "README.md").read_text()
    alone = re.search(r"than the clone at .* on single datasets ahead in (\d+) and behind in 0 ", overview)
    assert alone is not None
    assert (
        f"Over all {words[datasets]} datasets together it is ahead of the clone, on {words[int(alone[1])]} of them "
        "also alone." in text
    )
    ablations = judged("OMCDA earns more than its ablations")
    assert {verdict for verdict, _ in ablations.values()} <= {"not told apart from", "not run:"}
    letter = judged("OMCDA by the paper's letter")
    verdict, datasets = letter["omiga"]
    assert verdict == "behind"
    assert letter["comadice"] == letter["omiga"]
    assert letter["bcq"][0] == "behind"
    assert (
        f"By the paper's letter it is behind OMIGA and ComaDICE over {words[datasets]} datasets, and behind BCQ "
        f"over {words[letter['bcq'][1]]}." in text
    )


@pytest.mark.parametrize("line", pipeline())
def test_every_command_of_the_pipeline_is_valid(line: str) -> None:
    assert line.startswith("omcda-deploy ")
    command_line().main(arguments(line), standalone_mode=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("export", "Missing parameter: run"),
        ("serve bundle --agnt agent_2", "No such option.*--agnt"),
        ("trian data.hdf5", "No such command 'trian'"),
        ("serve bundle --port many", "valid integer"),
    ],
)
def test_an_invalid_command_would_be_noticed(words: str, message: str) -> None:
    with pytest.raises(Exception, match=message):
        command_line().main(words.split(), standalone_mode=False)


def test_commands_and_options_in_the_text_exist() -> None:
    codes = mentions()
    assert {"serve", "evaluate --bundle", "results PAGE.toml", "bench reload"} <= set(codes)
    for code in codes:
        words = code.split()
        command = command_line()
        while words and (subcommands := getattr(command, "commands", None)):
            assert words[0] in subcommands, code
            command = subcommands[words.pop(0)]
        options = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options, code


@pytest.mark.parametrize("target", ["test", "demo", "team", "slow", "fuzz", "extras", "docs"])
def test_make_targets_of_the_readme_exist(target: str) -> None:
    assert f"make {target}" in TEXT
    dry = subprocess.run(["make", "-n", target], cwd=README.parent, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
