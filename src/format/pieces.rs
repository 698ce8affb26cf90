//! Weights read a few rows at a time on all threads, handed on in order.

use super::Source;
use super::plan::Weight;
use super::quantize::Ticker;
use crate::error::Result;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pocketlora_kernels::FloatType;
use pocketlora_kernels::quant::BLOCK;
use rayon::prelude::*;
use std::ops::Range;

/// Elements of a piece, about: 1 MiB of f32, which stays in a core's cache.
const PIECE: usize = 1 << 18;

/// Pieces in flight per thread: enough to keep threads busy while one piece takes longer.
const PER_THREAD: usize = 4;

/// Reads `weight` in pieces of whole rows and whole NF4 blocks, runs `work` on each in parallel and `consume` on the
/// results in order. `work` gets the number of the piece's first element.
///
/// # Errors
/// The first of those of the source, `work`, `consume` and a caller who stops.
pub(super) fn for_each_piece<T: Send>(
    source: &dyn Source,
    weight: &Weight,
    work: impl Fn(u64, &[f32]) -> Result<T> + Sync,
    ticker: &mut Ticker<'_>,
    mut consume: impl FnMut(T) -> Result<()>,
) -> Result<()> {
    let cols = weight.cols;
    // As few rows as make whole blocks, so that every piece but the last encodes as in the whole.
    let step = BLOCK >> cols.trailing_zeros().min(BLOCK.trailing_zeros());
    let rows_per_piece = (PIECE / cols / step).max(1) * step;
    let pieces = weight.rows.div_ceil(rows_per_piece);
    let group = rayon::current_num_threads() * PER_THREAD;
    for first in (0..pieces).step_by(group) {
        let read = |buffer: &mut Vec<f32>, piece: usize| {
            let rows = piece * rows_per_piece..((piece + 1) * rows_per_piece).min(weight.rows);
            let start = rows.start as u64 * cols as u64;
            buffer.resize(rows.len() * cols, 0.0);
            match weight.transposed {
                true => read_columns(source, weight, rows, buffer)?,
                false => source.read_rows(weight.index, rows, buffer)?,
            }
            Ok((buffer.len() as u64, work(start, buffer)?))
        };
        // All results are kept, and the first error in order is reported: the same one at any thread count.
        let results: Vec<Result<_>> =
            (first..pieces.min(first + group)).into_par_iter().map_init(Vec::new, read).collect();
        let mut elements = 0;
        for result in results {
            let (len, value) = result?;
            elements += len;
            consume(value)?;
        }
        ticker.advance(&weight.name, elements)?;
    }
    Ok(())
}

/// Rows of a weight that its source has as columns.
fn read_columns(source: &dyn Source, weight: &Weight, rows: Range<usize>, buffer: &mut [f32]) -> Result<()> {
    let mut column = vec![0.0; weight.rows];
    for i in 0..weight.cols {
        source.read_rows(weight.index, i..i + 1, &mut column)?;
        for (row, value) in buffer.chunks_exact_mut(weight.cols).zip(&column[rows.clone()]) {
            row[i] = *value;
        }
    }
    Ok(())
}

/// `values`, which begin at element `start` of `weight`, as little-endian elements of type `float`.
///
/// # Errors
/// A value is NaN or infinite, or too large for binary16.
pub(super) fn narrow(float: FloatType, values: &[f32], weight: &Weight, start: u64) -> Result<Vec<u8>> {
    if let Some(i) = values.iter().position(|x| !x.is_finite()) {
        return Err(weight.bad_value(start + i as u64, values[i], "a finite weight"));
    }
    match float {
        FloatType::F32 => Ok(values.iter().flat_map(|x| x.to_le_bytes()).collect()),
        FloatType::BF16 => {
            let mut narrow = vec![bf16::ZERO; values.len()];
            narrow.convert_from_f32_slice(values);
            Ok(narrow.iter().flat_map(|x| x.to_le_bytes()).collect())
        }
        FloatType::F16 => {
            let mut narrow = vec![f16::ZERO; values.len()];
            narrow.convert_from_f32_slice(values);
            if let Some(i) = narrow.iter().position(|x| x.is_infinite()) {
                let expected = "a magnitude below 65520 for `f16` (convert to `bf16` instead)";
                return Err(weight.bad_value(start + i as u64, values[i], expected));
            }
            Ok(narrow.iter().flat_map(|x| x.to_le_bytes()).collect())
        }
    }
}
