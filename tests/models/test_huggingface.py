"""Checkpoints in and out: exact, strict, and read shard by shard."""

import dataclasses
import functools
import json
import mmap
import re
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import traverse_util
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxmem.models import (
  checkpoint_names,
  decoder,
  encoder_decoder,
  fingerprint,
  huggingface,
  tensor_files,
)
from jaxmem.models.config import ModelConfig, from_hf
from jaxmem.models.encoder_decoder_config import EncoderDecoderConfig

LLAMA = ModelConfig(
  family="llama",
  vocab_size=24,
  hidden_size=8,
  num_layers=2,
  num_heads=4,
  num_kv_heads=2,
  head_dim=2,
  mlp_size=12,
  bos_token_id=1,
  eos_token_ids=(2, 3),
)


def _like(**changes):
  return dataclasses.replace(LLAMA, **{"layer_windows": ()} | changes)


TIED = _like(tie_embeddings=True)
GPT2 = _like(
  family="gpt2",
  num_kv_heads=4,
  norm_eps=1e-5,
  activation="gelu_new",
  max_positions=6,
  tie_embeddings=True,
  attention_bias=True,
  output_bias=True,
  mlp_bias=True,
)
T5 = EncoderDecoderConfig(
  vocab_size=24,
  hidden_size=8,
  num_layers=2,
  num_decoder_layers=3,
  num_heads=2,
  head_dim=3,
  mlp_size=12,
)
CONFIGS = {
  "llama": LLAMA,
  "llama_tied": TIED,
  "llama_biased": _like(attention_bias=True, output_bias=True, mlp_bias=True),
  "mistral": _like(family="mistral", sliding_window=4),
  "phi3": _like(family="phi3", norm_eps=1e-5, sliding_window=5),
  "qwen2": _like(family="qwen2", attention_bias=True, tie_embeddings=True),
  "qwen3": _like(family="qwen3", head_dim=6, qk_norm=True),
  "gpt2": GPT2,
  "t5": T5,
  "t5_1_1": dataclasses.replace(T5, gated=True, tie_embeddings=False),
}


def _shapes(config):
  return {k: leaf.shape for k, leaf in checkpoint_names.leaves(config).items()}


def _params(config, dtype=np.float32, seed=0):
  rng = np.random.default_rng(seed)
  flat = {
    path: rng.normal(size=shape).astype(dtype)
    for path, shape in _shapes(config).items()
  }
  return traverse_util.unflatten_dict(flat)


def _assert_same(found, expected):
  found, expected = map(traverse_util.flatten_dict, (found, expected))
  assert found.keys() == expected.keys()
  for path, value in expected.items():
    assert found[path].dtype == value.dtype, path
    np.testing.assert_array_equal(
      np.asarray(found[path]).view(np.uint8), value.view(np.uint8)
    )


def _saved(path, config=LLAMA, edit=lambda tensors: None):
  """A checkpoint whose tensors were edited after writing."""
  huggingface.save(path, config, _params(config))
  tensors = load_file(path / "model.safetensors")
  edit(tensors)
  save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
  return path


