//! What a copy was made from: where the model lies, and enough of what it holds to see whether it still is the same.

use super::record::{hex, sha256};
use crate::error::{Error, Result};
use crate::format::gguf::parts_of;
use crate::format::{CONFIG, CONVERSION, is_gguf, is_of_parts, sidecar_names};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The record's name inside a copy.
pub const FILE: &str = "pocketlora_source.json";
/// Endings of files that hold weights.
const WEIGHTS: &[&str] = &["safetensors", "bin", "gguf", "npz"];
/// Samples that are taken of each such file, which are too large to be read at every start, and the bytes of one.
const SAMPLES: u64 = 32;
const SAMPLE: usize = 256;
/// The start of a file is read whole: headers are there.
const START: usize = 1 << 16;

/// Fingerprints of all that a copy depends on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprints {
    /// Of what the weights and the config of a copy are made from, and of the way of making them.
    pub weights: String,
    /// Of what its texts are made from: tokenizer, templates, generation settings.
    pub texts: String,
}

/// Where a copy comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// What people call the model: `OWNER/REPO`, or the path that was given.
    pub name: String,
    /// Where it lies, links followed.
    pub path: String,
    /// The hub's commit, where that is known.
    pub revision: Option<String>,
    /// What it held.
    #[serde(flatten)]
    pub fingerprints: Fingerprints,
    /// The program that made the copy.
    pub made_by: String,
    /// When, in seconds since 1970.
    pub made: u64,
    /// Sizes of its files beside weights and config.
    #[serde(default)]
    pub files: BTreeMap<String, u64>,
}

impl Origin {
    /// The origin of a copy that is made now of the model at `path`, links followed.
    pub fn new(name: &str, path: &Path, fingerprints: Fingerprints) -> Self {
        Self {
            name: name.to_owned(),
            path: path.to_string_lossy().into_owned(),
            revision: commit_of(path),
            fingerprints,
            made_by: concat!("pocketlora ", env!("CARGO_PKG_VERSION")).to_owned(),
            made: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            files: BTreeMap::new(),
        }
    }

    /// What the copy in `dir` says of itself; copies of older versions say nothing.
    pub fn of(dir: &Path) -> Option<Self> {
        serde_json::from_slice(&fs::read(dir.join(FILE)).ok()?).ok()
    }

    /// The record's content.
    pub fn to_json(&self) -> Vec<u8> {
        let mut text = serde_json::to_vec_pretty(self).expect("plain data serializes");
        text.push(b'\n');
        text
    }

    /// Why the copy is not what would be made now, if it is not.
    pub fn stale(&self) -> Option<&'static str> {
        let path = Path::new(&self.path);
        if !path.exists() {
            return Some("its model is gone");
        }
        match Fingerprints::of(path) {
            Ok(now) if now == self.fingerprints => None,
            _ if self.made_by != concat!("pocketlora ", env!("CARGO_PKG_VERSION")) => Some("made by another version"),
            _ => Some("its model has changed"),
        }
    }
}

impl Fingerprints {
    /// The fingerprints of the model at `path`: a Hugging Face directory, a `.gguf` file, or another file of weights with its
    /// `config.json` beside it.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn of(path: &Path) -> Result<Self> {
        let (mut weights, mut texts) = (Sha256::new(), Sha256::new());
        weights.update(CONVERSION.to_le_bytes());
        // Texts cost nothing to be made anew, and code that makes them changes more often.
        texts.update(CONVERSION.to_le_bytes());
        texts.update(env!("CARGO_PKG_VERSION"));
        let single = path.is_file();
        let dir = if single { path.parent().unwrap_or(Path::new("")) } else { path };
        let files = if single && !is_of_parts(path) { parts_of(path) } else { weight_files(dir)? };
        for file in &files {
            sample(&mut weights, file)?;
        }
        if !is_gguf(path) {
            whole(&mut weights, CONFIG, &dir.join(CONFIG))?;
            for name in sidecar_names(dir)? {
                whole(&mut texts, &name, &dir.join(&name))?;
            }
        }
        Ok(Self { weights: hex(weights), texts: hex(texts) })
    }

    /// A short name for the fingerprints of the model at `path`.
    pub fn key(&self, path: &Path) -> String {
        let mut hash = Sha256::new();
        for part in [path.as_os_str().as_encoded_bytes(), self.weights.as_bytes(), self.texts.as_bytes()] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        hex(hash)[..16].to_owned()
    }
}

