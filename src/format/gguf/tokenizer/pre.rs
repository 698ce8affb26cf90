//! llama.cpp's pre-tokenizers: `tokenizer.ggml.pre` is a name, and the name stands for regular expressions.
//!
//! Each expression of a list cuts what the ones before it left into what it matches and what lies between, as
//! llama.cpp and `tokenizers` both do. Where llama.cpp had to adapt a model's published expression to its own engine,
//! the published one is here.

use serde_json::{Value, json};

/// Words of GPT-2: small contractions, letters, digits or other marks with one leading space.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Words of Llama 3: contractions, letters with one leading symbol, up to three digits, punctuation, white space.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Words of Qwen 2: as Llama 3's, but every digit alone.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2's without contractions, for Turkish suffixes follow an apostrophe.
const UFAKZEKA: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const MINICPM5: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const JAIS2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}";
const SEED_CODER: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const BAILING: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const EXAONE_MOE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+";
/// Mistral's Tekken: words end where capitals begin.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-4o's: Tekken's with contractions and up to three digits.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-4o's with every digit alone.
const YOUTU: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const YOUTU_ASIAN: &str =
    r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+";
const DEEPSEEK3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const SPARK2_5: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"##;
/// Letters that have a case, as DeepSeek lists them.
const DEEPSEEK_CASED: &str = r"\s?[A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}]+";
const DEEPSEEK_MARKS: &str = r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+";
const DEEPSEEK_ASIAN: &str = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+";
/// Chinese and Japanese characters.
const HAN_KANA: &str = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+";
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";
const LINES: &str = r"[^\n]+|[\n]+";
const DIGIT: &str = r"\p{N}";
const DIGITS: &str = r"\p{N}+";
const THREE_DIGITS: &str = r"\p{N}{1,3}";
const ASCII_THREE: &str = "[0-9][0-9][0-9]";
const LINE_END: &str = r"[\r\n]";

/// What a name stands for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pre {
    names: &'static [&'static str],
    /// Applied one after the other.
    pub(super) splits: &'static [&'static str],
    /// Text is composed first (NFC), which only the models' own files say.
    pub(super) composed: bool,
    /// A word that is in the vocabulary is taken as it is, even where merges would not make it.
    pub(super) ignores_merges: bool,
    /// Whether the text starts with BOS when the file does not say.
    pub(super) adds_bos: bool,
}

const fn words(names: &'static [&'static str], splits: &'static [&'static str]) -> Pre {
    Pre { names, splits, composed: false, ignores_merges: false, adds_bos: false }
}

