"""Writes metrics.json: cases with the scores that sacrebleu, rouge-score, scikit-learn and NLTK give them.

    pip install sacrebleu==2.6.0 rouge-score==0.1.2 scikit-learn==1.9.1 nltk==3.10.4
    python3 metrics.py > metrics.json
"""
import itertools, json, random, re, string
from importlib.metadata import version

from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU
from sklearn.metrics import accuracy_score, f1_score

# name, [(hypothesis, [references])]
TEXTS = [
    ("equal", [("The cat sat on the mat.", ["The cat sat on the mat."])]),
    ("nothing shared", [("alpha beta gamma delta", ["one two three four five"])]),
    ("empty hypothesis", [("", ["A reference of some length."])]),
    ("empty reference", [("words that nobody asked for", [""])]),
    ("one empty among others", [("", ["a b c d e"]), ("the quick brown fox jumps", ["the quick brown fox jumped"])]),
    ("white space only", [(" \t\n ", ["one two three four"])]),
    ("fewer words than orders", [("yes it is", ["yes it is"])]),
    ("smoothed", [("the dog runs over a hill", ["the dog walks under that hill"])]),
    ("smoothed twice", [("one x three y five", ["one two three four five"])]),
    ("brevity", [("the quick brown fox jumps", ["the quick brown fox jumps over the lazy dog tonight"])]),
    ("too long", [("the quick brown fox jumps over the lazy dog and then some", ["the quick brown fox jumps"])]),
    ("repeated n-grams", [("the the the the the the the", ["the cat is on the mat"]),
                          ("of of of of the the the", ["of the of the of the of"])]),
    ("several references", [
        ("It is a guide to action which ensures that the military always obeys the commands of the party.",
         ["It is a guide to action that ensures that the military will forever heed Party commands.",
          "It is the guiding principle which guarantees the military forces always being under the command of the Party.",
          "It is the practical guide for the army always to heed the directions of the party."]),
        ("he read the book because he was interested in world history",
         ["he was interested in world history because he read the book"])]),
    ("references equally far", [("a b c d e", ["a b c d", "a b c d e f", "a b c"]), ("x y z v w", ["x y", "x y z v w q r s"])]),
    ("numbers", [("It cost $1,234.56, i.e. 3.5% of 35,273.14 - or 1.2e-5.", ["It cost $1,234.57, i.e. 3.5 % of 35,273.14 or 1.2e-5."]),
                 ("pages 10-20 of no. 7, 8,9 and 10.", ["pages 10-20 of No. 7, 8, 9 and 10 ."]),
                 (".5 and 5. and ,5 and 5, and 1-a a-1", [".5 and 5 . and , 5 and 5 , and 1 - a a-1"])]),
    ("punctuation", [('"Well," she said -- (quietly) -- "what\'s {this} [thing]?!"; ok/not~ok @ home|away',
                      ['"Well", she said - quietly - "what is this thing?" ok / not ~ ok @ home | away']),
                     ("a...b,,c.,d!?#$%&*+<=>^_`", ["a ... b , , c . , d ! ? # $ % & * + < = > ^ _ `"])]),
    ("entities and markers", [("Tom &amp; Jerry &lt;skipped> &quot;run&quot; &amp;lt; <skipped>now", ['Tom & Jerry "run" < now']),
                              ("a hyphen-\nated word and\na line break", ["a hyphenated word and a line break"])]),
    ("unicode", [("Le café coûte 3 € — déjà vu… « oui »", ["Le café coûte 3 € — déjà-vu… « oui »"]),
                 ("naïve Straße ÉCOLE İstanbul K\u212aelvin", ["naive Strasse école istanbul kkelvin"]),
                 ("thin\u2009space no\u00a0break ideographic\u3000space unit\x1fseparator nel\x85end",
                  ["thin space no break ideographic space unit separator nel end"])]),
    ("cjk", [("今天天气很好，我们去公园散步吧。", ["今天天气非常好，我们去公园散步。"]), ("猫 が 好き です 。", ["猫 が とても 好き です 。"])]),
    ("emoji and combining marks", [("I 👍🏽 agree e\u0301cole 🇩🇪 yes it does", ["I 👍 agree école 🇩🇪 yes it does"])]),
    ("letters' case", [("The Cat Sat On The Mat Today", ["the cat sat on the mat today"])]),
    ("stems", [("the runners were running happily through their connected conditional relations",
                ["the runner runs happy through connecting conditions and relational connections"]),
               ("generously dying skies succeeded", ["generous die sky succeed"])]),
    ("best reference differs by score", [("b a d c", ["a b c d", "a d e f g", "b a"])]),
    ("articles", [("The answer is: an apple!", ["answer is apple"]), ("a-b the\u2013end", ["ab end"]), ("Theory", ["ory"])]),
]

