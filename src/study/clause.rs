//! A sentence's subject, verb and the parts behind it, by order and endings of words: what a question needs to turn around.

use super::templates::{helper, phrase};
use super::words::{self, Kind, Tense, Word};

/// A part behind the verb: an object, or a preposition with what it governs.
#[derive(Clone, Debug)]
pub struct Part<'w> {
    pub preposition: Option<&'w str>,
    /// Without the preposition.
    pub words: &'w [Word<'w>],
    with_preposition: &'w [Word<'w>],
}

impl Part<'_> {
    pub fn text(&self) -> String {
        phrase(self.with_preposition)
    }
}

/// The main clause of a sentence.
#[derive(Clone, Debug)]
pub struct Clause<'w> {
    subject: &'w [Word<'w>],
    /// What a pronoun as the subject stands for.
    pub stands_for: Option<String>,
    /// The first of the verbs, where it comes before the subject in a question: is, has, will.
    auxiliary: Option<&'w Word<'w>>,
    /// Of the main verb, the bare form and its tense; nothing where the auxiliary is all.
    verb: Option<(String, Tense)>,
    /// The main verb, or all verbs behind the auxiliary, as they stand.
    verbs: &'w [Word<'w>],
    pub parts: Vec<Part<'w>>,
    /// From `because` on.
    pub reason: Option<String>,
    /// It tells somebody what to do.
    pub imperative: bool,
}

impl<'w> Clause<'w> {
    /// The clause that `all` begin with, if its verb is known.
    pub fn of(all: &'w [Word<'w>]) -> Option<Self> {
        let reason = all
            .iter()
            .position(|w| matches!(w.lower.as_str(), "because" | "so" | "since") && w.kind != Kind::Preposition);
        let (clause, reason) = match reason.filter(|at| *at > 1) {
            Some(at) => (&all[..at], Some(phrase(&all[at..])).filter(|text| text.starts_with("because"))),
            None => (all, None),
        };
        let at = clause.iter().position(|w| matches!(w.kind, Kind::Auxiliary | Kind::Verb))?;
        let (subject, imperative) = if at == 0 {
            // Somebody's own notes leave `I` out; a bare form is what to do.
            let (_, tense) = words::verb(&clause[0].lower).filter(|_| clause[0].kind == Kind::Verb)?;
            (&clause[..0], tense == Tense::Present)
        } else {
            (subject(&clause[..at])?, false)
        };
        let is_verb = |i: usize| clause.get(i).is_some_and(|w| w.kind == Kind::Verb);
        let skip = |mut i: usize| {
            while clause.get(i).is_some_and(|w| words::is_adverb(&w.lower)) {
                i += 1;
            }
            i
        };
        let have = matches!(clause[at].lower.as_str(), "have" | "has" | "had" | "do" | "does" | "did");
        let mut end = at + 1;
        let (auxiliary, verb);
        if clause[at].kind == Kind::Verb {
            (auxiliary, verb) = (None, words::verb(&clause[at].lower));
        } else if have && !is_verb(skip(at + 1)) && !clause.get(skip(at + 1)).is_some_and(|w| participle(&w.lower)) {
            let lower = clause[at].lower.as_str();
            let tense = if lower.ends_with('d') {
                Tense::Past
            } else if lower.ends_with('s') {
                Tense::Third
            } else {
                Tense::Present
            };
            (auxiliary, verb) = (None, Some((if lower.starts_with('h') { "have" } else { "do" }.to_owned(), tense)));
        } else {
            (auxiliary, verb) = (Some(&clause[at]), None);
            end = skip(end);
            // Behind these a verb stands, be it one that is not known: will bear, must be painted.
            let modal = ["will", "would", "can", "could", "shall", "should", "may", "might", "must"];
            let bare = clause.get(end).is_some_and(|w| w.kind == Kind::Other && !w.ends);
            end += usize::from(bare && modal.contains(&clause[at].lower.as_str()));
            // be painted, have been sold
            while clause
                .get(end)
                .is_some_and(|w| w.kind == Kind::Auxiliary || participle(&w.lower) || w.kind == Kind::Verb)
            {
                end += 1;
            }
        }
        // Switched on in the hall: a preposition that governs nothing belongs to the verb.
        let governs = |i: usize| clause.get(i + 1).is_some_and(|w| w.kind != Kind::Preposition) && !clause[i].ends;
        end += usize::from(clause.get(end).is_some_and(|w| w.kind == Kind::Preposition) && !governs(end));
        let verbs = &clause[at + usize::from(auxiliary.is_some())..end];
        let parts = parts(&clause[end..]);
        Some(Self { subject, stands_for: None, auxiliary, verb, verbs, parts, reason, imperative })
    }

    pub fn subject_text(&self) -> String {
        self.stands_for.clone().unwrap_or_else(|| phrase(self.subject))
    }

    /// The subject, if it is no pronoun.
    pub fn own_subject(&self) -> Option<String> {
        let noun = self.subject.first().is_some_and(|word| word.kind != Kind::Pronoun);
        noun.then(|| phrase(self.subject))
    }

    /// Whether it says what somebody or something is.
    pub fn is_be(&self) -> bool {
        let be = self.auxiliary.is_some_and(|w| matches!(w.lower.as_str(), "is" | "are" | "was" | "were"));
        be && self.verbs.is_empty()
    }

    /// Whether the verb is of those whose object is somebody.
    pub fn takes_people(&self) -> bool {
        let people =
            ["meet", "invite", "visit", "marry", "ask", "tell", "help", "hire", "thank", "call", "join", "pay"];
        self.verb.as_ref().is_some_and(|(lemma, _)| people.contains(&lemma.as_str()))
    }

    /// The question that begins with `wh` and has the parts `kept`.
    pub fn inverted(&self, wh: &str, kept: &[&Part<'_>]) -> String {
        let mut words: Vec<String> = vec![wh.to_owned()];
        let subject = if self.subject.is_empty() { "I".to_owned() } else { self.subject_text() };
        let particles = || self.verbs.iter().skip(1).map(|w| w.lower.clone());
        match (&self.verb, self.auxiliary) {
            (Some((lemma, _)), _) if self.imperative => {
                words.extend(["should".into(), subject, lemma.clone()]);
                words.extend(particles());
            }
            (Some((lemma, tense)), _) => {
                words.extend([helper(*tense).to_owned(), subject, lemma.clone()]);
                words.extend(particles());
            }
            (None, auxiliary) => {
                words.extend(auxiliary.map(|w| w.lower.clone()));
                words.push(subject);
                words.extend(self.verbs.iter().map(|w| w.lower.clone()));
            }
        }
        words.extend(kept.iter().map(|part| part.text()));
        words.join(" ")
    }

    /// Who or what does it, and the rest of that question.
    pub fn subject_question(&self) -> Option<(String, String)> {
        let first = self.subject.first()?;
        if matches!(first.lower.as_str(), "i" | "we" | "you" | "there") {
            return None;
        }
        let named = self.subject.iter().any(|w| w.kind == Kind::Name)
            || first.kind == Kind::Other && first.text.starts_with(char::is_uppercase);
        let person = matches!(first.lower.as_str(), "he" | "she" | "who" | "whoever" | "everybody" | "nobody");
        let counted = first.kind == Kind::Number && self.subject.len() > 1;
        let who = match () {
            () if counted => format!("how many {}", phrase(&self.subject[1..])),
            () if named && self.subject.len() <= 3 || person => "who".to_owned(),
            () => "what".to_owned(),
        };
        let shown = self.parts.iter().take(2).map(Part::text);
        let verbs = self.auxiliary.into_iter().chain(self.verbs).map(|w| w.lower.clone());
        let words = verbs.chain(shown);
        let rest = words.collect::<Vec<_>>().join(" ");
        (!rest.is_empty()).then_some((who, rest))
    }
}