/// Every name that llama.cpp knows, but for those in [`OTHERS`].
const TABLE: &[Pre] = &[
    words(&["default"], &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, DIGITS, ASCII_THREE]),
    Pre {
        // Files of Llama 3 from before mid-2025 do not say whether BOS is added; its own tokenizer adds it.
        adds_bos: true,
        ignores_merges: true,
        ..words(
            &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"],
            &[LLAMA3],
        )
    },
    // Files of Llama 3 again. llama.cpp has neither BOS nor whole words for this name; the model has both.
    Pre { adds_bos: true, ignores_merges: true, ..words(&["smaug-bpe"], &[LLAMA3]) },
    // Vocabularies of tiktoken, which takes whole words, too.
    Pre { ignores_merges: true, ..words(&["dbrx", "chatglm-bpe", "glm4", "glm5"], &[LLAMA3]) },
    words(&["jais-2"], &[JAIS2]),
    Pre { ignores_merges: true, ..words(&["minicpm5"], &[THREE_DIGITS, MINICPM5]) },
    words(&["deepseek-llm"], &[LINE_END, DEEPSEEK_CASED, DEEPSEEK_MARKS, r"\s+$", DEEPSEEK_ASIAN, DIGITS]),
    words(&["deepseek-coder"], &[LINE_END, r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_ASIAN, DIGIT]),
    words(&["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"], &[THREE_DIGITS, HAN_KANA, DEEPSEEK3]),
    words(&["spark2_5"], &[THREE_DIGITS, HAN_KANA, SPARK2_5, DIGIT]),
    Pre { ignores_merges: true, ..words(&["youtu"], &[YOUTU_ASIAN, YOUTU]) },
    words(&["falcon"], &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, ASCII_THREE]),
    words(
        &["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[DIGIT, GPT2],
    ),
    words(
        &[
            "gpt-2",
            "phi-2",
            "jina-es",
            "jina-de",
            "jina-v1-en",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v2-code",
            "roberta-bpe",
            "gigachat",
            "a.x-4.0",
            "mellum",
            "modern-bert",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
        ],
        &[GPT2],
    ),
    Pre { composed: true, ..words(&["qwen2", "deepseek-r1-qwen"], &[QWEN2]) },
    words(&["stablelm2", "hunyuan", "solar-open", "megrez", "kormo", "f2llmv2", "grok-2"], &[QWEN2]),
    Pre { composed: true, ..words(&["qwen35"], &[QWEN35]) },
    words(&["ufakzeka"], &[UFAKZEKA]),
    words(&["laguna"], &[LINES, QWEN2]),
    words(&["seed-coder"], &[SEED_CODER]),
    words(&["bailingmoe", "bailingmoe2", "llada-moe"], &[BAILING]),
    words(&["exaone-moe"], &[EXAONE_MOE]),
    words(&["poro-chat", "bloom", "gpt3-finnish"], &[BLOOM]),
    words(&["viking"], &[BLOOM, DIGIT]),
    Pre { ignores_merges: true, adds_bos: true, ..words(&["tekken"], &[TEKKEN]) },
    Pre {
        adds_bos: true,
        ..words(
            &["chameleon"],
            &[
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                DIGIT,
                r"[\p{P}!-/:-@\[-`{-~]",
                GPT2,
            ],
        )
    },
    words(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], &[GPT4O]),
    words(&["tiny_aya", "cohere2moe"], &[r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O]),
    words(&["superbpe"], &[DIGITS, r"(?=(\d{3})+(?!\d))"]),
];

/// Names that llama.cpp reads by code of its own, and the kind of tokenizer behind each.
const OTHERS: &[(&str, &str)] = &[
    ("afmoe", "digits in groups counted from the right"),
    ("gemma4", "merges of characters instead of bytes"),
    ("granite-embed-multi-311m", "merges of characters instead of bytes"),
    ("granite-embed-multi-97m", "a split for embedding models"),
    ("kimi-k2", "a vocabulary without merges"),
    ("sarvam-moe", "merges of characters instead of bytes"),
    ("whitespace", "whole words instead of merges"),
];

/// The name of what cuts texts by `splits` and then as GPT-2 does, if `gpt2` says so. `composed` and `ignores_merges` are as
/// in [`Pre`].
pub(crate) fn pre_name(splits: &[&str], gpt2: bool, composed: bool, ignores_merges: bool) -> Option<&'static str> {
    let wanted: Vec<&str> = splits.iter().copied().chain(gpt2.then_some(GPT2)).collect();
    let same = |pre: &&Pre| pre.splits == wanted && pre.composed == composed && pre.ignores_merges == ignores_merges;
    TABLE.iter().find(same).and_then(|pre| pre.names.first().copied())
}

