//! SentencePiece vocabularies: the rebuilt tokenizer does what llama.cpp's loop over scores does.

use super::model::exported;
use super::tokens::{ids, json_file, load, sidecars};
use super::writer::{ARRAY, F32, Random, Writer, all, array, small_llama};
use bytes::Bytes;
use pocketlora::format::Source;
use pocketlora::format::gguf::{Gguf, GgufTarget};
use serde_json::json;
use std::collections::HashMap;
use std::path::Path;

const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

struct Spm {
    tokens: Vec<String>,
    scores: Vec<f32>,
    types: Vec<i32>,
}

impl Spm {
    /// Marks, bytes, two user-defined words, then `pieces` with falling scores.
    fn new(pieces: &[&str]) -> Self {
        let mut spm = Self { tokens: Vec::new(), scores: Vec::new(), types: Vec::new() };
        for (text, kind) in [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)] {
            spm.push(text, 0.0, kind);
        }
        for byte in 0..=255u8 {
            spm.push(&format!("<0x{byte:02X}>"), 0.0, BYTE);
        }
        spm.push("<|im_end|>", 0.0, USER_DEFINED);
        spm.push("[TOOL]", 0.0, USER_DEFINED);
        for (i, piece) in pieces.iter().enumerate() {
            spm.push(piece, -(i as f32), 1);
        }
        spm
    }

    fn push(&mut self, text: &str, score: f32, kind: i32) {
        self.tokens.push(text.to_owned());
        self.scores.push(score);
        self.types.push(kind);
    }

    fn write(&self) -> Writer {
        let mut w = small_llama();
        w.pairs.retain(|(key, _, _)| !key.starts_with("tokenizer.ggml."));
        let scores: Vec<_> = self.scores.iter().map(|s| s.to_le_bytes().to_vec()).collect();
        w.string("tokenizer.ggml.model", "llama")
            .strings("tokenizer.ggml.tokens", &self.tokens)
            .i32s("tokenizer.ggml.token_type", &self.types)
            .set("tokenizer.ggml.scores", ARRAY, array(F32, &scores));
        let embedding = w.find("token_embd.weight");
        embedding.dims[1] = self.tokens.len() as u64;
        embedding.data.resize(self.tokens.len() * 8 * 4, 0);
        w
    }

    /// llama.cpp's way: a space before each piece of text between marks, then the union of neighbours with the highest
    /// score, the left one among equals, until there is none; what is no token becomes bytes.
    fn oracle(&self, text: &str, prefix: bool) -> Vec<u32> {
        let id: HashMap<&str, usize> = self.tokens.iter().enumerate().map(|(i, t)| (t.as_str(), i)).collect();
        let marks = |i: &usize| matches!(self.types[*i], UNKNOWN | CONTROL | USER_DEFINED);
        let mut out = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let next = (0..self.tokens.len())
                .filter(marks)
                .filter_map(|i| rest.find(self.tokens[i].as_str()).map(|at| (at, i)))
                .min();
            let (plain, mark) = next.map_or((rest.len(), None), |(at, i)| (at, Some(i)));
            if plain > 0 {
                let text = format!("{}{}", if prefix { " " } else { "" }, &rest[..plain]).replace(' ', "▁");
                let mut symbols: Vec<String> = text.chars().map(String::from).collect();
                loop {
                    let union = |i: usize| id.get(format!("{}{}", symbols[i], symbols[i + 1]).as_str()).copied();
                    let best = (0..symbols.len().saturating_sub(1))
                        .filter_map(|i| union(i).map(|t| (self.scores[t], i)))
                        .max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
                    let Some((_, at)) = best else { break };
                    let right = symbols.remove(at + 1);
                    symbols[at].push_str(&right);
                }
                for symbol in symbols {
                    match id.get(symbol.as_str()) {
                        Some(&i) => out.push(i as u32),
                        None => out.extend(symbol.bytes().map(|b| u32::from(b) + 3)),
                    }
                }
            }
            out.extend(mark.map(|i| i as u32));
            rest = &rest[plain + mark.map_or(0, |i| self.tokens[i].len())..];
        }
        out
    }
}