def _tokenizer(path, size):
  path.mkdir(exist_ok=True)
  vocabulary = {"[UNK]": 0} | {f"w{i}": i for i in range(1, size)}
  model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(path / "tokenizer.json"))
  written = {"eos_token": "w2", "tokenizer_class": "PreTrainedTokenizerFast"}
  (path / "tokenizer_config.json").write_text(json.dumps(written))
  return path


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_exact(tmp_path, name):
  config = CONFIGS[name]
  params = _params(config)
  huggingface.save(tmp_path / "one", config, params)
  found_config, found = huggingface.load(tmp_path / "one")
  assert found_config == config
  _assert_same(found, params)
  huggingface.save(tmp_path / "many", config, found, max_shard_bytes=2000)
  files = sorted((tmp_path / "many").glob("*.safetensors"))
  assert len(files) > 2
  one, many = (
    tensor_files.open_directory(tmp_path / where) for where in ("one", "many")
  )
  assert one.keys() == many.keys()
  for file in files:
    tensors = load_file(file)
    assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 2000
  _assert_same(huggingface.load(tmp_path / "many")[1], params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_round_trip_and_convert(tmp_path, dtype):
  params = _params(LLAMA, jnp.dtype(dtype))
  huggingface.save(tmp_path, LLAMA, params)
  stored = json.loads((tmp_path / "config.json").read_text())
  assert stored["torch_dtype"] == dtype
  _assert_same(huggingface.load(tmp_path)[1], params)
  _, wide = huggingface.load(tmp_path, dtype=jnp.float32)
  _assert_same(wide, jax.tree.map(lambda x: x.astype(np.float32), params))
  _, half = huggingface.load(tmp_path, dtype="bfloat16")
  _assert_same(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
  with pytest.raises(ValueError, match="int8.*float32, bfloat16 or float16"):
    huggingface.load(tmp_path, dtype=jnp.int8)


def test_names_and_orientation_in_the_file(tmp_path):
  params = _params(LLAMA)
  tensors = load_file(_saved(tmp_path) / "model.safetensors")
  kernel = params["layers"]["self_attn"]["q_proj"]["kernel"]
  name = "model.layers.1.self_attn.q_proj.weight"
  np.testing.assert_array_equal(tensors[name], kernel[1].T)
  head = params["lm_head"]["kernel"]
  np.testing.assert_array_equal(tensors["lm_head.weight"], head.T)
  scale = params["layers"]["post_attention_layernorm"]["scale"]
  name = "model.layers.0.post_attention_layernorm.weight"
  np.testing.assert_array_equal(tensors[name], scale[0])


def test_gpt2_without_prefix_and_with_buffers(tmp_path):
  def edit(tensors):
    for name in list(tensors):
      tensors[name.removeprefix("transformer.")] = tensors.pop(name)
    tensors["h.0.attn.bias"] = np.ones((1, 1, 6, 6), np.uint8)
    tensors["h.1.attn.masked_bias"] = np.float32([-1e4])
    tensors["lm_head.weight"] = tensors["wte.weight"]

  kernel = load_file(_saved(tmp_path, GPT2) / "model.safetensors")
  kernel = kernel["transformer.h.1.attn.c_attn.weight"]
  _, params = huggingface.load(_saved(tmp_path, GPT2, edit))
  _assert_same(params, _params(GPT2))
  found = params["layers"]["attn"]["c_attn"]["kernel"][1]
  np.testing.assert_array_equal(found, kernel)


def test_both_spellings_of_one_tensor_are_refused(tmp_path):
  def edit(tensors):
    tensors["wpe.weight"] = tensors["transformer.wpe.weight"]

  with pytest.raises(
    ValueError, match=r"unknown \(1\):\n.*wpe.weight \[6, 8\]"
  ):
    huggingface.load(_saved(tmp_path, GPT2, edit))


def test_rotary_buffers_are_ignored(tmp_path):
  def edit(tensors):
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.float32([1])

  _, params = huggingface.load(_saved(tmp_path, LLAMA, edit))
  _assert_same(params, _params(LLAMA))


@pytest.mark.parametrize("kept", ["both", "copy"])
def test_a_tied_head_may_be_stored_too(tmp_path, kept):
  def edit(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    if kept == "copy":
      del tensors["model.embed_tokens.weight"]

  _, params = huggingface.load(_saved(tmp_path, TIED, edit))
  _assert_same(params, _params(TIED))


def test_a_tied_head_that_differs_is_refused(tmp_path):
  def edit(tensors):
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

  with pytest.raises(ValueError, match="lm_head.weight differs from model.emb"):
    huggingface.load(_saved(tmp_path, TIED, edit))


def test_t5_copies_and_stray_bias(tmp_path):
  stray = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias"

  def edit(tensors):
    for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
      tensors[f"{name}.weight"] = tensors["shared.weight"]
    tensors[f"{stray}.weight"] = np.zeros((32, 2), np.float32)

  _, params = huggingface.load(_saved(tmp_path, T5, edit))
  _assert_same(params, _params(T5))


def test_all_that_is_wrong_is_listed_at_once(tmp_path):
  def edit(tensors):
    del tensors["model.norm.weight"]
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((12, 8), np.float32)
    tensors["visual.weight"] = np.zeros(3, np.float32)
    tensors["lm_head.weight"] = np.zeros((25, 8), np.float32)
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].astype(np.int8)

  with pytest.raises(ValueError) as caught:
    huggingface.load(_saved(tmp_path, LLAMA, edit))
  assert str(caught.value) == (
    "the tensors do not fit a llama of this config; make config.json and "
    "checkpoint agree\n"
    "missing (2):\n"
    "  model.layers.1.mlp.up_proj.weight [12, 8]\n"
    "  model.norm.weight [8]\n"
    "unknown (2):\n"
    "  model.layers.2.mlp.up_proj.weight [12, 8]\n"
    "  visual.weight [3]\n"
    "misshapen (2):\n"
    "  model.layers.0.self_attn.k_proj.weight I8, expected F32, BF16 or F16\n"
    "  lm_head.weight [25, 8], expected [24, 8]"
  )


def test_saving_lists_leaves_that_do_not_fit(tmp_path):
  params = _params(LLAMA)
  del params["norm"]
  params["extra"] = {"scale": np.zeros(3, np.float32)}
  params["lm_head"]["kernel"] = params["lm_head"]["kernel"].T
  with pytest.raises(ValueError) as caught:
    huggingface.save(tmp_path / "new", LLAMA, params)
  for line in (
    r"norm/scale \[8\]",
    r"extra/scale \[3\]",
    r"lm_head/kernel \[24, 8\], expected \[8, 24\]",
  ):
    assert re.search(line, str(caught.value))
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
  "files, words",
  [
    ({}, "config.json: no such file"),
    ({"config.json": "{"}, "config.json is not valid json"),
    ({"config.json": "[]"}, "config.json holds no json object"),
    (
      {"config.json": '{"model_type": "bert"}'},
      "'bert' is not supported; known: llama, .*gpt2, t5",
    ),
    ({"config.json": None}, "neither model.safetensors nor .*index.json; give"),
    (
      {"config.json": None, "pytorch_model.bin": "x"},
      "only pytorch_model.bin. Such files can run code .*save_pretrained",
    ),
    (
      {"config.json": None, "model.safetensors": "not tensors at all"},
      "model.safetensors is not a whole safetensors file",
    ),
    (
      {"config.json": None, "model.safetensors.index.json": "{}"},
      "has no weight_map",
    ),
    (
      {
        "config.json": None,
        "model.safetensors.index.json": '{"weight_map": {"a": "../a"}}',
      },
      "'../a' must be a plain name",
    ),
    (
      {
        "config.json": None,
        "model.safetensors.index.json": '{"weight_map": {"a": "gone"}}',
      },
      "gone: no such file",
    ),
  ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, files, words):
  complete = _saved(tmp_path / "complete")
  directory = tmp_path / "other"
  directory.mkdir()
  for name, text in files.items():
    text = (complete / name).read_text() if text is None else text
    (directory / name).write_text(text)
  with pytest.raises(ValueError, match=words):
    huggingface.load(directory)


def test_a_cut_off_file_is_noticed(tmp_path):
  file = _saved(tmp_path) / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-1])
  with pytest.raises(ValueError, match="not a whole safetensors file"):
    huggingface.load(tmp_path)


