//! `tokenizer.json` and the files beside it as the metadata of llama.cpp: byte-level BPE, and SentencePiece's BPE, of which
//! the order of merges becomes scores.

use super::super::tokenizer::pre_name;
use super::super::writer::Pairs;
use crate::error::{Error, Result};
use crate::format::Sidecars;
use crate::format::foreign::parse_object;
use serde_json::{Map, Value};
use std::collections::HashMap;
use std::path::Path;

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;
/// SentencePiece's sign for a space.
const SPACE: &str = "▁";

/// A model's small files, parsed.
struct Files<'a> {
    place: &'a Path,
    tokenizer: Map<String, Value>,
    config: Map<String, Value>,
    generation: Map<String, Value>,
}

/// Writes the tokenizer in `sidecars`, of a model at `place` with `rows` of its embedding, to `pairs`; of a model without
/// one, that there is none.
///
/// # Errors
/// The tokenizer is of another kind, or a file is broken.
pub(super) fn write(sidecars: &Sidecars, place: &Path, rows: usize, pairs: &mut Pairs) -> Result<()> {
    let file = |name: &str| sidecars.files.iter().find(|(file, _)| file == name).map(|(_, bytes)| &bytes[..]);
    let parse = |name: &str| file(name).map(|bytes| parse_object(&place.join(name), bytes)).transpose();
    let Some(tokenizer) = parse("tokenizer.json")? else {
        pairs.text("tokenizer.ggml.model", "none");
        return Ok(());
    };
    let config = parse("tokenizer_config.json")?.unwrap_or_default();
    let generation = parse("generation_config.json")?.unwrap_or_default();
    let files = Files { place, tokenizer, config, generation };
    let ids = files.vocabulary(rows, pairs)?;
    files.marks(&ids, pairs);
    let template = file("chat_template.jinja").map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    let other = parse("chat_template.json")?;
    let own = other.as_ref().and_then(|json| json.get("chat_template")).or(files.config.get("chat_template"));
    match (template, own) {
        (Some(text), _) => pairs.text("tokenizer.chat_template", &text),
        (None, Some(Value::String(text))) => pairs.text("tokenizer.chat_template", text),
        (None, Some(Value::Array(named))) => {
            for one in named {
                let text = |key: &str| one.get(key).and_then(Value::as_str);
                match (text("name"), text("template")) {
                    (Some("default"), Some(template)) => pairs.text("tokenizer.chat_template", template),
                    (Some(name), Some(template)) => pairs.text(&format!("tokenizer.chat_template.{name}"), template),
                    _ => {}
                }
            }
        }
        _ => {}
    }
    Ok(())
}

/// How texts are cut before merges are made.
enum Cut {
    /// Into words, by llama.cpp's name for it.
    Words(&'static str),
    /// Not at all; whether a space is put before them.
    Pieces(bool),
}

/// Scores that make llama.cpp merge in the order of `merges`: a token that is made earlier has a higher one.
fn scores(tokens: &[(String, i32)], merges: &[String]) -> Vec<f32> {
    let mut ranks: HashMap<String, usize> = HashMap::with_capacity(merges.len());
    for (rank, merge) in merges.iter().enumerate() {
        ranks.entry(merge.replacen(' ', "", 1)).or_insert(rank);
    }
    let score = |(text, _): &(String, i32)| -(ranks.get(text).copied().unwrap_or(merges.len()) as f32);
    tokens.iter().map(score).collect()
}

impl Files<'_> {
    fn refuse<T>(&self, what: impl std::fmt::Display) -> Result<T> {
        let next = "use llama.cpp's own converter";
        let place = self.place.join("tokenizer.json");
        Err(Error::unsupported(&place, format!("to write {what} as GGUF"), next))
    }

