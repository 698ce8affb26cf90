//! What lies in a model's cache folder. The record is written last: a folder without one is unfinished.

use crate::error::{Error, ErrorCode, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// The record's name inside the model's folder.
const FILE: &str = "pulled.json";

/// What was pulled, and from where. Paths are relative to the model's folder, or absolute where the hub's own cache
/// keeps the files, which other programs share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The source, as the manifest's `Display` names it.
    pub source: String,
    /// The weights' licence.
    pub licence: String,
    /// What a command's MODEL stands for: a directory or a `.gguf` file.
    pub path: PathBuf,
    /// Every file of the model.
    pub files: Vec<Entry>,
}

/// One file of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Where it is.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Its SHA-256 in lower-case hexadecimal, where the source tells one to compare with.
    pub sha256: Option<String>,
}

impl Record {
    /// The record in `folder`, if there is one and every file still has its size. Contents were checked when they
    /// arrived; reading gigabytes again at each start would buy little.
    pub fn of(folder: &Path) -> Option<Self> {
        let text = fs::read(folder.join(FILE)).ok()?;
        let record: Self = serde_json::from_slice(&text).ok()?;
        let intact =
            |entry: &Entry| fs::metadata(folder.join(&entry.path)).is_ok_and(|m| m.is_file() && m.len() == entry.bytes);
        (!record.files.is_empty() && record.files.iter().all(intact)).then_some(record)
    }

    /// Writes the record into `folder`, beside and renamed.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        let text = serde_json::to_vec_pretty(self).map_err(|e| Error::io("write", &path, e.into()))?;
        // The caller holds the model's lock, so the name is this process's alone.
        let partial = folder.join(format!("{}record", super::PARTIAL));
        let write = || {
            let mut file = File::create(&partial)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&partial, &path)?;
            sync_folder(folder);
            Ok(())
        };
        write().map_err(|e| Error::io("write", &path, e))
    }
}

/// Makes a rename in `folder` last through a power cut. Best effort: some systems cannot sync a folder.
pub fn sync_folder(folder: &Path) {
    if let Ok(folder) = File::open(folder) {
        let _ = folder.sync_all();
    }
}

/// SHA-256 of what `from` yields, in lower-case hexadecimal. Each chunk goes to `chunk` first.
///
/// # Errors
/// Reading fails, which becomes what `unreadable` says, or `chunk` does.
pub fn sha256(
    from: impl Read,
    unreadable: impl FnOnce(io::Error) -> Error,
    chunk: impl FnMut(&[u8]) -> Result<()>,
) -> Result<String> {
    let mut hash = Sha256::new();
    hash_into(&mut hash, from, unreadable, chunk)?;
    Ok(hex(hash))
}

/// As [`sha256`], for one of several pieces that `hash` is about.
///
/// # Errors
/// As there.
pub fn hash_into(
    hash: &mut Sha256,
    mut from: impl Read,
    unreadable: impl FnOnce(io::Error) -> Error,
    mut chunk: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(unreadable(e)),
        };
        chunk(&buffer[..n])?;
        hash.update(&buffer[..n]);
    }
}

/// What `hash` has come to, in lower-case hexadecimal.
pub fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// The error of a file that is not what its source promised.
pub fn wrong_checksum(file: &str, expected: &str, got: &str) -> Error {
    Error::new(
        ErrorCode::Network,
        format!("`{file}`"),
        format!("expected sha256 `{expected}`, got `{got}`; nothing was kept of it"),
    )
}