impl Pre {
    /// The description of `name`; for others what kind of tokenizer it is, where known.
    pub(super) fn of(name: &str) -> Result<Self, Option<&'static str>> {
        let found = TABLE.iter().find(|pre| pre.names.contains(&name));
        found.copied().ok_or_else(|| OTHERS.iter().find(|(other, _)| *other == name).map(|(_, kind)| *kind))
    }

    /// All names that can be read.
    pub(super) fn names() -> impl Iterator<Item = &'static str> {
        TABLE.iter().flat_map(|pre| pre.names).copied()
    }

    pub(super) fn normalizer(self) -> Value {
        if self.composed { json!({"type": "NFC"}) } else { Value::Null }
    }

    pub(super) fn pre_tokenizer(self) -> Value {
        let split = |words: &&str| json!({"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": false});
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let steps: Vec<Value> = self.splits.iter().map(split).chain([bytes]).collect();
        json!({"type": "Sequence", "pretokenizers": steps})
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, PreTokenizerWrapper};

    fn split(name: &str, text: &str) -> Vec<String> {
        let pre = Pre::of(name).unwrap().pre_tokenizer();
        let pre: PreTokenizerWrapper = serde_json::from_value(pre).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut pieces = PreTokenizedString::from(text);
        pre.pre_tokenize(&mut pieces).unwrap();
        let pieces = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        pieces.into_iter().map(|(_, (from, to), _)| text[from..to].to_owned()).collect()
    }

    #[test]
    fn every_name_is_known_once_and_its_expressions_compile() {
        let mut names: Vec<_> = Pre::names().chain(OTHERS.iter().map(|(name, _)| *name)).collect();
        for name in Pre::names() {
            let text = "Don't  stop: 12345 ÄÖ élan 你好、かな\n\n\t x(y)=`z`; ΣΑΣ 한국어 100%!\r\n  ";
            assert_eq!(split(name, text).concat(), text, "{name}");
        }
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all, "a name occurs twice");
    }

    #[test]
    fn names_split_as_their_models_do() {
        // From the published expressions, by hand.
        let cases: &[(&str, &str, &str)] = &[
            ("default", "a+=12345 b", "a|+=|123|45| b"),
            ("falcon", "a`12345", "a|`|123|45"),
            ("llama3", "I'LL go 12345!\n", "I|'LL| go| |123|45|!\n"),
            ("smaug-bpe", "I'LL go 12345!\n", "I|'LL| go| |123|45|!\n"),
            ("dbrx", "I'LL go 12345!\n", "I|'LL| go| |123|45|!\n"),
            ("starcoder", "x 12", "x| |1|2"),
            ("gpt-2", "x 12  y", "x| 12| | y"),
            ("qwen2", "x 12", "x| |1|2"),
            ("tekken", "helloWorld HTTPServer 12//\n", "hello|World| HTTPServer| |1|2|//\n"),
            ("gpt-4o", "helloWorld's 1234", "hello|World's| |123|4"),
            ("deepseek-llm", "ab, cd 12\n你好", "ab|,| cd| |12|\n|你好"),
            ("deepseek-coder", "ab, cd 12\n", "ab|,| cd| |1|2|\n"),
            ("deepseek-v3", "x=y 1234 你好a", "x|=y| |123|4| |你好|a"),
            ("superbpe", "by the way 1234567 ok", "by the way |1|234|567| ok"),
            ("tiny_aya", "1234567", "1|234|567"),
            ("viking", "ab cd 12", "ab| cd| |1|2"),
            ("bloom", "ab cd.", "ab| cd|."),
            ("ufakzeka", "Ali'nin", "Ali|'nin"),
            ("seed-coder", "a!\nb", "a|!|\n|b"),
            ("bailingmoe", "a\n\nb", "a|\n\n|b"),
            ("exaone-moe", "a b1", "a b|1"),
            ("jais-2", "a    b", "a|  | | b"),
            ("minicpm5", "a1234", "a|123|4"),
            ("laguna", "ab \n\ncd", "ab| |\n\n|cd"),
            ("chameleon", "a  b12", "a|  |b|1|2"),
            ("youtu", "한국12", "한국|1|2"),
            ("qwen35", "e\u{301}a", "e\u{301}a"),
            ("spark2_5", "!\n\n", "!|\n|\n"),
        ];
        let failed: Vec<_> = cases
            .iter()
            .map(|(name, text, want)| (name, text, want, split(name, text).join("|")))
            .filter(|(_, _, want, got)| got != **want)
            .collect();
        assert!(failed.is_empty(), "{failed:#?}");
    }
}
