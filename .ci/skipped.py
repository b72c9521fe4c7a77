"""Fail if a test was skipped in each run that had it: `python .ci/skipped.py REPORT.xml ...` (JUnit)."""

import sys
import xml.etree.ElementTree as ElementTree

ALLOWED = ("needs a CUDA device", "needs a C++ compiler", "by root only", "root may write anywhere")
"""What CI's machine and user decide: a GPU, a compiler; a test is for root, or for everybody else."""


def skipped_everywhere(reports: list[str]) -> dict[str, str]:
    """Test → reason, of the tests that no run has executed."""
    ran, skipped = set(), {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            name = f"{case.get('classname')}::{case.get('name')}"
            reason = case.find("skipped")
            if reason is None:
                ran.add(name)
            else:
                skipped[name] = f"{reason.get('message')} {reason.text or ''}"
    return {name: reason for name, reason in skipped.items() if name not in ran}


def main() -> None:
    left = skipped_everywhere(sys.argv[1:])
    wrong = {name: reason for name, reason in left.items() if not any(word in reason for word in ALLOWED)}
    for name, reason in sorted(wrong.items()):
        print(f"skipped in every run: {name}: {reason}")
    print(f"{len(wrong)} tests were skipped in every run, {len(left) - len(wrong)} more may be")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
