//! Questions about a sentence by rules of grammar, for models that are too small to ask good ones, and beside those that a
//! model asks.
//!
//! A sentence is asked about in several ways, and answered by itself: what its parts are (`When does ..?`), what it says
//! about the things that it names, and how it goes on. The rules know small words and endings of English; of sentences in
//! other languages only beginnings and rare words are asked.

use super::clause::{Clause, Part};
use super::unit::Unit;
use super::words::{self, Kind, Tense, Word};

/// A question about a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    pub question: String,
    /// The words of the sentence that answer it, where it asks for some of them only.
    pub key: Option<String>,
}

impl Ask {
    fn new(question: impl Into<String>, key: Option<&str>) -> Self {
        Self { question: capital(&question.into()), key: key.map(str::to_owned) }
    }
}

/// Most questions about parts of one sentence, and about things that it names.
const TYPED: usize = 5;
const NAMED: usize = 3;

/// Questions about `unit`, the more telling first. `rarity` is higher for words that few sentences have.
pub fn questions(unit: &Unit<'_>, rarity: &dyn Fn(&str) -> f64) -> Vec<Ask> {
    let mut out: Vec<Ask> = Vec::new();
    if unit.note.english {
        out = typed(unit);
        out.truncate(TYPED);
        out.extend(named(unit, rarity));
    }
    out.extend(begun(unit, rarity));
    let mut seen: Vec<String> = Vec::new();
    out.retain(|ask| {
        let folded = ask.question.to_lowercase();
        let new = !seen.contains(&folded) && folded.chars().any(char::is_alphanumeric);
        seen.push(folded);
        new
    });
    out
}

/// Nouns with what stands before them, in their order.
pub fn chunks<'w, 't>(tagged: &'w [Word<'t>]) -> Vec<&'w [Word<'t>]> {
    let (mut out, mut start) = (Vec::new(), 0);
    while start < tagged.len() {
        let first = start + usize::from(tagged[start].kind == Kind::Determiner);
        let mut end = first;
        while let Some(word) = tagged.get(end) {
            // The back room; but not: came back.
            let inside = end > start && end + 1 < tagged.len() && tagged[end + 1].kind == Kind::Other;
            let joins = matches!(word.kind, Kind::Other | Kind::Name | Kind::Number);
            if !joins || words::is_adverb(&word.lower) && !inside {
                break;
            }
            end += 1;
            if word.ends {
                break;
            }
        }
        let telling = tagged[first..end].iter().any(|w| w.kind != Kind::Number && !words::is_time(&w.lower));
        if telling {
            out.push(&tagged[start..end]);
        }
        start = end.max(start + 1);
    }
    out
}

/// Things that the sentence names, as phrases: the rarer first.
pub fn phrases(unit: &Unit<'_>, rarity: &dyn Fn(&str) -> f64) -> Vec<String> {
    let tagged = words::tagged(unit.text);
    let scored = |chunk: &[Word<'_>]| {
        let text = phrase(chunk);
        (words::content_words(&text).iter().map(|word| rarity(word)).fold(0.0, f64::max), text)
    };
    let mut found: Vec<(f64, String)> = chunks(&tagged).into_iter().map(scored).collect();
    found.sort_by(|a, b| b.0.total_cmp(&a.0));
    found.into_iter().map(|(_, text)| text).collect()
}

/// What the sentence says about things that it names.
fn named(unit: &Unit<'_>, rarity: &dyn Fn(&str) -> f64) -> Vec<Ask> {
    let (title, number) = (&unit.note.title, unit.number);
    let found = phrases(unit, rarity);
    let mut out: Vec<Ask> = Vec::new();
    for (i, thing) in found.iter().take(NAMED).enumerate() {
        let question = match (number + i) % 5 {
            0 => format!("What do the notes say about {thing}?"),
            1 => format!("What about {thing}?"),
            2 => format!("Tell me about {thing}."),
            3 => format!("{title}: what about {thing}?"),
            _ => format!("What do you know about {thing}?"),
        };
        out.push(Ask::new(question, None));
    }
    if let [first, second, ..] = &found[..] {
        out.push(Ask::new(format!("What have {first} and {second} to do with each other?"), None));
    }
    out
}

