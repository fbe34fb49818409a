"""The bank's benchmark runs; what finds and reads the same says the same."""

import json

import pytest

from benchmarks import bank, bank_arrays


@pytest.mark.filterwarnings("ignore:builtin type:DeprecationWarning")  # faiss
def test_one_repetition_of_everything(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr("benchmarks.bank_jaxmem._times", lambda spec: 2)
  monkeypatch.setattr(bank, "SLOW", ("nn_average",))
  path = tmp_path / "out.json"
  result = bank.main(
    ["--documents=40", "--queries=3", "--width=8", "--k=2", "--block=16",
     "--read-documents=20", "--read-tokens=2", "--read-width=8",
     "--repetitions=1", "--in-process", f"--json={path}"]
  )  # fmt: skip
  assert json.loads(path.read_text()) == result
  found = result["scan"]["40"]
  assert {bank.BLOCKS, bank.ONE, bank.MATMUL} <= set(found["arms"])
  assert set(found["same"].values()) == {1.0}
  written = result["write"]["arms"]
  assert "none, unchecked, 40 slots" in written and len(written) == 4
  assert set(bank.READ) <= set(result["read"]["arms"])
  shown = capsys.readouterr().out
  assert "the same slots as matmul, top-k for 100.00 % of the queries" in shown
  assert "kept / anew" in shown and "operations, anew over kept" in shown


def test_agreement_is_of_sets():
  assert bank.agreement([[1, 2], [3, 4]], [[2, 1], [3, 5]]) == 0.5


def test_operations_by_hand():
  """Llama-2-7b's width, a stream of 1,665 documents: what the papers run."""
  found = bank_arrays.flops(1665, 24, 4096)
  question = 4 * 4 * 24 * 4096 * (768 + 768)
  scores = 16 * 1665 * 24**2 * 768
  maps = 4 * 2 * 2 * 1665 * 24 * 4096 * 768
  assert found == {
    "anew": maps + scores + question,
    "kept": scores + question,
  }
  assert maps / scores == pytest.approx(4096 / 24)


def test_errors(capsys):
  for flag, told in (
    ("--parts=scan,sort", r"['sort']; allowed: scan, write, read"),
    ("--documents=10,-1", "--documents=10,-1: whole numbers"),
    ("--queries=0", "--queries must be at least 1"),
    ("--k=2000", "--k=2000 is more than 1000 documents"),
  ):
    with pytest.raises(SystemExit) as stopped:
      bank.parse([flag])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err
