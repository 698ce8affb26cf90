//! Tokenizer and chat template: a model's own, and those that an adapter's folder brings, which it was taught with.
//!
//! What an adapter's folder lacks is the model's. Files that say the same as the model's bring nothing.

use crate::chat::ChatTemplate;
use crate::error::{Error, ErrorCode, Result};
use crate::format::foreign::parse_object;
use crate::format::{Sidecars, sidecar_names, write_bytes};
use crate::generate::GENERATION_CONFIG;
use crate::tokenizer::{SpecialText, Tokenizer, declared_tokens, read_json};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};

/// A tokenizer and the chat template that goes with it.
pub struct Text {
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// A conversation as one text.
    pub template: ChatTemplate,
}

const TOKENIZER: &str = "tokenizer.json";
/// What an adapter's folder says about text that its base does not say.
#[derive(Clone, Debug)]
pub(crate) struct Own {
    dir: PathBuf,
    /// A hash of `tokenizer.json`, without what cuts or pads.
    vocabulary: Option<u64>,
    /// Names and text of special tokens, and what is added around a text.
    special: Option<BTreeMap<String, Value>>,
    /// Templates by their names.
    templates: Option<Vec<(String, String)>>,
}

impl PartialEq for Own {
    /// Wherever it lies.
    fn eq(&self, other: &Self) -> bool {
        (self.vocabulary, &self.special, &self.templates) == (other.vocabulary, &other.special, &other.templates)
    }
}

impl Own {
    /// What the adapter in `dir` brings to the model in `base`. With an embedding of its own (`new_rows`), its ids may be
    /// others than the model's.
    ///
    /// # Errors
    /// A file is broken, or its ids are of another vocabulary.
    pub(crate) fn find(dir: &Path, base: &Path, new_rows: bool) -> Result<Option<Self>> {
        if dir.as_os_str().is_empty() || !dir.is_dir() {
            return Ok(None);
        }
        let vocabulary = vocabulary(dir, base, new_rows)?;
        let mut own = special_tokens(dir)?;
        let mut declared = declared_tokens(dir)?;
        if !declared.is_empty() {
            let known = declared_tokens(base)?;
            declared.retain(|token| !known.contains(token));
        }
        if !declared.is_empty() {
            own.insert("declared".to_owned(), declared.into_iter().collect());
        }
        let special = match own {
            own if own.is_empty() || own == special_tokens(base)? => None,
            own => Some(own),
        };
        let templates = ChatTemplate::find(dir)?;
        let templates = if templates == ChatTemplate::find(base)? { None } else { templates };
        let own = Self { dir: dir.to_owned(), vocabulary, special, templates };
        let brings = own.vocabulary.is_some() || own.special.is_some() || own.templates.is_some();
        Ok(brings.then_some(own))
    }

    /// Opens it, with what is missing from the model in `base`.
    ///
    /// # Errors
    /// A file is missing or broken.
    pub(crate) fn open(&self, base: &Path, special_text: SpecialText) -> Result<Text> {
        let from = |own: bool| if own { self.dir.as_path() } else { base };
        let mut tokenizer = Tokenizer::open_parts(from(self.vocabulary.is_some()), from(self.special.is_some()), base)?;
        tokenizer.special_text = special_text;
        let template = ChatTemplate::open(from(self.templates.is_some()), &mut tokenizer)?;
        Ok(Text { tokenizer, template })
    }

    /// The files of a model with these in place of them.
    ///
    /// # Errors
    /// A file cannot be read, or is broken.
    pub(crate) fn over(&self, base: Sidecars) -> Result<Sidecars> {
        const CONFIG: &str = "tokenizer_config.json";
        const TEMPLATE: &str = "chat_template";
        let mut files = base.files;
        let template = match files.iter().find(|(name, _)| name == CONFIG) {
            Some((name, bytes)) => parse_object(Path::new(name), bytes)?.get(TEMPLATE).cloned(),
            None => None,
        };
        // What would be looked at first, or beside the new ones, goes.
        let is_template = |name: &str| name.starts_with(TEMPLATE) || name.ends_with(".jinja");
        let is_vocabulary = |name: &str| matches!(name, "tokenizer.model" | "vocab.json" | "merges.txt");
        files.retain(|(name, _)| {
            !(self.templates.is_some() && is_template(name) || self.vocabulary.is_some() && is_vocabulary(name))
        });
        for name in sidecar_names(&self.dir)?.into_iter().filter(|name| name != GENERATION_CONFIG) {
            let path = self.dir.join(&name);
            let mut bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
            if let (CONFIG, None, Some(template)) = (name.as_str(), &self.templates, &template) {
                let mut config = parse_object(&path, &bytes)?;
                config.entry(TEMPLATE).or_insert_with(|| template.clone());
                bytes = serde_json::to_vec_pretty(&config).unwrap_or(bytes);
            }
            files.retain(|(there, _)| *there != name);
            files.push((name, bytes));
        }
        Ok(Sidecars { files })
    }

    /// Refuses to join `other`, which another adapter brings.
    ///
    /// # Errors
    /// They differ.
    pub(crate) fn agree(&self, other: &Self) -> Result<()> {
        if self == other {
            return Ok(());
        }
        let message = format!(
            "it brings another {} than `{}`, which is attached; attach only one of the two",
            self.names(),
            other.dir.display()
        );
        Err(Error::new(ErrorCode::AdapterMismatch, format!("`{}`", self.dir.display()), message))
    }

