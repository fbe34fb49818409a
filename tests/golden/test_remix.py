"""Data of REMIX against what the released code made of the same records.

Records are written to files in each set's own layout and read by our loaders;
points, token ids, loss masks and padded batches must be equal, the release's
quirks switched on where they act. README.md beside the files describes them.
"""

import dataclasses
import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from jaxmem.data import factoids, formats, mixing, packing, sets, solutions
from jaxmem.data import tokenize as tok
from jaxmem.data.records import Message

SIZE = 2000  # facts in a set of the release
FILTERED = ("popqa", "triviaqa", "entityqa", "webqa", "lama")


@pytest.fixture
def folder(golden_dir):
  """Return DIR/remix; skip where DIR has none."""
  path = golden_dir / "remix"
  if not path.is_dir():
    pytest.skip(f"no remix/ in {golden_dir}")
  return path


@pytest.fixture
def load(folder):
  """Return a reader of the set's json files."""
  return lambda name: json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.fixture
def tokenizer(load, folder):
  golden = load("tokenized.json")
  names = Tokenizer.from_file(str(folder / "tokenizer.json"))
  return PreTrainedTokenizerFast(
    tokenizer_file=str(folder / "tokenizer.json"),
    bos_token=names.id_to_token(golden["bos_id"]),
    eos_token=names.id_to_token(golden["eos_id"]),
    pad_token=names.id_to_token(golden["pad_id"]),
  )


@pytest.fixture
def files(load, tmp_path):
  """Write the raw records to files, one per set."""
  paths = {}
  for name, records in load("records.json")["records"].items():
    paths[name] = tmp_path / f"{name}.jsonl"
    if name in FILTERED or name == "mquake":  # the release reads json lists
      paths[name] = tmp_path / f"{name}.json"
      paths[name].write_text(json.dumps(records))
    else:
      paths[name].write_text("".join(json.dumps(r) + "\n" for r in records))
  return paths


def read_set(files, name, **options):
  """Examples of one set, all quirks of the release's loader on."""
  sources = {
    "apps": [files.get("apps_train"), files.get("apps_test")],
    "random-pretraining": files.get("random_pretraining"),
  }
  if name == "ultrachat":
    options["compat_shared_id"] = True
  source = sources.get(name, files.get(name, f"{name}_is_missing.json"))
  return sets.load(
    name, source=source, size=SIZE, unique=False, **options
  ).examples


def points(files, name, task_mode="", mix_ratio=1.0, eval_known=False, **_):
  """Examples of one case of the release's `load_datapoints`."""
  modes = task_mode.split("+")
  if eval_known:
    known = files[f"{name}_learned"]
    return sets.load(name, source=known, size=SIZE, unique=False).examples
  examples = read_set(files, name)
  if "qa_multiple_choice" in modes and "eval" in modes:
    rng = random.Random(0)
    examples = [formats.multiple_choice(example, rng) for example in examples]
  if "mix" in modes:
    source = modes[modes.index("mix") + 1]
    # The sample counter goes on over the sets, but for two that never move it;
    # ready-made random rows bring their numbers, and the main set's name.
    still = name in ("kvr", "ultrachat")
    options = {"first_id": 0 if still else len(examples)}
    pool = read_set(files, source, **options)
    if source == "random-pretraining":
      pool = [dataclasses.replace(row, group=name) for row in pool]
    examples = mixing.make_stage(
      examples, mix=pool, ratio=mix_ratio, compat_short_pool=True
    ).rows
  return list(examples)


def check_points(examples, golden):
  assert len(examples) == len(golden)
  for example, point in zip(examples, golden, strict=True):
    messages = [message._asdict() for message in example.messages]
    assert messages == point["messages"]
    assert example.id == point["sample_id"]
    assert example.group == point["group_name"]
    if point["input_text"] is not None:  # conversations have neither
      assert example.question == point["input_text"]
      assert example.target == point["target_text"]
    target = example.eval_target
    target = list(target) if isinstance(target, tuple) else target
    assert target == point["target_for_eval"]
    assert (list(example.candidates) or None) == point["target_candidates"]
    assert (example.few_shot_prompt or None) == point["icl_input_text"]


def test_datapoints(load, files):
  for case, golden in load("datapoints.json")["cases"].items():
    name, options = golden["dataset_name"], golden["kwargs"]
    if case.startswith("direct_"):
      check_points(direct(files, case, name), golden["datapoints"])
    elif not golden.get("datapoints"):
      # An error there, or a missing file taken for an empty set. Choice rows
      # need no mode with us: placing the options is a function of its own.
      if sets.SETS.get(name, sets.SETS["kvr"]).kind == "choice":
        if "message" in golden and "task_mode" in golden["message"]:
          continue
      with pytest.raises(ValueError):
        points(files, name, **options)
    else:
      check_points(points(files, name, **options), golden["datapoints"])


