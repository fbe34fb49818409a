"""Tables as text, by hand."""

from jaxmem.evaluation import markdown


def test_a_table():
  assert markdown.table(["a", "b"], []) == "| a | b |\n| --- | --- |\n"
  text = markdown.table(["a"], [["1|2"], ["–"]])
  assert text == "| a |\n| --- |\n| 1\\|2 |\n| – |\n"
