//! Adapters of several methods that were trained together, such as a prefix and a LoRA (the unified view of He et al.
//! 2022). Each is a whole adapter, in a file of its own that PEFT reads. One of them is the first, and lies in the folder
//! itself; `beside.json` there names the folders of the others below it: `{"beside": ["beside/prefix-tuning"]}`.

use super::peft::{CONFIG, Use};
use super::{AdapterFile, Kind, Method};
use crate::error::{Error, ErrorCode, Result};
use crate::format::{Staged, create_folder, sync_dir};
use serde_json::{Value, json};
use std::fs;
use std::io::Write as _;
use std::path::{Component, Path, PathBuf};

/// Names the folders, in the folder of the first adapter.
const FILE: &str = "beside.json";
/// The key of its list, and the folder that they lie in.
const BESIDE: &str = "beside";

impl Kind {
    /// Methods that can be trained beside another.
    pub const TOGETHER: &'static [Self] =
        &[Self::PrefixTuning, Self::PromptTuning, Self::Bottleneck, Self::LnTuning, Self::Ia3, Self::Beft, Self::Lora];

    /// Its name in settings and folders.
    #[must_use]
    pub fn key(self) -> String {
        serde_json::to_value(self).ok().and_then(|name| Some(name.as_str()?.to_owned())).unwrap_or_default()
    }

    /// Whether its configs have the key `key` to some effect.
    pub(crate) fn knows(self, key: &str) -> bool {
        self.keys().iter().any(|(own, used, _)| *own == key && *used == Use::Honoured)
    }

    /// Why it cannot be trained in one run with `other`, if it cannot.
    #[must_use]
    pub fn clash(self, other: Self) -> Option<String> {
        let virtual_tokens = |kind: Self| kind.reads("num-virtual-tokens");
        let shared = |names: &[&'static str], others: &[&str]| names.iter().copied().find(|name| others.contains(name));
        if self == other {
            return Some("they are the same".to_owned());
        }
        if virtual_tokens(self) && virtual_tokens(other) {
            return Some("both have virtual tokens".to_owned());
        }
        let name = shared(self.parts(), other.parts()).or_else(|| shared(self.shared(), other.shared()))?;
        Some(format!("both have tensors called `{name}`"))
    }
}

impl Method {
    /// Whether training makes something of its tensors that other methods' tensors beside them would disturb.
    pub(crate) fn is_trained_alone(&self) -> bool {
        self.converts() || self.budget().is_some()
    }
}

/// The folders that `dir` names, as they stand there.
///
/// # Errors
/// The file is no such list, or names a folder that is not below `dir`.
fn named(dir: &Path) -> Result<Vec<String>> {
    let path = dir.join(FILE);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let object = crate::format::foreign::read_object(&path)?;
    let names: Option<Vec<String>> = object
        .get(BESIDE)
        .and_then(Value::as_array)
        .and_then(|list| list.iter().map(|name| Some(name.as_str()?.to_owned())).collect());
    let below = |name: &String| {
        let mut parts = Path::new(name).components().peekable();
        parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)))
    };
    let expected = "a list of folders below this one";
    let names = names.ok_or_else(|| Error::format(&path, format!("key `{BESIDE}`"), expected, "something else"))?;
    match names.iter().find(|name| !below(name)) {
        Some(outside) => Err(Error::format(&path, format!("key `{BESIDE}`"), expected, format!("`{outside}`"))),
        None => Ok(names),
    }
}

/// The adapters that lie beside the one in `dir`.
///
/// # Errors
/// The list is broken; one of them is missing or broken, or has adapters beside itself.
pub(super) fn open(dir: &Path) -> Result<Vec<AdapterFile>> {
    let one = |name: String| {
        let folder = dir.join(&name);
        if !named(&folder)?.is_empty() {
            let what = "an adapter beside another one that has adapters beside itself";
            return Err(Error::unsupported(&folder, what, "name all of them in the first one's `beside.json`"));
        }
        AdapterFile::open(&folder)
    };
    named(dir)?.into_iter().map(one).collect()
}

