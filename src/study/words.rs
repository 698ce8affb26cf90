//! What kinds of words there are in English, as far as the small words and the endings of others tell. Nothing here knows a
//! subject: a language's few hundred commonest words and its rules.

/// What a word is in its sentence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Determiner,
    Pronoun,
    Preposition,
    Conjunction,
    Auxiliary,
    Verb,
    Number,
    Name,
    Other,
}

/// A word of a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Word<'t> {
    /// Without the marks around it.
    pub text: &'t str,
    /// In small letters.
    pub lower: String,
    /// A mark stands behind it that ends a part of the sentence.
    pub ends: bool,
    /// What it is.
    pub kind: Kind,
}

const DETERMINERS: &str =
    " a an the this that these those my your his her its our their each every some any no all both another ";
const PRONOUNS: &str = " i you he she it we they me him us them who which whoever nobody somebody everyone everybody someone \
                        anyone one something nothing everything there himself herself itself themselves ";
const PREPOSITIONS: &str = " of in on at by for with from to into onto over under behind before after during until till since \
                            between through across along around near against without within above below per about beside \
                            besides beyond toward towards inside outside off next opposite ";
const CONJUNCTIONS: &str =
    " and or but so because if when while although though than as nor that whether where unless ";
const AUXILIARIES: &str = " am is are was were be been has have had do does did can could will would shall should may might \
                           must ";
const ADVERBS: &str = " not never always often also only now then again still just already soon here there very too usually \
                       sometimes yesterday today tomorrow later once twice back up out down away first ";
const NUMBERS: &str = " one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen \
                       seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand \
                       million half dozen ";
/// Words that say how much something costs.
const MONEY: &str =
    " euro euros dollar dollars franc francs pound pounds cent cents crown crowns yen rupee rupees peso pesos ";
/// Words that tell when.
const TIMES: &str = " monday tuesday wednesday thursday friday saturday sunday mondays tuesdays wednesdays thursdays fridays \
                     saturdays sundays january february march april may june july august september october november december \
                     morning mornings afternoon evening evenings night noon midnight day days week weeks weekend month months \
                     year years season spring summer autumn winter hour hours minute minutes second seconds century breakfast \
                     lunch dinner supper o'clock am pm today tomorrow yesterday easter christmas ";
/// Irregular verbs: the bare form, the past, and the participle where it differs.
const IRREGULAR: &str = "be was been;go went gone;have had;do did done;say said;make made;get got gotten;take took taken;come came;\
see saw seen;know knew known;give gave given;find found;tell told;become became;leave left;feel felt;put put;bring brought;\
begin began begun;keep kept;hold held;write wrote written;stand stood;hear heard;let let;mean meant;set set;meet met;run ran;\
pay paid;sit sat;speak spoke spoken;lie lay lain;lead led;read read;grow grew grown;lose lost;fall fell fallen;send sent;\
build built;understand understood;draw drew drawn;break broke broken;spend spent;cut cut;rise rose risen;drive drove driven;\
buy bought;wear wore worn;choose chose chosen;sell sold;eat ate eaten;sleep slept;win won;fly flew flown;teach taught;\
catch caught;throw threw thrown;swim swam swum;sing sang sung;drink drank drunk;ride rode ridden;steal stole stolen;\
hide hid hidden;hang hung;lend lent;dig dug;feed fed;bend bent;shut shut;cost cost;hit hit;hurt hurt;forget forgot forgotten;\
freeze froze frozen;shake shook shaken;wake woke woken;bite bit bitten;blow blew blown;tear tore torn;sweep swept;\
stick stuck;light lit;show showed shown;shine shone;seek sought;think thought;fight fought;deal dealt;\
burn burnt;learn learnt;sink sank sunk;spread spread;ring rang rung;swing swung;quit quit;bind bound";
/// Regular verbs, in the bare form.
const REGULAR: &str = " accept add agree allow answer appear arrange arrive ask attach bake beat belong boil book borrow brush call \
care carry change charge check clean clear climb close collect complete connect consist contain continue cook cool count cover \
cross dance date decide deliver depart depend die discover drop dry empty end enter exchange expect explain fail fill finish fit \
fix fold follow gather guard hand happen harvest hate heat help hire hope include install invite join jump kill \
laugh land last lay like listen live lock look love mark marry measure melt mend miss mix move name need notice offer open order \
own pack paint park pass peel pick place plan plant play post pour press prepare promise protect pull push rain \
reach receive recommend recover remain remember remove rent repair replace report require rest return roll save seem serve share \
sign sleep smell smoke snow sound start stay step stir stop store study suggest support switch talk taste thank touch \
train travel trim try turn use visit wait walk want warm warn wash watch water weigh wish work worry hum ";

fn among(list: &str, word: &str) -> bool {
    !word.is_empty() && list.contains(&format!(" {word} "))
}