/// How the sentence goes on, and what it says of its rarest word: questions that need no grammar.
fn begun(unit: &Unit<'_>, rarity: &dyn Fn(&str) -> f64) -> Vec<Ask> {
    let half = match unit.text.split_whitespace().count() {
        0..=1 => unit.text.chars().take(unit.text.chars().count().div_ceil(2)).collect(),
        n => unit.text.split_whitespace().take(n.div_ceil(2)).collect::<Vec<_>>().join(" "),
    };
    let title = &unit.note.title;
    let mut out = Vec::new();
    if unit.note.english {
        out.push(Ask::new(format!("Complete the sentence from my notes: {half} ..."), None));
        return out;
    }
    out.push(Ask::new(format!("{title}: {half} ..."), None));
    out.push(Ask::new(format!("{half} ..."), None));
    let mut rare: Vec<String> = words::words_of(unit.text).filter(|word| word.chars().count() > 3).collect();
    rare.sort_by(|a, b| rarity(&words::stem(b)).total_cmp(&rarity(&words::stem(a))));
    out.extend(rare.first().map(|word| Ask::new(format!("{title}: {word}?"), None)));
    if let [a, b, ..] = &rare[..] {
        out.push(Ask::new(format!("{a}, {b}?"), None));
    }
    out
}

/// What the parts of the sentence are: first a question for each part, then longer ones.
fn typed(unit: &Unit<'_>) -> Vec<Ask> {
    let tagged = words::tagged(unit.text);
    let (mut out, mut longer) = (Vec::new(), Vec::new());
    let mut main = &tagged[..];
    let first = tagged.first().map_or("", |word| word.lower.as_str());
    if first == "whoever" {
        // Whoever is late must knock.
        let is_verb = |word: &Word<'_>| {
            let form = words::verb(&word.lower).is_some_and(|(_, tense)| tense != Tense::Present);
            form || matches!(word.kind, Kind::Auxiliary | Kind::Verb)
        };
        let second = (2..tagged.len()).find(|i| is_verb(&tagged[*i])).unwrap_or(tagged.len());
        let (who, key) = (phrase(&tagged[1..second]), phrase(&tagged[second..]));
        if !key.is_empty() {
            out.push(Ask::new(format!("what happens if somebody {who}?"), Some(&key)));
            out.push(Ask::new(format!("what about somebody who {who}?"), Some(&key)));
        }
        return out;
    }
    let condition = matches!(first, "if" | "when" | "while" | "once");
    let comma = tagged.iter().position(|word| word.ends).filter(|at| condition && at + 1 < tagged.len());
    if let Some(comma) = comma {
        main = &tagged[comma + 1..];
    }
    let clause = Clause::of(main);
    if let Some(comma) = comma {
        let (when, key) = (phrase(&tagged[..=comma]), phrase(main));
        let told = clause.as_ref().is_some_and(|clause| !clause.imperative);
        let first = if told { "what does it mean" } else { "what should I do" };
        out.extend([first, "what happens"].map(|wh| Ask::new(format!("{wh} {when}?"), Some(&key))));
    }
    let Some(mut clause) = clause else { return out };
    clause.stands_for = unit.referent();
    let about = unit.label_about();
    let whole = clause.parts.clone();
    if let Some(reason) = &clause.reason {
        let some: Vec<&Part<'_>> = whole.iter().take(2).collect();
        out.push(Ask::new(format!("{}?", clause.inverted("why", &some)), Some(reason)));
    }
    for (i, part) in whole.iter().enumerate() {
        let Some((wh, noun)) = asked_by(part, &clause) else { continue };
        // Without the other parts, and with them: people leave out what they do not know.
        let objects: Vec<&Part<'_>> = whole.iter().take(i).filter(|p| p.preposition.is_none()).collect();
        let wh = noun.map_or(wh.to_owned(), |noun| format!("{wh} {noun}"));
        out.push(Ask::new(format!("{}{about}?", clause.inverted(&wh, &objects)), Some(&part.text())));
        let others: Vec<&Part<'_>> = whole.iter().enumerate().filter(|(j, _)| *j != i).map(|(_, part)| part).collect();
        if others.len() > objects.len() {
            longer.push(Ask::new(format!("{}?", clause.inverted(&wh, &others)), Some(&part.text())));
        }
    }
    if let Some((who, rest)) = clause.subject_question() {
        out.push(Ask::new(format!("{who} {rest}?"), Some(&clause.subject_text())));
    }
    out.extend(longer);
    out
}

