//! What the cache holds, what of it is out of date, and how it is taken away.

use super::copies::{Making, Watch, discard, is_whole, lock_of};
use super::lock::{Lock, Mode};
use super::origin::Origin;
use super::record::Record;
use super::{Hub, name, stopped};
use crate::error::{Error, Result};
use crate::format::head_origin;
use serde::Serialize;
use std::fs::{self, DirEntry};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// What something in the cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A model that was pulled.
    Model,
    /// An adapter that was pulled.
    Adapter,
    /// A copy of a model in NF4.
    Quantized,
    /// A copy of a model's head in 8 bits.
    Head,
    /// Data and adapter of the demo.
    Demo,
    /// What was typed in chats.
    History,
    /// What a killed program left.
    Leftover,
}

impl Kind {
    /// Whether it is made from something else, and can be made again at any time.
    #[must_use]
    pub fn is_derived(self) -> bool {
        matches!(self, Self::Quantized | Self::Head | Self::Leftover)
    }
}

/// Something in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What it is.
    pub kind: Kind,
    /// What it is called; a copy has its model's name.
    pub name: String,
    /// Where it lies in the cache.
    pub path: PathBuf,
    /// What it takes there.
    pub bytes: u64,
    /// When it was last used, as far as that is known.
    pub used: Option<SystemTime>,
    /// What it was made from, or where its files are if not in the cache.
    pub source: Option<PathBuf>,
    /// Why it is of no use any more.
    pub stale: Option<String>,
    /// Downloads in the hub's cache, which other programs share: their folder and size.
    pub shared: Option<(PathBuf, u64)>,
}

impl Hub {
    /// Everything that the cache holds, sorted by kind and name.
    ///
    /// # Errors
    /// A folder cannot be listed.
    pub fn contents(&self) -> Result<Vec<Item>> {
        let mut items = Vec::new();
        for entry in entries(&self.home.join("models"))? {
            items.extend(self.pulled(&entry));
        }
        for entry in entries(&self.copies())? {
            items.extend(copy(&entry));
        }
        let copies: Vec<Item> = items.iter().filter(|i| i.kind == Kind::Quantized).cloned().collect();
        for entry in entries(&self.home.join("int8"))? {
            let file = entry.file_name().to_string_lossy().into_owned();
            // Anything else is somebody else's.
            if file.starts_with('.')
                || file.strip_suffix(".safetensors").is_some_and(|f| ends_with_key(f, "head-int8-"))
            {
                items.push(head(&entry, &copies));
            }
        }
        for (kind, name) in [(Kind::Demo, "demo"), (Kind::History, "chat-history")] {
            let path = self.home.join(name);
            if path.exists() {
                let (name, bytes) = (name.to_owned(), size(&path));
                let used = modified(&path);
                items.push(Item { kind, name, path, bytes, used, source: None, stale: None, shared: None });
            }
        }
        items.sort_by(|a, b| (a.kind as u8, &a.name, &a.path).cmp(&(b.kind as u8, &b.name, &b.path)));
        Ok(items)
    }

    /// Takes `item` away; `None` if a running program uses it. Downloads in the hub's cache stay.
    ///
    /// # Errors
    /// The system refused.
    pub fn remove(&self, item: &Item) -> Result<Option<u64>> {
        // What is listed lies in the cache by construction; a mistake here would delete somebody's files.
        let folders = [self.home.clone(), self.home.join("models"), self.copies(), self.home.join("int8")];
        assert!(folders.iter().any(|f| item.path.parent() == Some(f)), "`{}` is in the cache", item.path.display());
        let failed = |e| Error::io("remove", &item.path, e);
        let held = match item.kind {
            Kind::Quantized => Some(lock_of(&item.path)),
            // `.NAME.tmp-..` is locked as NAME is.
            Kind::Leftover => {
                item.path.to_string_lossy().rsplit_once(".tmp-").map(|(name, _)| format!("{name}.lock").into())
            }
            Kind::Model | Kind::Adapter => Some(item.path.join(".lock")),
            Kind::Head | Kind::Demo | Kind::History => None,
        };
        let lock = match held.map(|path| Lock::attempt(&path, Mode::Exclusive)) {
            None => None,
            Some(Ok(Some(lock))) => Some(lock),
            Some(Ok(None)) => return Ok(None),
            Some(Err(e)) => return Err(failed(e)),
        };
        match (item.kind, lock) {
            (Kind::Quantized, Some(lock)) => discard(&item.path, lock)?,
            (_, lock) => {
                let link = item.path.is_symlink();
                if item.path.is_dir() && !link { fs::remove_dir_all(&item.path) } else { fs::remove_file(&item.path) }
                    .map_err(failed)?;
                if let Some(lock) = lock {
                    lock.dissolve();
                }
            }
        }
        Ok(Some(item.bytes))
    }

