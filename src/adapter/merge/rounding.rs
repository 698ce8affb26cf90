//! What NF4 costs a merged model: the written weights beside those that were to be written.

use super::Merged;
use crate::adapter::layer_of;
use crate::error::{Error, ErrorCode, Result};
use crate::format::{HfSource, Source};
use rayon::prelude::*;
use std::ops::ControlFlow;
use std::path::Path;

/// Values that are read at once, about.
const PIECE: usize = 1 << 18;

/// How one linear layer's weight came through rounding to NF4.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounding {
    /// Path of the layer.
    pub module: String,
    /// Number of the decoder layer that it is part of.
    pub layer: Option<usize>,
    sums: Sums,
}

/// Sums of squares over a weight's values: `w` before the adapters, `m` merged, `q` as written.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Sums {
    /// `m²`.
    merged: f64,
    /// `(q - m)²`.
    error: f64,
    /// `(m - w)²`.
    change: f64,
    /// `(q - w) (m - w)`.
    arrived: f64,
}

impl Sums {
    fn add(self, other: Self) -> Self {
        Self {
            merged: self.merged + other.merged,
            error: self.error + other.error,
            change: self.change + other.change,
            arrived: self.arrived + other.arrived,
        }
    }
}

impl Rounding {
    /// All of `parts` as one.
    #[must_use]
    pub fn of_all<'a>(module: &str, layer: Option<usize>, parts: impl Iterator<Item = &'a Self>) -> Self {
        let sums = parts.fold(Sums::default(), |sum, part| sum.add(part.sums));
        Self { module: module.to_owned(), layer, sums }
    }

    /// Root mean square of what rounding changed, over that of the weights.
    #[must_use]
    pub fn error(&self) -> f64 {
        ratio(self.sums.error, self.sums.merged).sqrt()
    }

    /// Root mean square of what the adapters changed, over that of the weights.
    #[must_use]
    pub fn change(&self) -> f64 {
        ratio(self.sums.change, self.sums.merged).sqrt()
    }

    /// How much of the adapters' change is in the written weights: 1 where rounding took nothing of it away. None where
    /// the adapters changed nothing.
    #[must_use]
    pub fn arrived(&self) -> Option<f64> {
        (self.sums.change > 0.0).then(|| self.sums.arrived / self.sums.change)
    }
}

fn ratio(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

/// Compares the model at `made`, which [`Merged::write`] wrote, with `merged`: the layers that were rounded to NF4, in
/// their order in the base's file. `progress` hears of values done and may stop the work.
///
/// # Errors
/// The model cannot be read, or the caller stops.
pub fn rounding(
    merged: &Merged,
    made: &Path,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<Vec<Rounding>> {
    let made = HfSource::open(made)?;
    let mut found = Vec::new();
    for (index, meta) in merged.tensors().iter().enumerate() {
        let Some(at) = made.tensors().iter().position(|m| m.name == meta.name && m.dtype == "NF4") else { continue };
        if !merged.nf4(index).is_empty() {
            continue;
        }
        let [rows, cols] = meta.shape[..] else { continue };
        let step = (PIECE / cols).max(1);
        let group = rayon::current_num_threads() * 4;
        let pieces: Vec<usize> = (0..rows).step_by(step).collect();
        let mut sums = Sums::default();
        for starts in pieces.chunks(group) {
            let one = |&start: &usize| -> Result<Sums> {
                let range = start..(start + step).min(rows);
                let read = |get: &dyn Fn(&mut [f32]) -> Result<()>| -> Result<Vec<f32>> {
                    let mut values = vec![0.0; range.len() * cols];
                    get(&mut values).map(|()| values)
                };
                let m = read(&|out| merged.read_rows(index, range.clone(), out))?;
                let w = read(&|out| merged.weights[index].read_origin(merged.base.as_ref(), range.clone(), out))?;
                let q = read(&|out| made.read_rows(at, range.clone(), out))?;
                Ok(w.iter().zip(&m).zip(&q).fold(Sums::default(), |sum, ((&w, &m), &q)| {
                    let [w, m, q] = [w, m, q].map(f64::from);
                    sum.add(Sums {
                        merged: m * m,
                        error: (q - m) * (q - m),
                        change: (m - w) * (m - w),
                        arrived: (q - w) * (m - w),
                    })
                }))
            };
            let parts: Vec<Result<Sums>> = starts.par_iter().map(one).collect();
            for part in parts {
                sums = sums.add(part?);
            }
            let done = starts.iter().map(|start| (step.min(rows - start) * cols) as u64).sum();
            if progress(done).is_break() {
                let message = "stopped as asked; the merged model is complete";
                return Err(Error::new(ErrorCode::Cancelled, format!("tensor `{}`", meta.name), message));
            }
        }
        let module = meta.name.strip_suffix(".weight").unwrap_or(&meta.name).to_owned();
        let layer = layer_of(&module);
        found.push(Rounding { module, layer, sums });
    }
    Ok(found)
}
