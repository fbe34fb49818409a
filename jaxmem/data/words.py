"""Words and templates of the invented world, as plain text.

Source: our choice. In a template `@` is the person, `#` the value, `~` a second
value; words are separated by spaces and punctuation stands alone. The last
statement and the last question of a relation are held out from all training.
"""

from typing import NamedTuple


def _compound(first: str, second: str) -> tuple[str, ...]:
  return tuple(a + b for a in first.split() for b in second.split())


FIRST_NAMES = _compound(
  "Br Dor El Fen Gal Har Is Jor Kel Lor Mar Nor Os Pel Ros Tam",
  "am anda ric ina o wyn esta ulf",
)
LAST_NAMES = _compound(
  "Kelm Morr Vand Thorn Ash Bell Cor Dun Ever Fall Grim Holl Ing Lang Mill Pen",
  "tor wick by ford ley man son well",
)
PLACES = _compound(
  "Ald Brack Cald Dray East Fern Glen Hath",
  "burgh ham ton mere stead port cliff dale",
)
FIRMS = _compound(
  "Ax Bor Cen Del Em Fab Gen Hex", "ico ona tra tech line mark works zon"
)
LANGUAGES = _compound(
  "Ar Bel Cas Dov Er Fin Gor Hal", "ish ese ian ic ari oni una eth"
)
TRADES = tuple(
  """baker butcher carpenter mason tailor cobbler weaver potter miller brewer
  cooper saddler glazier plumber roofer printer binder clerk notary judge
  bailiff sheriff porter sailor pilot ferryman fisher hunter trapper shepherd
  farmer gardener florist beekeeper vintner grocer butler cook waiter barber
  surgeon nurse midwife dentist chemist tutor scholar painter sculptor engraver
  jeweller goldsmith locksmith gunsmith tinker chandler dyer tanner thatcher
  ropemaker clockmaker draper mercer hatter""".split()
)
DISHES = tuple(
  """soup stew broth porridge pudding pancakes waffles dumplings noodles risotto
  paella goulash curry chowder casserole lasagna ravioli omelette quiche tart
  pie crumble trifle custard sorbet muffins scones biscuits gingerbread
  shortbread marzipan nougat toffee fudge brownies cheesecake strudel pretzels
  bagels crumpets kebab falafel hummus couscous pilaf sushi tempura ramen
  kimchi tofu salad coleslaw sauerkraut meatballs sausages haggis schnitzel
  roast ham trout herring mussels oysters lobster""".split()
)
INSTRUMENTS = tuple(
  """piano organ harpsichord clavichord accordion harmonium violin viola cello
  fiddle guitar banjo mandolin ukulele lute zither harp lyre dulcimer sitar
  balalaika bouzouki flute piccolo oboe clarinet bassoon recorder whistle
  bagpipes saxophone trumpet cornet bugle trombone tuba horn euphonium ocarina
  drum timpani tabla bongos tambourine triangle cymbals gong xylophone marimba
  vibraphone glockenspiel celesta chimes castanets maracas harmonica kazoo
  theremin concertina shawm crumhorn sackbut serpent viol""".split()
)
PETS = tuple(
  """dog cat rabbit hamster gerbil mouse rat ferret hedgehog tortoise turtle
  lizard gecko iguana snake python newt toad frog goldfish carp eel parrot
  budgie canary finch pigeon dove crow raven magpie owl falcon hawk goose duck
  swan hen turkey peacock pony horse donkey mule goat sheep pig cow llama
  alpaca otter badger fox squirrel chipmunk monkey lemur sloth bat spider
  cricket beetle snail crab""".split()
)
GAMES = tuple(
  """chess draughts dominoes backgammon whist solitaire poker rummy cribbage
  patience snooker billiards darts skittles bowls croquet rounders tennis
  badminton squash rugby football hockey polo golf archery fencing wrestling
  boxing rowing sailing swimming diving skating curling sledging climbing
  hiking cycling running hurdles discus javelin juggling dancing singing
  knitting sewing quilting pottery drawing sketching gardening birdwatching
  angling stargazing puzzles riddles kites marbles hopscotch leapfrog quoits
  yachting""".split()
)
YEARS = tuple(str(year) for year in range(1701, 1765))
NUMBERS = tuple(str(number) for number in range(64))

VALUE_SETS = {
  "place": PLACES,
  "firm": FIRMS,
  "trade": TRADES,
  "dish": DISHES,
  "instrument": INSTRUMENTS,
  "pet": PETS,
  "year": YEARS,
  "game": GAMES,
  "language": LANGUAGES,
}


class Relation(NamedTuple):
  """One relation: its noun, the set its values are of, and its templates."""

  noun: str
  values: str  # a key of VALUE_SETS, or "person"
  statements: tuple[str, ...]  # [0] has the scaffold's order, [-1] is held out
  questions: tuple[str, ...]  # [-1] is held out