def test_an_index_that_disagrees_is_noticed(tmp_path):
  huggingface.save(tmp_path, LLAMA, _params(LLAMA), max_shard_bytes=2000)
  file = tmp_path / "model.safetensors.index.json"
  index = json.loads(file.read_text())
  where = index["weight_map"].pop("model.norm.weight")
  index["weight_map"]["absent"] = where
  file.write_text(json.dumps(index))
  with pytest.raises(ValueError) as caught:
    huggingface.load(tmp_path)
  assert f"model.norm.weight is in {where} but listed in None" in str(
    caught.value
  )
  assert f"absent is listed in {where} but not there" in str(caught.value)


def test_saving_replaces_a_checkpoint_with_more_files(tmp_path):
  huggingface.save(tmp_path, LLAMA, _params(LLAMA), max_shard_bytes=2000)
  huggingface.save(tmp_path, LLAMA, _params(LLAMA, seed=1))
  assert [f.name for f in tmp_path.glob("*.safetensors")] == [
    "model.safetensors"
  ]
  _assert_same(huggingface.load(tmp_path)[1], _params(LLAMA, seed=1))


def test_what_is_neither_a_path_nor_on_the_hub(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="no such directory, and not a hub id"):
    huggingface.load(tmp_path / "absent")

  asked = []

  def offline(name, *, allow_patterns):
    assert name == "someone/model"
    asked.append(allow_patterns)
    raise huggingface.huggingface_hub.errors.LocalEntryNotFoundError("offline")

  hub = huggingface.huggingface_hub
  monkeypatch.setattr(hub, "snapshot_download", offline)
  with pytest.raises(ValueError, match="hub did not give it.*Offline, give"):
    huggingface.load("someone/model")
  with pytest.raises(ValueError, match="hub did not give it"):
    huggingface.load_tokenizer("someone/model")
  assert asked == [["*.json", "model*.safetensors"], ["*.json"]]
  complete = _saved(tmp_path / "complete")
  monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(complete))
  assert huggingface.load("someone/model")[0] == LLAMA


def _mesh():
  names = ("data", "fsdp", "tensor")
  return jax.make_mesh((2, 2, 2), names, axis_types=(AxisType.Auto,) * 3)


