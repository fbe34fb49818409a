"""Official parameters of MAC and MBC, there and back; what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from jaxmem.adapters import lora
from jaxmem.memory import aggregator, injector, quantizer, slots
from jaxmem.methods import mac_files, mbc_files
from jaxmem.models import encoder_decoder
from jaxmem.models.encoder_decoder_config import EncoderDecoderConfig
from tests.models import tiny

C, P, BLOCKS, HEADS, SIZE = 3, 2, 2, 2, 5
MODEL = tiny.FAMILIES["gpt2"]
D, LAYERS = MODEL.hidden_size, MODEL.num_layers


def _t5(width):
  return EncoderDecoderConfig(11, width, 2, 1, 2, 4, 6, relative_buckets=8)


T5S = _t5(8), _t5(D)  # documents' of another width than the model's


@functools.cache
def _params():
  """A tree of MAC's parts, filled with noise."""

  def made(rng):
    tree = {}
    for name, config in zip(("compressor", "question"), T5S, strict=True):
      width = config.hidden_size
      tree[name] = {
        "t5": encoder_decoder.init(config, rng),
        "slots": jnp.zeros((C, width)),
        "mlp": slots.init(C, width, D, rng=rng),
      }
    tree["aggregator"] = aggregator.init(
      D, blocks=BLOCKS, heads=HEADS, head_dim=SIZE, rng=rng
    )
    tree["injector"] = injector.init(
      "mac_slots", width=D, tokens=C, layers=LAYERS, hidden=7, prefix_len=P,
      kv_heads=MODEL.num_kv_heads, head_dim=MODEL.head_dim, rng=rng,
    )  # fmt: skip
    return tree

  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32),
    jax.eval_shape(made, jax.random.key(0)),
  )


