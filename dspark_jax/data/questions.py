"""Thousands of short questions about Python's own standard library: prompts that every machine already has.

They are read off the modules of the running interpreter (names, signatures, first paragraphs of docstrings,
short sources), so two Python versions differ a little, and two runs of one version do not. No library code
runs but what an import runs, and what a function or class runs when it is asked for an attribute: that may be
anything, on a machine that nobody here has seen, so all of it goes through `_safely`.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import importlib
import inspect
import keyword
import linecache
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# Importing any of these opens no window, prints nothing and starts no thread. An object is asked about under
# the first module that shows it.
MODULES = """
builtins abc argparse array ast asyncio base64 binascii bisect bz2 calendar cmath cmd code codecs codeop
collections collections.abc colorsys compileall concurrent.futures configparser contextlib contextvars copy
copyreg csv ctypes dataclasses datetime decimal difflib dis doctest email email.generator
email.headerregistry email.message email.mime.multipart email.mime.text email.parser email.policy
email.utils enum filecmp fileinput fnmatch fractions ftplib functools gc getopt getpass gettext glob
graphlib gzip hashlib heapq hmac html html.parser http http.client http.cookiejar http.cookies http.server
imaplib importlib importlib.abc importlib.metadata importlib.resources importlib.util inspect io ipaddress
itertools json linecache locale logging logging.config logging.handlers lzma mailbox marshal math mimetypes
mmap modulefinder multiprocessing multiprocessing.pool multiprocessing.shared_memory netrc numbers operator
os os.path pathlib pickle pickletools pkgutil platform plistlib poplib pprint pstats py_compile pyclbr queue
quopri random re reprlib runpy sched secrets select selectors shelve shlex shutil signal smtplib socket
socketserver sqlite3 ssl stat statistics string struct subprocess symtable sys sysconfig tabnanny tarfile
tempfile textwrap threading time timeit tokenize tomllib trace traceback tracemalloc types typing
unicodedata unittest unittest.mock urllib.error urllib.parse urllib.request urllib.robotparser uuid venv
warnings wave weakref webbrowser wsgiref.simple_server wsgiref.util xml.dom.minidom xml.etree.ElementTree
xml.sax xml.sax.saxutils xmlrpc.client xmlrpc.server zipapp zipfile zipimport zlib zoneinfo
""".split()

# A template is used for a subject that has every field it names. Append at the end: an id holds the index.
MODULE_TEMPLATES = (
  "What is the Python module `{name}` for?",
  "Give a short example program that uses Python's `{name}` module.",
  "When would you reach for the `{name}` module? Name two situations.",
  "I am new to Python. Explain the `{name}` module to me in three sentences.",
  "List the most useful things in Python's `{name}` module and say what each does.",
  "What are common mistakes when using the `{name}` module?",
  "The documentation of the module `{name}` begins: \"{doc}\" Explain this in simple words.",
  "A colleague writes by hand what Python's `{name}` module offers. What are they missing?",
  "Write a small command-line tool in Python that imports `{name}`.",
  "Which problems does the standard module `{name}` solve, and which does it not solve?",
  "How do you import `{name}`, and what would you write next?",
  "Write a short quiz of three questions, with answers, about Python's `{name}` module.",
  "Describe `{member}` and how it fits into the `{name}` module.",
  "Which should a beginner learn first in `{name}`: `{member}` or something else? Explain.",
)
CALL_TEMPLATES = (
  "What does `{name}` do in Python?",
  "Give a short example of `{name}`.",
  "When would you use `{name}` rather than `{other}`?",
  "Explain the argument `{parameter}` of `{name}`.",
  "Write a Python function that uses `{name}`, and explain each line.",
  "The documentation of `{name}` says: \"{doc}\" Explain this in simple words.",
  "The signature of `{name}` is `{signature}`. What does each argument mean?",
  "What does `{name}` return?",
  "In `{name}`, the argument `{option}` defaults to `{default}`. What does that mean in practice?",
  "Which errors can `{name}` raise, and how would you handle them?",
  "Explain `{name}` to a programmer who knows JavaScript but not Python.",
  "This is the code of `{name}`:\n```python\n{code}\n```\nSay in two sentences what it does.",
  "Here is how the standard library writes `{name}`:\n```python\n{code}\n```\nExplain it step by step.",
  "Write a unit test for a function that calls `{name}`.",
  "How is `{name}` different from `{other}`? Show both in a short example.",
  "Show two ways to call `{name}`, one simple and one with more arguments.",
  "My program calls `{name}` and the result is not what I expected. What should I check?",
  "Summarise `{name}` in one sentence, then give one line of code.",
  "What happens if I leave out `{option}` when I call `{name}`?",
  "How would you do the work of `{name}` without calling it?",
  "Write a docstring for `{name}`, whose signature is `{signature}`.",
  "Rewrite this sentence about `{name}` for a beginner, and add an example: \"{doc}\"",
  "Is it a good idea to use `{name}` inside a loop? Explain briefly.",
  "Name a real task where `{name}` from the `{module}` module is useful, and write the code.",
)
CLASS_TEMPLATES = (
  "What is the class `{name}` for?",
  "Give a short example that creates and uses a `{name}`.",
  "When would you use `{name}` rather than `{other}`?",
  "What does the argument `{parameter}` of `{name}` do?",
  "Write a Python function that uses `{name}`, and explain each line.",
  "The documentation of the class `{name}` says: \"{doc}\" Explain this in simple words.",
  "A `{name}` is created with `{signature}`. What does each argument mean?",
  "How would you write a subclass of `{name}`? Show a few lines.",
  "What is the method `{method}` of `{name}` used for?",
  "List the main methods of `{name}` and say what they do.",
  "Explain `{name}` to a beginner in three sentences.",
  "`{option}` defaults to `{default}` when a `{name}` is created. When would you change it?",
  "What problem does `{name}` solve? Show the code with it and without it.",
  "Compare `{name}` with `{other}`.",
  "Describe the life of a `{name}` object, from creation to the end, in a numbered list.",
  "Write a short program that calls `{method}` on a `{name}`.",
  "What should I know about `{name}` from Python's `{module}` module before I use it?",
)
ERROR_TEMPLATES = (
  "When does Python raise `{name}`?",
  "Write a short program that catches `{name}` and prints a helpful message.",
  "What is the difference between `{name}` and `{other}`?",
  "My program stopped with `{name}`. What does that usually mean, and how do I fix it?",
  "Give three lines of code that lead to `{name}`.",
  "The documentation of `{name}` says: \"{doc}\" Explain this in simple words.",
  "Should I catch `{name}` or let it pass? Explain briefly.",
  "How would you test that a function raises `{name}`?",
)
KEYWORD_TEMPLATES = (
  "What does the keyword `{name}` mean in Python?",
  "Give a short example of the Python keyword `{name}`.",
  "Explain the keyword `{name}` to a beginner.",
  "What mistakes do people make with `{name}` in Python?",
  "Write a small program that uses both `{name}` and `{other}`.",
  "How does Python's `{name}` compare with what other languages have?",
)
# How many questions of each kind a subject gets.
TEMPLATES = {
  "module": (MODULE_TEMPLATES, 9), "function": (CALL_TEMPLATES, 4), "method": (CALL_TEMPLATES, 2),
  "class": (CLASS_TEMPLATES, 4), "error": (ERROR_TEMPLATES, 3), "keyword": (KEYWORD_TEMPLATES, 4),
}


@dataclass(frozen=True)
class Question:
  id: str        # "shutil.copytree/1": subject and index of the template; the seed does not change its text
  module: str    # "shutil", "urllib.parse"; "builtins" for int, print and the keywords
  question: str


@dataclass(frozen=True)
class Subject:
  """Something to ask about."""
  name: str             # as a user writes it: "shutil.copytree", "str.split"
  kind: str             # a key of TEMPLATES
  module: str
  value: Any
  other: str | None     # a neighbour of the same kind in the same module
  members: tuple[str, ...] = ()


def stdlib_questions(seed: int = 0) -> list[Question]:
  """Questions about this interpreter's standard library, in an order that makes every prefix a fair sample.

  The seed chooses which templates meet which subject, and the order.
  """
  questions = []
  # A deprecated module is still one to ask about; what one prints must not mix with what the program prints.
  with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
    warnings.simplefilter("ignore")
    for subject in _subjects():
      templates, wanted = TEMPLATES[subject.kind]
      fields = _fields(subject)
      ranked = sorted(range(len(templates)), key=lambda i: _digest(seed, subject.name, i))
      texts = ((i, _fill(templates[i], fields)) for i in ranked)
      chosen = [(i, text) for i, text in texts if text][:wanted]
      questions += [Question(f"{subject.name}/{i}", subject.module, text) for i, text in chosen]
  return sorted(questions, key=lambda question: _digest(seed, question.id))


def split(questions: list[Question], held_out: float = 0.1) -> tuple[list[Question], list[Question]]:
  """(train, held_out): whole top-level packages are held out, about that fraction of them.

  A package's side depends on its name alone, so the split stays when questions, modules or seeds change.
  """
  if not 0 <= held_out <= 1:
    raise ValueError(f"held_out is a fraction of the packages, 0 to 1, got {held_out}")
  sides = ([], [])
  for question in questions:
    package = question.module.partition(".")[0]
    sides[_digest("package", package) < held_out * 2**64].append(question)
  return sides


def _digest(*parts: Any) -> int:
  """u64 of the parts: unlike hash(), the same in every process."""
  text = "\0".join(map(str, parts))
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _safely(function: Callable, *args: Any, otherwise: Any = None) -> Any:
  """function(*args), or `otherwise` where it raises anything: an import may exit, an attribute may be any code."""
  try:
    return function(*args)
  except KeyboardInterrupt:  # the user's, not the object's
    raise
  except BaseException:
    return otherwise


def _safe_text(function: Callable, *args: Any) -> str | None:
  """As _safely; None for what is not exactly a str: a subclass is as much a stranger's code as any object."""
  found = _safely(function, *args)
  return found if type(found) is str else None