def _shardings(config, mesh):
  rules = (
    encoder_decoder.partition_rules()
    if config is T5
    else decoder.partition_rules()
  )
  flat = {}
  for path in _shapes(config):
    name = "/".join(path)
    spec = next(spec for rule, spec in rules if re.search(rule, name))
    flat[path] = NamedSharding(mesh, spec)
  return traverse_util.unflatten_dict(flat)


@pytest.mark.parametrize(
  "config", [LLAMA, GPT2, T5], ids=["llama", "gpt2", "t5"]
)
def test_each_part_of_a_sharded_leaf_is_read_once(
  tmp_path, monkeypatch, config
):
  path = _saved(tmp_path, config)
  read = []
  original = tensor_files.read_into

  def counted(out, tensor, bounds):
    read.append(out.size)
    original(out, tensor, bounds)

  monkeypatch.setattr(tensor_files, "read_into", counted)
  shardings = _shardings(config, _mesh())
  _, params = huggingface.load(path, shardings=shardings)
  _assert_same(params, _params(config))
  # Two replicas hold every part, yet all parts together are read once.
  sizes = [np.prod(shape) for shape in _shapes(config).values()]
  assert sum(read) == sum(sizes)
  for found, wanted in zip(
    *map(jax.tree.leaves, (params, shardings)), strict=True
  ):
    assert found.sharding == wanted


def test_shardings_from_the_abstract_tree_and_over_layers(tmp_path):
  mesh = _mesh()

  def shardings(abstract):
    assert jax.tree.leaves(abstract)[0].dtype == jnp.bfloat16
    over_layers = NamedSharding(mesh, PartitionSpec("fsdp"))
    return jax.tree.map(lambda x: over_layers, abstract)

  path = _saved(tmp_path)
  _, params = huggingface.load(path, dtype=jnp.bfloat16, shardings=shardings)
  _assert_same(
    params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), _params(LLAMA))
  )
  huggingface.save(tmp_path / "back", LLAMA, params)
  _, back = huggingface.load(tmp_path / "back")
  _assert_same(back, jax.tree.map(np.asarray, params))
  wrong = {"norm": {"scale": NamedSharding(mesh, PartitionSpec())}}
  with pytest.raises(ValueError, match="one leaf per parameter.*embed_tokens"):
    huggingface.load(path, shardings=wrong)


@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_the_host_holds_one_leaf_beyond_the_devices(
  tmp_path, monkeypatch, stored
):
  config = _like(hidden_size=64, mlp_size=4096, num_layers=8, vocab_size=4096)
  huggingface.save(tmp_path, config, _params(config, stored))
  largest = 4 * max(np.prod(shape) for shape in _shapes(config).values())
  layer = largest / config.num_layers
  original = jax.make_array_from_callback

  def on_device(shape, sharding, read, dtype):
    # A CPU device uses the host's array in place; give it memory that is not
    # counted, as the memory of a real device is not.
    def copied(index):
      part = read(index)
      owned = np.frombuffer(mmap.mmap(-1, part.nbytes), dtype)
      owned = owned.reshape(part.shape)
      owned[...] = part
      return owned

    return original(shape, sharding, copied, dtype)

  monkeypatch.setattr(jax, "make_array_from_callback", on_device)
  monkeypatch.setattr(tensor_files, "_BLOCK_BYTES", 1 << 16)
  shardings = _shardings(config, _mesh())
  load = functools.partial(huggingface.load, tmp_path, dtype=jnp.float32)
  tracemalloc.start()
  try:
    _, params = load(shardings=shardings)
    kept, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  assert total > 3 * largest
  assert peak < largest + layer
  assert kept < layer


def test_tokenizer_files_and_vocabulary(tmp_path):
  source = _tokenizer(tmp_path / "tokenizer", LLAMA.vocab_size)
  target = tmp_path / "model"
  huggingface.save(target, LLAMA, _params(LLAMA), tokenizer_from=source)
  assert huggingface.load(target)[0] == LLAMA
  tokenizer = huggingface.load_tokenizer(target)
  assert tokenizer("w5 w7 nothing").input_ids == [5, 7, 0]
  assert tokenizer.eos_token_id == 2
  huggingface.check_vocabulary(LLAMA, tokenizer)
  words = "ids up to 23, the model vocab_size=20 rows"
  small = _like(vocab_size=20)
  with pytest.raises(ValueError, match=words):
    huggingface.check_vocabulary(small, tokenizer)
  with pytest.raises(ValueError, match=words):
    huggingface.save(target, small, _params(small), tokenizer_from=source)
  huggingface.save(target, small, _params(small))  # the tokenizer stays
  with pytest.raises(ValueError, match=words):
    huggingface.load(target)
  with pytest.raises(ValueError, match="has no tokenizer.json"):
    huggingface.load_tokenizer(_saved(tmp_path / "bare"))


