"""Each extra in an environment of its own: ``python -m tests.support.extras_alone [EXTRA …]`` (``make extras``).

Installs the package with one extra into a new virtual environment, looks with ``pip check`` whether all there is
fits together, and whether torch and jax stay out of where they do not belong. Afterwards the server's code runs in
environments that have tritonclient, too, installed before it or after it, without constraints. Needs a package
index, several gigabytes and minutes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PIP = ("-m", "pip", "-q", "--disable-pip-version-check")
ORDERS = {
    "serve, then tritonclient": (f"{ROOT}[serve]", "tritonclient[grpc]"),
    "tritonclient, then serve": ("tritonclient[grpc]", f"{ROOT}[serve]"),
}
SERVE = (
    "import omcda_deploy.serve.introspection, omcda_deploy.serve.server, omcda_deploy.cli, tritonclient.grpc"
)
HEAVY = {"torch": {"train", "export", "behavior", "all", "dev"}, "jax": {"smax", "all", "dev"}}


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = sys.argv[1:] or [extra for extra in project["optional-dependencies"] if extra != "dev"]
    failed = [extra for extra in extras if not _fits(extra)]
    print(f"{len(extras) - len(failed)} of {len(extras)} extras fit alone", *failed)
    failed += [order for order in ORDERS if "serve" in extras and not _starts(order)]
    return bool(failed)


def _starts(order: str) -> bool:
    """Install the requirements of an order one after another, and run the server's and the neighbour's code."""
    with tempfile.TemporaryDirectory() as folder:
        python = _environment(Path(folder))
        for requirement in ORDERS[order]:
            subprocess.run([str(python), *PIP, "install", requirement], check=True)
        run = subprocess.run([str(python), "-c", SERVE], cwd=folder, check=False)
        print(f"{order}: {'starts' if run.returncode == 0 else 'does not start'}", flush=True)
        return run.returncode == 0


def _environment(folder: Path) -> Path:
    """Make a virtual environment; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / "bin" / "python"


def _fits(extra: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        python = _environment(Path(folder))
        pip = [str(python), *PIP]
        bound = ["install", "-c", str(ROOT / "constraints.txt")]
        if extra in HEAVY["torch"]:  # by name: a free choice brings several gigabytes of CUDA
            subprocess.run([*pip, *bound, "torch"], check=True)
        subprocess.run([*pip, *bound, f"{ROOT}[{extra}]"], check=True)
        fits = subprocess.run([*pip, "check"], check=False).returncode == 0
        for package, homes in HEAVY.items():
            imported = subprocess.run(
                [str(python), "-c", f"import {package}"], check=False, capture_output=True
            )
            if imported.returncode == 0 and extra not in homes:
                print(f"{extra} brings {package}")
                fits = False
    print(f"{extra}: {'fits' if fits else 'does not fit'}", flush=True)
    return fits


if __name__ == "__main__":
    sys.exit(main())
