//! Files and directories that appear whole or not at all: written beside, synced, renamed.
//!
//! Temporary names begin with `.NAME.tmp-pocketlora-`, and their makers hold a lock on them. Only a kill leaves one behind, and
//! whoever writes to the same folder next takes away what nobody holds.

use crate::error::{Error, ErrorCode, Result};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use tempfile::{NamedTempFile, TempDir};

/// What marks a temporary name, whoever made it, and as one of this program.
const TEMP: &str = ".tmp-";
const OURS: &str = ".tmp-pocketlora-";
/// Another program may take what it finds unlocked for left behind; nobody is that unlucky more often.
const TRIES: usize = 8;

/// Writes the file at `path` through `write`. Readers see the old file or the new one, also after a power cut.
///
/// # Errors
/// `write` failed, or the system refused; what was at `path` is untouched.
pub fn write_file(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    Staged::write(path, write)?.commit()
}

/// A file that is written and synced, but not yet under its name; dropped without [`commit`](Self::commit), it
/// vanishes. Files that belong together are all staged before the first is committed, so that a full disk spares them.
#[derive(Debug)]
pub struct Staged {
    place: Place,
    temp: NamedTempFile<File>,
}

impl Staged {
    /// Writes what shall become the file at `path` through `write`.
    ///
    /// # Errors
    /// `write` failed, or the system refused.
    pub fn write(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<Self> {
        let place = Place::of(path)?;
        sweep_killed(&place.parent);
        let prefix = place.hidden(OURS);
        // `make_in` rather than `tempfile_in`, which would leave the final file readable by its owner only.
        let make = || tempfile::Builder::new().prefix(&prefix).make_in(&place.parent, |path| File::create_new(path));
        let held = held(make, |temp| temp.as_file().lock().is_err() || temp.path().exists());
        let mut temp = held.map_err(|e| Error::io("create a temporary file for", path, e))?;
        write(temp.as_file_mut())?;
        sync(temp.as_file()).map_err(|e| Error::io("sync", path, e))?;
        Ok(Self { place, temp })
    }

    /// Gives the file its name.
    ///
    /// # Errors
    /// The system refused; what was there is untouched.
    pub fn commit(self) -> Result<()> {
        let Self { place, temp } = self;
        temp.persist(&place.path).map_err(|e| Error::io("rename a temporary file to", &place.path, e.error))?;
        sync_dir(&place.parent)
    }
}

/// [`write_file`] with content that is ready.
///
/// # Errors
/// As there.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    write_file(path, |file| file.write_all(bytes).map_err(|e| Error::io("write", path, e)))
}

/// Deletes the temporary files that killed writers of the file at `path` have left. The caller knows that no other writer
/// is at work. What cannot be deleted stays: it only takes room.
pub(crate) fn sweep(path: &Path) {
    let Ok(place) = Place::of(path) else { return };
    let prefix = place.hidden(TEMP);
    for entry in fs::read_dir(&place.parent).into_iter().flatten().flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(prefix.as_encoded_bytes()) {
            fs::remove_file(entry.path()).ok();
        }
    }
}

/// Makes something temporary until `holds` says that it is locked and still there.
fn held<T>(make: impl Fn() -> io::Result<T>, holds: impl Fn(&T) -> bool) -> io::Result<T> {
    let mut made = make()?;
    for _ in 1..TRIES {
        if holds(&made) {
            break;
        }
        made = make()?;
    }
    Ok(made)
}

/// Deletes what killed programs of this kind have left half-written in `folder`: what bears our mark and nobody holds. Where a
/// file system has no locks, and folders on Windows, nothing is known to be left behind, and all stays.
pub(crate) fn sweep_killed(folder: &Path) {
    let is_ours = |name: &OsStr| {
        let name = name.to_string_lossy();
        name.starts_with('.') && name.contains(OURS)
    };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten().filter(|entry| is_ours(&entry.file_name())) {
        let path = entry.path();
        // The lock is held until what it is on is gone, so that nobody begins to fill it meanwhile.
        let Some(lock) = File::open(&path).ok().filter(|file| file.try_lock().is_ok()) else { continue };
        match path.is_dir() {
            true => fs::remove_dir_all(&path).ok(),
            false => fs::remove_file(&path).ok(),
        };
        drop(lock);
    }
}

/// A directory being filled under a temporary name; dropped without [`commit`](Self::commit), it vanishes.
#[derive(Debug)]
pub struct AtomicDir {
    place: Place,
    temp: TempDir,
    may_replace: fn(&Path) -> bool,
    /// Tells others that somebody is at work here.
    lock: Option<File>,
}

impl AtomicDir {
    /// Starts a directory that will appear at `path`. What is there already must be an empty directory or one that
    /// `may_replace` accepts, for it will be deleted.
    ///
    /// # Errors
    /// `path` holds something else, or the temporary directory beside it cannot be created.
    pub fn create(path: &Path, may_replace: fn(&Path) -> bool) -> Result<Self> {
        let place = Place::of(path)?;
        place.recover()?;
        place.occupant(may_replace)?;
        sweep_killed(&place.parent);
        let mut builder = tempfile::Builder::new();
        let prefix = place.hidden(OURS);
        builder.prefix(&prefix);
        #[cfg(unix)] // the usual permissions instead of the owner's only
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        let make = || {
            let temp = builder.tempdir_in(&place.parent)?;
            let lock = File::open(temp.path()).ok().filter(|dir| dir.lock().is_ok());
            Ok((temp, lock))
        };
        let (temp, lock) = held(make, |(temp, _)| temp.path().exists())
            .map_err(|e| Error::io("create a temporary directory for", &place.path, e))?;
        Ok(Self { place, temp, may_replace, lock })
    }