def test_a_tokenizer_without_the_ends_of_texts(tmp_path):
  """A smaller vocabulary fits the rows; only such ids tell it from the own."""
  path = _tokenizer(tmp_path, LLAMA.vocab_size - 3)
  tokenizer = huggingface.load_tokenizer(path)
  last = LLAMA.vocab_size - 1
  for config, said in (
    (_like(bos_token_id=last), rf"no id \[{last}\]"),
    (_like(eos_token_ids=(2, last)), f"vocab_size={LLAMA.vocab_size}"),
  ):
    with pytest.raises(ValueError, match=said):
      huggingface.check_vocabulary(config, tokenizer)
  # Of no meaning: a config that kept the default of a larger model.
  for unused in (None, LLAMA.vocab_size, -1):
    config = _like(bos_token_id=unused)
    huggingface.check_vocabulary(config, tokenizer)


def test_largest_id_of_a_unigram_tokenizer(tmp_path):
  parsed = {"model": {"vocab": [["<pad>", 0.0]] * 24}, "added_tokens": []}
  (tmp_path / "tokenizer.json").write_text(json.dumps(parsed))
  huggingface.save(tmp_path, T5, _params(T5))
  huggingface.load(tmp_path)
  parsed["added_tokens"] = [{"id": 24, "content": "<extra>"}]
  (tmp_path / "tokenizer.json").write_text(json.dumps(parsed))
  with pytest.raises(ValueError, match="ids up to 24"):
    huggingface.load(tmp_path)


def test_fingerprint_follows_values_not_placement(tmp_path):
  params = _params(LLAMA)
  path = _saved(tmp_path)
  _, sharded = huggingface.load(path, shardings=_shardings(LLAMA, _mesh()))
  same = fingerprint.fingerprint(params)
  assert fingerprint.fingerprint(sharded) == same
  renamed = {"other": params}
  narrow = jax.tree.map(lambda x: x.astype(np.float16), params)
  params["norm"]["scale"][0] += 1e-3
  for other in (params, renamed, narrow):
    assert fingerprint.fingerprint(other) != same


LLAMA3 = {
  "model_type": "llama",
  "vocab_size": 128256,
  "num_key_value_heads": 8,
  "rms_norm_eps": 1e-5,
  "rope_theta": 500000.0,
  "max_position_embeddings": 8192,
}
LLAMA3_8B = LLAMA3 | {
  "hidden_size": 4096,
  "intermediate_size": 14336,
  "num_hidden_layers": 32,
  "num_attention_heads": 32,
}
LLAMA3_70B = LLAMA3 | {
  "hidden_size": 8192,
  "intermediate_size": 28672,
  "num_hidden_layers": 80,
  "num_attention_heads": 64,
}


@pytest.mark.parametrize(
  "hf, count, tensors",
  [(LLAMA3_8B, 8_030_261_248, 291), (LLAMA3_70B, 70_553_706_496, 723)],
  ids=["8B", "70B"],
)
def test_published_sizes_compile_ahead_of_time(hf, count, tensors):
  """Abstract values only: no weight of this size is ever made."""
  config, mesh = from_hf(hf), _mesh()
  table = checkpoint_names.leaves(config)
  assert sum(len(leaf.names) for leaf in table.values()) == tensors
  abstract = jax.eval_shape(
    lambda rng: decoder.init(config, rng, jnp.bfloat16), jax.random.key(0)
  )
  assert sum(np.prod(x.shape) for x in jax.tree.leaves(abstract)) == count
  params = jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    abstract,
    _shardings(config, mesh),
  )
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  ids = jax.ShapeDtypeStruct((4, 16), jnp.int32, sharding=rows)

  def run(params, ids):
    hidden = decoder.apply(
      config,
      params,
      ids,
      constrain=lambda x: jax.lax.with_sharding_constraint(x, rows),
    ).hidden
    return decoder.logits(config, params, hidden[:, -1:])

  compiled = jax.jit(run).lower(params, ids).compile()
  held = compiled.memory_analysis().argument_size_in_bytes
  # bfloat16 on fsdp x tensor = 4 parts; norms are whole everywhere.
  assert 2 * count / 4 <= held < 2 * count / 4 * 1.001
