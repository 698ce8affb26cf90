//! A file of a repository in the hub's cache, which other programs read and fill as well: contents lie in `blobs` under the
//! names that the hub gives them, and `snapshots` has a link for each file of a commit.

use super::TICK;
use super::client::{Client, Failure};
use super::lock::{Lock, Mode};
use crate::error::Result;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Bytes that are read at once.
const PIECE: usize = 1 << 16;

/// Where the cache keeps one repository.
pub struct Place {
    root: PathBuf,
}

impl Place {
    /// That of `OWNER/REPO` in the hub's cache `cache`.
    pub fn new(cache: &Path, repo: &str) -> Self {
        Self { root: cache.join(format!("models--{}", repo.replace('/', "--"))) }
    }

    /// Where the files of a commit are.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// The commit that `revision` was when it was last asked for; a commit is itself.
    pub fn commit_of(&self, revision: &str) -> Option<String> {
        let named = fs::read_to_string(self.reference(revision)).ok().map(|text| text.trim().to_owned());
        named.or_else(|| is_commit(revision).then(|| revision.to_owned()))
    }

    /// Notes that `revision` is `commit` now, for those who may not ask.
    pub fn refer(&self, revision: &str, commit: &str) -> io::Result<()> {
        let path = self.reference(revision);
        // A branch may have slashes in its name.
        fs::create_dir_all(path.parent().unwrap_or(&self.root))?;
        fs::write(path, commit)
    }

    fn reference(&self, revision: &str) -> PathBuf {
        self.root.join("refs").join(revision)
    }

    /// Fetches the file `name` of `commit` from `url` unless it is there. What a broken connection left is gone on from.
    /// `report` hears of bytes so far and in all, and stops the work by an error.
    pub fn fetch(
        &self,
        client: &Client,
        url: &str,
        (commit, name): (&str, &str),
        report: &mut dyn FnMut(u64, Option<u64>) -> Result<()>,
    ) -> Result<(), Failure> {
        let path = self.snapshot(commit).join(name);
        if path.exists() {
            return Ok(());
        }
        let facts = client.facts(url)?;
        let blobs = self.root.join("blobs");
        let blob = blobs.join(&facts.etag);
        fs::create_dir_all(&blobs).map_err(Failure::Disk)?;
        let lock = blob.with_extension("lock");
        let _lock = Lock::take(&lock, Mode::Exclusive, &mut || report(0, facts.size)).map_err(Failure::Stopped)?;
        if !blob.exists() {
            let part = blob.with_extension("part");
            complete(client, url, &part, facts.size, report)?;
            fs::rename(&part, &blob).map_err(Failure::Disk)?;
        }
        link(&blob, &path, name).map_err(Failure::Disk)
    }
}

/// Whether `text` is the hash of a commit.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Makes `part`, which may have a beginning of it, the whole file at `url`.
fn complete(
    client: &Client,
    url: &str,
    part: &Path,
    size: Option<u64>,
    report: &mut dyn FnMut(u64, Option<u64>) -> Result<()>,
) -> Result<(), Failure> {
    let mut file = File::options().create(true).append(true).open(part).map_err(Failure::Disk)?;
    let mut done = file.metadata().map_err(Failure::Disk)?.len();
    let anew = |file: &File| file.set_len(0).map_err(Failure::Disk);
    if size.is_some_and(|size| done > size) {
        // Of something else.
        anew(&file)?;
        done = 0;
    }
    // A writer that was killed before the rename has left all of it: there is nothing to ask for behind its end.
    if size != Some(done) {
        let (begin, mut body) = match client.bytes(url, done) {
            Err(e) if e.status() == Some(416) => {
                anew(&file)?;
                return Err(e);
            }
            other => other?,
        };
        if begin < done {
            anew(&file)?;
            done = begin;
        }
        let (mut buffer, mut told) = (vec![0; PIECE], None::<Instant>);
        loop {
            let read = match body.read(&mut buffer) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                other => other.map_err(Failure::Broken)?,
            };
            file.write_all(&buffer[..read]).map_err(Failure::Disk)?;
            done += read as u64;
            if read == 0 || told.is_none_or(|told| told.elapsed() >= TICK) {
                report(done, size).map_err(Failure::Stopped)?;
                told = Some(Instant::now());
            }
            if read == 0 {
                break;
            }
        }
    }
    if let Some(size) = size.filter(|size| *size != done) {
        return Err(Failure::Broken(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("expected {size} bytes, got {done}"),
        )));
    }
    file.sync_all().map_err(Failure::Disk)
}

/// Gives the content `blob` the name `path`, which ends in `name`, by a link from one to the other where there are such.
fn link(blob: &Path, path: &Path, name: &str) -> io::Result<()> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder)?;
    if path.is_symlink() {
        // To a content that is gone.
        fs::remove_file(path)?;
    }
    // <repository>/snapshots/<commit>/<name>, whose slashes are folders of its own.
    let mut target = PathBuf::from("../..");
    (0..name.matches('/').count()).for_each(|_| target.push(".."));
    target.push("blobs");
    target.extend(blob.file_name());
    #[cfg(unix)]
    let linked = std::os::unix::fs::symlink(&target, path);
    #[cfg(windows)]
    let linked = std::os::windows::fs::symlink_file(&target, path);
    #[cfg(not(any(unix, windows)))]
    let linked: io::Result<()> = Err(io::ErrorKind::Unsupported.into());
    linked.or_else(|_| fs::rename(blob, path))
}
