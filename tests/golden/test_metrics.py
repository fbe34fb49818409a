"""String scores against what the official code gave for the same strings.

The files and their fields are described in README.md beside them. Where the
official code raises, ours raises a ValueError with a message.
"""

import json

import pytest

from jaxmem.evaluation import imsm, longbench, metrics


@pytest.fixture
def load(golden_dir):
  """Return a reader of the set's json files; skip where DIR has none."""

  def read(name):
    path = golden_dir / "metrics" / name
    if not path.exists():
      pytest.skip(f"no metrics/{name} in {golden_dir}")
    return json.loads(path.read_text(encoding="utf-8"))

  return read


def close(value):
  return pytest.approx(value, abs=1e-9, rel=0)


def test_mac(load):
  golden = load("mac_qa.json")
  for row in golden["normalize"]:
    assert metrics.normalize_answer(row["text"]) == row["normalized"], row
  for row in golden["pairs"]:
    pair = row["prediction"], row["ground_truth"]
    assert metrics.mac_exact_match(*pair) == row["em"], row
    full = metrics.mac_exact_match(*pair, prefix=False)
    assert full == row["em_match_length"], row
    assert metrics.mac_f1(*pair) == close(row["f1"]), row
  for row in golden["multi_reference"]:
    f1s = [metrics.mac_f1(row["prediction"], r) for r in row["references"]]
    hits = [
      metrics.mac_exact_match(row["prediction"], r) for r in row["references"]
    ]
    assert any(hits) == row["em_any"], row
    assert f1s == close(row["f1_each"]), row
    assert max(f1s) == close(row["f1_max"]), row
  for row in golden["answer_selection"]:
    dataset = row["dataset"].removesuffix("Dataset").lower()
    got = metrics.mac_question_answer(dataset, row["record"])
    assert got == (row["question"], row["answer"]), row


def test_mac_evaluation_loop(load):
  for run in load("mac_qa.json")["qa_eval_runs"]:
    assert all(len(i["decoded"]) == run["top_k"] for i in run["items"])
    items, summary = metrics.mac_qa_eval(run["items"])
    for item, row in zip(items, run["per_item"], strict=True):
      assert item.predicted == row["predicted"], row
      assert item.f1s == close(row["f1s"]), row
      assert item.em == row["em"], row
    for name, expected in summary.items():
      assert expected == close(run[name])


def test_imsm(load):
  golden = load("imsm_metric_evaluation.json")
  for row in golden["normalize"]:
    assert metrics.normalize_answer(row["text"]) == row["normalized"], row
  for i, row in enumerate(golden["pairs"]):
    pair = row["generated"], row["golden"]
    assert imsm.exact_match(*pair) == golden["em_each"][i], row
    assert imsm.contain(*pair) == golden["contain_each"][i], row
    assert imsm.f1_overlap(*pair) == close(golden["f1_overlap_each"][i]), row
    assert imsm.rouge(*pair) == close(tuple(golden["rouge_each"][i])), row
  for row in golden["list_golden"]:
    pair = row["generated"], row["golden"]
    assert imsm.exact_match(*pair) == row["em"], row
    assert imsm.contain(*pair) == row["contain"], row


def test_imsm_files(load):
  for run in load("imsm_metric_evaluation.json")["datasets"]:
    if "error" in run:
      with pytest.raises(ValueError):
        imsm.evaluate(run["datapath"], run["data"])
      continue
    got = imsm.evaluate(run["datapath"], run["data"])
    assert got == close(run["result"]), run["name"]


def test_longbench(load):
  golden = load("memoryllm.json")
  for row in golden["normalize"]:
    assert metrics.normalize_answer(row["text"]) == row["en"], row
    assert longbench.normalize_zh(row["text"]) == row["zh"], row
  scores = {
    "qa_f1": longbench.qa_f1,
    "rouge": longbench.rouge,
    "retrieval": longbench.retrieval,
    "retrieval_zh": longbench.retrieval_zh,
    "count": longbench.count,
    "code_sim": longbench.code_similarity,
  }
  for name, score in scores.items():
    for row in golden[name]:
      got = score(row["prediction"], row["ground_truth"])
      assert got == close(row["score"]), (name, row)
  for row in golden["classification"]:
    got = longbench.classification(
      row["prediction"], row["ground_truth"], row["all_classes"]
    )
    assert got == close(row["score"]), row
  for row in golden["code_sim"]:
    pair = row["prediction"], row["ground_truth"]
    got = longbench.code_similarity(*pair, matcher="levenshtein")
    assert got == close(row["score_with_python_levenshtein"]), row


def test_longbench_chinese(load):
  golden = load("memoryllm.json")
  scores = {"qa_f1_zh": longbench.qa_f1_zh, "rouge_zh": longbench.rouge_zh}
  for name, score in scores.items():
    for row in golden[name]:
      got = score(row["prediction"], row["ground_truth"])
      assert got == close(row["score"]), (name, row)


def test_memoryllm_retention(load):
  golden = load("memoryllm.json")
  for row in golden["exact_hit"]:
    pair = row["prediction"], row["target"]
    hit = metrics.memoryllm_exact_hit(*pair)
    assert hit == row["hit_test_qa_memory"], row
    hit = metrics.memoryllm_exact_hit_train(*pair)
    assert hit == row["hit_train_util"], row
  run = golden["knowledge_retention_run"]
  got = metrics.memoryllm_retention(run["generated_results"])
  assert got == close(run["accuracy_per_step"])


def test_remix(load):
  golden, scores = load("remix_run_eval.json"), {}
  for row in golden["cases"]:
    mode, texts = row["task_mode"], (row["pred_text"], row["gold_text"])
    parsed = tuple(metrics.remix_parse(text, mode) for text in texts)
    assert parsed == (row["parsed_pred"], row["parsed_gold"]), row
    options = {"dataset": row["dataset_name"], "mode": mode}
    if "raises" in row:
      with pytest.raises(ValueError, match="option letter"):
        metrics.remix_score(*texts, **options)
      continue
    score = metrics.remix_score(*texts, **options)
    assert score.correct == row["correct"], row
    assert score.rouge == close(row["rouge"]), row
    if mode == "none":
      scores.setdefault(row["dataset_name"], []).append(score)
  for name, expected in golden["aggregate"].items():
    assert metrics.remix_aggregate(scores[name]) == close(expected)
  for row in golden["parse_gsm8k_unused"]:
    if "raises" in row:
      with pytest.raises(ValueError, match="no digit"):
        [metrics.remix_last_digits(row[f"{k}_text"]) for k in ("pred", "gold")]
      continue
    assert metrics.remix_last_digits(row["pred_text"]) == row["parsed_pred"]
    assert metrics.remix_last_digits(row["gold_text"]) == row["parsed_gold"]