LABELS = [
    (["a", "b", "a", "c"], ["a", "b", "c", "c"]),
    (["a", "a", "a", "a"], ["a", "b", "c", "a"]),
    (["x", "b", "", "c"], ["a", "b", "c", "c"]),
    (["1", "0", "1", "1", "0", "0"], ["1", "0", "0", "1", "1", "0"]),
    (["b"], ["a"]),
]


def normalized(text):
    """normalize_answer of SQuAD's evaluation (Rajpurkar et al. 2016)."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def scores(pairs):
    hypotheses, references = [h for h, _ in pairs], [r for _, r in pairs]
    streams = list(itertools.zip_longest(*references))
    out = {"bleu": BLEU().corpus_score(hypotheses, streams).score}
    for key, stemmer in (("rouge", False), ("rouge_stemmed", True)):
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=stemmer)
        each = [scorer.score_multi(r, h) for h, r in pairs]
        out[key] = [sum(s[k].fmeasure for s in each) / len(each) for k in ("rouge1", "rouge2", "rougeL")]
    out["exact"] = sum(any(normalized(h) == normalized(r) for r in rs) for h, rs in pairs) / len(pairs)
    return out


def random_texts(rng):
    """Texts of a few words and signs, so that n-grams meet by chance."""
    words = ["the", "cat", "sat", "1,000", "3.14", "re-run", "running", "it's", "U.S.", "no.", "7-up", "“x”", "很好", "a", "&amp;"]
    text = lambda: rng.choice(["", " "]) + "".join(rng.choice(words) + rng.choice([" ", " ", " ", ", ", ". ", "-", "\n"]) for _ in range(rng.randrange(1, 14)))
    return [(text(), [text() for _ in range(rng.randrange(1, 4))]) for _ in range(6)]


def words(rng):
    """Words that meet every rule of the stemmer, and letters at random."""
    stems = "y by syz relat condit vail hesit digit conform radic differ vile analog vietnam predic oper feud decis hope call formal sensit triplic form electric good reviv allow infer airlin gyroscop adjust defens irrit replac depend adopt homolog commun activ angular effect bowdler prob ceas control rol fl d l t tr cr pl enjo fl agr f hopp tann fall hiss fizz fil siz conflat troubl geo theo archaeo phil sk ponies happ".split()
    ends = " s es ies ied ed eed ing y ly ational tional enci ency ancy izer bly ably alli ally ently eli ously ization ation ator alism iveness fulness ousness aliti ality ivity bility fully logi logy icate ative alize icity ical ful ness al ance ence er ic able ible ant ement ment ent ion sion tion ou ism ate iti ous ive ize e ll le".split()
    made = {s + e for s in stems for e in ends if len(s + e) > 3}
    letters = {"".join(rng.choice("aeioubcdlstyz1") for _ in range(rng.randrange(4, 12))) for _ in range(4000)}
    fixed = set("skies dying lying tying news innings inning outings outing cannings canning howe proceed exceed succeed yyyy".split())
    return sorted(rng.sample(sorted(made), 500)) + sorted(rng.sample(sorted(letters), 200)) + sorted(fixed)


rng = random.Random(7)
texts = TEXTS + [(f"random {i}", random_texts(rng)) for i in range(12)]
stemmer = PorterStemmer()
print(json.dumps({
    "made_with": {p: version(p) for p in ("sacrebleu", "rouge-score", "scikit-learn", "nltk")},
    "texts": [{"name": n, "pairs": p, **scores(p)} for n, p in texts],
    "labels": [{"predicted": p, "expected": e, "accuracy": accuracy_score(e, p),
                "f1": f1_score(e, p, average="macro", labels=sorted(set(e)), zero_division=0)} for p, e in LABELS],
    "stems": " ".join(f"{w}:{stemmer.stem(w)}" for w in words(rng)),
}, ensure_ascii=False, indent=None))
