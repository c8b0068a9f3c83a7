"""Run the fault drill and print its table: a row of docs/reliability.md a line, with what its tests did and found.

    python -m tests.faults.drill                  all rows, the long tests too
    python -m tests.faults.drill --rows 4 5       some rows; the others keep the figures of the last time
    python -m tests.faults.drill -k export        tests whose name has the word
    python -m tests.faults.drill --fast           what the normal run has

The figures are also written to benchmarks/results/drill.json, by row and by test: trials, outcomes, problems. Tests
that several rows name are run once, and count in each.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "benchmarks" / "results" / "drill.json"
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


@dataclass
class Row:
    """A row of the table of faults."""

    number: str
    fault: str
    expected: str
    tests: list[str]
    """file::test, without parameters."""


class Collector:
    """A pytest plugin that notes what each test did."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take one phase of one test."""
        fresh = {"outcome": "passed", "seconds": 0.0, "date": date.today().isoformat()}
        test = self.tests.setdefault(report.nodeid, fresh)
        test["seconds"] = round(test["seconds"] + report.duration, 1)
        if report.outcome != "passed":
            test["outcome"] = report.outcome
        if report.failed:
            test["problem"] = str(report.longrepr).strip().splitlines()[-1][:300]
        drills = [value for key, value in report.user_properties if key == "drill"]
        if report.when == "call" and drills:
            (test["drill"],) = drills


def read_rows() -> list[Row]:
    """Read the table of faults out of the page."""
    text = PAGE.read_text(encoding="utf-8").split("\n## Faults\n", 1)[1].split("\n## ", 1)[0]
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and cells[0].strip("| ").isdigit():
            tests = [f"{file}::{test}" for file, test in NAMED_TEST.findall(line)]
            rows.append(Row(cells[0].strip("| "), cells[1], cells[2], tests))
    return rows


def figures(row: Row, tests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Sum up a row: a trial is what a drill counts as one, or a test with its parameters."""
    own = {name: test for name, test in tests.items() if name.split("[")[0] in row.tests}
    told: Counter[str] = Counter()
    problems, trials = [], 0
    for name, test in own.items():
        drill = test.get("drill", {})
        trials += int(drill.get("trials", test["outcome"] != "skipped"))
        problems += [f"{name}: {test['problem']}"] if "problem" in test else []
        problems += [f"{name}: {problem}" for problem in drill.get("problems", [])]
        for kind, count in drill.get("outcomes", {}).items():
            parts = count.items() if isinstance(count, dict) else [("", count)]
            told.update({f"{kind}: {part}" if part else kind: number for part, number in parts})
    return {
        "fault": row.fault,
        "expected": row.expected,
        "tests": row.tests,
        "tests_run": sum(test["outcome"] != "skipped" for test in own.values()),
        "tests_skipped": sum(test["outcome"] == "skipped" for test in own.values()),
        "trials": trials,
        "outcomes": dict(sorted(told.items())),
        "problems": problems,
        "seconds": round(sum(test["seconds"] for test in own.values()), 1),
    }


def word(number: str, row: dict[str, Any]) -> str:
    """Make one line of the printed table."""
    if not row["tests"]:
        verdict = "no test"
    elif row["problems"]:
        verdict = f"{len(row['problems'])} PROBLEMS"
    elif not row["trials"]:
        verdict = "skipped" if row["tests_skipped"] else "not run"
    else:
        verdict = "nothing lost"
    return f"{number:>2}  {row['fault'][:70]:<70}  {row['trials']:>6,}  {row['seconds']:>7.1f}  {verdict}"


def merge(tests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Put new figures of tests over the old ones, and sum up all rows anew."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with open(RESULTS, "a+", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # parts of a drill may run beside one another
        stream.seek(0)
        old = stream.read()
        kept = {**(json.loads(old)["tests"] if old else {}), **tests}
        result = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "rows": {row.number: figures(row, kept) for row in read_rows()},
            "tests": dict(sorted(kept.items())),
        }
        stream.truncate(0)
        stream.write(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", metavar="N", help="rows of the table (default: all)")
    parser.add_argument("--fast", action="store_true", help="leave the slow tests out")
    parser.add_argument("-k", metavar="WORDS", help="as pytest's: only tests whose name matches")
    parsed = parser.parse_args(arguments)
    rows = [row for row in read_rows() if parsed.rows is None or row.number in parsed.rows]
    tests = list(dict.fromkeys(test for row in rows for test in row.tests))
    os.chdir(ROOT)
    collector, started = Collector(), time.monotonic()
    options = ["-q", "--no-header", "-p", "no:warnings", *(["-m", "not slow"] if parsed.fast else [])]
    options += ["-k", parsed.k] if parsed.k else []
    code = int(pytest.main([*tests, *options], plugins=[collector]))
    result = merge(collector.tests)
    print(f"\n #  {'fault':<70}  trials  seconds")
    for number, row in result["rows"].items():
        print(word(number, row))
        for problem in row["problems"][:5]:
            print(f"      {problem}")
    total = sum(int(test.get("drill", {}).get("trials", 1)) for test in result["tests"].values())
    print(f"{total:,} trials in all; this part took {time.monotonic() - started:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
