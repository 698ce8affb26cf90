//! Scores of answers that are right or wrong: accuracy, macro-F1 and exact match, from 0 to 1.

use super::bleu::is_space;
use std::collections::BTreeSet;

/// Share of `predicted` that equal `expected`; NaN without any.
///
/// # Panics
/// The two differ in length.
#[must_use]
pub fn accuracy<L: PartialEq>(predicted: &[L], expected: &[L]) -> f64 {
    assert_eq!(predicted.len(), expected.len());
    let right = predicted.iter().zip(expected).filter(|(p, e)| p == e).count();
    right as f64 / expected.len() as f64
}

/// Mean of the F1 scores of all labels in `expected`, each label counting the same however rare it is; NaN without any.
/// A prediction that is none of these labels is wrong and no label of its own (scikit-learn's `f1_score` with
/// `average="macro"` and `labels` as they are in `expected`).
///
/// # Panics
/// The two differ in length.
#[must_use]
pub fn macro_f1<L: Ord>(predicted: &[L], expected: &[L]) -> f64 {
    assert_eq!(predicted.len(), expected.len());
    let labels: BTreeSet<&L> = expected.iter().collect();
    let f1 = |label: &&L| {
        let hits = predicted.iter().zip(expected).filter(|(p, e)| p == label && e == label).count();
        let named = predicted.iter().filter(|p| p == label).count() + expected.iter().filter(|e| e == label).count();
        // 2 TP / (2 TP + FP + FN); a label in `expected` makes the denominator positive.
        2.0 * hits as f64 / named as f64
    };
    labels.iter().map(f1).sum::<f64>() / labels.len() as f64
}

/// Share of `hypotheses` that equal one of their `references` after [`normalized`]; NaN without any.
///
/// # Panics
/// The two differ in length.
#[must_use]
pub fn exact_match<H: AsRef<str>, R: AsRef<str>>(hypotheses: &[H], references: &[Vec<R>]) -> f64 {
    assert_eq!(hypotheses.len(), references.len());
    let equal = |(hypothesis, references): &(&H, &Vec<R>)| {
        let hypothesis = normalized(hypothesis.as_ref());
        references.iter().any(|r| normalized(r.as_ref()) == hypothesis)
    };
    hypotheses.iter().zip(references).filter(equal).count() as f64 / hypotheses.len() as f64
}

/// Share of `answers` that hold one of their `expected` texts, whatever its case; NaN without any.
///
/// # Panics
/// The two differ in length.
#[must_use]
pub fn holding<H: AsRef<str>, R: AsRef<str>>(answers: &[H], expected: &[Vec<R>]) -> f64 {
    assert_eq!(answers.len(), expected.len());
    let holds = |(answer, expected): &(&H, &Vec<R>)| {
        let answer = answer.as_ref().to_lowercase();
        expected.iter().any(|text| answer.contains(&text.as_ref().to_lowercase()))
    };
    answers.iter().zip(expected).filter(holds).count() as f64 / answers.len() as f64
}

/// An answer as SQuAD's evaluation compares it: lower case, without ASCII punctuation, without the words `a`, `an` and
/// `the`, single spaces.
#[must_use]
pub fn normalized(text: &str) -> String {
    let text: String = text.to_lowercase().chars().filter(|c| !c.is_ascii_punctuation()).collect();
    let mut kept = String::with_capacity(text.len());
    // Each piece is a word with the character that ends it.
    for piece in text.split_inclusive(|c: char| !c.is_alphanumeric()) {
        let word = piece.trim_end_matches(|c: char| !c.is_alphanumeric());
        kept.push_str(if matches!(word, "a" | "an" | "the") { &piece[word.len()..] } else { piece });
    }
    kept.split(is_space).filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ")
}
