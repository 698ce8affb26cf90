//! A model in a repository on the hub, through the hub's own cache: downloads resume there, and what another program
//! fetched is not fetched again.
//!
//! A connection that says nothing cannot be told to stop. The work is therefore done in a thread that reports, and whoever
//! waits for the reports decides: silence beyond a limit counts as a dead network.

use super::client::{Client, Failure};
use super::download::{Place, is_commit};
use super::record::{Entry, sha256, wrong_checksum};
use super::{Event, Fetched, Hub, OnEvent, Repository, Stage, TICK, name, tell};
use crate::adapter::AdapterFile;
use crate::base::architecture_of;
use crate::error::{Error, ErrorCode, Result};
use crate::format::foreign::{Wanted, check_config, read_object};
use crate::format::gguf::{Gguf, parts_of};
use crate::format::{Source as _, is_gguf};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

/// What a model needs besides weights. Nothing that runs code when it is loaded (pickles, Python) is on the list.
const SMALL_FILES: &[&str] = &[
    "adapter_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    CONFIG,
    "generation_config.json",
    "merges.txt",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
];
const CONFIG: &str = "config.json";
const ADAPTER_CONFIG: &str = "adapter_config.json";
/// Where transformers keeps a model's further templates.
const TEMPLATES: &str = "additional_chat_templates/";
/// Tries per file. Each continues where the last one broke off, so that a flaky network gets somewhere.
const TRIES: usize = 3;
/// Files that an error names.
const MOST_NAMED: usize = 12;

/// Fetches `source` into the hub's cache.
///
/// # Errors
/// `Network`: no answer, a refusal, a missing file, a wrong checksum. `Io`: the disk is full. `Cancelled`.
pub(super) fn fetch(hub: &Hub, source: &Repository, progress: &mut OnEvent<'_>) -> Result<Fetched> {
    if let Some(endpoint) = hub.endpoint.as_ref().filter(|e| !e.starts_with("http://") && !e.starts_with("https://")) {
        return Err(Error::config("HF_ENDPOINT", "an address that starts with `http://` or `https://`", endpoint));
    }
    let (reports, inbox) = mpsc::channel();
    let worker = Worker { hub: hub.clone(), source: source.clone(), reports, stop: Arc::default() };
    // Dropped on every way out, so that the thread never outlives its purpose for long.
    let stop = StopOnDrop(worker.stop.clone());
    let thread = thread::spawn(move || worker.run());
    let (mut last_report, mut limit) = (Instant::now(), hub.answer_within);
    let mut last = Report { stage: Stage::Download, item: source.repo.clone(), done: 0, total: None };
    let outcome = loop {
        match inbox.recv_timeout(TICK) {
            Ok(report) => {
                last_report = Instant::now();
                limit = hub.stall_within;
                last = report;
            }
            Err(RecvTimeoutError::Timeout) if last_report.elapsed() > limit => {
                let why = format!("no answer within {} s; the network or the server is down", limit.as_secs_f32());
                break Err(refused(source, why));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                return thread.join().unwrap_or_else(|_| Err(refused(source, "the thread that fetches it failed")));
            }
        }
        let Report { stage, ref item, done, total } = last;
        if let Err(stopped) = tell(progress, Event::Progress { stage, item, done, total }) {
            break Err(stopped);
        }
    };
    drop(stop);
    // Give it a moment to let go of its locks, in case the caller pulls again at once. A thread that hangs in a dead
    // connection is left behind; it ends when the connection does.
    let patience = Instant::now();
    while !thread.is_finished() && patience.elapsed() < Duration::from_secs(1) {
        thread::sleep(TICK / 5);
    }
    outcome
}

fn refused(source: &Repository, why: impl Into<String>) -> Error {
    Error::new(ErrorCode::Network, format!("`{}`", source.repo), why)
}

/// Refuses what is known not to run by the config in the folder `dir`, be it a model or an adapter, or in the GGUF file of that
/// name; `name` is what people know it by. What is merely wrong with it shows when it is opened.
///
/// # Errors
/// `Unsupported`.
pub(super) fn check_runs(dir: &Path, name: &str) -> Result<()> {
    let (model, adapter) = (dir.join(CONFIG), dir.join(ADAPTER_CONFIG));
    let read = || {
        if is_gguf(dir) {
            return architecture_of(Gguf::open(dir)?.config(), dir).map(|_| ());
        }
        if model.exists() {
            let config = read_object(&model)?;
            check_config(&model, &config, Wanted::Source)?;
            return architecture_of(&config, dir).map(|_| ());
        }
        if adapter.exists() { AdapterFile::check_config(&adapter) } else { Ok(()) }
    };
    match read() {
        Err(e) if e.code() == ErrorCode::Unsupported => Err(e.moved(dir, Path::new(name))),
        _ => Ok(()),
    }
}

struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What the thread says, as in [`Event::Progress`].
struct Report {
    stage: Stage,
    item: String,
    done: u64,
    total: Option<u64>,
}

/// The thread that speaks with the hub.
struct Worker {
    hub: Hub,
    source: Repository,
    reports: Sender<Report>,
    stop: Arc<AtomicBool>,
}

impl Worker {
    fn run(self) -> Result<Fetched> {
        let place = Place::new(&self.hub.hub_cache, &self.source.repo);
        let (snapshot, names, licence) =
            if self.hub.offline { self.find_offline(&place)? } else { self.download(&place)? };
        let mut files = Vec::new();
        for name in &names {
            files.push(self.check(name, &snapshot.join(name))?);
        }
        // A GGUF file that was asked for is the model; else the folder is.
        let file = self.source.files.first().filter(|file| file.to_ascii_lowercase().ends_with(".gguf"));
        let path = file.map_or(snapshot.clone(), |_| snapshot.join(&names[0]));
        // Whoever fetched it may not have asked.
        check_runs(&path, &self.source.repo)?;
        Ok(Fetched { licence, path, files })
    }

    /// What earlier downloads, by whatever program, left in the hub's cache.
    fn find_offline(&self, place: &Place) -> Result<(PathBuf, Vec<String>, Option<String>)> {
        let snapshot = place.commit_of(&self.source.revision).map(|commit| place.snapshot(&commit));
        let snapshot = snapshot.filter(|snapshot| snapshot.is_dir()).ok_or_else(|| {
            refused(
                &self.source,
                "not in the hub's cache, and `HF_HUB_OFFLINE` forbids to ask; unset it and pull again",
            )
        })?;
        let mut present = Vec::new();
        files_below(&snapshot, "", &mut present).map_err(|e| Error::io("list", &snapshot, e))?;
        Ok((snapshot, self.choose(present)?, None))
    }

    fn download(&self, place: &Place) -> Result<(PathBuf, Vec<String>, Option<String>)> {
        let Hub { endpoint, token, stall_within, .. } = &self.hub;
        let client = Client::new(endpoint.as_deref(), token.clone(), *stall_within);
        let Repository { repo, revision, .. } = &self.source;
        let info = client.info(repo, revision).map_err(|e| self.failed("the list of files", e))?;
        self.report(Stage::Download, repo, 0, None)?;
        // All files come from one commit, whatever is pushed meanwhile. The hash becomes a folder's name.
        if !is_commit(&info.sha) {
            return Err(refused(&self.source, format!("expected a commit hash from the hub, got `{}`", info.sha)));
        }
        let names = self.choose(info.files())?;
        let snapshot = place.snapshot(&info.sha);
        // The configs first: they tell whether the weights are worth the wait.
        let is_config = |name: &str| [CONFIG, ADAPTER_CONFIG].contains(&name);
        let (configs, others): (Vec<&String>, Vec<&String>) = names.iter().partition(|name| is_config(name));
        for name in configs.into_iter().chain(others) {
            self.download_file(&client, place, &info.sha, name)?;
            if is_config(name) {
                check_runs(&snapshot, repo)?;
            }
        }
        // What is asked for offline is asked for by this name.
        place.refer(revision, &info.sha).map_err(|e| self.failed("the note of the commit", Failure::Disk(e)))?;
        Ok((snapshot, names, info.licence()))
    }

    fn download_file(&self, client: &Client, place: &Place, commit: &str, name: &str) -> Result<()> {
        let url = client.address(&self.source.repo, commit, name);
        let mut report = |done, total| self.report(Stage::Download, name, done, total);
        for attempt in 1.. {
            report(0, None)?;
            match place.fetch(client, &url, (commit, name), &mut report) {
                Ok(()) => break,
                Err(Failure::Stopped(e)) => return Err(e),
                // What came is gone on from; a refusal stays one.
                Err(e) if attempt == TRIES || matches!(e.status(), Some(400..=415 | 417..)) => {
                    return Err(self.failed(name, e));
                }
                Err(e @ (Failure::Disk(_) | Failure::Answer(_))) => return Err(self.failed(name, e)),
                Err(Failure::Broken(_) | Failure::Http(_)) => {}
            }
        }
        Ok(())
    }