def _same(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  jax.tree.map(np.testing.assert_array_equal, one, other)


def _read(file, model=MODEL, t5s=T5S, heads=HEADS):
  return mac_files.read(file, model, *t5s, heads=heads)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp("mac") / "mac.safetensors"
  mac_files.write(path, _params(), MODEL, *T5S)
  return path


def test_there_and_back(file, tmp_path):
  again = _read(file)
  _same(again, _params())
  mac_files.write(tmp_path / "again.safetensors", again, MODEL, *T5S)
  assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_names_and_layout(file):
  params, stored = _params(), load_file(file)
  for name, leaf in (
    ("enc_decoder.learnable_prompts", params["compressor"]["slots"][None]),
    ("mlps.1.skip.weight", params["compressor"]["mlp"]["skip"]["kernel"][1].T),
    ("mlps.2.mlp.0.bias", params["compressor"]["mlp"]["norm"]["bias"][2]),
    (
      "aggregator.mlps.0.mlp.3.weight",
      params["question"]["mlp"]["out"]["kernel"][0].T,
    ),
  ):
    np.testing.assert_array_equal(stored[name], leaf, name)
  assert not any(name.startswith("aggregator.mlps.0.skip") for name in stored)
  # Heads lie side by side in the rows of torch's matrices.
  block = "aggregator.cross_attention_list.1.attn"
  kernel = params["aggregator"]["query"]["kernel"][1]
  for head in range(HEADS):
    rows = slice(head * SIZE, (head + 1) * SIZE)
    got = stored[f"{block}.to_q.weight"][rows]
    np.testing.assert_array_equal(got, kernel[:, head].T)
    got = stored[f"{block}.to_out.0.weight"][:, rows]
    want = params["aggregator"]["out"]["kernel"][1, head].T
    np.testing.assert_array_equal(got, want)
  # Slot 2 L p + 2 l + c.
  row, layer, kind = 1, LAYERS - 1, 0
  number = 2 * LAYERS * row + 2 * layer + kind
  got = stored[f"token_SA.mlp_layers.{number}.net.4.weight"]
  want = params["injector"]["down"]["kernel"][row, layer, kind]
  np.testing.assert_array_equal(got, want.reshape(-1, D).T)
  for t5 in ("enc_decoder", "aggregator.question_encoder"):
    copies = [stored[f"{t5}.{name}.weight"] for name in (
      "shared", "encoder.embed_tokens", "decoder.embed_tokens",
    )]  # fmt: skip
    np.testing.assert_array_equal(copies[1:], [copies[0]] * 2)
    assert f"{t5}.lm_head.weight" not in stored


def test_what_is_missing_unknown_and_misshapen_is_listed(file, tmp_path):
  stored = load_file(file)
  path = tmp_path / "changed.safetensors"

  def changed(match, drop=(), **added):
    save_file({k: x for k, x in stored.items() if k not in drop} | added, path)
    with pytest.raises(ValueError, match=match):
      _read(path)

  changed(
    r"missing \(1\):\s+mlps.0.mlp.0.bias \[8\]\s+unknown \(1\):\s+more \[1\]",
    drop=["mlps.0.mlp.0.bias"],
    more=np.zeros(1, np.float32),
  )
  name = "aggregator.cross_attention_list.1.attn.to_q.weight"
  changed(
    rf"misshapen \(1\):\s+{name} \[3, 12\], expected \[10, 12\]",
    **{name: np.zeros((3, D), np.float32)},
  )
  changed(
    r"under enc_decoder.: .*\s+missing \(1\):\s+encoder.final_layer_norm",
    drop=["enc_decoder.encoder.final_layer_norm.weight"],
  )
  changed(r"missing .*\s+enc_decoder.learnable_pro", drop=[
    "enc_decoder.learnable_prompts"
  ])  # fmt: skip
  changed(
    "holds I64 .* convert it", **{"mlps.0.mlp.0.bias": np.zeros(8, np.int64)}
  )
  with pytest.raises(ValueError, match="no such file"):
    _read(tmp_path / "state.pt")
  with pytest.raises(ValueError, match="misshapen"):
    _read(file, heads=3)


def test_trees_that_are_none_of_macs():
  flat = traverse_util.flatten_dict(_params(), sep="/")

  def refused(match, drop=(), **changes):
    kept = {k: x for k, x in flat.items() if k not in drop} | changes
    tree = traverse_util.unflatten_dict(kept, sep="/")
    with pytest.raises(ValueError, match=match):
      mac_files.to_released(tree, MODEL, *T5S)

  refused("quantizer \\[2\\], which is no part", quantizer=jnp.zeros(2))
  refused(r"missing .*\s+.*to_q.weight", drop=["aggregator/query/kernel"])
  refused(
    r"missing .*\s+question/t5/encoder/norm/scale",
    drop=["question/t5/encoder/norm/scale"],
  )
  leaf = flat["injector/up/bias"]
  refused(
    r"misshapen .*\s+injector/up/bias \[1, 4, 2, 7\]",
    **{"injector/up/bias": leaf.reshape(1, 4, 2, 7)},
  )


def test_codebooks(tmp_path):
  path = tmp_path / "vq.safetensors"
  codebook, usage = jnp.ones((5, D)), quantizer.Usage(jnp.arange(5.0))
  mbc_files.write_quantizer(path, codebook, usage)
  _same(mbc_files.read_quantizer(path), (codebook, usage))
  stored = load_file(path)
  assert stored["vq.ema_cluster_size"].tolist() == [0, 1, 2, 3, 4]
  save_file({"vq.embedding.weight": stored["vq.embedding.weight"]}, path)
  with pytest.raises(ValueError, match=r"missing .*\s+vq.ema_cluster_size \[5"):
    mbc_files.read_quantizer(path)


def _kv_lora(model, adapted, rank=2, alpha=6):
  """An adapter of keys and values of some layers, as it is read."""
  fused = model.family == "gpt2"
  tree = lora.init(
    tiny.params(model)["layers"],
    ("c_attn",) if fused else ("k_proj", "v_proj"),
    rank,
    alpha=alpha,
    rng=jax.random.key(0),
  )
  live = np.isin(np.arange(model.num_layers), adapted)[:, None, None]
  for names in tree.values():
    for adapter in names.values():
      shape = adapter["lora_B"].shape
      columns = np.arange(shape[-1]) >= (D if fused else 0)
      mask = np.asarray(live * columns[None, None], np.float32)
      draw = np.random.default_rng(1).normal(size=shape)
      adapter["lora_A"] = adapter["lora_A"] * live[..., None]
      adapter["lora_B"] = jnp.asarray(draw * mask[:, :, None], jnp.float32)
      adapter["mask"] = jnp.asarray(mask)
  return tree


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adapters_of_keys_and_values(family, tmp_path):
  model, path = tiny.FAMILIES[family], tmp_path / "lora.safetensors"
  tree = _kv_lora(model, [1])
  mbc_files.write_kv_lora(path, model, tree)
  again = mbc_files.read_kv_lora(path, model, alpha=6)
  _same(again, tree)
  stored = load_file(path)
  columns = model.num_kv_heads * model.head_dim
  if family == "gpt2":
    start = "base_lm.transformer.h.1.attn.c_attn.lora_"
    shapes = {"A": (2, D), "B": (2 * columns, 2)}
    want = {f"{start}{k}.weight": shape for k, shape in shapes.items()}
  else:
    start = "base_lm.model.layers.1.self_attn."
    shapes = {"A": (2, D), "B": (columns, 2)}
    want = {
      f"{start}{name}.lora_{k}.weight": shape
      for name in ("k_proj", "v_proj")
      for k, shape in shapes.items()
    }
  assert {name: x.shape for name, x in stored.items()} == want
  dropped = dict(sorted(stored.items())[1:])
  save_file(dropped, path)
  with pytest.raises(ValueError, match=r"missing \(1\)"):
    mbc_files.read_kv_lora(path, model, alpha=6)
  save_file({}, path)
  with pytest.raises(ValueError, match="missing"):
    mbc_files.read_kv_lora(path, model, alpha=6)
  other = lora.init(
    tiny.params(model)["layers"],
    ("c_proj",) if family == "gpt2" else ("k_proj",),
    2,
    alpha=6,
    rng=jax.random.key(0),
  )
  with pytest.raises(ValueError, match="the adapter has .*; MBC's has"):
    mbc_files.write_kv_lora(path, model, other)