/// What is said of a folder with adapters beside the one in `dir` that no list names: they are not used.
pub(super) fn unlisted(dir: &Path) -> Option<String> {
    let folder = dir.join(BESIDE);
    let is_adapter = |entry: &fs::DirEntry| entry.path().join(CONFIG).exists();
    let there = !dir.join(FILE).exists() && fs::read_dir(&folder).ok()?.flatten().any(|entry| is_adapter(&entry));
    there.then(|| format!("adapters in `{}` are not used, for `{FILE}` is not there: fetch it, too", folder.display()))
}

/// Methods of the adapters beside the one in `dir`, which a run wrote there.
///
/// # Errors
/// The list is broken, or one of them is in a folder that no run would write.
pub(super) fn kinds(dir: &Path) -> Result<Vec<Kind>> {
    let kind = |name: String| {
        let known = Kind::ALL.iter().find(|kind| folder(dir, **kind) == dir.join(&name)).copied();
        known.ok_or_else(|| Error::format(&dir.join(FILE), format!("key `{BESIDE}`"), "folders named by methods", name))
    };
    named(dir)?.into_iter().map(kind).collect()
}

/// Where an adapter of `kind` beside the one in `dir` lies.
pub(super) fn folder(dir: &Path, kind: Kind) -> PathBuf {
    dir.join(BESIDE).join(kind.key())
}

/// Replaces what lies beside the adapter in `dir` by adapters of `kinds`, which `write` puts into their folders, before
/// the adapter itself is written. The old one's config goes first, so that no adapter is ever there beside others' parts.
///
/// # Errors
/// The files cannot be written.
pub(crate) fn replace(dir: &Path, kinds: &[Kind], mut write: impl FnMut(usize, &Path) -> Result<()>) -> Result<()> {
    let list = dir.join(FILE);
    if kinds.is_empty() && !list.exists() {
        return Ok(());
    }
    let remove = |path: &Path| match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io("remove", path, e)),
        _ => Ok(()),
    };
    // A list that cannot be read names nothing that could be taken away.
    let old = named(dir).unwrap_or_default();
    remove(&dir.join(CONFIG))?;
    remove(&list)?;
    sync_dir(dir)?;
    old.iter()
        .map(|name| dir.join(name))
        .filter(|folder| AdapterFile::exists(folder))
        .try_for_each(|folder| AdapterFile::remove(&folder))?;
    for (i, kind) in kinds.iter().enumerate() {
        let folder = folder(dir, *kind);
        create_folder(&folder)?;
        write(i, &folder)?;
    }
    if kinds.is_empty() {
        let _ = fs::remove_dir(dir.join(BESIDE));
        return Ok(());
    }
    let names: Vec<String> = kinds.iter().map(|kind| format!("{BESIDE}/{}", kind.key())).collect();
    let text = format!("{:#}\n", json!({ BESIDE: names }));
    Staged::write(&list, |file| file.write_all(text.as_bytes()).map_err(|e| Error::io("write", &list, e)))?.commit()
}

impl AdapterFile {
    /// It and those beside it, each by itself.
    #[must_use]
    pub fn each(mut self) -> Vec<Self> {
        let beside = std::mem::take(&mut self.beside);
        std::iter::once(self).chain(beside).collect()
    }

    /// Refuses one that has others beside it, where only one can be worked with: `what` is that work.
    ///
    /// # Errors
    /// It has.
    pub fn check_alone(&self, what: &str) -> Result<()> {
        if self.beside.is_empty() {
            return Ok(());
        }
        let count = 1 + self.beside.len();
        let message = format!(
            "holds {count} adapters that were trained together, and {what}; give the folder of one below `{BESIDE}`, or copy the \
             first to a folder without `{FILE}`"
        );
        Err(Error::new(ErrorCode::Unsupported, format!("`{}`", self.dir.display()), message))
    }
}
