"""The command starts from state dicts as MAC's and MBC's own code writes them.

Their T5s and language models are the set's; tokenizers and texts are invented.
"""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import cmt as experiment
from jaxmem import config as configs
from jaxmem.methods import cmt_files, cmt_setup, mac, mac_files
from jaxmem.models import encoder_decoder_config, huggingface, tensor_files
from tests.golden import mac_set

WORDS = "<pad> </s> <unk> Ann Bob Cid is in Rome Oslo Bern Where ? .".split()
PLACES = {"Ann": "Rome", "Bob": "Oslo", "Cid": "Bern"}


def _never(step):
  del step
  return False


def _save_tokenizer(path):
  from tokenizers import Tokenizer, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  ids = {word: number for number, word in enumerate(WORDS)}
  made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  PreTrainedTokenizerFast(
    tokenizer_object=made, pad_token="<pad>", eos_token="</s>",
    unk_token="<unk>",
  ).save_pretrained(path)  # fmt: skip


def _texts(path):
  articles = [
    {
      "title": name,
      "paragraphs": [
        {
          "context": f"{name} is in {place} .",
          "qas": [
            {
              "id": name,
              "question": f"Where is {name} ?",
              "answers": [{"text": place, "answer_start": 0}],
            }
          ],
        }
      ],
    }
    for name, place in PLACES.items()
  ]
  path.write_text(json.dumps({"data": articles}))


@pytest.fixture(scope="module")
def files(golden_dir, tmp_path_factory):
  """A language model, two T5s, state dicts of both methods, and questions."""
  mbc = mac_set.folder(golden_dir, "mbc")
  source, out = mbc.parent / "mac", tmp_path_factory.mktemp("released")
  shutil.copytree(source / "gpt2", out / "gpt2")
  _save_tokenizer(out / "gpt2")
  found = mac_set.load(source, "gpt2", mac.settings)
  for part, name in (("compressor", "amort"), ("question", "question")):
    hf = tensor_files.read_json(source / f"{name}_t5_config.json")
    t5 = encoder_decoder_config.from_hf(hf)
    # Others than the state dict's, which has its own.
    weights = jax.tree.map(jnp.zeros_like, found.params[part]["t5"])
    huggingface.save(out / name, t5, weights)
    _save_tokenizer(out / name)
  tensors = load_file(source / "amort_model.safetensors")
  save_file(tensors, out / "mac.safetensors")
  for name in ("vq_state", "lora_gpt2"):
    tensors |= load_file(mbc / f"{name}.safetensors")
  save_file(tensors, out / "mbc.safetensors")
  _texts(out / "squad.json")
  sizes = {
    "mac": json.loads((source / "meta.json").read_text())["config"],
    "mbc": json.loads((mbc / "meta.json").read_text())["config"],
  }
  return out, sizes


def _config(files, name, **changes):
  out, sizes = files
  mac_sizes, mbc_sizes = sizes["mac"], sizes["mbc"]
  values = {
    "model": str(out / "gpt2"),
    "method": name,
    "start": str(out / f"{name}.safetensors"),
    "order": "()",
    "select.score": "",
    "mesh.data": 1,
    "t5.documents": str(out / "amort"),
    "t5.questions": str(out / "question"),
    "memory.blocks": mac_sizes["num_cross_attention_blocks"],
    "memory.t5_mask_bug": True,
    "of_method.mbc.kv_lora_alpha": float(mbc_sizes["lora_alpha"]),
    "of_method.mac.tokens": mac_sizes["num_virtual_tokens"],
    "of_method.mbc.tokens": mac_sizes["num_virtual_tokens"],
    "of_method.mbc.num_codes": mbc_sizes["vq_num_codes"],
    "of_method.mbc.kv_lora_rank": mbc_sizes["lora_r"],
    "train.base_dtype": "float32",
    "data.source": str(out / "squad.json"),
    "data.set": "squad",
    "data.documents": 0,
    "data.document_tokens": 8,
    "eval.batch_size": 4,
    "eval.decode": "greedy",
    "eval.max_new_tokens": 2,
    "eval.ladder": "('all', 'no memory')",
  }
  config = configs.load("configs/cmt.py:paper")
  return configs.apply(config, values | changes)


def _experiment(config, tmp_path):
  base = cmt_setup.load_base(config)
  return experiment.Experiment(config, tmp_path, _never, base, (), None)


def test_macs_parameters_are_the_files(files, tmp_path):
  exp = _experiment(_config(files, "mac"), tmp_path)
  params, limit = experiment.start(exp)
  model = exp.base.model
  want = mac_files.read(
    files[0] / "mac.safetensors", model.config, model.document_t5,
    model.question_t5, heads=8,
  )  # fmt: skip
  jax.tree.map(np.testing.assert_array_equal, params, want)
  assert limit == -1


def test_mbc_answers_from_its_file(files, tmp_path, monkeypatch):
  asked, ask = [], experiment.ask

  def keep(exp, stream, params, limit):
    asked.append(params)
    return ask(exp, stream, params, limit)

  monkeypatch.setattr(experiment, "ask", keep)
  config = _config(files, "mbc")
  experiment.run(config, tmp_path, _never)
  result = json.loads((tmp_path / "result.json").read_text())
  assert result["documents"] == 3 and result["steps"] == 0
  ladder = json.loads((tmp_path / "ladder.json").read_text())
  assert len(ladder["all"]["answers"]) == 3
  (params,) = asked
  stored = load_file(files[0] / "mbc.safetensors")
  np.testing.assert_array_equal(
    params["quantizer"], stored["vq.embedding.weight"]
  )
  adapter = params["kv_lora"]["attn"]["c_attn"]
  name = "base_lm.transformer.h.1.attn.c_attn.lora_A.weight"
  np.testing.assert_array_equal(adapter["lora_A"][1, 0].T, stored[name])
  assert adapter["scale"].ravel().tolist() == [2.0, 2.0]
  # What compare takes.
  saved = cmt_files.describe(tmp_path / "memory")
  settings = cmt_setup.make_settings(config)
  assert saved[:3] == ("mbc", settings, result["base"])
  assert saved.document_tokens == config.data.document_tokens
  assert len(saved.t5) == 2 and not saved.chat


@pytest.mark.parametrize(
  ("method", "changes", "message"),
  [
    ("mac", {"of_method.mac.tokens": 5}, r"compressor/mlp/\S+: \[3, .*\[5, "),
    ("mac", {"method": "cmt", "memory.compressor": "t5"}, "set method=mac or"),
    ("mac", {"method": "mbc"}, r"missing \(2\):\s+vq.embedding.weight"),
    ("mbc", {"method": "mac"}, r"unknown \(4\):\s+base_lm"),
    ("mbc", {"of_method.mbc.kv_lora_rank": 2}, "kv_lora/attn/c_attn/lora_A"),
    (
      "mac", {"of_method.mac.injector": "linear"},
      r"which has injector=mac_slots \(given linear\)",
    ),
    ("mac", {"start": "none.safetensors"}, "none.safetensors: no such file"),
  ],
)  # fmt: skip
def test_files_that_do_not_go(files, tmp_path, method, changes, message):
  exp = _experiment(_config(files, method, **changes), tmp_path)
  with pytest.raises(ValueError, match=message):
    experiment.start(exp)
