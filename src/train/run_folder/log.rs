//! The log: one JSON object a line, appended as steps are done.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;

/// What is known after a step; of step 0, before the first, only the evaluation is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LogLine {
    /// Steps done.
    pub step: u64,
    /// Mean loss of the step's learned tokens (natural log).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Learning rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f32>,
    /// Norm of the gradient before clipping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grad_norm: Option<f64>,
    /// Tokens run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens: Option<usize>,
    /// Time of the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// Mean loss on the held-out data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<f64>,
    /// Mean loss on the general text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub general_loss: Option<f64>,
    /// General questions that were answered rightly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known: Option<u32>,
    /// Mean divergence from what the base says on the held tokens, in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_loss: Option<f64>,
    /// This is a first step that found next to nothing to learn.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub learns_little: bool,
}

/// Adds a line.
pub(super) fn append(path: &Path, line: &LogLine) -> Result<()> {
    let text = serde_json::to_string(line).expect("plain data serializes");
    let file = OpenOptions::new().create(true).append(true).open(path);
    // One write: a kill may cut the line short, which `cut` finds, but not mix two.
    file.and_then(|mut file| file.write_all(format!("{text}\n").as_bytes())).map_err(|e| Error::io("write", path, e))
}

/// Cuts off all lines after `step`, and what is no whole line; for step 0, everything.
pub(super) fn cut(path: &Path, step: u64) -> Result<()> {
    let mut keep = 0;
    if step > 0 && path.exists() {
        let mut reader = BufReader::new(File::open(path).map_err(|e| Error::io("open", path, e))?);
        let mut text = Vec::new();
        while reader.read_until(b'\n', &mut text).map_err(|e| Error::io("read", path, e))? > 0 {
            let line = serde_json::from_slice::<LogLine>(&text);
            if !text.ends_with(b"\n") || !line.is_ok_and(|line| line.step <= step) {
                break;
            }
            keep += text.len() as u64;
            text.clear();
        }
    }
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path);
    file.and_then(|file| file.set_len(keep)).map_err(|e| Error::io("cut", path, e))
}