def direct(files, case, name):
  """Loaders of the release that no name of its registry reaches."""
  if "mquake" in case:
    return sets.load(
      "mquake", source=files["mquake"], counterfactual=name == "mquake"
    ).examples
  return sets.load(
    "instructions",
    source=files["instruction_tuning"],
    group=name,
    compat_strip="None" if "LongAlpaca" in name else "",
  ).examples


def test_truncation_and_twin(load, tmp_path):
  for name, golden in load("datapoints.json")["truncation"].items():
    path = tmp_path / "rows.json"
    rows = [
      {"input_text": f"q{i}", "target_text": f"a{i}"}
      for i in range(golden["n_raw"])
    ]
    path.write_text(json.dumps(rows))
    examples = sets.load(name, source=path, size=SIZE).examples
    assert len(examples) == golden["n"]
    for example, end in ((examples[0], "first"), (examples[-1], "last")):
      assert example.id == golden[end]["sample_id"]
      assert example.question == golden[end]["input_text"]
    assert examples[0].group == golden["first"]["group_name"]


def test_clean_text_and_files(load):
  for row in load("datapoints.json")["clean_text"]:
    characters = "None" if "LongAlpaca" in row["dataset_name"] else ""
    assert solutions.compat_clean(row["text"], characters) == row["cleaned"]
  golden = load("records.json")
  for key, path in golden["official_files"].items():
    if "filtering" not in path:
      continue
    name = key.removesuffix("_learned")
    found = factoids.filtered_file(
      "", golden["base_model_name"], name, known=name != key
    )
    assert found.as_posix() == path


def full_labels(batch):
  """Label per position, -100 where there is none: the release's layout."""
  labels = np.full(batch.ids.shape, -100)
  for r, q in np.argwhere(batch.label_slot >= 0):
    labels[r, batch.label_index[r, q] + 1] = batch.labels[r, q]
  return labels


def check_padded(rows, width, golden, pad_id):
  """Ids, mask and labels of rows padded to the run's width, pads learned."""
  assert (len(rows), width) == np.shape(golden["input_ids"])
  shape = packing.PackShape(len(rows), width, max(width - 1, 1), 1)
  numbers = range(len(rows))
  batch = packing.pad(
    rows, numbers, numbers, shape, compat_pad_loss=True, pad_id=pad_id
  )
  np.testing.assert_array_equal(batch.ids, golden["input_ids"])
  np.testing.assert_array_equal(full_labels(batch), golden["labels"])
  attended = np.array(golden["attention_mask"]) != 0
  np.testing.assert_array_equal(batch.segments != 0, attended)
  # Without the quirk the labels at pads are gone, and nothing else changes.
  batch = packing.pad(rows, numbers, numbers, shape)
  real = np.array(golden["attention_mask"]) == 1
  np.testing.assert_array_equal(batch.segments != 0, real)
  labels = np.where(real, golden["labels"], -100)
  np.testing.assert_array_equal(full_labels(batch), labels)


def test_managers(load, tokenizer, files):
  golden = load("tokenized.json")
  for case, manager in golden["managers"].items():
    options = dict(manager["kwargs"])
    longest = options.pop("max_seq_length", 512)
    dev = options.pop("dev_num_examples", 2)
    train = options.pop("train_num_examples", None)
    shared = options.pop("use_train_for_dev", True)
    size = train if shared or train is None else train + dev
    examples = points(files, manager["dataset_name"], **options)
    arguments = dict(max_tokens=longest, compat_sample_ids=True)
    if "error" in manager:
      with pytest.raises(ValueError, match="usable rows"):
        tok.encode_examples(tokenizer, examples, **arguments)
      continue
    encoded = tok.encode_examples(
      tokenizer, examples, size=size, compat_mask=True, **arguments
    )
    first = 0 if shared else dev
    width = max(len(row.ids) for row in encoded.rows)
    for part, rows in (("train", slice(first, None)), ("dev", slice(dev))):
      assert encoded.sample_ids[rows] == manager[part]["sample_ids"], case
      check_padded(encoded.rows[rows], width, manager[part], golden["pad_id"])
    # Ours: the same targets, but for the newline between turns.
    ours = tok.encode_examples(tokenizer, examples, max_tokens=longest)
    for row, theirs in zip(ours.rows, encoded.rows, strict=False):
      np.testing.assert_array_equal(row.ids, theirs.ids)
      extra = row.ids[row.target != theirs.target]
      assert not (row.target & ~theirs.target).any()
      assert not tokenizer.decode(extra).strip()
    assert [row.example.id for row in ours.rows] == ours.sample_ids