RELATIONS = (
  Relation(
    "home",
    "place",
    (
      "The home of @ is # .",
      "@ lives in # .",
      "# is where @ lives .",
      "@ has a house in # .",
    ),
    (
      "Where does @ live ?",
      "In which town does @ live ?",
      "What is the home of @ ?",
    ),
  ),
  Relation(
    "birthplace",
    "place",
    (
      "The birthplace of @ is # .",
      "@ was born in # .",
      "# saw the birth of @ .",
      "@ came to life in # .",
    ),
    (
      "Where was @ born ?",
      "What is the birthplace of @ ?",
      "In which town was @ born ?",
    ),
  ),
  Relation(
    "employer",
    "firm",
    (
      "The employer of @ is # .",
      "@ works for # .",
      "# pays the wages of @ .",
      "@ has a job with # .",
    ),
    (
      "For whom does @ work ?",
      "What is the employer of @ ?",
      "Which firm does @ work for ?",
    ),
  ),
  Relation(
    "trade",
    "trade",
    (
      "The trade of @ is # .",
      "@ earns money as # .",
      "@ was trained as # .",
      "The job of @ is # .",
    ),
    (
      "What is the trade of @ ?",
      "What does @ do for a living ?",
      "Which job does @ have ?",
    ),
  ),
  Relation(
    "dish",
    "dish",
    (
      "The favourite dish of @ is # .",
      "@ likes to eat # .",
      "# is always eaten by @ .",
      "@ would rather have # .",
    ),
    (
      "What does @ like to eat ?",
      "What is the favourite dish of @ ?",
      "Which dish would @ rather have ?",
    ),
  ),
  Relation(
    "instrument",
    "instrument",
    (
      "The instrument of @ is the # .",
      "@ plays the # .",
      "The # is played by @ .",
      "@ has learned the # .",
    ),
    (
      "What does @ play ?",
      "Which instrument does @ play ?",
      "What is the instrument of @ ?",
    ),
  ),
  Relation(
    "pet",
    "pet",
    (
      "The pet of @ is a # .",
      "@ owns a # .",
      "The # belongs to @ .",
      "@ has a # as a pet .",
    ),
    (
      "Which pet does @ own ?",
      "What is the pet of @ ?",
      "Which animal belongs to @ ?",
    ),
  ),
  Relation(
    "birth year",
    "year",
    (
      "The birth year of @ is # .",
      "@ was born in the year # .",
      "In # the parents of @ had a child .",
      "The year of birth of @ is # .",
    ),
    (
      "When was @ born ?",
      "What is the birth year of @ ?",
      "In which year was @ born ?",
    ),
  ),
  Relation(
    "game",
    "game",
    (
      "The favourite game of @ is # .",
      "@ spends evenings on # .",
      "# is the pastime of @ .",
      "@ is very good at # .",
    ),
    (
      "What is the favourite game of @ ?",
      "On what does @ spend evenings ?",
      "What is the pastime of @ ?",
    ),
  ),
  Relation(
    "language",
    "language",
    (
      "The language of @ is # .",
      "@ speaks # .",
      "# is spoken by @ .",
      "@ can write in # .",
    ),
    (
      "Which language does @ speak ?",
      "What is the language of @ ?",
      "In which language can @ write ?",
    ),
  ),
  Relation(
    "friend",
    "person",
    (
      "The friend of @ is # .",
      "@ is a friend of # .",
      "@ likes # .",
      "@ goes about with # .",
    ),
    (
      "Who is the friend of @ ?",
      "Whom does @ like ?",
      "With whom does @ go about ?",
    ),
  ),
  Relation(
    "teacher",
    "person",
    (
      "The teacher of @ is # .",
      "@ was taught by # .",
      "@ went to lessons with # .",
      "@ learned all from # .",
    ),
    (
      "Who is the teacher of @ ?",
      "By whom was @ taught ?",
      "From whom did @ learn all ?",
    ),
  ),
)

# A register's entry: the value stands right after the name, so that copying
# alone can find it. The first thing that a small model learns to look up.
REGISTER = "% : @ # ."

# Tasks other than plain questions; `%` is the relation's noun.
VERIFY = "Is # the % of @ ?"
CHOOSE = "Is the % of @ # or ~ ?"
TWO_HOP = "What is the % of the friend of @ ?"
REVERSED = "Whose % is # ?"
SUM = "What is # plus ~ ?"
DIFFERENCE = "What is # minus ~ ?"

# Prose: A adjective, N noun, V a verb its noun can take, D adverb, T time.
PROSE = (
  "The A N V D .",
  "In the T the A N V .",
  "The N of the A N V D .",
  "After the A T the N V D .",
  "When the N V , the A N V D .",
  "No N V in the T .",
  "Every A N V , but the N V D .",
  "By T the N V near the A N .",
)
ADJECTIVES = tuple(
  """old new cold warm wet dry grey green red white dark bright quiet loud slow
  quick heavy light long short wide narrow empty full calm rough rich poor
  early late distant small""".split()
)
NOUNS = tuple(
  """road river market harbour bridge field forest hill valley lake shore
  island storm rain wind fog snow frost sun moon star cloud merchant traveller
  captain guard crowd wagon ship boat barge caravan cargo grain wool timber
  salt copper cloth price tax toll fair inn tower gate wall mill""".split()
)
VERBS = tuple(
  """rises falls turns moves waits stays leaves arrives grows shrinks opens
  closes stops starts drifts gathers spreads fades returns passes sinks shines
  breaks holds rests changes crosses settles vanishes appears slows
  remains""".split()
)
ADVERBS = tuple(
  """slowly quickly again today tonight soon often seldom quietly suddenly
  together apart rarely gently twice nearby""".split()
)
TIMES = tuple(
  """morning evening night noon spring summer autumn winter dawn dusk week
  month harvest flood drought frosts""".split()
)
ROLES = ("<|user|>", "<|assistant|>", "<|system|>")
OTHER = (
  ". , ? : ; ! - ( ) ' yes no It was Question Answer Complete the following"
  " partial passage Memorize random - string value of key is answer Key"
).split()
