//! Corpus BLEU (Papineni et al. 2002) as sacrebleu computes it by default: tokenizer 13a, letters as they are, up to four
//! words, exponential smoothing (Chen and Cherry 2014, method 3). Scores run from 0 to 100.

use std::collections::HashMap;

/// Longest run of words that is compared.
const ORDERS: usize = 4;

/// Counts over all texts, of which the score is a function.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    /// Words of the hypotheses.
    length: usize,
    /// Words of the references, for each text of the one closest in length.
    reference: usize,
    /// Runs of 1, 2, .. words that a reference has too.
    matched: [usize; ORDERS],
    /// Runs of 1, 2, .. words.
    total: [usize; ORDERS],
}

/// BLEU of `hypotheses` against one or more `references` for each.
///
/// # Panics
/// The two differ in length.
#[must_use]
pub fn bleu<H: AsRef<str>, R: AsRef<str>>(hypotheses: &[H], references: &[Vec<R>]) -> f64 {
    assert_eq!(hypotheses.len(), references.len());
    let mut counts = Counts::default();
    for (hypothesis, references) in hypotheses.iter().zip(references) {
        let references: Vec<Vec<String>> = references.iter().map(|r| tokenize(r.as_ref())).collect();
        count(&tokenize(hypothesis.as_ref()), &references, &mut counts);
    }
    score(&counts)
}

fn count(hypothesis: &[String], references: &[Vec<String>], counts: &mut Counts) {
    counts.length += hypothesis.len();
    // Of two references equally far away the shorter counts.
    let closest = references.iter().map(Vec::len).min_by_key(|&len| (hypothesis.len().abs_diff(len), len));
    counts.reference += closest.unwrap_or(0);
    for order in 1..=ORDERS {
        let mut best: HashMap<&[String], usize> = HashMap::new();
        for reference in references {
            for (words, n) in ngrams(reference, order) {
                let most = best.entry(words).or_default();
                *most = n.max(*most);
            }
        }
        for (words, n) in ngrams(hypothesis, order) {
            counts.total[order - 1] += n;
            counts.matched[order - 1] += n.min(best.get(words).copied().unwrap_or(0));
        }
    }
}

/// How often each run of `order` words occurs.
pub(super) fn ngrams(words: &[String], order: usize) -> HashMap<&[String], usize> {
    let mut found = HashMap::new();
    for run in words.windows(order) {
        *found.entry(run).or_default() += 1;
    }
    found
}

fn score(counts: &Counts) -> f64 {
    if counts.matched == [0; ORDERS] || counts.total.contains(&0) {
        return 0.0;
    }
    let (length, reference) = (counts.length as f64, counts.reference as f64);
    let brevity = if length < reference { (1.0 - reference / length).exp() } else { 1.0 };
    let (mut smooth, mut logs) = (1.0, 0.0);
    for (&matched, &total) in counts.matched.iter().zip(&counts.total) {
        let matched = if matched == 0 {
            smooth /= 2.0;
            smooth
        } else {
            matched as f64
        };
        logs += (100.0 * matched / total as f64).ln();
    }
    brevity * (logs / ORDERS as f64).exp()
}

/// Words as mteval-v13a splits them, which is what sacrebleu's `13a` does.
fn tokenize(text: &str) -> Vec<String> {
    let mut text = text.trim_end_matches(is_space).replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    for (entity, plain) in [("&quot;", "\""), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")] {
        text = text.replace(entity, plain);
    }
    let text: Vec<char> = format!(" {text} ").chars().collect();
    let digit = |c: char| c.is_ascii_digit();
    let stop = |c: char| matches!(c, '.' | ',');

    let mut apart = Vec::with_capacity(text.len() * 2);
    for c in text {
        if matches!(c, '{'..='~' | '['..='`' | ' '..='&' | '('..='+' | ':'..='@' | '/') {
            apart.extend([' ', c, ' ']);
        } else {
            apart.push(c);
        }
    }
    // Full stops and commas stand alone unless they are inside a number, and so does a dash after a digit.
    let text = between(&apart, |c| !digit(c), stop, |a, b| [a, ' ', b, ' ']);
    let text = between(&text, stop, |c| !digit(c), |a, b| [' ', a, ' ', b]);
    let text = between(&text, digit, |c| c == '-', |a, b| [a, ' ', b, ' ']);
    text.split(|&c| is_space(c)).filter(|w| !w.is_empty()).map(|w| w.iter().collect()).collect()
}

/// Replaces each pair of neighbours that `first` and `second` accept, from the left and without overlap, as a regular
/// expression of the two would.
fn between(
    text: &[char],
    first: impl Fn(char) -> bool,
    second: impl Fn(char) -> bool,
    replacement: impl Fn(char, char) -> [char; 4],
) -> Vec<char> {
    let (mut out, mut i) = (Vec::with_capacity(text.len()), 0);
    while i < text.len() {
        match text.get(i + 1) {
            Some(&next) if first(text[i]) && second(next) => {
                out.extend(replacement(text[i], next));
                i += 2;
            }
            _ => {
                out.push(text[i]);
                i += 1;
            }
        }
    }
    out
}

/// What Python's `str.split` splits at: white space, and four separators of the ASCII control characters.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}
