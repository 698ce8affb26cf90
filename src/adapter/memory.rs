//! An adapter's folder in memory: the same files by their names, and no folder on a disk.
//!
//! Such an adapter is what a host's own container holds, or what was sealed. Its tokenizer and template are the model's.

use super::beside::FILE as BESIDE;
use super::peft::{CONFIG, WEIGHTS};
use super::{AdapterFile, CENTROID, Centroid};
use crate::error::{Error, ErrorCode, Result};
use crate::format::foreign::parse_object;
use crate::format::safetensors::TensorFile;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::path::Path;

/// Files of a folder by their names, those of folders below it with `/` between.
pub type Parts = BTreeMap<String, Bytes>;

/// What an adapter was taught before: its name in the folder.
pub(crate) const LESSONS: &str = "lessons.json";

impl AdapterFile {
    /// Reads a PEFT adapter whose `adapter_config.json` is `config` and whose `adapter_model.safetensors` is `tensors`.
    /// No file is touched. In messages it is called `name`.
    ///
    /// # Errors
    /// As [`AdapterFile::open`].
    pub fn from_bytes(config: &[u8], tensors: impl Into<Bytes>, name: impl AsRef<Path>) -> Result<Self> {
        let config = Bytes::copy_from_slice(config);
        let parts = [(CONFIG, config), (WEIGHTS, tensors.into())].map(|(name, bytes)| (name.to_owned(), bytes));
        Self::from_parts(Parts::from(parts), name)
    }

    /// As [`AdapterFile::from_bytes`], of all files of the folder: adapters beside the first, and its centroid, are read,
    /// too. What is there in vain is said in [`AdapterFile::warnings`].
    ///
    /// # Errors
    /// As there.
    pub fn from_parts(mut parts: Parts, name: impl AsRef<Path>) -> Result<Self> {
        let name = name.as_ref();
        let mut beside = Vec::new();
        let path = name.join(BESIDE);
        let listed = parts.remove(BESIDE).map(|list| super::beside::listed(&path, &parse_object(&path, &list)?));
        for folder in listed.transpose()?.into_iter().flatten() {
            let prefix = format!("{folder}/");
            let names: Vec<String> = parts.keys().filter(|part| part.starts_with(&prefix)).cloned().collect();
            let below = names.iter().filter_map(|part| parts.remove_entry(part));
            let own: Parts = below.map(|(part, bytes)| (part[prefix.len()..].to_owned(), bytes)).collect();
            if own.contains_key(BESIDE) {
                return Err(super::beside::nested(&name.join(folder)));
            }
            beside.push(Self::from_parts(own, name.join(folder))?);
        }
        let mut take = |file: &str| {
            parts.remove(file).ok_or_else(|| {
                let message = format!("expected `{file}` among the files in memory, got none; give it, too");
                Error::new(ErrorCode::Format, format!("`{}`", name.display()), message)
            })
        };
        let (config, weights) = (take(CONFIG)?, take(WEIGHTS)?);
        let json = parse_object(&name.join(CONFIG), &config)?;
        let mut file = Self::read(name, &json, |path| TensorFile::parse(path, weights), beside)?;
        let unread = parts.keys().filter(|part| ![CENTROID, LESSONS].contains(&part.as_str()));
        file.warnings.extend(unread.map(|part| format!("`{part}` is not read of an adapter in memory")));
        parts.retain(|part, _| [CENTROID, LESSONS].contains(&part.as_str()));
        file.in_memory = Some(parts);
        Ok(file)
    }

    /// Where its folder lies, or is to lie; none if it was read from memory.
    #[must_use]
    pub fn folder(&self) -> Option<&Path> {
        self.in_memory.is_none().then_some(&self.dir)
    }

    /// What it was taught about, if its folder tells.
    ///
    /// # Errors
    /// As [`Centroid::read`].
    pub fn centroid(&self) -> Result<Option<Centroid>> {
        match &self.in_memory {
            None => Centroid::read(&self.dir),
            Some(parts) => {
                let parse =
                    |bytes: &Bytes| Centroid::parse(&TensorFile::parse(&self.dir.join(CENTROID), bytes.clone())?);
                parts.get(CENTROID).map(parse).transpose()
            }
        }
    }

    /// The file `name` that lies beside its tensors in memory.
    pub(crate) fn part(&self, name: &str) -> Option<&Bytes> {
        self.in_memory.as_ref()?.get(name)
    }
}