    /// What there is, in words.
    pub(crate) fn names(&self) -> String {
        let parts = [
            (self.templates.is_some(), "chat template"),
            (self.vocabulary.is_some(), "tokenizer"),
            (self.special.is_some(), "special tokens"),
        ];
        parts.iter().filter(|(there, _)| *there).map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
    }
}

/// The text of the model in `dir`, if it has one.
///
/// # Errors
/// A file is broken.
pub(crate) fn open_text(dir: &Path, special_text: SpecialText) -> Result<Option<Text>> {
    if !dir.join(TOKENIZER).exists() {
        return Ok(None);
    }
    open_with(dir, None, special_text).map(Some)
}

/// Opens the text of the model in `base`, or as the adapter in `adapter` brings it.
///
/// # Errors
/// A file is missing or broken.
pub(crate) fn open_with(base: &Path, adapter: Option<(&Path, bool)>, special_text: SpecialText) -> Result<Text> {
    let own = adapter.map(|(dir, new_rows)| Own::find(dir, base, new_rows)).transpose()?.flatten();
    let plain = Own { dir: base.to_owned(), vocabulary: None, special: None, templates: None };
    own.unwrap_or(plain).open(base, special_text)
}

/// Copies what `init` brings to the folder `out` of an adapter that learns on from it. A folder with the files of some
/// other adapter is refused: they would be taken for this one's.
///
/// # Errors
/// As said; a file cannot be read or written.
pub(crate) fn carry(init: Option<&Own>, base: &Path, out: &Path) -> Result<()> {
    match (Own::find(out, base, true)?, init) {
        (None, None) => return Ok(()),
        (Some(there), init) if init != Some(&there) => {
            let message = format!(
                "expected a folder without another adapter's files, got its {}; name another folder, or take these files \
                 away",
                there.names()
            );
            return Err(Error::new(ErrorCode::Config, format!("`{}`", out.display()), message));
        }
        (Some(_), _) => return Ok(()),
        (None, Some(_)) => {}
    }
    let Some(init) = init else { return Ok(()) };
    for name in sidecar_names(&init.dir)? {
        let (from, to) = (init.dir.join(&name), out.join(&name));
        let bytes = fs::read(&from).map_err(|e| Error::io("read", &from, e))?;
        if let Some(folder) = to.parent() {
            crate::format::create_folder(folder)?;
        }
        write_bytes(&to, &bytes)?;
    }
    Ok(())
}

/// The tokenizer in `dir`, if it differs from the one in `base`.
fn vocabulary(dir: &Path, base: &Path, new_rows: bool) -> Result<Option<u64>> {
    let (path, base_path) = (dir.join(TOKENIZER), base.join(TOKENIZER));
    let Some(bytes) = read(&path)? else { return Ok(None) };
    let base_bytes = read(&base_path)?;
    if base_bytes.as_deref() == Some(&bytes[..]) {
        return Ok(None);
    }
    let parse = |path: &Path, bytes: &[u8]| -> Result<Value> {
        let mut json = Value::Object(parse_object(path, bytes)?);
        // Trainers leave how they cut and padded; neither is done here.
        for key in ["truncation", "padding"] {
            json.as_object_mut().and_then(|map| map.insert(key.to_owned(), Value::Null));
        }
        Ok(json)
    };
    let own = parse(&path, &bytes)?;
    let Some(base_bytes) = base_bytes else { return Ok(Some(hash(&own))) };
    let of_base = parse(&base_path, &base_bytes)?;
    if own == of_base {
        return Ok(None);
    }
    let (ids, known) = (tokens(&own), tokens(&of_base));
    let other = ids.iter().find_map(|(id, text)| Some((id, text, known.get(id).filter(|known| *known != text)?)));
    match other {
        Some((id, text, known)) if !new_rows => {
            let message = format!(
                "expected the base's vocabulary with tokens added, got `{text}` for id {id}, which is `{known}` in the \
                 base; use the base that the adapter was trained on, or take `{TOKENIZER}` out of the adapter's folder"
            );
            Err(Error::new(ErrorCode::AdapterMismatch, format!("`{}`", path.display()), message))
        }
        _ => Ok(Some(hash(&own))),
    }
}

fn hash(json: &Value) -> u64 {
    let mut hasher = DefaultHasher::new();
    json.to_string().hash(&mut hasher);
    hasher.finish()
}

/// A tokenizer's vocabulary by id, without added tokens: those are renamed at times.
fn tokens(json: &Value) -> BTreeMap<u64, &str> {
    match json.pointer("/model/vocab") {
        Some(Value::Object(map)) => map.iter().filter_map(|(text, id)| Some((id.as_u64()?, text.as_str()))).collect(),
        Some(Value::Array(list)) => {
            (0..).zip(list).filter_map(|(id, piece)| Some((id, piece.get(0)?.as_str()?))).collect()
        }
        _ => BTreeMap::new(),
    }
}

/// Special tokens that the files in `dir` name, and what they say is added around a text.
fn special_tokens(dir: &Path) -> Result<BTreeMap<String, Value>> {
    let mut all = BTreeMap::new();
    // The first counts, as where they are opened.
    for file in ["special_tokens_map.json", "tokenizer_config.json"] {
        let path = dir.join(file);
        let config: Map<String, Value> = read_json(&path)?;
        for name in ["bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token", "add_eos_token"] {
            if let Some(value) = config.get(name).filter(|v| !v.is_null()) {
                all.insert(name.to_owned(), value.get("content").unwrap_or(value).clone());
            }
        }
    }
    Ok(all)
}

fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("read", path, e)),
    }
}