/// A vocabulary of 90 pieces, each made of two others.
fn grown(random: &mut Random) -> Spm {
    let mut pieces: Vec<String> = "▁abcdefgh\né你".chars().map(String::from).collect();
    let letters = pieces.len();
    while pieces.len() < letters + 90 {
        let union = format!("{}{}", pieces[random.below(pieces.len())], pieces[random.below(pieces.len())]);
        // In a piece that ends as it begins two ways to make it can overlap ("aba" in "ababa"), where ranks of merges
        // cannot say "the left one". Vocabularies have them, but texts hardly ever the overlap.
        let ends_as_it_begins = (1..union.len()).any(|n| union.is_char_boundary(n) && union.ends_with(&union[..n]));
        if union.chars().count() <= 6 && !ends_as_it_begins && !pieces.contains(&union) {
            pieces.push(union);
        }
    }
    // Letters have the lowest scores, as SentencePiece gives them.
    pieces.rotate_left(letters);
    Spm::new(&pieces.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn any_text_becomes_the_ids_of_llama_cpp() {
    let mut random = Random(7);
    let parts = [
        "a",
        "b",
        "c",
        "d",
        "e",
        "f",
        "g",
        "h",
        " ",
        " ",
        "  ",
        "\n",
        "é",
        "你",
        "好",
        "🦙",
        "\t",
        "\u{0}",
        "<s>",
        "<|im_end|>",
        "[TOOL]",
    ];
    let dir = tempfile::tempdir().unwrap();
    let mut cases = Vec::new();
    for _ in 0..8 {
        let spm = grown(&mut random);
        for prefix in [true, false] {
            let mut w = spm.write();
            w.bool("tokenizer.ggml.add_bos_token", false).bool("tokenizer.ggml.add_space_prefix", prefix);
            let (path, out) = (dir.path().join("small.gguf"), dir.path().join("out.gguf"));
            std::fs::write(&path, w.build()).unwrap();
            let exported = exported(&path, &out, GgufTarget::F16).sidecars().unwrap();
            let tokenizers = [load(&sidecars(&w)), load(&exported)];
            for i in 0..60 {
                // As it was read, and written and read again.
                let tokenizer = &tokenizers[i % 2];
                let text: String = (0..random.below(40)).map(|_| parts[random.below(parts.len())]).collect();
                let (got, want) = (ids(tokenizer, &text), spm.oracle(&text, prefix));
                let same = if got == want { Ok(()) } else { Err(format!("expected {want:?}, got {got:?}")) };
                cases.push(((text.clone(), prefix), same));
                // What the tokenizer puts before text is taken off at the front alone.
                if !text.contains(['<', '[']) {
                    let back = tokenizer.decode(&got, false).unwrap();
                    let same = if back == text { Ok(()) } else { Err(format!("decoded to {back:?}")) };
                    cases.push(((text, prefix), same));
                }
            }
        }
    }
    all(cases);
}

#[test]
fn defaults_and_switches_are_llama_cpps() {
    let spm = Spm::new(&["▁hi", "▁h", "▁", "h", "i"]);
    let id = |text: &str| spm.tokens.iter().position(|t| t == text).unwrap() as u32;
    let encode = |change: fn(&mut Writer)| {
        let mut w = spm.write();
        change(&mut w);
        ids(&load(&sidecars(&w)), "hi")
    };
    // Ids of the marks are 1 and 2 where the file names none, and BOS is added.
    assert_eq!(encode(|_| ()), [1, id("▁hi")]);
    assert_eq!(encode(|w| _ = w.bool("tokenizer.ggml.add_eos_token", true)), [1, id("▁hi"), 2]);
    assert_eq!(encode(|w| _ = w.bool("tokenizer.ggml.add_space_prefix", false)), [1, id("h"), id("i")]);
    let files = sidecars(&spm.write());
    assert_eq!(json_file(&files, "generation_config.json")["eos_token_id"], json!([2, id("<|im_end|>")]));
    let config = json_file(&files, "tokenizer_config.json");
    assert_eq!((&config["bos_token"], &config["unk_token"]), (&json!("<s>"), &json!("<unk>")));
    let mut w = spm.write();
    w.bool("tokenizer.ggml.remove_extra_whitespaces", true).bool("tokenizer.ggml.add_bos_token", false);
    assert_eq!(ids(&load(&sidecars(&w)), "  hi   hi "), [id("▁hi"), id("▁hi")]);
}

/// The cut of greatest score by trying all, with unknown characters 10 below the worst piece, and several of them as one.
fn unigram_oracle(pieces: &[(&str, f32)], first: u32, text: &str) -> Vec<u32> {
    let words: Vec<&str> = text.split(' ').filter(|word| !word.is_empty()).collect();
    let worst = pieces.iter().map(|(_, score)| *score).fold(f32::MAX, f32::min) - 10.0;
    let mut out: Vec<u32> = Vec::new();
    for word in words {
        let word: Vec<char> = format!("▁{word}").chars().collect();
        // The best sum up to each place, and the last piece on the way.
        let mut best: Vec<(f32, usize, u32)> = vec![(f32::MIN, 0, 0); word.len() + 1];
        best[0].0 = 0.0;
        for end in 1..=word.len() {
            for start in 0..end {
                let part: String = word[start..end].iter().collect();
                let known = pieces.iter().position(|(piece, _)| *piece == part);
                let (score, id) = match known {
                    Some(i) => (pieces[i].1, first + i as u32),
                    None if end == start + 1 => (worst, 2),
                    None => continue,
                };
                if best[start].0 + score > best[end].0 {
                    best[end] = (best[start].0 + score, start, id);
                }
            }
        }
        let (mut at, mut back) = (word.len(), Vec::new());
        while at > 0 {
            back.push(best[at].2);
            at = best[at].1;
        }
        let mut cut: Vec<u32> = back.into_iter().rev().collect();
        cut.dedup_by(|a, b| *a == 2 && *b == 2);
        out.extend(cut);
    }
    out
}

#[test]
fn unigram_takes_the_likeliest_cut() {
    let mut random = Random(11);
    let letters = ["▁", "a", "b", "c", "d"];
    let mut texts: Vec<String> = letters.iter().map(|&letter| letter.to_owned()).collect();
    while texts.len() < 60 {
        let start = ["", "▁"][random.below(2)];
        let word: String = (0..2 + random.below(3)).map(|_| letters[1 + random.below(4)]).collect();
        let piece = format!("{start}{word}");
        if !texts.contains(&piece) {
            texts.push(piece);
        }
    }
    let pieces: Vec<(&str, f32)> =
        texts.iter().map(|text| (text.as_str(), -1.0 - random.below(10_000) as f32 / 700.0)).collect();
    let mut spm = Spm { tokens: Vec::new(), scores: Vec::new(), types: Vec::new() };
    for (text, kind) in [("<pad>", CONTROL), ("</s>", CONTROL), ("<unk>", UNKNOWN)] {
        spm.push(text, 0.0, kind);
    }
    pieces.iter().for_each(|(text, score)| spm.push(text, *score, 1));
    let mut w = spm.write();
    w.string("tokenizer.ggml.model", "t5");
    let tokenizer = load(&sidecars(&w));
    all((0..300).map(|_| {
        let text: String = (0..random.below(30)).map(|_| ["a", "b", "c", "d", " ", "x"][random.below(6)]).collect();
        // T5's end stands behind every text.
        let want = [unigram_oracle(&pieces, 3, &text), vec![1]].concat();
        let got = ids(&tokenizer, &text);
        let same = if got == want { Ok(()) } else { Err(format!("expected {want:?}, got {got:?}")) };
        (text, same)
    }));
    w.bool("tokenizer.ggml.add_eos_token", false);
    let plain = load(&sidecars(&w));
    assert_eq!(plain.decode(&ids(&plain, "abc dab"), false).unwrap(), "abc dab");
    for (table, said) in [(&[1u8, 0][..], "precompiled_charsmap"), (&[8, 0, 0, 0, 1, 2, 3, 4], "precompiled_charsmap")]
    {
        let bytes: Vec<_> = table.iter().map(|byte| vec![*byte]).collect();
        w.set("tokenizer.ggml.precompiled_charsmap", ARRAY, array(super::writer::U8, &bytes));
        let gguf = Gguf::from_bytes(Bytes::from(w.build()), Path::new("small.gguf")).unwrap();
        let error = gguf.sidecars().unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}

/// Gemma 4's tokenizer: merges of characters, bytes where there is no token, BOS whatever the file says.
#[test]
fn gemma_4_merges_characters() {
    let spm = Spm::new(&["▁", "h", "i", "▁h", "▁hi", "é"]);
    let id = |text: &str| spm.tokens.iter().position(|t| t == text).unwrap() as u32;
    let mut w = spm.write();
    w.string("tokenizer.ggml.model", "gemma4").strings("tokenizer.ggml.merges", &["▁ h", "▁h i"]);
    w.remove("tokenizer.ggml.scores").bool("tokenizer.ggml.add_bos_token", false);
    w.u32("tokenizer.ggml.bos_token_id", 1);
    let tokenizer = load(&sidecars(&w));
    assert_eq!(ids(&tokenizer, "hi hi"), [1, id("h"), id("i"), id("▁hi")]);
    assert_eq!(ids(&tokenizer, "é\u{1}"), [1, id("é"), id("<0x01>")]);
    assert_eq!(tokenizer.decode(&ids(&tokenizer, "hi  hé"), true).unwrap(), "hi  hé");
}
