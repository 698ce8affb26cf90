//! What a run may replace in its output folder.

use super::Args;
use super::names;
use crate::adapter::AdapterFile;
use crate::cli::outputs::check_readable;
use crate::cli::shell::quoted;
use crate::error::{Error, ErrorCode, Result};
use crate::train::{SETTINGS, TrainConfig, has_checkpoint, refuse_model};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// What a run writes beside adapter and checkpoints. Of an earlier run these are the adapter's or the checkpoint's
/// companions; alone they are somebody else's.
const BESIDE: [&str; 10] = [
    "adapter_model.safetensors",
    SETTINGS,
    "log.jsonl",
    "loss.svg",
    "ranks.svg",
    "ranks.txt",
    "best",
    "keep.safetensors",
    "keep-taught.safetensors",
    "lessons.json",
];

/// Refuses to write over what lies in the output folder, unless told to; over what the run reads, and into a model, always.
pub(super) fn check(args: &Args, config: &TrainConfig) -> Result<()> {
    let out = args.out();
    let refuse = |message: String| Err(Error::new(ErrorCode::Config, format!("`{}`", out.display()), message));
    refuse_model(out)?;
    // A run that goes on reads its own settings and writes the same again.
    let is_own = |file: &&PathBuf| args.resume && is_same(&out.join(SETTINGS), file);
    let settings = args.config.as_ref().filter(|file| !is_own(file));
    for file in [Some(&args.data), config.eval_data.as_ref(), settings].into_iter().flatten() {
        if let Some(name) = BESIDE.iter().find(|name| is_same(&out.join(name), file)) {
            return refuse(format!(
                "expected a place for the run's own `{name}`, got what it reads; name another folder"
            ));
        }
    }
    let init = args.init.as_deref().and_then(|init| names::adapter(init).ok());
    if !args.resume && init.is_some_and(|init| is_same(out, &init)) {
        return refuse("holds the adapter that `--init` starts from; name another folder".into());
    }
    [Some(&args.data), config.eval_data.as_ref()].into_iter().flatten().try_for_each(|file| check_readable(file))?;
    let (finished, unfinished) = (AdapterFile::exists(out), has_checkpoint(out));
    if args.resume && finished && !unfinished {
        let command = train_on(std::env::args_os().skip(1), out);
        return refuse(format!("the run in it is finished; train on from its adapter: `{command}`"));
    }
    if args.resume && !unfinished {
        return refuse("expected a checkpoint to resume from, got none; start without `--resume`".into());
    }
    if args.resume || args.overwrite {
        return Ok(());
    }
    if unfinished {
        return refuse("holds an unfinished run; continue it with `--resume` or replace it with `--overwrite`".into());
    }
    if finished {
        let next =
            "name another folder, train on from it with `--init` and another folder, or replace it with `--overwrite`";
        return refuse(format!("holds an adapter; {next}"));
    }
    // What a run left that was killed before its first checkpoint is no loss.
    let beside = if was_ours(out) { &BESIDE[..1] } else { &BESIDE };
    match beside.iter().find(|name| out.join(name).exists()) {
        Some(name) => refuse(format!(
            "holds a `{name}` that the run would replace; name another folder, or let it with `--overwrite`"
        )),
        None => Ok(()),
    }
}

/// Whether the folder holds the settings of an earlier run, just as it wrote them.
fn was_ours(out: &Path) -> bool {
    let Ok(text) = std::fs::read_to_string(out.join(SETTINGS)) else { return false };
    let config: Option<TrainConfig> = toml::from_str(&text).ok();
    config.and_then(|config| config.to_toml().ok()).is_some_and(|written| written == text)
}

fn is_same(a: &Path, b: &Path) -> bool {
    a.canonicalize().ok().zip(b.canonicalize().ok()).is_some_and(|(a, b)| a == b)
}

/// The command that was typed, as one that learns on from the adapter in `out`.
fn train_on(typed: impl Iterator<Item = OsString>, out: &Path) -> String {
    let mut command = String::from("pocketlora");
    let mut words = typed.peekable();
    while let Some(word) = words.next() {
        let text = word.to_string_lossy();
        let ours = |short: &str, long: &str| {
            // `-o OUT`, `--out OUT`; joined as `-oOUT`, `-o=OUT`, `--out=OUT`.
            let joined = text.starts_with(&format!("{long}=")) || text.starts_with(short) && !text.starts_with("--");
            (text == short || text == long, joined)
        };
        match (ours("-o", "--out"), text == "--init", text.starts_with("--init=")) {
            ((true, _), ..) | (_, true, _) => drop(words.next()),
            ((_, true), ..) | (.., true) => {}
            _ if text == "--resume" => {}
            _ => command += &format!(" {}", quoted(&word)),
        }
    }
    let mut next = out.as_os_str().to_owned();
    next.push("-2");
    command + &format!(" --init {} -o {}", quoted(out), quoted(OsStr::new(&next)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_that_learns_on_is_the_one_that_was_typed() {
        let expected = "pocketlora train -m 'a model' -d d.jsonl --epochs 4 --init 'out 1' -o 'out 1-2'";
        for typed in [
            &["train", "-m", "a model", "-o", "out 1", "-d", "d.jsonl", "--resume", "--epochs", "4"][..],
            &["train", "--resume", "-m", "a model", "--out=out 1", "-d", "d.jsonl", "--epochs", "4", "--init", "old"],
            &["train", "-oout 1", "-m", "a model", "--init=old", "-d", "d.jsonl", "--resume", "--epochs", "4"],
        ] {
            assert_eq!(train_on(typed.iter().map(OsString::from), Path::new("out 1")), expected);
        }
    }
}