def _subjects() -> Iterator[Subject]:
  words = sorted(word for word in keyword.kwlist if word.islower())
  for word, other in _with_neighbour(words):
    yield Subject(word, "keyword", "builtins", None, other)
  seen = set()
  for module in MODULES:
    # None: not in this version, not built on this machine, or broken there.
    if (found := _safely(importlib.import_module, module)) is not None:
      yield from _module_subjects(module, found, seen)


def _module_subjects(module: str, found: Any, seen: set[int]) -> Iterator[Subject]:
  prefix = "" if found is builtins else module + "."
  by_kind: dict[str, dict[str, Any]] = {"function": {}, "class": {}, "error": {}}
  for short, kind, value in _public(module, found):
    if id(value) not in seen:
      seen.add(id(value))
      by_kind[kind][prefix + short] = value
  names = tuple(name for kind in ("function", "class") for name in by_kind[kind])
  yield Subject(module, "module", module, found, None, names)
  for kind, values in by_kind.items():
    for name, neighbour in _with_neighbour(list(values)):
      methods = _methods(values[name], seen) if kind == "class" else {}
      yield Subject(name, kind, module, values[name], neighbour, tuple(methods))
      for method, sibling in _with_neighbour(list(methods)):
        other = sibling and f"{name}.{sibling}"
        yield Subject(f"{name}.{method}", "method", module, methods[method], other)


