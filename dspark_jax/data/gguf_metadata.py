"""GGUF files (llama.cpp's format), opened: tensors as stored; metadata, which includes the tokenizer."""

from __future__ import annotations

import os
import sys
from typing import Any

import gguf
import numpy as np

from dspark_jax.config import shown


ARRAY, STRING = int(gguf.GGUFValueType.ARRAY), int(gguf.GGUFValueType.STRING)  # enumerations compare slowly
LEAST = 8  # bytes of a string, which is its length and its text, or of an array


class Reader(gguf.GGUFReader):
  """gguf's reader, several times faster where a file has a tokenizer, which is 100,000 strings, and within the file."""

  def _build_fields(self, offs, count):
    self.data = self.data.view(np.ndarray)  # of a memmap every slice is dear
    return super()._build_fields(offs, count)

  def _get_field_parts(self, orig_offs, raw_type):
    if int(raw_type) == ARRAY:  # gguf would go on counting behind the file's end
      kind, count = int(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
      item = self.gguf_scalar_to_np.get(kind)
      size = count * (np.dtype(item).itemsize if item else LEAST)
      if size > len(self.data) - orig_offs:
        raise ValueError(f"an array of {count} at byte {orig_offs}")
      if kind == STRING:
        return self._strings(orig_offs, count)
    return super()._get_field_parts(orig_offs, raw_type)

  def _strings(self, begin, count):
    """What gguf says of an array of strings: (bytes, parts, which of them are texts, types)."""
    data, native = memoryview(self.data), self.byte_order == "I"
    order, at = sys.byteorder if native else {"little": "big", "big": "little"}[sys.byteorder], begin + 12
    texts = []
    for _ in range(count):
      size = int.from_bytes(data[at:at + 8], order)
      at += 8 + size
      if at > len(data):
        raise ValueError(f"a string of {size} before byte {at}")
      texts.append(self.data[at - size:at])
    return at - begin, texts, list(range(count)), [gguf.GGUFValueType.ARRAY, *[gguf.GGUFValueType.STRING] * bool(count)]


def open_gguf(path: str | os.PathLike) -> Reader:
  """The file's reader. ValueError when it is not a GGUF file, or is cut short."""
  with open(path, "rb") as file:
    magic = file.read(4)
  if magic != b"GGUF":
    raise ValueError(f"{path} starts with {magic!r}, a GGUF file with b'GGUF': give the path of a .gguf file")
  try:
    reader = Reader(path)
    reader.path = path
    return reader
  # A read past the end surfaces as any of these, from numpy; none of them says that the file is short.
  except (ValueError, IndexError, KeyError, OverflowError, MemoryError, RecursionError) as error:
    size = os.path.getsize(path)
    raise ValueError(f"{path} is a damaged GGUF file: its {size} bytes end before its tables and tensors, "
                     f"or make no sense ({shown(str(error))}): download it again") from error


def read_metadata(reader: Reader) -> dict[str, Any]:
  """The file's key-value pairs as Python values, e.g. `tokenizer.ggml.tokens` -> list of str. ValueError: no text."""
  try:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
  except UnicodeDecodeError as error:
    raise ValueError(f"{reader.path} is a damaged GGUF file: a text in its tables is not UTF-8: download it "
                     f"again") from error
