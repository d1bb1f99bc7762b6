"""What the documents name is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_the_documents_name_exists():
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")))
    assert len(named) > 20
    assert named <= defined, named - defined


def test_every_mutant_names_a_test_and_a_line_that_exist():
    text = (ROOT / "tests" / "mutants.py").read_text(encoding="utf-8")
    tests = re.findall(r'"(tests/\S+?\.py)::(test_\w+)"', text)
    assert len(tests) >= 20
    for path, name in tests:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), (path, name)