pub fn is_adverb(word: &str) -> bool {
    among(ADVERBS, word) || word.len() > 4 && word.ends_with("ly")
}

/// Whether a word has to do with time, as a clock's time and a year do.
pub fn is_time(word: &str) -> bool {
    let clock = word.split_once(':').is_some_and(|(h, m)| is_digits(h) && m.len() >= 2 && is_digits(&m[..2]));
    let year = word.len() == 4 && is_digits(word) && (word.starts_with("19") || word.starts_with("20"));
    among(TIMES, word) || clock || year
}

/// Whether a word is of money.
pub fn is_money(word: &str) -> bool {
    among(MONEY, word) || word.contains(['\u{20ac}', '$', '\u{a3}'])
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

pub fn is_number(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_digit()) || among(NUMBERS, word)
}

/// Words that carry no subject of their own.
pub fn is_small(word: &str) -> bool {
    [DETERMINERS, PRONOUNS, PREPOSITIONS, CONJUNCTIONS, AUXILIARIES, ADVERBS].iter().any(|list| among(list, word))
        || matches!(word, "what" | "how" | "why" | "did" | "s" | "not" | "it's" | "i'm")
}

/// Words of a text in small letters, without marks around them.
pub fn words_of(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| c.is_whitespace() || matches!(c, '-' | '/' | '\u{2014}'))
        .map(|word| word.trim_matches(|c: char| !c.is_alphanumeric()).to_lowercase())
        .filter(|word| !word.is_empty())
}

/// Words of a text that carry its subject, each once and without the commonest endings.
pub fn content_words(text: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for word in words_of(text).filter(|word| !is_small(word)) {
        let stem = stem(&word);
        if !found.contains(&stem) {
            found.push(stem);
        }
    }
    found
}

/// A word as its other forms have it, too.
pub fn stem(word: &str) -> String {
    if let Some(lemma) = irregular(word) {
        return lemma.to_owned();
    }
    let word = word.trim_end_matches("'s");
    let cut = ["ing", "ied", "ies", "ed", "es", "s", "e", "y"]
        .iter()
        .find_map(|end| word.strip_suffix(end).filter(|rest| rest.chars().count() >= 3));
    cut.unwrap_or(word).to_owned()
}

/// Whether the small words of a text are English ones.
pub fn is_english(text: &str) -> bool {
    let (mut all, mut small) = (0, 0);
    for word in words_of(text) {
        all += 1;
        small += usize::from(is_small(&word) || is_number(&word));
    }
    // Texts in English have 35 to 50 in a hundred, lists fewer; other languages share some of these words, such as `in`.
    let letters = text.chars().filter(|c| c.is_alphabetic());
    let (ascii, letters) = letters.fold((0, 0), |(ascii, all), c| (ascii + usize::from(c.is_ascii()), all + 1));
    all > 0 && 6 * small >= all && 20 * ascii >= 19 * letters || all < 4 && ascii == letters
}

/// The bare form of a form of an irregular verb.
fn irregular(word: &str) -> Option<&'static str> {
    IRREGULAR.split(';').find_map(|line| {
        let mut forms = line.split(' ');
        let lemma = forms.next()?;
        forms.any(|form| form == word).then_some(lemma)
    })
}

fn is_lemma(word: &str) -> bool {
    among(REGULAR, word) || IRREGULAR.split(';').any(|line| line.split(' ').next() == Some(word))
}

/// When something is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tense {
    /// The bare form: we, you, they.
    Present,
    /// He, she, it.
    Third,
    Past,
}

/// The bare form of a verb, and the tense that its form tells; known verbs only.
pub fn verb(word: &str) -> Option<(String, Tense)> {
    if let Some(lemma) = irregular(word) {
        return Some((lemma.to_owned(), Tense::Past));
    }
    if is_lemma(word) {
        return Some((word.to_owned(), Tense::Present));
    }
    let known = |rest: &str, ends: &[&str]| ends.iter().map(|end| format!("{rest}{end}")).find(|word| is_lemma(word));
    for (end, tails, tense) in [
        ("ied", &["y"][..], Tense::Past),
        ("ed", &["", "e"], Tense::Past),
        ("ies", &["y"], Tense::Third),
        ("es", &["", "e"], Tense::Third),
        ("s", &[""], Tense::Third),
    ] {
        if let Some(rest) = word.strip_suffix(end) {
            let doubled = rest.len() > 2 && rest.as_bytes()[rest.len() - 1] == rest.as_bytes()[rest.len() - 2];
            let single = if doubled && tense == Tense::Past { rest.get(..rest.len() - 1) } else { None };
            if let Some(lemma) = known(rest, tails).or_else(|| single.and_then(|rest| known(rest, &[""]))) {
                return Some((lemma, tense));
            }
        }
    }
    None
}

/// Whether a text has a verb in a form that may be a sentence's.
pub fn has_verb(text: &str) -> bool {
    tagged(text).iter().any(|word| matches!(word.kind, Kind::Auxiliary | Kind::Verb))
}

