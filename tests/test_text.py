"""The one reader of text, JSON and JSON lines: what people's editors and other programs write is read, or refused in a
sentence that names file and line."""

import json
import subprocess
import sys

import pytest

from dspark_jax.text import read_json, read_jsonl, read_text
from folders import complains

SAID = {"prompt": "naïve \u2028 日本"}
LINE = json.dumps(SAID, ensure_ascii=False)


@pytest.mark.parametrize("data", [LINE, "\ufeff" + LINE, f"\n{LINE}\r\n\r\n", f"\ufeff\n{LINE}"])
def test_what_editors_write(data, tmp_path):
  """Kills: a byte-order mark, Windows line ends or a line separator inside a string taken for damage."""
  path = tmp_path / "x.jsonl"
  path.write_bytes(data.encode())
  assert [record for _, record in read_jsonl(path)] == [SAID] and read_json(path) == SAID
  assert read_text(path) == data.removeprefix("\ufeff")


def test_any_locale(tmp_path):
  """Kills: a reader that asks the locale, so that a file is read on one machine and not on another."""
  path = tmp_path / "x.jsonl"
  path.write_text(LINE, encoding="utf-8")
  code = (f"from dspark_jax.text import read_jsonl, read_text\n"
          f"print(list(read_jsonl({str(path)!r})) == [(1, {SAID!a})], read_text({str(path)!r})[-1] == '}}')")
  run = subprocess.run([sys.executable, "-X", "utf8=0", "-c", code], env={"LC_ALL": "C", "PATH": ""}, text=True,
                       capture_output=True)
  assert run.stdout.split() == ["True", "True"], run.stderr


@pytest.mark.parametrize("data, part", [
    (b'{"prompt": "\\ud800"}', "has the surrogate '\\ud800' without its other half"),
    (b'{"\\uDFFF": 1}', "has the surrogate"), (b"[" * 100_000, "brackets nested too deep"),
    (b'{"a":' * 100_000, "brackets nested too deep"), (LINE.encode("utf-16"), "is not UTF-8"),
    (LINE.encode("latin-1", "replace"), "is not UTF-8"), (b"{", "is not JSON"),
    (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
    (b"[]", "holds a list, expected an object"), (b"null", "holds null"), (b"true", "holds true or false"),
    (b'"a"', "holds a text"), (b"1", "holds a number")])
def test_what_is_refused(data, part, tmp_path):
  """Kills: a traceback (of json, of the terminal that cannot print a lone surrogate) where a sentence belongs."""
  path = tmp_path / "x.jsonl"
  path.write_bytes(b'{"prompt": "w5"}\n' + data)
  with complains(f"{path}, line 2 ", part):
    list(read_jsonl(path))
  path.write_bytes(data)
  with complains(f"{path} ", part):
    read_json(path)


def test_half_a_character_in_a_pair(tmp_path):
  """Kills: an emoji that JSON wrote as two escapes refused, since each alone would be no character."""
  path = tmp_path / "x.json"
  path.write_text(json.dumps({"prompt": "😀"}))
  assert "\\ud83d" in path.read_text() and read_json(path) == {"prompt": "😀"}


def test_no_file(tmp_path):
  """Kills: an OSError's own words, which name no remedy."""
  for read in (read_json, read_text, lambda path: list(read_jsonl(path))):
    with complains("x.json is missing: check the path"):
      read(tmp_path / "x.json")
    with complains("is a folder, expected a file"):
      read(tmp_path)
