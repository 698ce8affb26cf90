//! What the log holds, as points of curves.

use super::LogLine;
use crate::error::{Error, Result};
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;

/// Points of a curve; more steps are averaged, so that reading a long log takes little memory.
const POINTS: u64 = 400;

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
