"""Lists what is installed with its licences, and asks pip-audit for known faults in it: `tempflow audit`.

Exit code 0: nothing known; 1: faults, which are listed; 2: they could not be asked for, as one line says.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import Distribution, distributions
from typing import Any

from tempflow.commands.ending import Parser, end
from tempflow.common.errors import BadInput
from tempflow.common.say import say

APPROVED = "License :: "
"""How a classifier begins that tells a licence."""
LONGEST = 60
"""Characters of a licence's name; some packages put the whole text there."""


def licence(package: Distribution) -> str:
    """A package's licence, by its expression, its classifiers or the first line of its own words."""
    told = package.metadata
    classifiers = [line.rpartition(" :: ")[2] for line in told.get_all("Classifier", []) if line.startswith(APPROVED)]
    words = (told.get("License") or "").strip().partition("\n")[0]
    found = told.get("License-Expression") or ", ".join(classifiers) or words or "not told"
    return found if len(found) <= LONGEST else f"{found[:LONGEST]}..."


def table(packages: Iterable[Distribution]) -> str:
    """A line for each package: name, version, licence."""
    rows = sorted({(p.metadata["Name"], p.version, licence(p)) for p in packages}, key=lambda row: row[0].lower())
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {version:<{widths[1]}}  {words}" for name, version, words in rows)


def known_faults(seconds: float) -> list[str]:
    """A line for each fault that an index knows of what is installed here, and one of packages that it does not know.

    Raises:
        BadInput: pip-audit is not installed, no index answers it in time, or none knows one of the packages.
    """
    if importlib.util.find_spec("pip_audit") is None:
        raise BadInput("pip-audit", None, "is not installed, so nothing was asked: pip install pip-audit")
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        faults, unknown, count = _read(json.loads(done.stdout))
    except subprocess.TimeoutExpired as error:
        raise BadInput("pip-audit", None, f"no index answered within {seconds:g} s") from error
    except (ValueError, KeyError, TypeError) as error:
        said = done.stderr.strip().rpartition("\n")[2]
        raise BadInput("pip-audit", None, f"no index answered ({said or 'nothing was said'})") from error
    if len(unknown) == count:  # it says so of a package whose page it cannot reach, and finds no fault in that
        raise BadInput("pip-audit", None, f"no index answered for any of {count} packages")
    if unknown:
        say(f"not asked about, for no index knows them: {', '.join(unknown)}")
    return faults


def _read(answer: dict[str, Any]) -> tuple[list[str], list[str], int]:
    """pip-audit's answer: a line for each fault, names of packages it passed over, and how many there are in all."""
    packages = answer["dependencies"]
    faults = [
        f"{package['name']} {package['version']}: {fault['id']}, mended in {', '.join(fault['fix_versions']) or 'none'}"
        for package in packages
        for fault in package.get("vulns", [])
    ]
    return faults, [package["name"] for package in packages if "skip_reason" in package], len(packages)


def _run(arguments: Sequence[str] | None) -> int:
    parser = Parser(prog="tempflow audit", description=__doc__, example="tempflow audit --licences")
    parser.add_argument("--licences", action="store_true", help="list licences alone, ask nobody")
    parser.add_argument("--seconds", type=float, default=300.0, help="to wait for an index (default: %(default)s)")
    given = parser.parse_args(arguments)
    if not 0 < given.seconds <= 86400:
        raise BadInput("--seconds", given.seconds, "must be above 0, at most 86400")
    print(table(distributions()))
    if given.licences:
        return 0
    faults = known_faults(given.seconds)
    print("\n".join(["", *faults]) if faults else "\nno known faults")
    return 1 if faults else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 for faults that are known, or 2 where none could be asked."""
    return end(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())
