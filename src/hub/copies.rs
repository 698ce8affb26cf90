//! NF4 copies of models, made at first use and kept in the cache.
//!
//! A copy lies in a folder whose name changes whenever anything does that it depends on (see [`Origin`]), and never
//! changes itself. Whoever uses one holds a shared lock, whoever makes or removes one an exclusive lock, so that two
//! programs make one copy between them, and none is taken away under a running one.

use super::lock::{Lock, Mode};
use super::name;
use super::origin::{FILE, Fingerprints, Origin};
use super::{Hub, stopped};
use crate::check_import;
use crate::error::{Error, Result};
use crate::format::atomic::AtomicDir;
use crate::format::{
    CONFIG, Checkpoint, Existing, MODEL, Progress, Sidecars, Source, Target, TensorMeta, nf4_bytes, open_source,
    quantize, write_sidecars,
};
use serde_json::{Map, Value};
use std::fs::{self, File};
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// What the making of a copy tells. Each event can be answered with `Break`, which stops it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Making<'a> {
    /// Another program makes or removes the same copy; this one waits for it. Sent again and again.
    Waiting,
    /// Weights are converted.
    Progress(Progress<'a>),
    /// A copy was removed to keep within the cache's limit.
    Removed {
        /// What it was made from.
        name: &'a str,
        /// Its size.
        bytes: u64,
    },
    /// The cache is larger than its limit, and nothing is left that may be removed.
    OverLimit {
        /// What it holds, the new copy included.
        bytes: u64,
        /// What it should.
        limit: u64,
    },
}

/// Who is told, and may stop the making.
pub type Watch<'a> = dyn FnMut(Making<'_>) -> ControlFlow<()> + 'a;

/// An NF4 copy of a model, which stays while this value lives.
#[derive(Debug)]
pub struct Copy {
    /// A Hugging Face directory.
    pub dir: PathBuf,
    /// Whether it was made just now.
    pub new: bool,
    _lock: Option<Lock>,
}

impl Hub {
    /// The NF4 copy of the model at `source`, made now if there is none of what the model holds today. `name` is what
    /// people call the model.
    ///
    /// # Errors
    /// As [`quantize`]; the cache cannot be written; `Cancelled`: `watch` said `Break`.
    pub fn quantized(&self, source: &Path, name: &str, watch: &mut Watch<'_>) -> Result<Copy> {
        let full = source.canonicalize().map_err(|e| Error::io("find", source, e))?;
        let fingerprints = Fingerprints::of(&full)?;
        let folder = self.copies();
        let dir = folder.join(format!("{}-nf4-{}", label(&full), fingerprints.key(&full)));
        if !is_whole(&dir) {
            // Of a model that could not run nothing is left, not even a folder.
            check_import(open_source(&full)?.as_ref(), &full)?;
        }
        if let Err(e) = self.create(&folder) {
            // A cache that cannot be written to still serves what it has.
            return if is_whole(&dir) { Ok(Copy { dir, new: false, _lock: None }) } else { Err(e) };
        }
        let (at, mut new) = (lock_of(&dir), false);
        loop {
            match Lock::take(&at, Mode::Shared, &mut || tell(watch, Making::Waiting)) {
                Ok(lock) if is_whole(&dir) => {
                    touch(&dir.join(FILE));
                    return Ok(Copy { dir, new, _lock: Some(lock) });
                }
                Err(_) if is_whole(&dir) && File::create(&at).is_err() => {
                    return Ok(Copy { dir, new, _lock: None });
                }
                other => drop(other?),
            }
            let own = Lock::take(&at, Mode::Exclusive, &mut || tell(watch, Making::Waiting))?;
            // Whoever had the lock before may have made it.
            if !is_whole(&dir) {
                if let Err(e) = self.make(&full, name, &fingerprints, &dir, watch) {
                    own.dissolve();
                    return Err(e);
                }
                new = true;
            }
        }
    }

    /// Where copies lie.
    pub(super) fn copies(&self) -> PathBuf {
        self.home.join("quantized")
    }

    /// Makes the copy `dir`, whose exclusive lock the caller holds.
    fn make(
        &self,
        full: &Path,
        name: &str,
        fingerprints: &Fingerprints,
        dir: &Path,
        watch: &mut Watch<'_>,
    ) -> Result<()> {
        sweep(dir);
        if dir.exists() {
            // What is left of a damaged copy. It has a name of ours, and all of it can be made again.
            let aside = hidden(dir, ".tmp-removed");
            fs::rename(dir, &aside).map_err(|e| Error::io("remove", dir, e))?;
            fs::remove_dir_all(&aside).map_err(|e| Error::io("remove", &aside, e))?;
        }
        let source = WithOrigin { inner: open_source(full)?, origin: Origin::new(name, full, fingerprints.clone()) };
        if let Some((older, lock)) = self.with_same_weights(&source.origin)
            && holds(&older, &source)
        {
            link(&older, &source, dir)?;
            drop(lock);
            // All that it had and the new one has not are texts that are out of date.
            if let Ok(Some(lock)) = Lock::attempt(&lock_of(&older), Mode::Exclusive) {
                discard(&older, lock)?;
            }
            return Ok(());
        }
        self.make_room(nf4_bytes(&source), watch)?;
        quantize(&source, dir, Target::Nf4, Existing::Keep, &mut |p| watch(Making::Progress(p)))?;
        Ok(())
    }