    /// Writes tokens, their types, and merges; returns ids by text.
    fn vocabulary(&self, rows: usize, pairs: &mut Pairs) -> Result<HashMap<String, usize>> {
        let model = self.tokenizer.get("model").and_then(Value::as_object);
        let part = |key: &str| model.and_then(|model| model.get(key));
        let flag = |key: &str| part(key) == Some(&Value::Bool(true));
        if part("type").and_then(Value::as_str) != Some("BPE") {
            return self.refuse("a tokenizer that is no BPE");
        }
        let (Some(Value::Object(vocab)), Some(Value::Array(merges))) = (part("vocab"), part("merges")) else {
            return self.refuse("a tokenizer without vocabulary or merges");
        };
        let cut = if flag("byte_fallback") { self.prefix().map(Cut::Pieces) } else { None };
        let cut = cut.or_else(|| self.pre_tokenizer(flag("ignore_merges")).map(Cut::Words));
        let Some(cut) = cut else {
            return self.refuse("a tokenizer that cuts texts into words as none of llama.cpp's does");
        };
        let id = |value: &Value| value.as_u64().map(|id| id as usize).filter(|id| *id < rows);
        let mut tokens: Vec<(String, i32)> = (0..rows).map(|id| (format!("[PAD{id}]"), UNUSED)).collect();
        for (text, value) in vocab {
            let Some(id) = id(value) else { return self.refuse("a tokenizer with more tokens than the embedding has") };
            tokens[id] = (text.clone(), NORMAL);
        }
        let listed = self.tokenizer.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
        let listed = listed.filter_map(|token| Some((token.get("id")?.clone(), token)));
        let declared = self.config.get("added_tokens_decoder").and_then(Value::as_object).into_iter().flatten();
        let declared = declared.filter_map(|(id, token)| Some((id.parse::<u64>().ok()?.into(), token)));
        for (number, token) in declared.chain(listed) {
            let (Some(id), Some(text)) = (id(&number), token.get("content").and_then(Value::as_str)) else {
                return self.refuse("a tokenizer with more tokens than the embedding has");
            };
            let special = token.get("special") == Some(&Value::Bool(true));
            tokens[id] = (text.to_owned(), if special { CONTROL } else { USER_DEFINED });
        }
        let line = |merge: &Value| match merge {
            Value::String(line) => Some(line.clone()),
            Value::Array(pair) => match &pair[..] {
                [Value::String(a), Value::String(b)] => Some(format!("{a} {b}")),
                _ => None,
            },
            _ => None,
        };
        let Some(merges) = merges.iter().map(line).collect::<Option<Vec<String>>>() else {
            return self.refuse("a tokenizer with merges of an unknown form");
        };
        match cut {
            Cut::Words(pre) => {
                pairs.text("tokenizer.ggml.model", "gpt2");
                pairs.text("tokenizer.ggml.pre", pre);
                pairs.texts("tokenizer.ggml.merges", &merges);
            }
            Cut::Pieces(prefix) => {
                let unknown = part("unk_token").and_then(Value::as_str);
                for (text, kind) in &mut tokens {
                    *kind = match text.as_str() {
                        text if Some(text) == unknown => UNKNOWN,
                        text if text.len() == 6 && text.starts_with("<0x") && text.ends_with('>') => BYTE,
                        _ => *kind,
                    };
                }
                pairs.text("tokenizer.ggml.model", "llama");
                pairs.text("tokenizer.ggml.pre", "default");
                pairs.bool("tokenizer.ggml.add_space_prefix", prefix);
                pairs.f32s("tokenizer.ggml.scores", &scores(&tokens, &merges));
            }
        }
        pairs.texts("tokenizer.ggml.tokens", &tokens.iter().map(|(text, _)| text).collect::<Vec<_>>());
        pairs.i32s("tokenizer.ggml.token_type", &tokens.iter().map(|(_, kind)| *kind).collect::<Vec<_>>());
        Ok(tokens.into_iter().enumerate().map(|(id, (text, _))| (text, id)).collect())
    }

