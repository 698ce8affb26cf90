//! The command as people run it, in a folder of its own.

use crate::common::{tiny_chat_model, tiny_chats};
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub model: PathBuf,
    pub data: PathBuf,
}

pub fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (tiny_chat_model(dir.path()), tiny_chats(dir.path(), 12));
    Fixture { dir, model, data }
}

impl Fixture {
    pub fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pocketlora"));
        command.args(args).env("POCKETLORA_HOME", self.dir.path().join("home")).stdin(Stdio::null());
        command
    }

    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Stdout of a run that must succeed.
    pub fn ok(&self, args: &[&str]) -> String {
        let out = self.run(args);
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    }

    pub fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(self.ok(args).lines().last().unwrap()).unwrap()
    }

    /// Stderr of a run.
    pub fn said(&self, args: &[&str]) -> String {
        String::from_utf8(self.run(args).stderr).unwrap()
    }

    pub fn train_args<'a>(&'a self, out: &'a str) -> Vec<&'a str> {
        let (model, data) = (self.model.to_str().unwrap(), self.data.to_str().unwrap());
        vec![
            "train", "--auto", "off", "-m", model, "-d", data, "-o", out, "--lr", "3e-3", "--epochs", "4", "--batch",
            "2", "--json",
        ]
    }
}
