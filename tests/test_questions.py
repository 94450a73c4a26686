"""The questions that the demo trains and evaluates on: the same for everyone, on one side of the split."""

import hashlib
import inspect
import json
import math
import os
import shlex
import shutil
import string
import subprocess
import sys
import types
import warnings

import pytest

from dspark_jax.data import questions as q

FEW = ["builtins", "shutil", "collections", "collections.abc", "argparse", "textwrap", "urllib.parse"]


@pytest.fixture(scope="module")
def all_questions():
  return q.stdlib_questions()


@pytest.fixture
def few_modules(monkeypatch):
  monkeypatch.setattr(q, "MODULES", FEW)


def test_plenty_and_well_formed(all_questions):
  """Kills: a walk that loses a kind, repeated ids or texts, addresses in signatures, long texts."""
  assert len(all_questions) > 10_000
  assert len({question.module for question in all_questions}) > 150
  for part in (lambda x: x.id, lambda x: x.question):
    assert len(set(map(part, all_questions))) == len(all_questions)
  for question in all_questions:
    assert 3 <= len(question.question.split()) <= 80, question
    assert " at 0x" not in question.question, question
  subjects = {question.id.rpartition("/")[0] for question in all_questions}
  assert subjects >= {"json", "shutil.copytree", "str.split", "KeyError", "yield", "os.path.join", "print",
                      "argparse.ArgumentParser", "urllib.parse.urlparse", "dict.get", "open"}


def test_same_in_every_process():
  """Kills: choosing with hash() or by the order of a set, which PYTHONHASHSEED changes; needing a package.

  -S hides the installed packages, and the file is run alone: it must do with Python itself.
  """
  script = ("import hashlib, runpy, sys; here = runpy.run_path(sys.argv[1]); "
            "questions = here['stdlib_questions'](3); sides = here['split'](questions); "
            "print(len(questions), hashlib.sha256(repr([questions, sides]).encode()).hexdigest())")
  command = [sys.executable, "-S", "-c", script, q.__file__]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  running = [subprocess.Popen(command, env=os.environ | {"PYTHONHASHSEED": n}, **pipes) for n in "12"]
  (first, errors), (second, _) = [process.communicate() for process in running]
  assert errors == "" and first.split()[0].isdigit()
  assert first == second


def test_split_by_package(all_questions):
  """Kills: a split by question, or one that holds out urllib.parse and trains on urllib.request."""
  train, held_out = q.split(all_questions)
  assert sorted(train + held_out, key=lambda x: x.id) == sorted(all_questions, key=lambda x: x.id)
  packages = [{question.module.partition(".")[0] for question in side} for side in (train, held_out)]
  assert packages[0].isdisjoint(packages[1])
  assert len(packages[1]) >= 8 and 0.03 < len(held_out) / len(all_questions) < 0.2
  assert "builtins" in packages[0]


def test_split_stays_when_questions_come_and_go(all_questions):
  """Kills: holding out the last tenth, or a random tenth: one more question would move others across."""
  train, held_out = q.split(all_questions)
  sides = set(train), set(held_out)
  part = all_questions[::3]
  assert q.split(part) == tuple([question for question in part if question in side] for side in sides)
  more = q.split(all_questions, 0.3)[1]
  assert set(held_out) < set(more)
  assert q.split(all_questions, 0) == (all_questions, []) and q.split(all_questions, 1) == ([], all_questions)
  with pytest.raises(ValueError, match="0 to 1, got 200"):
    q.split(all_questions, 200)


def test_an_object_has_one_home():
  """Kills: asking about one object under two modules (os.error is OSError): it could be on both sides."""
  subjects = [subject for subject in q._subjects() if subject.value is not None]
  names = {}
  for subject in subjects:
    assert names.setdefault(id(subject.value), subject.name) == subject.name
  members = {subject.name for subject in subjects}
  for subject in subjects:
    # What a question compares with comes from the same module, hence from the same side.
    assert subject.other is None or subject.other in members
    prefix = "" if subject.module == "builtins" else subject.module + "."
    assert subject.kind == "module" or subject.other is None or subject.other.startswith(prefix)


def test_seed_moves_order_and_choice_not_meaning(few_modules):
  """Kills: a seed that is ignored; an id whose text depends on the seed (answers on disk go by the id)."""
  first, again, other = q.stdlib_questions(0), q.stdlib_questions(0), q.stdlib_questions(1)
  assert first == again and first != other
  texts = {question.id: question.question for question in first}
  shared = [question for question in other if question.id in texts]
  assert 0 < len(shared) < len(other)
  assert all(texts[question.id] == question.question for question in shared)
  # Every prefix is a fair sample: the order is not module by module.
  assert len({question.module for question in first[:100]}) == len(FEW)


def test_only_what_python_brought(few_modules, monkeypatch):
  """Kills: asking about functions that others hung on a module, failing where a module is missing."""
  def foreign():
    """A function of this test file, not of Python."""

  monkeypatch.setattr(q, "MODULES", ["shutil", "math", "no_such_module"])
  monkeypatch.setattr(shutil, "copytree", foreign)
  monkeypatch.setattr(math, "foreign", foreign, raising=False)
  subjects = {subject.name for subject in q._subjects() if subject.kind != "keyword"}
  assert {"shutil", "shutil.move", "math.sin"} <= subjects
  assert subjects.isdisjoint({"shutil.copytree", "math.foreign", "no_such_module"})


def test_every_template_is_used(few_modules):
  """Kills: a template that names a field that no subject has: it would be skipped in silence, always."""
  fields = {}
  for subject in q._subjects():
    fields.setdefault(subject.kind, []).append(q._fields(subject))
  fields["function"] = fields["function"] + fields.pop("method")
  for kind, known in fields.items():
    for template in q.TEMPLATES[kind][0]:
      texts = [text for text in (q._fill(template, given) for given in known) if text]
      assert texts, template
      assert any(name == "name" for _, name, _, _ in string.Formatter().parse(template)), template