/// The word that asks for a part, and what follows it in the question.
fn asked_by(part: &Part<'_>, clause: &Clause<'_>) -> Option<(&'static str, Option<String>)> {
    let inner = part.words;
    let time = inner.iter().any(|word| words::is_time(&word.lower));
    let clock = inner.iter().any(|word| word.text.contains(':'));
    let counted = inner.first().filter(|word| word.kind == Kind::Number && inner.len() > 1);
    let nouns = inner.iter().skip(1).take(2).take_while(|word| matches!(word.kind, Kind::Other | Kind::Name)).count();
    let noun = counted.map(|_| phrase(&inner[1..=nouns])).filter(|noun| !noun.is_empty());
    let money = inner.iter().any(|word| words::is_money(&word.lower));
    let named = inner.iter().any(|word| word.kind == Kind::Name);
    let Some(preposition) = part.preposition else {
        if inner.iter().all(|word| word.kind == Kind::Pronoun || words::is_adverb(&word.lower)) {
            return None;
        }
        return Some(match counted {
            _ if money => ("how much", None),
            Some(_) if noun.is_some() => ("how many", noun),
            Some(_) => ("how many", None),
            None if time => ("when", None),
            None if named && (clause.takes_people() || clause.is_be()) => ("who", None),
            None => ("what", None),
        });
    };
    Some(match preposition {
        "to" if inner[0].kind == Kind::Verb => ("what", None),
        _ if clock => ("at what time", None),
        "for" if time => ("how long", None),
        "for" if counted.is_some() || money => ("for how much", None),
        "until" | "till" => ("until when", None),
        "after" | "before" | "during" | "since" => ("when", None),
        _ if time => ("when", None),
        "in" | "on" | "at" | "behind" | "under" | "near" | "inside" | "outside" | "below" | "above" | "over"
        | "along" | "between" | "into" | "onto" | "beside" | "opposite" | "through" | "against" | "around" | "to"
        | "off" => ("where", None),
        "from" if named => ("from whom or where", None),
        "from" => ("where from", None),
        "with" if named => ("with whom", None),
        "with" => ("with what", None),
        "by" if named => ("by whom", None),
        "by" => ("how", None),
        "for" => ("what for", None),
        "about" => ("about what", None),
        "without" => ("without what", None),
        _ => return None,
    })
}

/// Words as one phrase, in small letters where only the beginning of a sentence made the first a capital.
pub fn phrase(words: &[Word<'_>]) -> String {
    let mut out = String::new();
    for (i, word) in words.iter().enumerate() {
        if i > 0 {
            out.push(' ');
        }
        let small = matches!(
            word.kind,
            Kind::Determiner | Kind::Preposition | Kind::Conjunction | Kind::Auxiliary | Kind::Pronoun | Kind::Verb
        );
        out.push_str(if small && i == 0 && word.lower != "i" { &word.lower } else { word.text });
    }
    out
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}

/// The helping word of a question for a verb in `tense`.
pub fn helper(tense: Tense) -> &'static str {
    match tense {
        Tense::Past => "did",
        Tense::Third => "does",
        Tense::Present => "do",
    }
}