    /// Another copy of the same model, whose weights are what would be made now, held.
    fn with_same_weights(&self, wanted: &Origin) -> Option<(PathBuf, Lock)> {
        let same = |dir: &PathBuf| {
            Origin::of(dir)
                .is_some_and(|o| o.path == wanted.path && o.fingerprints.weights == wanted.fingerprints.weights)
        };
        let mut dirs = fs::read_dir(self.copies()).ok()?.flatten().map(|entry| entry.path()).filter(same);
        dirs.find_map(|dir| {
            let lock = Lock::attempt(&lock_of(&dir), Mode::Shared).ok()??;
            is_whole(&dir).then_some((dir, lock))
        })
    }
}

/// Whether the copy `dir` has the weights of `source`, no more and no fewer: a config that ties the head to the embedding
/// leaves out a head of its own.
fn holds(dir: &Path, source: &dyn Source) -> bool {
    let tensors = source.tensors();
    Checkpoint::open(dir)
        .is_ok_and(|c| c.weights().count() == tensors.len() && tensors.iter().all(|t| c.contains(&t.name)))
}

/// What goes into a copy: the model and where it is from.
struct WithOrigin {
    inner: Box<dyn Source>,
    origin: Origin,
}

impl Source for WithOrigin {
    fn config(&self) -> &Map<String, Value> {
        self.inner.config()
    }

    fn tensors(&self) -> &[TensorMeta] {
        self.inner.tensors()
    }

    fn read_rows(&self, index: usize, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.inner.read_rows(index, rows, out)
    }

    fn by_rows(&self, index: usize) -> bool {
        self.inner.by_rows(index)
    }

    fn sidecars(&self) -> Result<Sidecars> {
        let mut sidecars = self.inner.sidecars()?;
        let sizes = sidecars.files.iter().map(|(name, bytes)| (name.clone(), bytes.len() as u64));
        let origin = Origin { files: sizes.collect(), ..self.origin.clone() };
        sidecars.files.push((FILE.to_owned(), origin.to_json()));
        Ok(sidecars)
    }

    fn files(&self) -> Vec<PathBuf> {
        self.inner.files()
    }
}

/// Makes the copy `dir` with the weights of the copy `older`: they are the same file under two names, where the file
/// system has that.
fn link(older: &Path, source: &WithOrigin, dir: &Path) -> Result<()> {
    let new = AtomicDir::create(dir, |_| false)?;
    for name in [MODEL, CONFIG] {
        let (from, to) = (older.join(name), new.path().join(name));
        fs::hard_link(&from, &to)
            .or_else(|_| fs::copy(&from, &to).map(drop))
            .map_err(|e| Error::io("copy", &from, e))?;
    }
    write_sidecars(source, new.path())?;
    new.commit()
}

/// Whether `dir` is a copy. It appeared as a whole, but disks fill and people tidy up.
pub(super) fn is_whole(dir: &Path) -> bool {
    let size = |name: &str| fs::metadata(dir.join(name)).map_or(u64::MAX, |m| m.len());
    Origin::of(dir).is_some_and(|origin| origin.files.iter().all(|(name, bytes)| size(name) == *bytes))
        && Checkpoint::open(dir).is_ok()
}

/// Where the copy `dir` is locked.
pub(super) fn lock_of(dir: &Path) -> PathBuf {
    hidden(dir, ".lock")
}

fn hidden(dir: &Path, ending: &str) -> PathBuf {
    dir.with_file_name(format!(".{}{ending}", dir.file_name().unwrap_or_default().to_string_lossy()))
}

/// Takes away the copy `dir`, whose exclusive lock is `lock`. It is gone at once, though its bytes take a while.
///
/// # Errors
/// The system refused.
pub(super) fn discard(dir: &Path, lock: Lock) -> Result<()> {
    let aside = hidden(dir, ".tmp-removed");
    fs::rename(dir, &aside).map_err(|e| Error::io("remove", dir, e))?;
    fs::remove_dir_all(&aside).map_err(|e| Error::io("remove", &aside, e))?;
    lock.dissolve();
    Ok(())
}

/// Takes away what killed makers of the copy `dir` left. Needs its lock.
fn sweep(dir: &Path) {
    let prefix = hidden(dir, ".tmp-");
    let (Some(folder), Some(prefix)) = (dir.parent(), prefix.file_name()) else { return };
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(prefix.as_encoded_bytes()) {
            fs::remove_dir_all(entry.path()).ok();
        }
    }
}

/// Notes that the file at `path`, and what it stands for, is used now.
pub(super) fn touch(path: &Path) {
    if let Ok(file) = File::options().append(true).open(path) {
        file.set_modified(SystemTime::now()).ok();
    }
}

/// A readable start for the name of a copy of the model at `path`.
fn label(path: &Path) -> String {
    let of_hub = path.ancestors().find_map(|p| p.file_name()?.to_str()?.strip_prefix("models--").map(str::to_owned));
    let own = || {
        let stem = if path.is_dir() { path.file_name() } else { path.file_stem() };
        stem.unwrap_or_default().to_string_lossy().into_owned()
    };
    let text: String = of_hub.unwrap_or_else(own).chars().take(64).map(|c| if plain(c) { c } else { '_' }).collect();
    if name::is_plain(&text) { text } else { format!("model{text}") }
}

fn plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || "._-".contains(c)
}

fn tell(watch: &mut Watch<'_>, event: Making<'_>) -> Result<()> {
    if watch(event).is_break() { Err(stopped()) } else { Ok(()) }
}