def _public(module: str, found: Any) -> list[tuple[str, str, Any]]:
  """(name, kind, value) of the functions, classes and errors that belong to the module, sorted by name."""
  names = _safely(_listed, found)
  owned = {module, "_" + module} | ({"io", "_io"} if found is builtins else set())
  chosen = []
  for name, value in _own(found):
    # The kind first: of what is neither a class nor a function, no attribute is touched.
    if (kind := _kind(value)) is None:
      continue
    home = _safe_text(getattr, value, "__module__", None)
    listed = name in names if names is not None else home in owned
    # Other packages hang their own objects on standard modules; those are not Python's.
    if listed and (home or module).partition(".")[0] in sys.stdlib_module_names:
      chosen.append((name, kind, value))
  return chosen


def _listed(found: Any) -> set[str] | None:
  """What the module's __all__ lists, None without one."""
  names = vars(found).get("__all__")
  return None if names is None else {name for name in names if type(name) is str}


def _own(value: Any) -> list[tuple[str, Any]]:
  """What a module or class itself holds under public names, sorted. vars() and not getattr(), which runs code."""
  held = _safely(lambda: list(vars(value).items()), otherwise=[])
  names = [item for item in held if type(item[0]) is str and item[0].isidentifier() and not item[0].startswith("_")]
  return sorted(names, key=lambda item: item[0])


def _kind(value: Any) -> str | None:
  if _is_class(value):
    return "error" if issubclass(value, BaseException) else "class"
  return "function" if _is_routine(value) else None


def _is_class(value: Any) -> bool:
  """isinstance(value, type) without asking value.__class__: a lazy object loads itself then, a mock lies."""
  return issubclass(type(value), type)


def _is_routine(value: Any) -> bool:
  """As inspect.isroutine (functions, methods, what makes methods when looked up) without asking value.__class__."""
  has = lambda name: _safely(inspect.getattr_static, type(value), name, None) is not None
  bound = issubclass(type(value), (types.BuiltinFunctionType, types.MethodType, types.MethodWrapperType))
  return bound or (has("__get__") and not has("__set__"))


