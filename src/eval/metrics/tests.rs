//! Scores against those of the programs whose names the metrics bear; `tests/data/metrics.py` made them.

use super::*;
use serde::Deserialize;

#[derive(Deserialize)]
struct Oracle {
    texts: Vec<Texts>,
    labels: Vec<Labels>,
    /// `word:stem`, separated by spaces.
    stems: String,
}

#[derive(Deserialize)]
struct Texts {
    name: String,
    pairs: Vec<(String, Vec<String>)>,
    bleu: f64,
    rouge: [f64; 3],
    rouge_stemmed: [f64; 3],
    exact: f64,
}

#[derive(Deserialize)]
struct Labels {
    predicted: Vec<String>,
    expected: Vec<String>,
    accuracy: f64,
    f1: f64,
}

fn oracle() -> Oracle {
    serde_json::from_str(include_str!("../../../tests/data/metrics.json")).unwrap()
}

/// Sums of logarithms are rounded differently by other programs; nothing else may differ.
const BOUND: f64 = 1e-9;

#[test]
fn scores_of_texts_equal_sacrebleus_and_rouge_scores() {
    let mut failures = Vec::new();
    for Texts { name, pairs, bleu: expected_bleu, rouge: plain, rouge_stemmed, exact } in oracle().texts {
        let (hypotheses, references): (Vec<String>, Vec<Vec<String>>) = pairs.into_iter().unzip();
        let mut check = |what: &str, actual: f64, expected: f64| {
            let off = (actual - expected).abs();
            if off > BOUND || off.is_nan() {
                failures.push(format!("{name}: {what} {actual} instead of {expected}"));
            }
        };
        check("BLEU", bleu(&hypotheses, &references), expected_bleu);
        check("exact match", exact_match(&hypotheses, &references), exact);
        for (stemmer, expected) in [(false, plain), (true, rouge_stemmed)] {
            let found = rouge(&hypotheses, &references, stemmer);
            for (kind, actual, expected) in
                [("1", found.rouge1, expected[0]), ("2", found.rouge2, expected[1]), ("L", found.rouge_l, expected[2])]
            {
                check(&format!("ROUGE-{kind}, stemmer {stemmer}"), actual, expected);
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn scores_of_labels_equal_scikit_learns() {
    for Labels { predicted, expected, accuracy: right, f1 } in oracle().labels {
        let found = (accuracy(&predicted, &expected), macro_f1(&predicted, &expected));
        let off = (found.0 - right).abs().max((found.1 - f1).abs());
        assert!(off <= BOUND, "{predicted:?} for {expected:?}: {found:?} instead of {:?}", (right, f1));
    }
}

#[test]
fn stems_equal_nltks() {
    let oracle = oracle();
    let pairs = oracle.stems.split(' ').map(|pair| pair.split_once(':').unwrap());
    let wrong: Vec<_> = pairs.filter(|(word, expected)| porter::stem(word) != *expected).collect();
    assert!(wrong.is_empty(), "{} differ: {wrong:?}", wrong.len());
}

#[test]
fn the_loss_of_a_uniform_guess_is_the_log_of_the_choices() {
    assert!((nll(&[5.0; 8], 3) - (8f64).ln()).abs() < 1e-12);
}
