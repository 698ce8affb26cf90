//! ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) as the package rouge-score computes them, from 0 to 1.

use super::bleu::ngrams;
use super::porter::stem;

/// F-measures of one text, or their means over several.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rouge {
    /// Shared words.
    pub rouge1: f64,
    /// Shared pairs of words.
    pub rouge2: f64,
    /// Longest common subsequence of words.
    pub rouge_l: f64,
}

/// ROUGE of each hypothesis against its references, of which the best counts for each score, and the mean over all;
/// zeros without any. `use_stemmer` compares stems of words (Porter, as NLTK has it).
///
/// # Panics
/// The two differ in length.
#[must_use]
pub fn rouge<H: AsRef<str>, R: AsRef<str>>(hypotheses: &[H], references: &[Vec<R>], use_stemmer: bool) -> Rouge {
    assert_eq!(hypotheses.len(), references.len());
    let mut sum = Rouge::default();
    for (hypothesis, references) in hypotheses.iter().zip(references) {
        let hypothesis = tokenize(hypothesis.as_ref(), use_stemmer);
        let mut best = Rouge::default();
        for reference in references {
            let one = score(&hypothesis, &tokenize(reference.as_ref(), use_stemmer));
            best = best.with(&one, f64::max);
        }
        sum = sum.with(&best, |a, b| a + b);
    }
    let texts = hypotheses.len().max(1) as f64;
    Rouge { rouge1: sum.rouge1 / texts, rouge2: sum.rouge2 / texts, rouge_l: sum.rouge_l / texts }
}

impl Rouge {
    fn with(&self, other: &Self, join: fn(f64, f64) -> f64) -> Self {
        Self {
            rouge1: join(self.rouge1, other.rouge1),
            rouge2: join(self.rouge2, other.rouge2),
            rouge_l: join(self.rouge_l, other.rouge_l),
        }
    }
}

fn score(hypothesis: &[String], reference: &[String]) -> Rouge {
    let shared = |order| {
        let (ours, theirs) = (ngrams(hypothesis, order), ngrams(reference, order));
        let matched: usize = ours.iter().map(|(run, n)| *n.min(theirs.get(run).unwrap_or(&0))).sum();
        let runs = |words: &[String]| (words.len() + 1).saturating_sub(order);
        f_measure(matched, runs(hypothesis), runs(reference))
    };
    let common = longest_common_subsequence(hypothesis, reference);
    Rouge { rouge1: shared(1), rouge2: shared(2), rouge_l: f_measure(common, hypothesis.len(), reference.len()) }
}

/// Harmonic mean of `matched / ours` and `matched / theirs`.
fn f_measure(matched: usize, ours: usize, theirs: usize) -> f64 {
    if matched == 0 {
        return 0.0;
    }
    let (precision, recall) = (matched as f64 / ours as f64, matched as f64 / theirs as f64);
    2.0 * precision * recall / (precision + recall)
}

fn longest_common_subsequence(a: &[String], b: &[String]) -> usize {
    // One row of the usual table, overwritten from row to row.
    let mut row = vec![0; b.len() + 1];
    for word in a {
        let mut diagonal = 0;
        for (j, other) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if word == other { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

/// Runs of the letters a to z and digits, in lower case. Other letters separate words, in every language.
fn tokenize(text: &str, use_stemmer: bool) -> Vec<String> {
    let text = text.to_lowercase();
    let words = text.split(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit()).filter(|w| !w.is_empty());
    words.map(|w| if use_stemmer && w.len() > 3 { stem(w) } else { w.to_owned() }).collect()
}
