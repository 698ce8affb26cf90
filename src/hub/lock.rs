//! Locks between processes, which the system releases even when a process is killed.

use super::TICK;
use crate::error::{Error, Result};
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;

/// Whom a lock keeps out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Those who would change what is locked.
    Shared,
    /// Everybody.
    Exclusive,
}

/// A lock on the file at a path, held until this is dropped. The file stays, for its name is what others wait at.
#[derive(Debug)]
pub struct Lock {
    file: File,
    path: PathBuf,
}

impl Lock {
    /// Waits for the lock; `wait` is asked now and then and ends the waiting with an error.
    ///
    /// # Errors
    /// The file cannot be made, or `wait` gave up.
    pub fn take(path: &Path, mode: Mode, wait: &mut dyn FnMut() -> Result<()>) -> Result<Self> {
        loop {
            match Self::attempt(path, mode).map_err(|e| Error::io("lock", path, e))? {
                Some(lock) => return Ok(lock),
                None => wait()?,
            }
            thread::sleep(TICK);
        }
    }

    /// The lock, if nobody else is in the way now.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn attempt(path: &Path, mode: Mode) -> io::Result<Option<Self>> {
        loop {
            let file = File::options().create(true).truncate(false).write(true).open(path)?;
            let locked = if mode == Mode::Shared { file.try_lock_shared() } else { file.try_lock() };
            match locked {
                Ok(()) if is_at(&file, path) => return Ok(Some(Self { file, path: path.to_owned() })),
                Ok(()) => {} // somebody took the file away between our opening and locking it
                Err(TryLockError::WouldBlock) => return Ok(None),
                // A file system without locks: everybody is let in, as before there were any.
                Err(TryLockError::Error(e)) if e.kind() == io::ErrorKind::Unsupported => {
                    return Ok(Some(Self { file, path: path.to_owned() }));
                }
                Err(TryLockError::Error(e)) => return Err(e),
            }
        }
    }

    /// Takes the file away with the lock, which must be exclusive: nothing is left there to be locked.
    pub fn dissolve(self) {
        // Elsewhere an open file cannot be taken away; an empty one harms nobody.
        if cfg!(unix) {
            fs::remove_file(&self.path).ok();
        }
        drop(self.file);
    }
}

/// Whether the file at `path` is still the open one.
fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt as _;
        let id = |meta: fs::Metadata| (meta.dev(), meta.ino());
        matches!((file.metadata().map(id), fs::metadata(path).map(id)), (Ok(a), Ok(b)) if a == b)
    }
    #[cfg(not(unix))]
    {
        let _ = (file, path);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_share_and_a_lock_that_was_taken_away_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.lock");
        let attempt = |mode| Lock::attempt(&path, mode).unwrap();
        let (a, b) = (attempt(Mode::Shared).unwrap(), attempt(Mode::Shared).unwrap());
        assert!(attempt(Mode::Exclusive).is_none());
        drop((a, b));
        let own = attempt(Mode::Exclusive).unwrap();
        assert!(attempt(Mode::Shared).is_none());
        own.dissolve();
        assert_eq!(path.exists(), cfg!(not(unix)));
        assert!(attempt(Mode::Exclusive).is_some());
    }
}