    /// Takes away the downloads of `item` in the hub's cache, which other programs share, and says how much that frees.
    ///
    /// # Errors
    /// The system refused.
    pub fn remove_downloads(&self, item: &Item) -> Result<u64> {
        let Some((folder, bytes)) = &item.shared else { return Ok(0) };
        fs::remove_dir_all(folder).map_err(|e| Error::io("remove", folder, e))?;
        Ok(*bytes)
    }

    /// Takes away copies, the longest unused ones first, until `more` bytes fit under the cache's limit.
    ///
    /// # Errors
    /// The cache cannot be listed, or `watch` stops it.
    pub fn make_room(&self, more: u64, watch: &mut Watch<'_>) -> Result<()> {
        let Some(limit) = self.limit else { return Ok(()) };
        let mut items = self.contents()?;
        let mut total = items.iter().map(|i| i.bytes).sum::<u64>() + more;
        items.retain(|i| i.kind.is_derived());
        items.sort_by_key(|i| (i.stale.is_none(), i.used));
        for item in items {
            if total <= limit {
                return Ok(());
            }
            // What is in use, or cannot be taken away, is passed over.
            if let Ok(Some(bytes)) = self.remove(&item) {
                total -= bytes;
                if watch(Making::Removed { name: &item.name, bytes }).is_break() {
                    return Err(stopped());
                }
            }
        }
        if total > limit && watch(Making::OverLimit { bytes: total, limit }).is_break() {
            return Err(stopped());
        }
        Ok(())
    }

    /// What was pulled into the folder `entry`; an empty folder, such as a failed pull leaves, is nothing.
    fn pulled(&self, entry: &DirEntry) -> Option<Item> {
        let folder = entry.path();
        let name = name::of_folder(&entry.file_name().to_string_lossy());
        let used = modified(&folder.join(".lock"));
        let bytes = size(&folder);
        let Some(record) = Record::of(&folder) else {
            let stale = Some("its files are gone, or were not all pulled".to_owned());
            let item = Item { kind: Kind::Model, name, path: folder, bytes, used, source: None, stale, shared: None };
            return (bytes > 0).then_some(item);
        };
        let at = folder.join(&record.path);
        let shared = at.starts_with(&self.hub_cache).then(|| {
            let repository = at.ancestors().find(|p| p.parent() == Some(self.hub_cache.as_path()))?;
            Some((repository.to_owned(), record.files.iter().map(|f| f.bytes).sum()))
        });
        let kind = if at.join("adapter_config.json").is_file() { Kind::Adapter } else { Kind::Model };
        Some(Item { kind, name, path: folder, bytes, used, source: Some(at), stale: None, shared: shared.flatten() })
    }
}

/// Whether `item` is `wanted`: its name, its path, or the path of what it was made from.
#[must_use]
pub fn is_named(item: &Item, wanted: &str) -> bool {
    let same = |path: &Path| {
        path == Path::new(wanted)
            || matches!((path.canonicalize(), Path::new(wanted).canonicalize()), (Ok(a), Ok(b)) if a == b)
    };
    let file = item.path.file_name().is_some_and(|n| n == wanted);
    item.name == wanted || file || same(&item.path) || item.source.as_deref().is_some_and(same)
}