def _methods(cls: type, seen: set[int]) -> dict[str, Any]:
  """The class's own public methods, not the inherited ones: those are asked about where they are defined."""
  found = {}
  for name, value in _own(cls):
    if issubclass(type(value), (staticmethod, classmethod)):
      value = _safely(getattr, value, "__func__")
    if _is_routine(value) and id(value) not in seen:
      seen.add(id(value))
      found[name] = value
  return found


def _with_neighbour(names: list[str]) -> Iterator[tuple[str, str | None]]:
  """Each name with the next in the alphabet, which is often a relative: copy and copy2, loads and dumps."""
  for name, following in zip(names, names[1:] + names[:1]):
    yield name, following if following != name else None


def _fields(subject: Subject) -> dict[str, str | None]:
  """What templates may name; None for what this subject lacks."""
  short = subject.name.rpartition(".")[2]
  fields = {"name": subject.name, "short": short, "module": subject.module, "other": subject.other}
  if subject.members:
    member = subject.members[_digest("member", subject.name) % len(subject.members)]
    fields["member" if subject.kind == "module" else "method"] = member
  if subject.kind == "keyword":
    return fields
  fields["doc"] = _first_paragraph(subject.value, short)
  if subject.kind in ("function", "method"):
    fields["code"] = _short_source(subject.value, short)
  if subject.kind in ("function", "method", "class"):
    fields.update(_arguments(subject))
  return fields


def _arguments(subject: Subject) -> dict[str, str]:
  """signature, parameter (one of them), option and its default (one that has a default): those that exist."""
  # Raises for C code without a text signature, for a metaclass that hides it, and for names that are not there.
  text, named = _safely(_signature, subject.value, otherwise=("", []))
  fields = {}
  # "<" is the repr of an object: it would carry an address, which differs from run to run.
  if named and len(text) < 200 and "<" not in text:
    fields["signature"] = text
  if named:
    fields["parameter"] = named[_digest("parameter", subject.name) % len(named)][0]
  shown = [(name, _safe_text(repr, default)) for name, default in named
           if issubclass(type(default), (str, int, float, type(None)))]
  defaults = [(name, value) for name, value in shown if value and "<" not in value and len(value) < 30]
  if defaults:
    fields["option"], fields["default"] = defaults[_digest("option", subject.name) % len(defaults)]
  return fields


def _signature(value: Any) -> tuple[str, list[tuple[str, Any]]]:
  """The signature as text; name and default of each argument that has a public name of its own."""
  signature = inspect.signature(value)
  plain = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  named = [(p.name, p.default) for p in signature.parameters.values()
           if p.kind not in plain and p.name not in ("self", "cls") and not p.name.startswith("_")]
  return str(signature), named


def _first_paragraph(value: Any, short: str) -> str | None:
  """First paragraph of prose in the docstring, whole sentences, at most 45 words."""
  own = _safe_text(lambda: vars(value).get("__doc__") if _is_class(value) else value.__doc__)
  if own is None:
    return None
  for paragraph in inspect.cleandoc(own).split("\n\n"):
    words = paragraph.split()
    # C functions, named tuples and dataclasses open with their signature.
    if len(words) < 4 or paragraph.startswith(short + "(") or "->" in paragraph:
      continue
    if len(words) > 45:
      ends = [i + 1 for i in range(45) if words[i].endswith(".")]
      words = words[:ends[-1]] if ends else []
    text = " ".join(words)
    return text if len(text) > 20 and '"' not in text and "<" not in text else None
  return None


def _short_source(value: Any, short: str) -> str | None:
  """The source of a function of two to twelve lines and at most 60 words."""
  code = _safely(getattr, value, "__code__")
  if type(code) is not types.CodeType or code.co_name != short:  # C, or a decorator's wrapper
    return None
  # Finding the end of a function tokenises it, so the long ones are left out before that.
  last = max((line for *_, line in code.co_lines() if line), default=0)
  if not 1 <= last - code.co_firstlineno <= 11:
    return None
  # Not inspect.getsource: it asks every module that anyone loaded for its file. No lines: installed without sources.
  lines = linecache.getlines(code.co_filename)[code.co_firstlineno - 1:]
  source = textwrap.dedent("".join(_safely(inspect.getblock, lines, otherwise=[]))).strip()
  return source if len(source.split()) <= 60 and source.startswith(("def ", "@", "async ")) else None


def _fill(template: str, fields: dict[str, str | None]) -> str | None:
  """The question, or None when the subject lacks a field that the template names, or has one no file can hold."""
  given = {key: value for key, value in fields.items() if value is not None}
  try:
    text = template.format(**given)
    text.encode()  # a str may hold halves of surrogate pairs, which are not text
  except (KeyError, UnicodeEncodeError):
    return None
  return text
