"""Small folders for the tests of loading and of the programs: golden models, and copies of them changed on purpose."""

import contextlib
import datetime
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.flax import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import dspark_jax
from dspark_jax.checkpoints import dialects
from dspark_jax.data import chat, rows
from dspark_jax.data.rows import Rows
from dspark_jax.drafters.dspark import DSparkConfig
from dspark_jax.nn.parameters import parameters
from dspark_jax.programs import run_folder, shell
from dspark_jax.targets import TARGETS
from dspark_jax.targets.decoder import Decoder, TargetConfig
from dspark_jax.text import read_json

GOLDEN = Path(__file__).parent / "golden"
QWEN3 = GOLDEN / "target_qwen3"
LLAMA = GOLDEN / "target_llama"
DSPARK = GOLDEN / "generate_dspark_qwen3"
NOT_READ = {"gemma4_text"}  # families of which there are golden cases, too
LLAMA_CONFIG, QWEN3_CONFIG = (read_json(folder / "config.json") for folder in (LLAMA, QWEN3))
TAPS = tuple(range(-1, LLAMA_CONFIG["num_hidden_layers"] - 1))[-2:]  # the last that a drafter of target_llama may read
# Of the tests' tokenizer. Both targets know one token more, which is no word: the mask.
WORDS = MASK = min(130, *(config["vocab_size"] - 1 for config in (LLAMA_CONFIG, QWEN3_CONFIG)))


def slow_but(kept, values):
  """Parameters of a test that takes long: of the values, those that are kept are for the fast suite, too."""
  return thorough_but(kept, values, values)


def thorough_but(kept, slow, values):
  """The same of more kinds than CI has time for: those that are neither kept nor slow are for `make thorough`."""
  marked = lambda value: pytest.param(value, marks=pytest.mark.slow if value in slow else pytest.mark.thorough)
  return [value if value in kept else marked(value) for value in values]


def golden_cases(prefix: str, key: str) -> list[str]:
  """The golden folders of this prefix whose outputs have the key (or, of "/key", one that ends so), without those that
  name a family or an architecture that we do not read."""
  def known(config):
    name = (config.get("architectures") or [None])[0]
    return (config.get("model_type") in (None, *TARGETS)
            and (name is None or name.endswith("ForCausalLM") or name in dialects.ARCHITECTURES))

  def is_case(folder):
    outputs, config = folder / "outputs.npz", folder / "config.json"
    return (outputs.is_file() and any(name == key or key[0] == "/" and name.endswith(key) for name in np.load(outputs))
            and (not config.is_file() or known(read_json(config))))
  return sorted(folder.name for folder in GOLDEN.glob(f"{prefix}*") if is_case(folder))


# Scanned, which compiles one layer instead of six; that unrolled ones say the same is test_targets'.
@functools.cache
def qwen3(scanned=True):
  return dspark_jax.load_target(QWEN3, scanned=scanned)


@functools.cache
def llama():
  return dspark_jax.load_target(LLAMA, scanned=True)


def golden_dtype(case: str) -> np.dtype:
  """What a golden case was computed in, whatever its weights are stored in."""
  return jnp.dtype(read_json(GOLDEN / case / "meta.json").get("dtype", "float32"))


def tied(config: dict) -> bool:
  """Whether a stored model's head is its embedding, as its config.json says: its file has none then."""
  return config.get("tie_word_embeddings", False)


@functools.cache
def target_of(case: str):
  """The target of a golden drafter: the real one, or random layers between the drafter's own embedding and head."""
  meta, raw = (read_json(GOLDEN / case / f"{name}.json") for name in ("meta", "config"))
  if case.startswith("generate_"):
    return golden_target(meta["target"].split()[0])
  _, config = dialects.drafter_config(raw)
  target = nnx.eval_shape(lambda: Decoder(TargetConfig("qwen3", config.spec, config.num_target_layers,
                                                       config.vocab_size, tied(raw), raw["max_position_embeddings"]),
                                          rngs=nnx.Rngs(0)))
  stored = dialects.stored_frozen(load_file(GOLDEN / case / "model.safetensors"), tied(raw))
  rng = np.random.default_rng(0)
  for name, variable in parameters(target).items():
    frozen = stored.get(name)
    variable.set_value(jnp.asarray(rng.normal(size=variable.shape).astype("f4") if frozen is None else frozen))
  return target


@functools.cache
def golden_target(name: str):
  return qwen3() if name == QWEN3.name else dspark_jax.load_target(GOLDEN / name, scanned=True)


def copied(source: Path, folder: Path, *, config=None, tensors=None, dtype=None, metadata="same") -> Path:
  """A copy of a safetensors folder. config, tensors: functions of the dictionary that return the changed one."""
  folder.mkdir(parents=True)
  text = (source / "config.json").read_text()
  (folder / "config.json").write_text(json.dumps(config(json.loads(text)), indent=1) if config else text)
  arrays = {n: x.astype(dtype) if dtype else x for n, x in load_file(source / "model.safetensors").items()}
  if metadata == "same":
    metadata = safe_open(source / "model.safetensors", "flax").metadata()
  save_file(tensors(arrays) if tensors else arrays, folder / "model.safetensors", metadata=metadata)
  return folder


