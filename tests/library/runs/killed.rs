//! Kills at any moment, as an operating system does them.

use super::{Fixture, fixture, weights};
use crate::common::tiny_chats;
use pocketlora::adapter::AdapterFile;
use pocketlora::train::has_checkpoint;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Instant;

const KILLS: u32 = 25;

fn start(f: &Fixture, out: &Path, more: &[&str]) -> Child {
    let held_out = f.out("held-out");
    let mut command = Command::new(env!("CARGO_BIN_EXE_pocketlora"));
    command.args(["train", "--auto", "off", "--threads", "1", "--lr", "3e-3", "--batch", "2", "--dropout", "0.1"]);
    command.args(["--optimizer", "adamw8bit", "--save-every", "1", "--eval-every", "2", "--keep-best"]);
    command.arg("-m").arg(&f.model).arg("-d").arg(&f.data).arg("-o").arg(out);
    command.arg("--eval-data").arg(held_out.join("chats.jsonl")).args(more);
    command.env("POCKETLORA_HOME", f.out("home")).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn finish(child: Child) {
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// Fifty kills at random moments of runs that are resumed after each, over an older adapter of another shape: every run
/// ends in the bytes of the undisturbed one, and what lies there meanwhile is never half of one adapter and half of
/// another.
#[test]
fn runs_killed_at_random_moments_end_in_the_same_bytes() {
    let f = fixture();
    fs::create_dir(f.out("held-out")).unwrap();
    tiny_chats(&f.out("held-out"), 3);
    let (whole, older, out) = (f.out("whole"), f.out("older"), f.out("killed"));
    finish(start(&f, &older, &["--rank", "2", "--steps", "2"]));
    let begin = Instant::now();
    finish(start(&f, &whole, &["--epochs", "2"]));
    let length = begin.elapsed();

    let mut random = 0x5eed_u64;
    let mut wait = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        length.mul_f64((random >> 40) as f64 / (1u64 << 24) as f64)
    };
    let (mut kills, mut resumed, mut ended) = (0, 0, 0);
    while kills < KILLS || ended == 0 {
        let fresh = !has_checkpoint(&out);
        if fresh {
            let _ = fs::remove_dir_all(&out);
            fs::create_dir(&out).unwrap();
            for file in ["adapter_config.json", "adapter_model.safetensors"] {
                fs::copy(older.join(file), out.join(file)).unwrap();
            }
        }
        let mut child = start(&f, &out, &[if fresh { "--overwrite" } else { "--resume" }, "--epochs", "2"]);
        if kills < KILLS {
            thread::sleep(wait());
        }
        if kills < KILLS && child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        let done = child.wait_with_output().unwrap();
        resumed += u32::from(!fresh);
        if done.status.success() {
            assert!(weights(&out) == weights(&whole), "after {kills} kills the adapter differs");
            assert!(!has_checkpoint(&out));
            ended += 1;
            fs::remove_dir_all(&out).unwrap();
        } else {
            let stderr = String::from_utf8_lossy(&done.stderr);
            assert_eq!(done.status.code(), None, "failed instead of being killed: {stderr}");
            if AdapterFile::exists(&out) {
                AdapterFile::open(&out).unwrap();
            }
        }
    }
    assert!(resumed > KILLS / 4, "only {resumed} of the runs were resumed");
}
