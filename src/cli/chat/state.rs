//! The file that keeps a chat (`--state`).

use crate::chat::Message;
use crate::engine;
use crate::error::{Error, ErrorCode, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// When a file was written, and its length: what changes when somebody else writes it.
type Stamp = Option<(SystemTime, u64)>;

/// A file that one chat reads once and writes after each answer.
pub(super) struct StateFile {
    path: PathBuf,
    /// What it holds.
    kept: Vec<Message>,
    /// As it was when this chat last read or wrote it.
    stamp: Stamp,
}

impl StateFile {
    /// The file at `path`, which need not be there yet.
    ///
    /// # Errors
    /// It is a folder, or nothing can be written beside it: better known now than after an answer.
    pub fn open(path: PathBuf) -> Result<Self> {
        if path.is_dir() {
            let message = "expected a file that keeps the chat, got a folder; name a file in it";
            return Err(Error::new(ErrorCode::Config, format!("`{}`", path.display()), message));
        }
        let folder = crate::format::folder_of(&path);
        crate::format::create_folder(&folder)?;
        tempfile::tempfile_in(&folder).map_err(|e| Error::io("write into", &folder, e))?;
        let stamp = stamp(&path);
        Ok(Self { path, kept: Vec::new(), stamp })
    }

    /// Has `chat` go on with what the file holds, and gives its path; nothing where there is no file.
    ///
    /// # Errors
    /// As [`engine::Chat::load_state`].
    pub fn load(&mut self, chat: &mut engine::Chat) -> Result<Option<PathBuf>> {
        if !self.path.exists() {
            return Ok(None);
        }
        self.stamp = stamp(&self.path);
        chat.load_state(&self.path)?;
        self.kept = chat.messages().to_vec();
        Ok(Some(self.path.clone()))
    }

    /// Writes what was said since.
    ///
    /// # Errors
    /// It cannot be written; another chat has written it, whose turns would be lost.
    pub fn keep(&mut self, chat: &mut engine::Chat) -> Result<()> {
        if self.kept == chat.messages() {
            return Ok(());
        }
        if stamp(&self.path) != self.stamp {
            let message = "expected the file as this chat left it, got one that something else has written since, such as \
                           another chat; what is said here is not kept: `/save` it to another file";
            return Err(Error::new(ErrorCode::Config, format!("`{}`", self.path.display()), message));
        }
        chat.save_state(&self.path)?;
        (self.kept, self.stamp) = (chat.messages().to_vec(), stamp(&self.path));
        Ok(())
    }
}

fn stamp(path: &Path) -> Stamp {
    fs::metadata(path).ok().and_then(|meta| Some((meta.modified().ok()?, meta.len())))
}
