//! A model in a repository on the hub, through the hub's own cache: downloads resume there, and what another program
//! fetched is not fetched again.
//!
//! The client library cannot be told to give up or to stop. It therefore works in a thread that reports, and whoever
//! waits for the reports decides: silence beyond a limit counts as a dead network.

use super::record::{Entry, sha256, wrong_checksum};
use super::{Event, Fetched, Hub, OnEvent, Repository, Stage, TICK, name, tell};
use crate::adapter::AdapterFile;
use crate::base::architecture_of;
use crate::error::{Error, ErrorCode, Result};
use crate::format::foreign::{Wanted, check_config, read_object};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;
use std::fs::{self, File};
use std::io;
use std::panic;
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
                return thread.join().unwrap_or_else(|_| Err(refused(source, "the client library failed")));
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

/// Refuses what is known not to run by the config in the folder `dir`, be it a model or an adapter; `name` is what people
/// know it by. What is merely wrong with it shows when it is opened.
///
/// # Errors
/// `Unsupported`.
pub(super) fn check_runs(dir: &Path, name: &str) -> Result<()> {
    let (model, adapter) = (dir.join(CONFIG), dir.join(ADAPTER_CONFIG));
    let read = || {
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

/// What the hub tells about a repository, as far as it matters here.
#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
    #[serde(rename = "cardData", default)]
    card: Option<Card>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// The head of the repository's README. Authors write it by hand, so nothing in it is certain to be there.
#[derive(Deserialize)]
struct Card {
    #[serde(default)]
    license: serde_json::Value,
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
        let cache = Cache::new(self.hub.hub_cache.clone());
        let (snapshot, names, licence) =
            if self.hub.offline { self.find_offline(&cache)? } else { self.download(&cache)? };
        // Whoever fetched it may not have asked.
        check_runs(&snapshot, &self.source.repo)?;
        let mut files = Vec::new();
        for name in names {
            files.push(self.check(&name, &snapshot.join(&name))?);
        }
        Ok(Fetched { licence, path: snapshot, files })
    }

    /// What earlier downloads, by whatever program, left in the hub's cache.
    fn find_offline(&self, cache: &Cache) -> Result<(PathBuf, Vec<String>, Option<String>)> {
        let repo = cache.repo(self.repo(&self.source.revision));
        let config = repo.get(CONFIG).or_else(|| repo.get("adapter_config.json"));
        let snapshot = config.as_deref().and_then(Path::parent).ok_or_else(|| {
            refused(
                &self.source,
                "not in the hub's cache, and `HF_HUB_OFFLINE` forbids to ask; unset it and pull again",
            )
        })?;
        let mut present = Vec::new();
        for (folder, prefix) in [(snapshot.to_owned(), ""), (snapshot.join("additional_chat_templates"), TEMPLATES)] {
            if folder.is_dir() {
                let entries = fs::read_dir(&folder).map_err(|e| Error::io("list", &folder, e))?;
                let names = entries.filter_map(|e| e.ok()?.file_name().into_string().ok());
                present.extend(names.map(|name| format!("{prefix}{name}")));
            }
        }
        Ok((snapshot.into(), self.choose(present)?, None))
    }

    fn download(&self, cache: &Cache) -> Result<(PathBuf, Vec<String>, Option<String>)> {
        let mut builder = ApiBuilder::from_cache(cache.clone()).with_progress(false).with_token(self.hub.token.clone());
        if let Some(endpoint) = &self.hub.endpoint {
            builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
        }
        let api = builder.build().map_err(|e| self.failed("the repository", e))?;
        let info = self.info(&api)?;
        self.report(Stage::Download, &self.source.repo, 0, None)?;
        // All files come from one commit, whatever is pushed meanwhile. The hash becomes a folder's name.
        if info.sha.len() != 40 || !info.sha.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(refused(&self.source, format!("expected a commit hash from the hub, got `{}`", info.sha)));
        }
        let mut names = self.choose(info.siblings.into_iter().map(|s| s.rfilename).collect())?;
        // The configs first: they tell whether the weights are worth the wait.
        let is_config = |name: &str| [CONFIG, ADAPTER_CONFIG].contains(&name);
        names.sort_by_key(|name| !is_config(name));
        let repo = self.repo(&info.sha);
        let (remote, local) = (api.repo(repo.clone()), cache.repo(repo));
        for name in &names {
            let path = local.pointer_path(&info.sha).join(name);
            self.download_file(&api, &remote, &path, name)?;
            if is_config(name) {
                check_runs(path.parent().unwrap_or(&path), &self.source.repo)?;
            }
        }
        let licence = info.card.and_then(|c| c.license.as_str().map(str::to_owned));
        Ok((local.pointer_path(&info.sha), names, licence))
    }

    fn info(&self, api: &Api) -> Result<Info> {
        let what = "the list of files";
        let request = api.repo(self.repo(&self.source.revision)).info_request();
        let mut response = request.call().map_err(|e| self.failed(what, ApiError::RequestError(Box::new(e))))?;
        response.body_mut().read_json().map_err(|e| self.failed(what, ApiError::RequestError(Box::new(e))))
    }

    fn download_file(&self, api: &Api, remote: &ApiRepo, path: &Path, name: &str) -> Result<()> {
        for attempt in 1.. {
            if path.exists() {
                break;
            }
            self.report(Stage::Download, name, 0, None)?;
            let meter = Meter { worker: self, name, done: 0, size: 0, last: None };
            match remote.download_with_progress(name, meter) {
                Ok(_) => {}
                Err(e) if attempt == TRIES || is_full(&e) => return Err(self.failed(name, e)),
                Err(ApiError::RequestError(_) | ApiError::IoError(_) | ApiError::InvalidResume) => {
                    self.drop_stuck_part(api, remote, path, name)?;
                }
                Err(e) => return Err(self.failed(name, e)),
            }
        }
        Ok(())
    }

    /// Removes a part file that is as long as the whole file: whoever wrote it was killed before the rename, and asking
    /// the server for what follows its end fails for ever.
    fn drop_stuck_part(&self, api: &Api, remote: &ApiRepo, path: &Path, name: &str) -> Result<()> {
        let metadata = api.metadata(&remote.url(name)).map_err(|e| self.failed(name, e))?;
        // <repository>/snapshots/<commit>/<name> and <repository>/blobs/<etag>.part
        let above = 3 + name.matches('/').count();
        let Some(repository) = path.ancestors().nth(above) else { return Ok(()) };
        let part = repository.join("blobs").join(metadata.etag()).with_extension("part");
        if fs::metadata(&part).is_ok_and(|m| m.len() >= metadata.size() as u64) {
            fs::remove_file(&part).map_err(|e| Error::io("remove", &part, e))?;
        }
        Ok(())
    }

    /// Which of the files that are `present` to take.
    fn choose(&self, present: Vec<String>) -> Result<Vec<String>> {
        let missing = |what: &str| refused(&self.source, format!("has no `{what}`; choose another repository"));
        if let Some(file) = self.source.files.iter().find(|f| !present.contains(f)) {
            return Err(missing(file));
        }
        if !self.source.files.is_empty() {
            return Ok(self.source.files.clone());
        }
        let weights = |f: &str| f.ends_with(".safetensors");
        // Some authors ship the same weights once more under another name.
        let model = present.iter().any(|f| weights(f) && f.starts_with("model"));
        let template = |f: &str| {
            let file = f.strip_prefix(TEMPLATES);
            file.is_some_and(|file| name::is_plain(file) && file.ends_with(".jinja"))
        };
        let wanted = |f: &String| {
            SMALL_FILES.contains(&f.as_str())
                || template(f)
                || weights(f) && name::is_plain(f) && (!model || f.starts_with("model"))
        };
        let names: Vec<String> = present.into_iter().filter(wanted).collect();
        if !names.iter().any(|f| f == CONFIG || f == "adapter_config.json") {
            return Err(missing("config.json"));
        }
        if !names.iter().any(|f| weights(f)) {
            return Err(missing("*.safetensors"));
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

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.source.repo.clone(), RepoType::Model, revision.into())
    }

    fn report(&self, stage: Stage, item: &str, done: u64, total: Option<u64>) -> Result<()> {
        let report = Report { stage, item: item.into(), done, total };
        let gone = || Error::new(ErrorCode::Cancelled, "pull", "stopped");
        if self.stop.load(Ordering::Relaxed) { Err(gone()) } else { self.reports.send(report).map_err(|_| gone()) }
    }

    fn failed(&self, what: &str, error: ApiError) -> Error {
        if is_full(&error) {
            return Error::new(ErrorCode::Io, format!("`{}`", self.hub.hub_cache.display()), "could not write to it")
                .caused_by(error);
        }
        let status = |code: &str| error.to_string().contains(code);
        let next = if status("401") || status("403") {
            "; accept the model's terms on its page and set `HF_TOKEN`"
        } else if status("404") {
            "; check the name"
        } else {
            ""
        };
        refused(&self.source, format!("{what} could not be fetched{next}")).caused_by(error)
    }
}

fn is_full(error: &ApiError) -> bool {
    use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(error, ApiError::IoError(e)
        if matches!(e.kind(), StorageFull | QuotaExceeded | ReadOnlyFilesystem | PermissionDenied))
}

/// Carries the client library's progress into reports.
struct Meter<'a> {
    worker: &'a Worker,
    name: &'a str,
    done: u64,
    size: u64,
    last: Option<Instant>,
}

impl hf_hub::api::Progress for Meter<'_> {
    /// Comes twice, the second time when the transfer starts; a resumed one then reports what is there already.
    fn init(&mut self, size: usize, _: &str) {
        (self.done, self.size) = (0, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        if self.last.is_some_and(|last| last.elapsed() < TICK) {
            return;
        }
        self.last = Some(Instant::now());
        let stopped = self.worker.report(Stage::Download, self.name, self.done, Some(self.size)).is_err();
        // The only way out of the library's copy loop; `resume_unwind` ends this thread without a panic message.
        // Where panics abort, the thread finishes its file unheard instead.
        if stopped && cfg!(panic = "unwind") {
            panic::resume_unwind(Box::new("stopped"));
        }
    }

    fn finish(&mut self) {}
}