def test_golden_sides():
  """Kills: a change of the hash: a drafter trained yesterday would be evaluated on what it was trained on.

  The sides were written down when the split was defined.
  """
  held = q._digest("package", "argparse"), q._digest("package", "shutil")
  assert held[0] < 0.1 * 2**64 < held[1]
  assert q._digest("a", 1) == int.from_bytes(hashlib.sha256(b"a\x001").digest()[:8], "big")


# A module that an ordinary function shares with everything that raises `error`, or lies, when it is looked at.
HOSTILE = '''
def plain(first, second=2):
  """Adds two numbers, slowly and with care."""
def fail(*_): raise error
class Liar:
  __get__ = lambda *_: None
  __getattribute__ = fail
class Number(int):
  __class__ = property(fail)
  __repr__ = __bool__ = fail
class Text(str):
  expandtabs = split = encode = __format__ = fail
class Meta(type):
  __getattribute__ = fail
class Silent(metaclass=Meta): pass
class Static(staticmethod): __func__ = __getattr__ = property(fail)
class Owner:
  __doc__ = 1
  static, shared, own, prop = Static(plain), classmethod(lambda cls: 0), Liar(), property(fail)
def default(first=Number()): pass
def numbered(first): pass
def documented(first): pass
def broken(first): pass
def wrapped(first): pass
def signed(first): pass
def annotated(first: Liar()): pass
def homeless(first): pass
numbered.__doc__, documented.__doc__ = 12, Text("Some words that stand in a docstring.")
broken.__doc__ = "Half of a character, \\ud800, that no file can hold."
wrapped.__wrapped__ = signed.__signature__ = liar = Liar()
homeless.__module__ = ["not", "hashable"]
blind = Number()
__all__ = [[], 7, "missing", *globals()]
globals()[5] = globals()["\\ud800"] = plain
'''


@pytest.fixture
def this(monkeypatch):
  """An empty module under a name of the standard library; it alone is asked about."""
  found = types.ModuleType("this")
  monkeypatch.setitem(sys.modules, "this", found)
  monkeypatch.setattr(q, "MODULES", ["this"])
  return found


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, SystemExit, GeneratorExit,
                                   type("Skipped", (BaseException,), {})])
def test_survives_any_object(this, error):
  """Kills: catching only what today's modules raise; dropping a whole module for one bad object in it.

  `select` of Python 3.13 has a method whose signature raises AttributeError, and the demo did not start.
  """
  this.error = error
  exec(HOSTILE, vars(this))
  questions = q.stdlib_questions()
  subjects = [question.id.removeprefix("this.").rpartition("/")[0] for question in questions]
  for name in "plain default numbered documented broken wrapped signed annotated homeless Silent Owner".split():
    assert subjects.count(name) == 4, name
  assert subjects.count("Owner.shared") == 2
  json.dumps([question.question for question in questions], ensure_ascii=False).encode()


def test_looks_only_where_it_must(this, monkeypatch):
  """Kills: isinstance and getattr on all that a module holds: lazy objects load themselves, and properties run.

  And asking the modules that others loaded: inspect.getsource wants to know the file of each.
  """
  asked = []
  record = lambda found, name: asked.append((found, name))
  lazy = type("Lazy", (), {"__getattribute__": record, "__get__": lambda *_: asked.append("get"), "__set__": record})()
  kept = type("Kept", (), {"__module__": "this", "data": lazy, "cost": property(asked.append)})
  stranger = types.ModuleType("stranger")
  stranger.__getattr__ = lambda name: asked.append(name)
  monkeypatch.setitem(sys.modules, "stranger", stranger)
  monkeypatch.setattr(inspect, "modulesbyfile", {}, raising=False)  # where inspect notes what it has asked already
  this.__getattr__ = asked.append
  vars(this).update(lazy=lazy, Kept=kept, join=shlex.join)
  assert {question.id.rpartition("/")[0] for question in q.stdlib_questions()} >= {"this", "this.Kept"}
  this.__all__ = ["lazy", "Kept", "join"]
  codes = [q._fields(subject).get("code") for subject in q._subjects()]
  assert any(code and code.startswith("def join(") for code in codes)
  assert asked == []


@pytest.mark.parametrize("code, there", [
  ("raise SystemExit", False), ("raise RuntimeError", False), ("def f(:", False), ("1 / 0", False),
  ("print('hello')", True), ("import warnings; warnings.warn('old', DeprecationWarning)", True),
  ("import sys; sys.modules[__name__] = 5", True), ("__all__ = None; __doc__ = 5", True), ("", True)])
def test_survives_any_import(code, there, tmp_path, monkeypatch, capsys):
  """Kills: catching ImportError alone; a module that prints into the program's output; warnings that are errors."""
  (tmp_path / "odd_module.py").write_text(code)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.delitem(sys.modules, "odd_module", raising=False)
  monkeypatch.setattr(q, "MODULES", ["odd_module", "math"])
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    modules = {question.module for question in q.stdlib_questions()}
  assert modules == {"builtins", "math"} | ({"odd_module"} if there else set())
  assert capsys.readouterr().out == ""


def test_the_user_can_interrupt(this):
  """Kills: catching all of BaseException: control-C would skip one object and go on."""
  def interrupt(*_):
    raise KeyboardInterrupt
  this.Class = type("Class", (), {"__module__": "this", "__signature__": type("Now", (), {"__get__": interrupt})()})
  with pytest.raises(KeyboardInterrupt):
    q.stdlib_questions()