/// The commit of a file or folder in the hub's cache: `models--OWNER--REPO/snapshots/COMMIT`.
fn commit_of(path: &Path) -> Option<String> {
    let mut above = path.ancestors();
    let commit = above.find(|p| p.parent().is_some_and(|p| p.ends_with("snapshots")))?;
    Some(commit.file_name()?.to_str()?.to_owned())
}

/// The files in `dir` that hold weights or say which does, in order.
fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::io("list", dir, e))? {
        let path = entry.map_err(|e| Error::io("list", dir, e))?.path();
        let index = path.to_string_lossy().ends_with(".index.json");
        let weights = path.extension().and_then(|e| e.to_str()).is_some_and(|e| WEIGHTS.contains(&e));
        if (index || weights) && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Takes in the content of the file at `path`.
fn whole(into: &mut Sha256, name: &str, path: &Path) -> Result<()> {
    let failed = |e| Error::io("read", path, e);
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file.map_err(failed)?,
    };
    into.update(name);
    into.update(sha256(file, failed, |_| Ok(()))?);
    Ok(())
}

/// Takes in name, size, time of change and samples of the file at `path`.
fn sample(into: &mut Sha256, path: &Path) -> Result<()> {
    let read = |into: &mut Sha256| -> io::Result<()> {
        let mut file = File::open(path)?;
        let meta = file.metadata()?;
        let changed = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_nanos());
        into.update(path.file_name().unwrap_or_default().as_encoded_bytes());
        into.update(meta.len().to_le_bytes());
        into.update(changed.to_le_bytes());
        let mut buffer = vec![0; START];
        let mut take = |file: &mut File, len: usize| -> io::Result<()> {
            let got = file.take(len as u64).read(&mut buffer[..len])?;
            into.update(&buffer[..got]);
            Ok(())
        };
        take(&mut file, START)?;
        let last = meta.len().saturating_sub(SAMPLE as u64);
        for i in 1..=SAMPLES {
            file.seek(SeekFrom::Start((last as u128 * u128::from(i) / u128::from(SAMPLES)) as u64))?;
            take(&mut file, SAMPLE)?;
        }
        Ok(())
    };
    read(into).map_err(|e| Error::io("read", path, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_a_copy_depends_on_counts() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        fs::create_dir(dir.join("additional_chat_templates")).unwrap();
        let weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json"];
        let index = ["model.safetensors.index.json"];
        let texts = [
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
            "tokenizer.model",
            "vocab.json",
            "merges.txt",
            "generation_config.json",
            "chat_template.jinja",
            "chat_template.json",
            "additional_chat_templates/tool_use.jinja",
        ];
        let all = || weights.iter().chain(&index).chain(&texts);
        all().for_each(|name| fs::write(dir.join(name), "one").unwrap());
        fs::write(dir.join("README.md"), "one").unwrap();
        let mut before = Fingerprints::of(dir).unwrap();
        assert_eq!(Fingerprints::of(dir).unwrap(), before);
        for name in all() {
            let path = dir.join(name);
            let changed = fs::metadata(&path).unwrap().modified().unwrap();
            fs::write(&path, "two").unwrap();
            // Of the same size and as old as before: the content alone tells.
            File::options().write(true).open(&path).unwrap().set_modified(changed).unwrap();
            let after = Fingerprints::of(dir).unwrap();
            assert_eq!(after.weights == before.weights, texts.contains(name), "{name}: weights");
            assert_eq!(after.texts != before.texts, texts.contains(name), "{name}: texts");
            before = after;
        }
        for name in texts {
            fs::remove_file(dir.join(name)).unwrap();
            let after = Fingerprints::of(dir).unwrap();
            assert_ne!(after.texts, before.texts, "{name}: gone");
            before = after;
        }
        fs::write(dir.join("README.md"), "two").unwrap();
        assert_eq!(Fingerprints::of(dir).unwrap(), before);
        assert_ne!(before.key(dir), before.key(temp.path().parent().unwrap()));
    }
}
