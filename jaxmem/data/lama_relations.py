"""Questions and clozes for the 41 T-REx relations of LAMA.

Source: our own wording. LAMA ships clozes only, while REMIX's overview figure
shows LAMA as natural questions whose text was not released, so scores under
this table and the authors' scores are not of the same prompts. The keys are
Wikidata properties; `[X]` stands for the subject, `[Y]` for the answer.
"""

from typing import NamedTuple


class Relation(NamedTuple):
  """Wording of one relation."""

  question: str  # holds [X]
  cloze: str  # holds [X] and [Y]


RELATIONS = {
  "P17": Relation("In which country is [X]?", "[X] is in the country [Y]."),
  "P19": Relation("Where was [X] born?", "[X] was born in [Y]."),
  "P20": Relation("Where did [X] die?", "[X] died in [Y]."),
  "P27": Relation(
    "Which country is [X] a citizen of?", "[X] is a citizen of [Y]."
  ),
  "P30": Relation("On which continent is [X]?", "[X] is on the continent [Y]."),
  "P31": Relation("What kind of thing is [X]?", "[X] is a [Y]."),
  "P36": Relation("What is the capital of [X]?", "The capital of [X] is [Y]."),
  "P37": Relation(
    "What is the official language of [X]?",
    "The official language of [X] is [Y].",
  ),
  "P39": Relation("What office did [X] hold?", "[X] held the office of [Y]."),
  "P47": Relation("What does [X] border?", "[X] shares a border with [Y]."),
  "P101": Relation(
    "In which field did [X] work?", "[X] worked in the field of [Y]."
  ),
  "P103": Relation(
    "What is the native language of [X]?", "The native language of [X] is [Y]."
  ),
  "P106": Relation("What was the profession of [X]?", "[X] worked as a [Y]."),
  "P108": Relation("Who employed [X]?", "[X] was employed by [Y]."),
  "P127": Relation("Who owns [X]?", "[X] belongs to [Y]."),
  "P131": Relation(
    "In which administrative area is [X]?", "[X] lies within [Y]."
  ),
  "P136": Relation(
    "Which genre does [X] belong to?", "The genre of [X] is [Y]."
  ),
  "P138": Relation("What is [X] named after?", "[X] is named after [Y]."),
  "P140": Relation(
    "Which religion does [X] follow?", "The religion of [X] is [Y]."
  ),
  "P159": Relation(
    "Where are the headquarters of [X]?", "The headquarters of [X] are in [Y]."
  ),
  "P176": Relation("Which company makes [X]?", "[X] is made by [Y]."),
  "P178": Relation("Who developed [X]?", "[X] was developed by [Y]."),
  "P190": Relation(
    "Which city is twinned with [X]?", "[X] is twinned with [Y]."
  ),
  "P264": Relation(
    "Which record label published [X]?", "The record label of [X] is [Y]."
  ),
  "P276": Relation("Where is [X] to be found?", "[X] is to be found in [Y]."),
  "P279": Relation("What is [X] a kind of?", "[X] is a kind of [Y]."),
  "P361": Relation("What is [X] a part of?", "[X] is a part of [Y]."),
  "P364": Relation(
    "What was the original language of [X]?",
    "The original language of [X] is [Y].",
  ),
  "P407": Relation(
    "In which language was [X] written?", "[X] was written in [Y]."
  ),
  "P413": Relation(
    "In which position does [X] play?", "[X] plays in the position [Y]."
  ),
  "P449": Relation(
    "Which network first broadcast [X]?", "[X] was first broadcast by [Y]."
  ),
  "P463": Relation(
    "Which organisation is [X] a member of?", "[X] is a member of [Y]."
  ),
  "P495": Relation(
    "Which country does [X] come from?", "[X] comes from the country [Y]."
  ),
  "P527": Relation("What does [X] consist of?", "[X] consists of [Y]."),
  "P530": Relation(
    "Which country does [X] have diplomatic relations with?",
    "[X] has diplomatic relations with [Y].",
  ),
  "P740": Relation("Where was [X] founded?", "[X] was founded in [Y]."),
  "P937": Relation("In which place did [X] work?", "[X] worked in [Y]."),
  "P1001": Relation(
    "In which jurisdiction does [X] apply?", "[X] applies in [Y]."
  ),
  "P1303": Relation("Which instrument does [X] play?", "[X] plays the [Y]."),
  "P1376": Relation(
    "What is [X] the capital of?", "[X] is the capital of [Y]."
  ),
  "P1412": Relation(
    "Which language did [X] speak or write?", "[X] spoke or wrote in [Y]."
  ),
}