    /// Where to put the files meanwhile.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.temp.path()
    }

    /// Syncs all files and renames the directory to its final name. A directory that is there already is moved
    /// aside first and back if the rename fails.
    ///
    /// # Errors
    /// The system refused, or something irreplaceable has appeared at the final name; what was there is untouched.
    pub fn commit(self) -> Result<()> {
        let Self { place, temp, may_replace, lock } = self;
        sync_tree(temp.path())?;
        let (path, previous) = (&place.path, place.previous());
        let rename = |from: &Path, to: &Path| fs::rename(from, to).map_err(|e| Error::io("rename to", to, e));
        match place.occupant(may_replace)? {
            Occupant::None => rename(temp.path(), path)?,
            Occupant::Empty => {
                fs::remove_dir(path).map_err(|e| Error::io("replace", path, e))?;
                rename(temp.path(), path)?;
            }
            Occupant::Replaceable => {
                rename(path, &previous)?;
                if let Err(e) = rename(temp.path(), path) {
                    rename(&previous, path)?;
                    return Err(e);
                }
                // The new one is in place; leftovers of the old one are taken away next time.
                fs::remove_dir_all(&previous).ok();
            }
        }
        drop((temp.keep(), lock)); // renamed: there is nothing left to delete under the temporary name
        sync_dir(&place.parent)
    }
}

/// Waits until `file` is on the disk, and lets a large one go from the system's cache: what was written in small pieces
/// lies there in small pages, and is to come back in large ones (see [`crate::mmap`]).
fn sync(file: &File) -> io::Result<()> {
    file.sync_all()?;
    #[cfg(target_os = "linux")]
    if file.metadata()?.len() >= crate::mmap::LARGE_PAGE as u64 {
        // A wish: where it is not granted, nothing is lost but speed.
        rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).ok();
    }
    Ok(())
}

enum Occupant {
    None,
    Empty,
    Replaceable,
}

/// A final name, symbolic link followed, taken apart.
#[derive(Debug)]
struct Place {
    path: PathBuf,
    parent: PathBuf,
    name: OsString,
}

impl Place {
    fn of(path: &Path) -> Result<Self> {
        let path = if path.is_symlink() {
            fs::canonicalize(path).map_err(|e| Error::io("follow the link at", path, e))?
        } else {
            path.to_path_buf()
        };
        let Some(name) = path.file_name().map(OsStr::to_owned) else {
            return Err(Error::config("output path", "a path that ends in a name", path.display()));
        };
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        Ok(Self { path, parent, name })
    }

    fn hidden(&self, ending: &str) -> OsString {
        let mut name = OsString::from(".");
        name.push(&self.name);
        name.push(ending);
        name
    }

    /// Where a replaced directory waits while its successor is renamed into place.
    fn previous(&self) -> PathBuf {
        self.parent.join(self.hidden(".previous"))
    }

    /// Finishes what a kill between the two renames of a replacement left undone.
    fn recover(&self) -> Result<()> {
        let previous = self.previous();
        if !previous.exists() {
            return Ok(());
        }
        let done = if self.path.exists() { fs::remove_dir_all(&previous) } else { fs::rename(&previous, &self.path) };
        done.map_err(|e| Error::io("take away", &previous, e))
    }

    fn occupant(&self, may_replace: fn(&Path) -> bool) -> Result<Occupant> {
        if !self.path.exists() {
            return Ok(Occupant::None);
        }
        let is_dir = self.path.is_dir();
        if is_dir && fs::read_dir(&self.path).is_ok_and(|mut entries| entries.next().is_none()) {
            return Ok(Occupant::Empty);
        }
        if is_dir && may_replace(&self.path) {
            return Ok(Occupant::Replaceable);
        }
        let message = "expected nothing or an older output of pocketlora there, got something else; choose another \
                       name or move it away";
        Err(Error::new(ErrorCode::Config, format!("`{}`", self.path.display()), message))
    }
}

fn sync_tree(dir: &Path) -> Result<()> {
    let refused = |e| Error::io("sync", dir, e);
    for entry in fs::read_dir(dir).map_err(refused)? {
        let path = entry.map_err(refused)?.path();
        if path.is_dir() {
            sync_tree(&path)?;
        } else {
            let file = File::options().write(true).open(&path);
            file.and_then(|file| sync(&file)).map_err(|e| Error::io("sync", &path, e))?;
        }
    }
    sync_dir(dir)
}

/// Makes the folder `path`, with those that it lies in.
///
/// # Errors
/// The system refuses, or something on the way is a file.
pub(crate) fn create_folder(path: &Path) -> Result<()> {
    fs::create_dir_all(path).map_err(|e| match path.ancestors().find(|part| part.exists() && !part.is_dir()) {
        Some(file) => {
            let message = "expected a folder, or a place for one, got a file; name another, or move it away";
            Error::new(ErrorCode::Config, format!("`{}`", file.display()), message)
        }
        None => Error::io("create", path, e),
    })
}

/// Makes renames in `dir` durable. Windows has no such call and needs none.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| Error::io("sync", dir, e))?;
    }
    Ok(())
}
