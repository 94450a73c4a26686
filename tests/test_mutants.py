"""Every wrong program of mutants.py, in a copy of the project: the tests that are named there must fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mutants import MUTANTS

ROOT = Path(__file__).parents[1]


@pytest.mark.mutants
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.why)
def test_mutant_dies(mutant, tmp_path):
  """Kills: tests that let a wrong program pass, and a list of programs that are no longer wrong."""
  sources = shutil.ignore_patterns("__pycache__", "golden")
  for part in ("dspark_jax", "train", "infer", "configs", "tests"):
    shutil.copytree(ROOT / part, tmp_path / part, ignore=sources)
  (tmp_path / "tests" / "golden").symlink_to(ROOT / "tests" / "golden")
  text = (ROOT / mutant.file).read_text()
  assert text.count(mutant.old) == 1, f"{mutant.file} has {text.count(mutant.old)} times: {mutant.old}"
  (tmp_path / mutant.file).write_text(text.replace(mutant.old, mutant.new))
  for test in mutant.tests:
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider",
                          f"tests/{test}"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, text=True,
                         capture_output=True)
    assert run.returncode == 1, f"{test} lets it pass, or did not run:\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
