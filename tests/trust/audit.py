"""Look the installed packages up among known vulnerabilities; without a network, say so and pass.

``python tests/trust/audit.py SITE_PACKAGES``, with a Python that has pip-audit. A mirror that answers "not found" to
every question makes pip-audit say that nothing is wrong; here it counts as nothing looked up.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import NamedTuple

UNREACHABLE = ("ConnectionError", "ServiceError", "Max retries", "Temporary failure", "Connection refused", "timed out")
ARGUMENTS = ("--skip-editable", "--progress-spinner", "off", "--timeout", "15", "--format", "json")


class Verdict(NamedTuple):
    """What to print, and the exit status."""

    text: str
    status: int


def verdict(stdout: str, stderr: str, returncode: int) -> Verdict:
    """What pip-audit's answer comes to."""
    try:
        packages = json.loads(stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        if any(sign in stderr for sign in UNREACHABLE):
            return Verdict("audit: the database of vulnerabilities cannot be reached; nothing was looked up", 0)
        return Verdict(f"audit: pip-audit failed with status {returncode}:\n{stderr[-2000:]}", returncode or 1)
    known = [package for package in packages if "skip_reason" not in package]
    if not known:
        return Verdict(f"audit: the index knows none of {len(packages)} packages; nothing was looked up", 0)
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, repaired in {', '.join(found['fix_versions']) or '-'}"
        for package in known
        for found in package["vulns"]
    ]
    unknown = [package["name"] for package in packages if "skip_reason" in package]
    note = f"; not looked up: {', '.join(unknown)}" if unknown else ""
    lines.append(f"audit: {len(lines)} known vulnerabilities in {len(known)} packages{note}")
    return Verdict("\n".join(lines), int(len(lines) > 1))


def main(site_packages: str) -> int:
    """Ask, and print what came of it."""
    if importlib.util.find_spec("pip_audit") is None:
        print("audit: pip-audit is not installed and could not be; nothing was looked up")
        return 0
    command = [sys.executable, "-m", "pip_audit", "--path", site_packages, *ARGUMENTS]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    text, status = verdict(found.stdout, found.stderr, found.returncode)
    print(text)
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
