//! The log: one JSON object a line, appended as steps are done.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write as _};
use std::path::Path;

/// Points of a curve; more steps are averaged, so that reading a long log takes little memory.
const POINTS: u64 = 400;

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
    /// This is a first step that found next to nothing to learn.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub learns_little: bool,
}

/// Points (step, value) of all that is drawn.
#[derive(Clone, Debug, Default)]
pub(super) struct Curves {
    pub train: Vec<(f64, f64)>,
    pub held_out: Vec<(f64, f64)>,
    pub general: Vec<(f64, f64)>,
    pub rate: Vec<(f64, f64)>,
    /// Steps averaged into a point.
    pub width: u64,
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

/// Calls `on_line` for every line that can be read.
fn each(path: &Path, on_line: &mut dyn FnMut(LogLine)) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::io("open", path, e))?;
    for text in BufReader::new(file).lines() {
        let text = text.map_err(|e| Error::io("read", path, e))?;
        if let Ok(line) = serde_json::from_str(&text) {
            on_line(line);
        }
    }
    Ok(())
}

/// What the log holds, in [`POINTS`] points a curve at most.
pub(super) fn curves(path: &Path) -> Result<Curves> {
    let mut last = 0;
    each(path, &mut |line| last = last.max(line.step))?;
    let width = last.div_ceil(POINTS).max(1);
    let [mut train, mut held_out, mut general, mut rate] = [const { Means::new() }; 4];
    each(path, &mut |line| {
        let bucket = line.step.saturating_sub(1) / width;
        for (means, value) in [
            (&mut train, line.loss),
            (&mut held_out, line.eval_loss),
            (&mut general, line.general_loss),
            (&mut rate, line.lr.map(f64::from)),
        ] {
            means.add(bucket, line.step, value);
        }
    })?;
    Ok(Curves { train: train.points, held_out: held_out.points, general: general.points, rate: rate.points, width })
}

/// Means of the values in buckets that come in order.
struct Means {
    points: Vec<(f64, f64)>,
    bucket: u64,
    count: f64,
}

impl Means {
    const fn new() -> Self {
        Self { points: Vec::new(), bucket: 0, count: 0.0 }
    }

    fn add(&mut self, bucket: u64, step: u64, value: Option<f64>) {
        let Some(value) = value.filter(|v| v.is_finite()) else { return };
        let step = step as f64;
        match self.points.last_mut() {
            // What was found before the first step is a point of its own.
            Some(point) if self.bucket == bucket && point.0 > 0.0 => {
                self.count += 1.0;
                point.0 += (step - point.0) / self.count;
                point.1 += (value - point.1) / self.count;
            }
            _ => {
                self.points.push((step, value));
                (self.bucket, self.count) = (bucket, 1.0);
            }
        }
    }
}
