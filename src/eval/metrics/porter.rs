//! The stemmer that rouge-score uses: Porter 1980 ("An algorithm for suffix stripping") with the changes that NLTK made to
//! it (`PorterStemmer`, mode `NLTK_EXTENSIONS`). Crates implement the original or Porter's later English stemmer, whose
//! stems differ.

/// The stem of a word in the letters a to z and digits.
pub(super) fn stem(word: &str) -> String {
    if let Some((_, stem)) = IRREGULAR.iter().find(|(form, _)| *form == word) {
        return (*stem).to_owned();
    }
    if word.len() <= 2 {
        return word.to_owned();
    }
    let mut word = plural(word);
    word = past_and_progressive(&word);
    word = final_y(&word);
    word = double_suffixes(&word);
    word = apply(&word, &STEP_3, 0);
    word = single_suffixes(&word);
    word = final_e(&word);
    if word.ends_with("ll") && measure(&word[..word.len() - 1]) > 1 {
        word.pop();
    }
    word
}

/// NLTK's table of forms that the rules get wrong.
const IRREGULAR: [(&str, &str); 16] = [
    ("sky", "sky"),
    ("skies", "sky"),
    ("dying", "die"),
    ("lying", "lie"),
    ("tying", "tie"),
    ("news", "news"),
    ("innings", "inning"),
    ("inning", "inning"),
    ("outings", "outing"),
    ("outing", "outing"),
    ("cannings", "canning"),
    ("canning", "canning"),
    ("howe", "howe"),
    ("proceed", "proceed"),
    ("exceed", "exceed"),
    ("succeed", "succeed"),
];

/// Suffix and replacement; the first suffix that a word has decides.
type Rules = [(&'static str, &'static str)];

/// Step 2. `bli` and the last two are not Porter's original.
const STEP_2: [(&str, &str); 21] = [
    ("ational", "ate"),
    ("tional", "tion"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("izer", "ize"),
    ("bli", "ble"),
    ("alli", "al"),
    ("entli", "ent"),
    ("eli", "e"),
    ("ousli", "ous"),
    ("ization", "ize"),
    ("ation", "ate"),
    ("ator", "ate"),
    ("alism", "al"),
    ("iveness", "ive"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("aliti", "al"),
    ("iviti", "ive"),
    ("biliti", "ble"),
    ("fulli", "ful"),
];

const STEP_3: [(&str, &str); 7] =
    [("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", "")];

/// Step 4: suffixes that go.
const STEP_4: [&str; 19] = [
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism", "ate", "iti",
    "ous", "ive", "ize",
];

/// Applies the first rule whose suffix fits, if the rest has a measure above `least`.
fn apply(word: &str, rules: &Rules, least: usize) -> String {
    for (suffix, replacement) in rules {
        if let Some(rest) = word.strip_suffix(suffix) {
            return if measure(rest) > least { format!("{rest}{replacement}") } else { word.to_owned() };
        }
    }
    word.to_owned()
}

/// Step 1a. A word of four letters keeps its e: `dies` and `die` are one, `flies` and `fly` are.
fn plural(word: &str) -> String {
    let cut = |n: usize| word[..word.len() - n].to_owned();
    match word {
        w if w.ends_with("ies") => cut(if w.len() == 4 { 1 } else { 2 }),
        w if w.ends_with("sses") => cut(2),
        w if w.ends_with('s') && !w.ends_with("ss") => cut(1),
        _ => word.to_owned(),
    }
}

/// Step 1b.
fn past_and_progressive(word: &str) -> String {
    if let Some(rest) = word.strip_suffix("ied") {
        return format!("{rest}{}", if word.len() == 4 { "ie" } else { "i" });
    }
    if let Some(rest) = word.strip_suffix("eed") {
        return if measure(rest) > 0 { format!("{rest}ee") } else { word.to_owned() };
    }
    let rest = ["ed", "ing"].iter().find_map(|s| word.strip_suffix(s).filter(|rest| has_vowel(rest)));
    let Some(rest) = rest else { return word.to_owned() };
    if ["at", "bl", "iz"].iter().any(|s| rest.ends_with(s)) {
        return format!("{rest}e");
    }
    if ends_in_double_consonant(rest) {
        let shorter = &rest[..rest.len() - 1];
        return if rest.ends_with(['l', 's', 'z']) { rest } else { shorter }.to_owned();
    }
    if measure(rest) == 1 && ends_in_short_syllable(rest) { format!("{rest}e") } else { rest.to_owned() }
}

/// Step 1c, where y becomes i only after a consonant that is not the first letter.
fn final_y(word: &str) -> String {
    match word.strip_suffix('y') {
        Some(rest) if rest.len() > 1 && consonants(rest).last() == Some(&true) => format!("{rest}i"),
        _ => word.to_owned(),
    }
}

/// Step 2. `alli` goes first and what is left is looked at again.
fn double_suffixes(word: &str) -> String {
    if let Some(rest) = word.strip_suffix("alli")
        && measure(rest) > 0
    {
        return double_suffixes(&format!("{rest}al"));
    }
    // The l of `logi` counts as the stem's, so that short stems such as `geo` work too.
    if word.ends_with("logi") {
        let stem = &word[..word.len() - 1];
        return if measure(&word[..word.len() - 3]) > 0 { stem } else { word }.to_owned();
    }
    apply(word, &STEP_2, 0)
}

/// Step 4.
fn single_suffixes(word: &str) -> String {
    for suffix in STEP_4 {
        if let Some(rest) = word.strip_suffix(suffix) {
            let goes = measure(rest) > 1 && (suffix != "ion" || rest.ends_with(['s', 't']));
            return if goes { rest } else { word }.to_owned();
        }
    }
    word.to_owned()
}

/// Step 5a.
fn final_e(word: &str) -> String {
    match word.strip_suffix('e') {
        Some(rest) if measure(rest) > 1 || measure(rest) == 1 && !ends_in_short_syllable(rest) => rest.to_owned(),
        _ => word.to_owned(),
    }
}

/// Which letters are consonants: all but a, e, i, o, u, and y after a consonant.
fn consonants(word: &str) -> Vec<bool> {
    let mut flags: Vec<bool> = Vec::with_capacity(word.len());
    for letter in word.bytes() {
        let flag = match letter {
            b'a' | b'e' | b'i' | b'o' | b'u' => false,
            b'y' => flags.last() != Some(&true),
            _ => true,
        };
        flags.push(flag);
    }
    flags
}

/// How often a consonant follows a vowel: Porter's m.
fn measure(word: &str) -> usize {
    consonants(word).windows(2).filter(|pair| !pair[0] && pair[1]).count()
}

fn has_vowel(word: &str) -> bool {
    consonants(word).contains(&false)
}

fn ends_in_double_consonant(word: &str) -> bool {
    let letters = word.as_bytes();
    letters.len() >= 2
        && letters[letters.len() - 1] == letters[letters.len() - 2]
        && consonants(word).ends_with(&[true])
}

/// Consonant, vowel, consonant other than w, x and y; or a word of vowel and consonant.
fn ends_in_short_syllable(word: &str) -> bool {
    let flags = consonants(word);
    flags == [false, true] || flags.ends_with(&[true, false, true]) && !word.ends_with(['w', 'x', 'y'])
}