/// The nouns that a verb's subject is, of the words before the verb.
fn subject<'w>(before: &'w [Word<'w>]) -> Option<&'w [Word<'w>]> {
    let from = before.iter().rposition(|w| w.ends).map_or(0, |at| at + 1);
    let segment = if from < before.len() { &before[from..] } else { before };
    let mut end = segment.len();
    while end > 0 && words::is_adverb(&segment[end - 1].lower) {
        end -= 1;
    }
    let mut start = end;
    while start > 0 {
        match segment[start - 1].kind {
            Kind::Pronoun | Kind::Determiner => {
                start -= 1;
                break;
            }
            Kind::Other | Kind::Name | Kind::Number => start -= 1,
            _ => break,
        }
    }
    // The key of the hut, the boat behind the pier; but not: on Monday the boat.
    let behind = start > 0 && segment[start - 1].kind == Kind::Preposition;
    if behind && segment[0].kind != Kind::Preposition && start > 1 {
        start = 0;
    }
    let found = &segment[start..end];
    (!found.is_empty()).then_some(found)
}

/// Whether a form is one that stands behind `has` or `is`.
fn participle(word: &str) -> bool {
    word.len() > 4 && (word.ends_with("ed") || word.ends_with("ing"))
        || words::verb(word).is_some_and(|(_, t)| t == Tense::Past)
}

/// Cuts what stands behind a verb, up to the end of its clause, before prepositions.
fn parts<'w>(words: &'w [Word<'w>]) -> Vec<Part<'w>> {
    let mut out = Vec::new();
    let mut start = 0;
    let mut i = 0;
    let mut close = |from: usize, to: usize| {
        let all = &words[from..to];
        let Some(first) = all.first() else { return };
        let led = first.kind == Kind::Preposition;
        let inner = &all[usize::from(led)..];
        if !inner.is_empty() {
            let preposition = led.then_some(first.lower.as_str());
            out.push(Part { preposition, words: inner, with_preposition: all });
        }
    };
    while i < words.len() {
        let word = &words[i];
        // Until the bell rings, before they join: a clause of its own.
        let clause = matches!(words[start].lower.as_str(), "before" | "after" | "until" | "till" | "since");
        let next_is_verb =
            words.get(i + 1).is_some_and(|w| matches!(w.kind, Kind::Verb | Kind::Auxiliary | Kind::Pronoun));
        let other = word.kind == Kind::Conjunction && (!matches!(word.lower.as_str(), "and" | "or") || next_is_verb);
        let to_do = words.get(i + 1).is_some_and(|w| w.kind == Kind::Verb) && word.lower == "to";
        let verb = word.kind == Kind::Verb && i > start && !clause && words[start].lower != "to";
        if other || to_do && i > start || verb {
            break;
        }
        if word.kind == Kind::Preposition && word.lower != "of" && i > start {
            close(start, i);
            start = i;
        }
        i += 1;
        if word.ends {
            break;
        }
    }
    close(start, i);
    out
}
