"""The rules of the house, read from the source: who imports whom, what a library must not do, how long things get."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mutants import MUTANTS
from train.config import CompareConfig, TrainConfig, read_config

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "dspark_jax").rglob("*.py"))
PROGRAMS = sorted(p for part in ("infer", "train") for p in (ROOT / part).glob("*.py"))
CONFIGS = sorted(p for p in (ROOT / "configs").glob("*.py") if p.name != "__init__.py")
SOURCES = sorted(p for part in ("dspark_jax", "train", "infer", "configs", "tests")
                 for p in (ROOT / part).rglob("*.py"))
# A file imports from earlier lines and from its own folder. Folders that share a line are siblings: strangers.
ORDER = [["types"], ["config"], ["text"], ["metrics"], ["sampling"], ["nn"], ["targets", "drafters"],
         ["decoding", "training"], ["data"], ["checkpoints"], ["loading"], ["__init__"], ["programs"]]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
NOWHERE = {"argparse", "click", "pickle", "torch", "infer", "train", "configs", "tests"}  # also not for programs/
PURE = NOWHERE | {"time", "datetime", "tyro", "rich", "matplotlib", "tensorboardX"}  # command lines, clocks, output
# They say how long something took, and decide nothing by it.
CLOCKS = {f"dspark_jax/{name}.py": {"time"} for name in ("data/pipeline", "decoding/engine", "decoding/executables")}


def name_of(path: Path) -> str:
  return str(path.relative_to(ROOT))


def imports(tree: ast.AST) -> list[str]:
  """Every imported module, also inside functions; `from a import b` counts as a.b."""
  found = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, "relative import: write the whole path"
      found += [f"{node.module}.{alias.name}" for alias in node.names]
  return found


def wrong_imports(source: str, part: str) -> list[str]:
  """What a file of the library, in the folder or single file `part`, must not import of the library."""
  wrong = []
  for module in imports(ast.parse(source)):
    first, *rest = module.split(".")
    if first != "dspark_jax":
      continue
    other = rest[0] if rest and rest[0] in LEVEL else "__init__"
    if other != part and LEVEL[other] >= LEVEL[part]:
      wrong.append(module)
  return wrong


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_imports_point_down(path):
  """Kills: a drafter that knows a family, a round that knows a drafter, a step that reads files."""
  part = path.relative_to(ROOT / "dspark_jax").parts[0].removesuffix(".py")
  assert part in LEVEL, f"{part} has no place in the order of design.md"
  assert wrong_imports(path.read_text(), part) == []


@pytest.mark.parametrize("source, part", [
    ("from dspark_jax.targets import qwen3", "drafters"), ("import dspark_jax.loading", "data"),
    ("def f():\n  from dspark_jax.checkpoints.hf import fill", "training"),
    ("from dspark_jax import load_target", "nn"), ("from dspark_jax.training import step", "decoding"),
    ("from dspark_jax import sampling", "types")])
def test_wrong_imports_are_seen(source, part):
  """Kills: a check of imports that never finds anything."""
  assert wrong_imports(source, part)
  assert not wrong_imports(source, "__init__")


@pytest.mark.parametrize("part", ["loading", "__init__", "decoding"])
def test_programs_are_imported_by_programs_alone(part):
  """Kills: `import dspark_jax` that needs tyro and rich, or a loader that draws a progress bar."""
  assert wrong_imports("from dspark_jax.programs import shell", part) == ["dspark_jax.programs.shell"]
  assert not wrong_imports("import dspark_jax\nfrom dspark_jax import loading", "programs")


def test_programs_import_one_way():
  """Kills: generating text that drags in the trainer."""
  for path in PROGRAMS:
    used = {module.split(".")[0] for module in imports(ast.parse(path.read_text()))}
    assert "configs" not in used and "tests" not in used, path
    assert path.parent.name == "train" or "train" not in used, path


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_the_library_keeps_to_itself(path):
  """Kills: a library that prints, parses a command line, reads the clock or the environment, or keeps globals."""
  tree, program = ast.parse(path.read_text()), path.parent.name == "programs"  # the one folder that talks to people
  unwanted = NOWHERE if program else PURE - CLOCKS.get(name_of(path), set())
  assert not unwanted & {module.split(".")[0] for module in imports(tree)}
  spoken, outside = ((), ()) if program else (("print", "input"), ("environ", "getenv", "putenv"))
  for node in ast.walk(tree):
    assert not (isinstance(node, ast.Name) and node.id in spoken), f"line {node.lineno}: {node.id}"
    assert not (isinstance(node, ast.Attribute) and node.attr in outside), node.lineno
    assert not isinstance(node, (ast.Global,)), f"line {node.lineno}: global"
    assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"line {node.lineno}: bare except"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_sizes(path):
  """Kills: files over 450 lines, functions over 60."""
  source = path.read_text()
  assert len(source.splitlines()) <= 450
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
      length = node.end_lineno - node.lineno + 1
      assert length <= 60, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_widths(path):
  """Kills: lines over 120 columns, whose ends nobody sees where two files stand side by side."""
  lines = enumerate(path.read_text(encoding="utf-8").split("\n"), 1)
  assert [f"line {number}: {len(line)}" for number, line in lines if len(line) > 120] == []


@pytest.mark.parametrize("path", LIBRARY + PROGRAMS, ids=name_of)
def test_docstrings(path):
  """Kills: a file, or a public class or function of more than 12 lines in the library, that does not say what it is."""
  tree = ast.parse(path.read_text())
  assert not tree.body or ast.get_docstring(tree) or path.name == "__init__.py"
  if path not in LIBRARY:
    return
  scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
  missing = [node.name for scope in scopes for node in scope.body
             if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
             and node.end_lineno - node.lineno + 1 > 12 and not ast.get_docstring(node)]
  assert missing == []


@pytest.mark.parametrize("path", PROGRAMS, ids=name_of)
def test_programs_say_how_to_run_them(path):
  """Kills: a program without its two commands, or with one for another file."""
  if "__main__" in (source := path.read_text()):
    commands = re.findall(r"^    python -m (\S+)", ast.get_docstring(ast.parse(source), clean=False), re.M)
    assert len(commands) >= 2 and set(commands) == {f"{path.parent.name}.{path.stem}"}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_configs(path):
  """Kills: an experiment whose first line does not run it, or that no longer fits the settings."""
  lines = path.read_text().splitlines()
  assert len(lines) <= 20
  words = shlex.split(lines[0])
  kind = {"train.train": TrainConfig, "train.compare": CompareConfig}[words[3]]
  assert words[:3] == ["#", "python", "-m"]
  assert words[words.index("--config") + 1] == name_of(path) and "--data" in words
  config = read_config(str(path), kind)
  base = config if kind is TrainConfig else config.base
  assert [base.steps, base.epochs, base.minutes].count(None) == 2


def test_every_folder_is_packaged():
  """Kills: a folder that works from the checkout and is missing after `pip install`."""
  import tomllib
  listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
  assert listed == {".".join(p.parent.relative_to(ROOT).parts) for p in LIBRARY}


@pytest.mark.parametrize("failing, code", [("nothing", 0), ("test", 3), ("slow", 3), ("mutants", 3), ("judge", 3),
                                           ("fuzz", 3), ("demo", 3)])
def test_ci_runs_what_the_machine_has(failing, code, tmp_path):
  """Kills: trusting an interpreter's name (pyenv's python3.13 may only fail); a swallowed exit code; other spoiled
  files in every run."""
  for name in ("bash", "awk", "sort", "head", "tail", "dirname"):
    (tmp_path / name).symlink_to(shutil.which(name))
  (tmp_path / "python3").symlink_to(sys.executable)
  for name, script in {"make": f'echo "make $*"; [ "$1" != {failing} ] || exit 3',
                       "python3.13": "echo 3.13 3.13.9 here; exit 127"}.items():
    (tmp_path / name).write_text(f"#!{shutil.which('bash')}\n{script}\n")
    (tmp_path / name).chmod(0o755)
  env = os.environ | dict.fromkeys(("PATH", "HOME", "PYENV_ROOT", "UV_PYTHON_INSTALL_DIR"), str(tmp_path))
  run = subprocess.run(["bash", ROOT / ".ci/run"], env=env, text=True, capture_output=True, stdin=subprocess.DEVNULL)
  assert (run.returncode, run.stderr) == (code, "")
  calls = [line.split() for line in run.stdout.splitlines() if line.startswith("make ")]
  version, jobs = "%d.%d" % sys.version_info[:2], ["test", "slow", "mutants", "judge", "fuzz", "demo"]
  assert all(call[-2:] == [f"PYTHON={tmp_path}/python3", f"VENV=.venv-{version}"] for call in calls)
  assert all("FUZZ_SEED=11" in call for call in calls if call[1] == "fuzz")
  assert [call[1] for call in calls] == jobs[:jobs.index(failing) + 1 if failing in jobs else None]


def test_mutants_name_what_is_there():
  """Kills: a test that was moved, or a line that was rewritten, of which `make mutants` would tell hours later."""
  for mutant in MUTANTS:
    assert (ROOT / mutant.file).read_text().count(mutant.old) == 1, mutant.why
    for test in mutant.tests:
      file, _, name = test.partition("::")
      assert f"def {name.partition('[')[0]}(" in (ROOT / "tests" / file).read_text(), (mutant.why, test)