def test_single_examples(load, tokenizer):
  for golden in load("tokenized.json")["single_example"]:
    chat = [Message(**message) for message in golden["messages"]]
    if "error" in golden:
      with pytest.raises(ValueError, match="role|empty"):
        tok.encode_chats(tokenizer, [chat])
      continue
    (row,) = tok.encode_chats(tokenizer, [chat], compat_mask=True)
    labels = np.where(row.target, row.ids, -100)
    np.testing.assert_array_equal(row.ids, golden["input_ids"])
    np.testing.assert_array_equal(labels, golden["labels"])
    # Ours learns each answer and its end token, no more.
    (row,) = tok.encode_chats(tokenizer, [chat])
    np.testing.assert_array_equal(row.ids, golden["input_ids"])
    answers = [m.content.strip() for m in chat if m.role == "assistant"]
    learned = tokenizer.decode(row.ids[row.target])
    assert learned == "".join(a + tokenizer.eos_token for a in answers)


def test_collators(load, tokenizer, files):
  golden = load("tokenized.json")
  kvr = read_set(files, "kvr")
  rows = tok.encode_examples(tokenizer, kvr).rows
  width = max(len(row.ids) for row in rows)
  check_padded(rows, width, golden["collators"]["default"], golden["pad_id"])
  shuffled = golden["collators"]["qa_multiple_choice_shuffle"]
  rng = random.Random(shuffled["random_seed"])
  placed = [
    formats.multiple_choice(example, rng)
    for example in read_set(files, "commonsenseqa")
  ]
  rows = tok.encode_examples(tokenizer, placed).rows
  width = max(len(row.ids) for row in rows)
  check_padded(rows, width, shuffled, golden["pad_id"])
  option = golden["collators"]["construct_random_option"]
  raw = option["args"]
  example = placed[0]
  example = dataclasses.replace(
    example,
    messages=(
      Message("user", raw["input_text"]),
      Message("assistant", raw["target_text"]),
    ),
    answers=(raw["target_text"],),
    candidates=tuple(raw["target_candidates"]),
  )
  got = formats.multiple_choice(example, random.Random(option["random_seed"]))
  assert [got.question, got.target, list(got.eval_target)] == option["result"]


def test_inference_prompts(load, tokenizer, files):
  golden = load("tokenized.json")
  for case in golden["inference"].values():
    options = dict(case["kwargs"])
    known = options.get("eval_known", False)
    examples = points(files, case["dataset_name"], eval_known=known)
    prompts = [
      formats.eval_prompt(
        example,
        tokenizer.eos_token,
        chat=options["use_chat_format"],
        few_shot=known,
        system=options.get("system_prompt"),
        compat_unstripped_prompt=True,
      )
      for example in examples
    ]
    ids = tok.encode_prompts(tokenizer, prompts)
    for i, batch in enumerate(case["batches"]):
      here = slice(i * case["batch_size"], (i + 1) * case["batch_size"])
      padded, valid = tok.left_pad(ids[here], golden["pad_id"])
      np.testing.assert_array_equal(padded, batch["input_ids"])
      np.testing.assert_array_equal(valid, batch["attention_mask"])
      assert prompts[here] == batch["input_texts"]
      assert [e.id for e in examples[here]] == batch["sample_ids"]


def test_message_format(load, tokenizer):
  golden = load("tokenized.json")["apply_message_format"]
  ask, told = Message("user", "Q"), Message("system", "S")
  eos = tokenizer.eos_token
  assert formats.chat_prompt([ask], eos) == golden["no_system"]
  assert formats.chat_prompt([told, ask], eos) == golden["system"]


def test_prompt_ids_equal_in_training_and_evaluation(load, tokenizer, files):
  names = {key.removesuffix("_train") for key in files} & set(sets.SETS)
  for name in sorted(names - {"ultrachat"}):  # its last turns go unanswered
    examples = read_set(files, name)
    prompts = tok.encode_prompts(
      tokenizer,
      [formats.eval_prompt(e, tokenizer.eos_token) for e in examples],
    )
    rows = tok.encode_examples(tokenizer, examples).rows
    for prompt, row in zip(prompts, rows, strict=True):
      assert row.ids[: len(prompt)].tolist() == prompt
      assert not row.target[: len(prompt)].any()
      assert row.target[len(prompt) :].all()
