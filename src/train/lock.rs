//! One trainer per output folder, and what an earlier one left there.

use super::has_checkpoint;
use crate::adapter::AdapterFile;
use crate::error::{Error, ErrorCode, Result};
use std::fs::{File, TryLockError};
use std::path::Path;

/// The folder is taken until this is dropped, or until the process ends in whatever way.
pub(super) struct FolderLock(#[allow(dead_code, reason = "held for its lock")] Option<File>);

impl FolderLock {
    /// Takes the folder. On a file system without locks everybody gets it.
    ///
    /// # Errors
    /// Another trainer works there.
    pub fn take(out: &Path) -> Result<Self> {
        match lockable(out).map(|file| (file.try_lock(), file)) {
            Ok((Ok(()), file)) => Ok(Self(Some(file))),
            Ok((Err(TryLockError::WouldBlock), _)) => {
                let message = "expected a folder of its own for every run, got one that another trainer works in; wait \
                               for its end or name another folder";
                Err(Error::new(ErrorCode::Config, format!("`{}`", out.display()), message))
            }
            Ok((Err(TryLockError::Error(_)), _)) | Err(_) => Ok(Self(None)),
        }
    }
}

/// What carries the lock: the folder itself, which leaves no file behind, or a file in it where folders cannot be opened.
fn lockable(out: &Path) -> std::io::Result<File> {
    if cfg!(unix) { File::open(out) } else { File::create(out.join(".lock")) }
}

/// What an earlier run left in a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Earlier {
    Checkpoint,
    Adapter,
}

impl Earlier {
    /// What there is in `out`. A run that is not done tells more than the adapter that it was to replace.
    pub fn find(out: &Path) -> Option<Self> {
        let adapter = || AdapterFile::exists(out).then_some(Self::Adapter);
        has_checkpoint(out).then_some(Self::Checkpoint).or_else(adapter)
    }

    /// The error for a run that would replace it and was not told to.
    pub fn refusal(self, out: &Path) -> Error {
        let message = match self {
            Self::Checkpoint => {
                "holds the checkpoint of an unfinished run, which this one would replace; resume it, name another folder, or \
                 call `replace_earlier` first"
            }
            Self::Adapter => {
                "holds an adapter, which this run would replace; name another folder, or call `replace_earlier` first"
            }
        };
        Error::new(ErrorCode::Config, format!("`{}`", out.display()), message)
    }
}