/// The words of a sentence with what they are.
pub fn tagged(sentence: &str) -> Vec<Word<'_>> {
    let mut out: Vec<Word<'_>> = Vec::new();
    // A clause has one verb; what looks like another one behind it is a noun.
    let mut has_verb = false;
    for raw in sentence.split_whitespace() {
        let text =
            raw.trim_matches(|c: char| !c.is_alphanumeric() && c != '\'' && c != '\u{20ac}' && c != '$' && c != '%');
        if text.is_empty() {
            if let Some(last) = out.last_mut() {
                last.ends = true;
            }
            continue;
        }
        let lower = text.to_lowercase();
        let ends = raw.ends_with([',', ';', ':', '.', '!', '?', ')', '\u{2014}']);
        let kind = kind(text, &lower, out.last(), has_verb);
        has_verb |= matches!(kind, Kind::Verb | Kind::Auxiliary);
        has_verb &= !ends && (kind != Kind::Conjunction || matches!(lower.as_str(), "and" | "or"));
        // The lights are on: what stands before another verb is a noun.
        if let Some(last) =
            out.last_mut().filter(|last| last.kind == Kind::Verb && kind == Kind::Auxiliary && !last.ends)
        {
            last.kind = Kind::Other;
        }
        out.push(Word { text, lower, ends, kind });
    }
    out
}

fn kind(text: &str, lower: &str, before: Option<&Word<'_>>, has_verb: bool) -> Kind {
    let capital = text.starts_with(char::is_uppercase);
    let inside = before.is_some();
    if among(DETERMINERS, lower) {
        return Kind::Determiner;
    }
    let counted = is_number(lower) && !(capital && inside);
    if counted && (lower != "one" || before.is_none_or(|b| b.kind != Kind::Determiner)) {
        return Kind::Number;
    }
    if among(PRONOUNS, lower) {
        return Kind::Pronoun;
    }
    if among(AUXILIARIES, lower) && !(capital && inside) {
        return Kind::Auxiliary;
    }
    if among(PREPOSITIONS, lower) {
        return Kind::Preposition;
    }
    if among(CONJUNCTIONS, lower) {
        return Kind::Conjunction;
    }
    if capital && inside {
        return Kind::Name;
    }
    let after = |kinds: &[Kind]| before.is_some_and(|b| kinds.contains(&b.kind) && !b.ends);
    if before.is_some_and(|b| b.lower == "to") && is_lemma(lower) {
        return Kind::Verb;
    }
    // Behind an article, a preposition or a number, a word that could be a verb is a noun: the walk, in use, two plants.
    let noun = after(&[Kind::Determiner, Kind::Preposition, Kind::Number])
        || has_verb && after(&[Kind::Other, Kind::Name])
        || is_adverb(lower);
    // A bare form goes with `we` and with plurals: members pay; but not: a burn mark.
    let singular = after(&[Kind::Other]) && before.is_some_and(|b| !b.lower.ends_with('s'));
    let known = verb(lower).is_some_and(|(_, tense)| tense != Tense::Present || !singular);
    if !noun && known { Kind::Verb } else { Kind::Other }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verbs_have_their_bare_forms() {
        for (form, lemma, tense) in [
            ("carries", "carry", Tense::Third),
            ("stopped", "stop", Tense::Past),
            ("baked", "bake", Tense::Past),
            ("watches", "watch", Tense::Third),
            ("sold", "sell", Tense::Past),
            ("pay", "pay", Tense::Present),
            ("closes", "close", Tense::Third),
        ] {
            assert_eq!(verb(form), Some((lemma.to_owned(), tense)), "{form}");
        }
        assert_eq!(verb("table"), None);
    }

    #[test]
    fn english_is_told_from_other_languages() {
        assert!(is_english("The boat is in the harbour and it leaks."));
        for other in [
            "Das Boot liegt im Hafen und hat ein Leck, das niemand findet.",
            "El barco tiene una fuga que nadie encuentra.",
            "\u{43b}\u{43e}\u{434}\u{43a}\u{430} \u{442}\u{435}\u{447}\u{451}\u{442} \u{43a}\u{430}\u{436}\u{434}\u{44b}\u{439} \u{434}\u{435}\u{43d}\u{44c}",
            "\u{732b}\u{304c}\u{5bdd}\u{3066}\u{3044}\u{307e}\u{3059}",
        ] {
            assert!(!is_english(other), "{other}");
        }
    }

    #[test]
    fn words_that_share_a_stem_are_one() {
        for (a, b) in [("keys", "key"), ("meets", "meet"), ("sold", "sell"), ("baking", "baked"), ("carry", "carries")]
        {
            assert_eq!(stem(a), stem(b), "{a} {b}");
        }
        assert_eq!(content_words("The keys of the key are in the box"), ["key", "box"]);
    }
}