    /// Whether a space is put before a text, if spaces are written as SentencePiece does and nothing else is done to texts.
    fn prefix(&self) -> Option<bool> {
        let list = |value: Option<&Value>, key: &str| -> Vec<Value> {
            match value {
                None | Some(Value::Null) => Vec::new(),
                Some(one) => one.get(key).and_then(Value::as_array).cloned().unwrap_or_else(|| vec![one.clone()]),
            }
        };
        let (mut prefix, mut spaces) = (false, false);
        let normalizers = list(self.tokenizer.get("normalizer"), "normalizers");
        for step in normalizers.iter().chain(&list(self.tokenizer.get("pre_tokenizer"), "pretokenizers")) {
            let is = |key: &str, wanted: &str| step.get(key).and_then(Value::as_str) == Some(wanted);
            let space = step.pointer("/pattern/String").and_then(Value::as_str) == Some(" ");
            match step.get("type")?.as_str()? {
                "Prepend" if is("prepend", SPACE) => prefix = true,
                "Replace" if space && is("content", SPACE) => spaces = true,
                // There is none any more.
                "Split" if space && spaces => {}
                "Metaspace" if is("replacement", SPACE) => {
                    (prefix, spaces) = (!is("prepend_scheme", "never"), true);
                }
                _ => return None,
            }
        }
        spaces.then_some(prefix)
    }

    /// llama.cpp's name for how texts are cut into words.
    fn pre_tokenizer(&self, ignores_merges: bool) -> Option<&'static str> {
        const DIGIT: &str = r"\p{N}";
        let mut steps = match self.tokenizer.get("pre_tokenizer")? {
            one if one.get("type")? == "Sequence" => one.get("pretokenizers")?.as_array()?.clone(),
            one => vec![one.clone()],
        };
        let bytes = steps.pop().filter(|last| last.get("type").is_some_and(|kind| kind == "ByteLevel"))?;
        if bytes.get("add_prefix_space") == Some(&Value::Bool(true)) {
            return None;
        }
        let mut splits = Vec::new();
        for step in &steps {
            match step.get("type")?.as_str()? {
                "Split" if step.get("behavior")? == "Isolated" && step.get("invert") != Some(&Value::Bool(true)) => {
                    splits.push(step.get("pattern")?.get("Regex")?.as_str()?);
                }
                "Digits" if step.get("individual_digits") == Some(&Value::Bool(true)) => splits.push(DIGIT),
                _ => return None,
            }
        }
        let gpt2 = bytes.get("use_regex") != Some(&Value::Bool(false));
        let composed = match self.tokenizer.get("normalizer") {
            None | Some(Value::Null) => false,
            Some(normalizer) if normalizer.get("type")? == "NFC" => true,
            Some(_) => return None,
        };
        pre_name(&splits, gpt2, composed, ignores_merges)
    }

    /// Writes the ids of special tokens, and which stand around a text.
    fn marks(&self, ids: &HashMap<String, usize>, pairs: &mut Pairs) {
        let token = |name: &str| {
            let value = self.config.get(name)?;
            ids.get(value.get("content").unwrap_or(value).as_str()?).copied()
        };
        let from_generation = |name: &str| -> Vec<usize> {
            let numbers = match self.generation.get(name) {
                Some(Value::Array(list)) => list.iter().filter_map(Value::as_u64).collect(),
                Some(one) => one.as_u64().into_iter().collect(),
                None => Vec::new(),
            };
            numbers.into_iter().map(|id| id as usize).filter(|id| *id < ids.len()).collect()
        };
        let ends = from_generation("eos_token_id");
        let eos = token("eos_token").or(ends.first().copied());
        let named = [
            ("bos", token("bos_token").or(from_generation("bos_token_id").first().copied())),
            ("eos", eos),
            ("unknown", token("unk_token")),
            ("padding", token("pad_token")),
            ("eot", ends.into_iter().find(|id| Some(*id) != eos)),
        ];
        for (name, id) in named {
            if let Some(id) = id {
                pairs.u32(&format!("tokenizer.ggml.{name}_token_id"), id as u32);
            }
        }
        let [before, after] = self.around();
        pairs.bool("tokenizer.ggml.add_bos_token", before);
        pairs.bool("tokenizer.ggml.add_eos_token", after);
    }

    /// Whether a special token stands before a text, and behind it.
    fn around(&self) -> [bool; 2] {
        let Some(processor) = self.tokenizer.get("post_processor") else { return [false; 2] };
        let mut steps = processor.get("processors").and_then(Value::as_array).into_iter().flatten().chain([processor]);
        let template = steps.find_map(|step| step.get("single").and_then(Value::as_array));
        let Some(template) = template else { return [false; 2] };
        let special = |piece: Option<&Value>| piece.is_some_and(|piece| piece.get("SpecialToken").is_some());
        [special(template.first()), special(template.last())]
    }
}