def sharded(source: Path, folder: Path, n: int = 3) -> Path:
  """The same model in n files and an index."""
  folder.mkdir(parents=True)
  shutil.copy(source / "config.json", folder)
  arrays = load_file(source / "model.safetensors")
  table = {name: f"model-{1 + i % n:05}-of-{n:05}.safetensors" for i, name in enumerate(sorted(arrays))}
  for file in set(table.values()):
    save_file({k: v for k, v in arrays.items() if table[k] == file}, folder / file)
  (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
  return folder


def files(folder: Path) -> dict[str, bytes]:
  """Every file below a folder, by relative path."""
  return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_weights(a, b) -> None:
  """The same parameter names, dtypes and bits."""
  a, b = parameters(a), parameters(b)
  assert list(a) == list(b)
  for name in a:
    x, y = np.asarray(a[name][...]), np.asarray(b[name][...])
    assert x.dtype == y.dtype, (name, x.dtype, y.dtype)
    np.testing.assert_array_equal(x, y, err_msg=name)


def fresh_drafter(words=None, seed: int = 0, **settings):
  """An untrained drafter for the golden Qwen3 target: of six layers, it reads 0 and 2."""
  config = qwen3().config
  return dspark_jax.new_drafter(DSparkConfig(**{**dict(
      spec=config.spec, num_layers=1, vocab_size=config.vocab_size, num_target_layers=config.num_layers,
      taps=tuple(range(config.num_layers - 1))[:3:2], mask_token_id=config.vocab_size - 1, block_size=4,
      markov_rank=8), **settings}), words=words, seed=seed)


def words() -> jnp.ndarray:
  """Five of the words of the golden Qwen3 target, the last of them two from the end."""
  size = QWEN3_CONFIG["vocab_size"]
  return jnp.asarray([0, 3, 4, size // 2, size - 3], jnp.int32)


CHATML = """{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}\
{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"""


def with_tokenizer(source: Path, folder: Path) -> Path:
  """A copy of a target with a tokenizer of one word per token: w4, w5, ..."""
  shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.npz", "meta.json"))
  special = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant"]
  vocabulary = special + [f"w{i}" for i in range(len(special), WORDS)]
  backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, "<unk>"))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  chat.fast_tokenizer()(tokenizer_object=backend, unk_token="<unk>", eos_token="<|im_end|>", chat_template=CHATML,
                        additional_special_tokens=special[1:3]).save_pretrained(folder)
  return folder


def today(monkeypatch, day: int) -> None:
  """That day of July 2026, for runs; what a template is not told it asks the clock."""
  class Day(datetime.date):
    @classmethod
    def today(cls):
      return cls(2026, 7, day)
  monkeypatch.setattr(run_folder, "datetime", SimpleNamespace(date=Day))


@contextlib.contextmanager
def complains(*parts: str, error=ValueError):
  """The block raises one line of text with all these parts in it."""
  with pytest.raises(error) as caught:
    yield
  text = str(caught.value)
  assert text.isprintable() and len(text) > 20, repr(text)
  for part in parts:
    assert part in text, f"{part!r} is not in {text!r}"


def cut(path: Path, share: float = 0.5) -> None:
  path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])


def spoiled(prefix: str):
  """A function that removes two tensors, adds two, misshapes one and makes integers of another."""
  def spoil(tensors):
    layer = f"{prefix}layers.0."
    del tensors[layer + "mlp.up_proj.weight"], tensors[f"{prefix}norm.weight"]
    tensors[layer + "self_attn.q_proj.weight"] = tensors[layer + "self_attn.q_proj.weight"].reshape(-1, 1)
    tensors[layer + "mlp.gate_proj.weight"] = tensors[layer + "mlp.gate_proj.weight"].astype(jnp.int8)
    return tensors | {"extra.weight": jnp.ones(3), layer + "self_attn.q_proj.bias": jnp.ones(3)}
  return spoil


def called(capsys, main, settings, *args, code: int = 0):
  """(JSON of the last line of stdout or None, stderr) of a program called in this process."""
  capsys.readouterr()
  try:
    shell.run(main, settings, args=[str(a) for a in args])
    got = 0
  except SystemExit as exit_:
    got = exit_.code
  out, err = capsys.readouterr()
  assert got == code, err
  assert "Traceback" not in err
  return json.loads(out.splitlines()[-1]) if got == 0 else None, err


def packed_rows(folder: Path, documents, length: int, vocab_size: int = 2 ** 16) -> Rows:
  """Documents as rows on disk, in two parts; sources are their numbers, from 1, as lines of a file."""
  sizes = np.array([len(document.tokens) for document in documents], np.int32)
  half = len(documents) // 2 or 1
  parts = [rows.Documents(np.concatenate([d.tokens for d in part]), np.concatenate([d.loss_mask for d in part]),
                          np.array([len(d.tokens) for d in part]))
           for part in (documents[:half], documents[half:]) if part]
  sources = np.array([[0, number + 1] for number in range(len(documents))], np.int32).reshape(-1, 2)
  about = dict(tokenizer="t", template="c", vocab_size=vocab_size, row_length=length, thinking=False,
               allow_special=False, date="2026-07-15", files=(("a.jsonl", 1, 1),), lost={})
  folder.mkdir(parents=True)
  manifest = rows.write(folder, parts, sizes, sources, about)
  (folder / rows.MANIFEST).write_text(json.dumps(rows.to_json(manifest)))
  return Rows(folder)