#[cfg(test)]
mod tests {
    use super::super::notes::Note;
    use super::super::unit::units;
    use super::*;

    fn asked(text: &str) -> Vec<(String, Option<String>)> {
        let notes = [Note::new("boats.md".into(), format!("# Boats\n\n{text}\n"))];
        let units = units(&notes);
        questions(units.last().unwrap(), &|_| 1.0).into_iter().map(|ask| (ask.question, ask.key)).collect()
    }

    #[test]
    fn parts_of_sentences_are_asked_for_by_their_kind() {
        for (text, question, key) in [
            ("The ferry leaves from the new pier at 9:15.", "At what time does the ferry leave?", "at 9:15"),
            ("The ferry leaves at 9:15.", "What leaves at 9:15?", "the ferry"),
            ("Tom sold three boats in Oslo.", "How many boats did Tom sell?", "three boats"),
            ("Tom sold three boats in Oslo.", "Where did Tom sell three boats?", "in Oslo"),
            ("Tom sold three boats in Oslo.", "Who sold three boats in Oslo?", "Tom"),
            ("The hull must be painted in May.", "When must the hull be painted?", "in May"),
            ("The pier is closed because the wind is strong.", "Why is the pier closed?", "because the wind is strong"),
            (
                "If the bell rings twice, call the harbour.",
                "What should I do if the bell rings twice?",
                "call the harbour",
            ),
            ("Paint the hull with two brushes.", "What should I paint?", "the hull"),
            ("In the morning we visited the harbour.", "What did we visit?", "the harbour"),
            ("Bought rope at the market.", "What did I buy?", "rope"),
            ("The captain is Ada Berg.", "Who is the captain?", "Ada Berg"),
            ("The pier is called Seven Posts.", "What is the pier called?", "Seven Posts"),
            ("Whoever is late pays for the tea.", "What happens if somebody is late?", "pays for the tea"),
            ("A berth costs 40 francs a day.", "How much does a berth cost?", "40 francs a day"),
            ("My aunt Olga sent a rope. She lives in Bergen.", "Where does my aunt Olga live?", "in Bergen"),
            ("Mira has a small boat. It is called Quiet Walnut.", "What is the small boat called?", "Quiet Walnut"),
            ("The new pier is open. It was built in 1950.", "When was the new pier built?", "in 1950"),
            (
                "The warden keeps the key and the score books.",
                "What does the warden keep?",
                "the key and the score books",
            ),
            ("The tree will bear fruit in its fourth year.", "When will the tree bear fruit?", "in its fourth year"),
            ("The cabin light is switched on in the galley.", "What is switched on in the galley?", "the cabin light"),
            ("The mast. It has torn the sail in May.", "What has torn the sail in May?", "the mast"),
            ("He wants to show me the harbour.", "Who wants to show me the harbour?", "he"),
        ] {
            let got = asked(text);
            let found = got.contains(&(question.to_owned(), Some(key.to_owned())));
            assert!(found, "{text}: `{question}` `{key}` is not in {got:#?}");
        }
    }

    #[test]
    fn a_sentence_of_any_kind_has_a_question() {
        for text in [
            "Milk",
            "\u{732b}\u{304c}\u{5bdd}\u{3066}\u{3044}\u{307e}\u{3059}",
            "7",
            "Yes.",
            "Das Boot liegt im Hafen und leckt.",
        ] {
            let got = asked(text);
            assert!(!got.is_empty() && got.iter().all(|(question, _)| !question.trim().is_empty()), "{text}: {got:?}");
        }
        let many = asked("The ferry leaves from the new pier at 9:15 on Mondays.");
        assert!((6..=12).contains(&many.len()), "{many:#?}");
        let things = asked("The club meets in the back room of the school.");
        assert!(things.iter().any(|(question, _)| question.contains("the back room")), "{things:#?}");
    }
}
