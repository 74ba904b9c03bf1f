"""Packages of others for benches: installed or unpacked once, and the outcomes of their own tests."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

PIP = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]


def pip_install(site: Path, *packages: str) -> None:
    """Install packages into a folder, without what they depend on."""
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(site), *packages], check=True)


def source_package(name: str, version: str, folder: Path) -> Path:
    """Return the unpacked source package of PyPI in ``folder``, where it is kept."""
    unpacked = folder / f"{name}-{version}"
    if not unpacked.exists():
        words = ["download", "--no-deps", "--no-binary", ":all:", f"{name}=={version}", "-d", str(folder)]
        subprocess.run([*PIP, *words], check=True)
        with tarfile.open(folder / f"{unpacked.name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return unpacked


def run_tests(
    folder: Path, words: Sequence[str], environment: Mapping[str, str]
) -> Iterator[tuple[Element, Element | None]]:
    """Run pytest in a folder. Yield each test that was not skipped with its failure or error, None if it passed."""
    report, log = folder / "herd-report.xml", folder / "herd-log.txt"
    command = [sys.executable, "-m", "pytest", "-o", "junit_family=xunit1", f"--junitxml={report}", *words]
    with log.open("w", encoding="utf-8") as output:
        subprocess.run(command, cwd=folder, env=environment, stdout=output, check=False)
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    if not cases:
        sys.exit(f"no test was run:\n{log.read_text(encoding='utf-8')[-2000:]}")
    for case in cases:
        problem = case.find("failure")
        if case.find("skipped") is None:
            yield case, case.find("error") if problem is None else problem
