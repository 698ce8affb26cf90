//! A chat in a file: what was said, and what the model remembers of it, so that a chat goes on as if it had never ended.

use super::{Chat, Engine};
use crate::adapter::mark;
use crate::chat::Message;
use crate::checksum::{add, sum_of};
use crate::engine::Precision;
use crate::error::{Error, ErrorCode, Result};
use crate::exec::{KeptFacts, Parts};
use crate::format::safetensors::TensorFile;
use crate::format::{Entry, Staged, Writer, foreign};
use crate::generate::Sampling;
use bytes::Bytes;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::io::{BufWriter, Cursor, Seek, Write};
use std::path::Path;
use std::sync::Arc;

/// Key of the facts in the file's metadata.
const META: &str = foreign::CHAT;
/// A tensor of 8 bytes: a sum over the facts and all other tensors, which tells flipped bits.
const CHECKSUM: &str = "checksum";
/// What messages call a chat that was kept as bytes.
const MEMORY: &str = "kept chat";
/// How the parts are laid out. Files of another layout are refused.
const LAYOUT: u32 = 1;

/// What a file belongs to.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Owner {
    /// Hash of the base's content, where it has one, and of its config and list of tensors.
    base: String,
    /// Hash and scale of each adapter.
    adapters: Vec<(u64, f32)>,
    /// How numbers are kept and multiplied.
    numbers: String,
}

/// What it holds beside the bytes.
#[derive(Serialize, Deserialize)]
struct Facts {
    layout: u32,
    owner: Owner,
    messages: Vec<Message>,
    sampling: Sampling,
    max_tokens: usize,
    thinking: Option<bool>,
    /// What the model has read.
    ids: Vec<u32>,
    sequence: KeptFacts,
}

impl Engine {
    fn owner(&self, adapters: Vec<(u64, f32)>) -> Result<Owner> {
        let content = mark::content_of(self.base())?.unwrap_or_default();
        let precision = match self.0.precision {
            Precision::Exact => "exact",
            Precision::Bf16 => "bf16",
            Precision::Fast => "fast",
        };
        let cache = format!("{:?}", self.0.numbers.cache).to_lowercase();
        Ok(Owner {
            base: format!("{:016x} {content}", self.0.fingerprint),
            adapters,
            numbers: format!("{precision}, cache in {cache}"),
        })
    }
}

impl Chat {
    /// Writes the conversation, the settings of sampling, and what the model remembers to the file at `path`, which is
    /// replaced as a whole. It grows with the conversation as [`Engine::context_bytes`] does.
    ///
    /// # Errors
    /// The file cannot be written; an adapter in use was detached.
    pub fn save_state(&mut self, path: &Path) -> Result<()> {
        let (facts, parts) = self.kept()?;
        let failed = |e| Error::io("write", path, e);
        Staged::write(path, |file| write(BufWriter::new(file), &facts, &parts).map_err(failed))?.commit()
    }

    /// What [`Chat::save_state`] writes, as bytes.
    ///
    /// # Errors
    /// An adapter in use was detached.
    pub fn state(&mut self) -> Result<Vec<u8>> {
        let (facts, parts) = self.kept()?;
        let mut bytes = Cursor::new(Vec::new());
        write(&mut bytes, &facts, &parts).map_err(|e| Error::io("keep", Path::new(MEMORY), e))?;
        Ok(bytes.into_inner())
    }

    /// The facts, and the parts that belong to them.
    fn kept(&mut self) -> Result<(String, Parts<'_>)> {
        let set = self.current()?;
        if !Arc::ptr_eq(&set, &self.set) {
            // What is remembered was made with other adapters.
            self.transcript.keep(self.engine.base(), &[]);
            self.set = Arc::clone(&set);
        }
        let adapters = self.engine.identities(&set).ok_or_else(|| {
            Error::new(ErrorCode::Config, "chat", "an adapter in use was detached; choose others, or attach it again")
        })?;
        let (ids, owner) = (self.transcript.ids().to_vec(), self.engine.owner(adapters)?);
        let (sequence, parts) = self.transcript.kept(self.engine.base())?;
        let facts = Facts {
            layout: LAYOUT,
            owner,
            messages: self.messages.clone(),
            sampling: self.sampling.clone(),
            max_tokens: self.max_tokens,
            thinking: self.thinking,
            ids,
            sequence,
        };
        Ok((serde_json::to_string(&facts).expect("plain data serializes"), parts))
    }

    /// Goes on with the chat in the file at `path`: the next answer is what it would have been without the break.
    ///
    /// # Errors
    /// The file cannot be read or is damaged; it was kept with another base, with other adapters, or with other numbers.
    /// Nothing changes then.
    pub fn load_state(&mut self, path: &Path) -> Result<()> {
        let file = TensorFile::open(path);
        self.load(path, file)
    }