/// Whether `item` was made from `other`.
#[must_use]
pub fn is_made_from(item: &Item, other: &Item) -> bool {
    let Some(source) = item.source.as_ref().filter(|_| item.kind.is_derived()) else { return false };
    // A copy's source is not its own: other copies of it are of no concern.
    if other.kind.is_derived() {
        return other.path.canonicalize().is_ok_and(|folder| source.starts_with(folder));
    }
    let inside = |folder: &Path| folder.canonicalize().is_ok_and(|folder| source.starts_with(folder));
    // The hub's cache has links in one folder to files in another.
    let shared = other.shared.as_ref().is_some_and(|(repository, _)| inside(repository));
    inside(&other.path) || other.source.as_deref().is_some_and(inside) || shared
}

/// The copy, or what is left of one, at `entry`.
fn copy(entry: &DirEntry) -> Option<Item> {
    let (path, file) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
    let bytes = size(&path);
    let item = |kind, name, used, source, stale| {
        Some(Item { kind, name, path: path.clone(), bytes, used, source, stale, shared: None })
    };
    if file.starts_with('.') {
        let killed = Some("a killed program left it".to_owned());
        return file.contains(".tmp-").then(|| item(Kind::Leftover, file, modified(&path), None, killed)).flatten();
    }
    match Origin::of(&path) {
        Some(origin) => {
            let damaged = (!is_whole(&path)).then_some("damaged; the next use makes it again");
            let stale = damaged.or_else(|| origin.stale()).map(str::to_owned);
            let used = modified(&path.join(super::origin::FILE));
            item(Kind::Quantized, origin.name, used, Some(origin.path.into()), stale)
        }
        // A folder that has no name of ours is somebody else's.
        None if !ends_with_key(&file, "-nf4-") => None,
        None => {
            item(Kind::Quantized, file, modified(&path), None, Some("damaged, or made by another version".to_owned()))
        }
    }
}

/// Whether `name` ends as those do that we give: with `mark` and 16 digits.
fn ends_with_key(name: &str, mark: &str) -> bool {
    let key = name.rsplit_once(mark).map(|(_, key)| key);
    key.is_some_and(|key| key.len() == 16 && key.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The head at `entry`; it is good for the weights that it names, or for those of a copy that has the same.
fn head(entry: &DirEntry, copies: &[Item]) -> Item {
    let (path, file) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
    let (bytes, used) = (size(&path), modified(&path));
    let leftover = file.starts_with('.');
    let kind = if leftover { Kind::Leftover } else { Kind::Head };
    let mut item = Item { kind, name: file, path, bytes, used, source: None, stale: None, shared: None };
    let Some(origin) = (!leftover).then(|| head_origin(&item.path)).flatten() else {
        let why = if leftover { "a killed program left it" } else { "made by another version" };
        item.stale = Some(why.to_owned());
        return item;
    };
    let weights = PathBuf::from(&origin.path);
    item.name = weights.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned();
    item.source = Some(weights.clone());
    let of_copy = copies.iter().map(|copy| (copy, copy.path.join(crate::format::MODEL)));
    if let Some((copy, path)) = of_copy.into_iter().find(|(_, path)| origin.is_of(path)) {
        item.name = copy.name.clone();
        item.source = path.canonicalize().ok();
    } else if !origin.is_of(&weights) {
        let why = if weights.exists() { "its model has changed" } else { "its model is gone" };
        item.stale = Some(why.to_owned());
    }
    item
}

/// What is in the folder `dir`, which need not exist.
fn entries(dir: &Path) -> Result<Vec<DirEntry>> {
    match fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        list => list.and_then(Iterator::collect).map_err(|e| Error::io("list", dir, e)),
    }
}

/// Bytes of the files at and below `path`. A file with several names counts for each by its share.
fn size(path: &Path) -> u64 {
    let Ok(meta) = fs::symlink_metadata(path) else { return 0 };
    if meta.is_dir() {
        return fs::read_dir(path).into_iter().flatten().flatten().map(|entry| size(&entry.path())).sum();
    }
    #[cfg(unix)]
    let names = std::os::unix::fs::MetadataExt::nlink(&meta).max(1);
    #[cfg(not(unix))]
    let names = 1;
    meta.len() / names
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|meta| meta.modified()).ok()
}