    /// Which of the files that are `present` to take.
    fn choose(&self, present: Vec<String>) -> Result<Vec<String>> {
        let missing = |what: &str, next: &str| refused(&self.source, format!("has no `{what}`; {next}"));
        let ggufs = || {
            let names: Vec<String> =
                present.iter().filter(|f| f.ends_with(".gguf")).map(|f| format!("`{f}`")).collect();
            let more = if names.len() > MOST_NAMED { ", .." } else { "" };
            (!names.is_empty()).then(|| format!("{}{more}", names[..names.len().min(MOST_NAMED)].join(", ")))
        };
        if !self.source.files.is_empty() {
            // A file in several parts is wanted whole.
            let parts = self.source.files.iter().flat_map(|file| parts_of(Path::new(file)));
            let wanted: Vec<String> = parts.map(|part| part.to_string_lossy().into_owned()).collect();
            return match wanted.iter().find(|file| !present.contains(file)) {
                None => Ok(wanted),
                Some(file) => Err(missing(
                    file,
                    &match ggufs() {
                        Some(names) => format!("it has {names}"),
                        None => "choose another repository".to_owned(),
                    },
                )),
            };
        }
        let weights = |f: &str| f.ends_with(".safetensors");
        // Some authors ship the same weights once more under another name.
        let model = present.iter().any(|f| weights(f) && f.starts_with("model"));
        let template = |f: &str| {
            let file = f.strip_prefix(TEMPLATES);
            file.is_some_and(|file| name::is_plain(file) && file.ends_with(".jinja"))
        };
        let wanted = |f: &&String| {
            SMALL_FILES.contains(&f.as_str())
                || template(f)
                || weights(f) && name::is_plain(f) && (!model || f.starts_with("model"))
        };
        let names: Vec<String> = present.iter().filter(wanted).cloned().collect();
        let next = match ggufs() {
            Some(files) => format!("but it has GGUF files: pull one as `{}:FILE`, one of {files}", self.source.repo),
            None => "choose another repository".to_owned(),
        };
        if !names.iter().any(|f| weights(f)) {
            return Err(missing("*.safetensors", &next));
        }
        if !names.iter().any(|f| f == CONFIG || f == ADAPTER_CONFIG) {
            return Err(missing(CONFIG, &next));
        }
        Ok(names)
    }

    /// Compares a file with its checksum. The cache calls large files by their SHA-256; small ones have git's hash,
    /// which is no checksum of the bytes alone, and a broken one shows when it is parsed.
    fn check(&self, name: &str, path: &Path) -> Result<Entry> {
        let blob = fs::canonicalize(path).map_err(|e| Error::io("find", path, e))?;
        let bytes = fs::metadata(&blob).map_err(|e| Error::io("read the size of", &blob, e))?.len();
        let promised = blob.file_name().and_then(|n| n.to_str());
        let promised = promised.filter(|n| n.len() == 64 && n.bytes().all(|b| b.is_ascii_hexdigit()));
        if let Some(promised) = promised {
            let file = File::open(&blob).map_err(|e| Error::io("open", &blob, e))?;
            let mut done = 0;
            let got = sha256(
                file,
                |e| Error::io("read", &blob, e),
                |chunk| {
                    done += chunk.len() as u64;
                    self.report(Stage::Check, name, done, Some(bytes))
                },
            )?;
            if got != promised {
                for broken in [path, blob.as_path()] {
                    fs::remove_file(broken).map_err(|e| Error::io("remove", broken, e))?;
                }
                return Err(wrong_checksum(name, promised, &got));
            }
        }
        Ok(Entry { path: path.into(), bytes, sha256: promised.map(str::to_owned) })
    }

    fn report(&self, stage: Stage, item: &str, done: u64, total: Option<u64>) -> Result<()> {
        let report = Report { stage, item: item.into(), done, total };
        let gone = || Error::new(ErrorCode::Cancelled, "pull", "stopped");
        if self.stop.load(Ordering::Relaxed) { Err(gone()) } else { self.reports.send(report).map_err(|_| gone()) }
    }

    fn failed(&self, what: &str, failure: Failure) -> Error {
        if let Failure::Disk(error) = failure {
            return Error::new(ErrorCode::Io, format!("`{}`", self.hub.hub_cache.display()), "could not write to it")
                .caused_by(error);
        }
        let next = match failure.status() {
            Some(401 | 403) => "; accept the model's terms on its page and set `HF_TOKEN`",
            Some(404) if self.source.revision == "main" => "; check the name",
            Some(404) => "; check the name, and the branch, tag or commit behind the `@`",
            _ => "",
        };
        refused(&self.source, format!("{what} could not be fetched{next}")).caused_by(failure)
    }
}

/// Adds the names of all files in `dir` and the folders in it, with `prefix` before each.
fn files_below(dir: &Path, prefix: &str, names: &mut Vec<String>) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        match entry.path().is_dir() {
            true => files_below(&entry.path(), &format!("{prefix}{name}/"), names)?,
            false => names.push(format!("{prefix}{name}")),
        }
    }
    Ok(())
}