    /// As [`Chat::load_state`], from what [`Chat::state`] gave.
    ///
    /// # Errors
    /// As there.
    pub fn restore(&mut self, state: &[u8]) -> Result<()> {
        let place = Path::new(MEMORY);
        let file = TensorFile::parse(place, Bytes::copy_from_slice(state));
        self.load(place, file)
    }

    fn load(&mut self, place: &Path, file: Result<TensorFile>) -> Result<()> {
        let place = format!("`{}`", place.display());
        let broken = |expected: &str| {
            let message =
                format!("expected {expected}, got a damaged or another file; begin a new chat with a new file");
            Error::new(ErrorCode::Format, &place, message)
        };
        let file = file.map_err(|e| match e.code() {
            ErrorCode::Io => e,
            _ => broken("a chat that `--state` kept").caused_by(e),
        })?;
        let text = file.metadata().get(META).ok_or_else(|| broken("a chat that `--state` kept"))?;
        let stored = file.find(CHECKSUM).and_then(|t| Some(u64::from_le_bytes(t.bytes[..].try_into().ok()?)));
        let tensors = file.tensors().filter(|(name, _)| *name != CHECKSUM);
        let sum = tensors.fold(add(0, text.as_bytes()), |sum, (name, t)| sum.wrapping_add(sum_of(name, &t.bytes)));
        if stored != Some(sum) {
            return Err(broken("what its checksum says"));
        }
        let facts: Facts = serde_json::from_str(text).map_err(|e| broken("a chat's facts").caused_by(e))?;
        if facts.layout != LAYOUT {
            return Err(broken("a chat that this version kept"));
        }
        self.pick_kept(&facts.owner.adapters)?;
        let set = self.current()?;
        let adapters = self.engine.identities(&set).unwrap_or_default();
        let (kept, here) = (facts.owner, self.engine.owner(adapters)?);
        if kept != here {
            return Err(Error::new(ErrorCode::Config, place, differences(&kept, &here)));
        }
        facts.sampling.validate()?;
        self.checked(&set, facts.ids.clone())?;
        let (engine, find) = (self.engine.clone(), |name: &str| file.find(name).map(|tensor| &tensor.bytes[..]));
        let (on, numbers) = (engine.on(&set.adapters), engine.numbers());
        if !self.transcript.restore(on, numbers, facts.ids, &facts.sequence, &find)? {
            return Err(broken("parts that agree with each other and with the model"));
        }
        self.set = set;
        (self.messages, self.sampling) = (facts.messages, facts.sampling);
        (self.max_tokens, self.thinking) = (facts.max_tokens, facts.thinking);
        Ok(())
    }
}

/// What is not as it was, and what helps.
fn differences(kept: &Owner, here: &Owner) -> String {
    if kept.base != here.base {
        let next = "give the model that the chat was kept with, or begin a new chat with a new file";
        return format!("expected the base with the hash `{}`, got `{}`; {next}", kept.base, here.base);
    }
    if kept.adapters != here.adapters {
        let named = |adapters: &[(u64, f32)]| {
            let one = |(hash, scale): &(u64, f32)| format!("{hash:016x}={scale}");
            if adapters.is_empty() {
                "none".to_owned()
            } else {
                adapters.iter().map(one).collect::<Vec<_>>().join(", ")
            }
        };
        let (kept, here) = (named(&kept.adapters), named(&here.adapters));
        let next = "attach those that the chat was kept with, at the same scales and in that order, or begin a new chat \
                    with a new file";
        return format!("expected the adapters with the hashes `{kept}`, got `{here}`; {next}");
    }
    let next = "open the model with the settings that the chat was kept with, or begin a new chat with a new file";
    format!("expected numbers as `{}`, got `{}`; {next}", kept.numbers, here.numbers)
}

fn write<W: Write + Seek>(out: W, text: &str, parts: &Parts<'_>) -> std::io::Result<()> {
    let entry = |name: &str, len: usize| Entry { name: name.to_owned(), dtype: Dtype::U8, shape: vec![len] };
    let entries = parts.iter().map(|(name, bytes)| entry(name, bytes.len())).chain([entry(CHECKSUM, 8)]).collect();
    let mut writer = Writer::new(out, json!({ META: text }), entries, Vec::new());
    let mut sum = add(0, text.as_bytes());
    for (name, bytes) in parts {
        sum = sum.wrapping_add(sum_of(name, bytes));
        writer.write(name, 0, bytes)?;
    }
    writer.write(CHECKSUM, 0, &sum.to_le_bytes())?;
    writer.finish().map(|_| ())
}
