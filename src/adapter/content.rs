//! A hash of what a base holds, by which an adapter knows the weights that it was trained on.
//!
//! It covers the linear layers of the decoder that are stored as matrices of their own: of each the name, the shape, and
//! the NF4 codes of eight blocks of 64 weights that are spread over it. A layer in NF4 gives the codes that the same
//! layer in 16 or 32 bits would get, so that a model and the copies that Pocketlora and bitsandbytes quantize of it have
//! one hash. What other quantizations have rounded, and what was trained further or merged into, has another. Norms,
//! biases, embeddings, experts in stacks and transposed layers are not covered. It tells slips apart, not forgeries.

use crate::checksum::add;
use crate::error::Result;
use pocketlora_kernels::{mix, quant};
use pocketlora_models::{Layout, ParamSpec, Role};
use std::ops::Range;

/// Blocks of a layer that are looked at.
const BLOCKS: usize = 8;

/// Reads rows of the parameter of that number as f32.
pub(super) type ReadRows<'a> = dyn FnMut(usize, Range<usize>) -> Result<Vec<f32>> + 'a;

/// The hash of a model with `params`, as text; none where nothing of it is covered.
///
/// # Errors
/// Those of `read`.
pub(super) fn hash(params: &[ParamSpec], read: &mut ReadRows<'_>) -> Result<Option<String>> {
    let (mut sum, mut covered) = (0, false);
    for (number, spec) in params.iter().enumerate() {
        let (Role::Linear, Layout::Whole, [rows, cols]) = (spec.role, spec.layout, &spec.shape[..]) else { continue };
        covered = true;
        let (rows, cols) = (*rows, *cols);
        sum = add(sum, spec.name.as_bytes());
        sum = mix(mix(sum, rows as u64), cols as u64);
        // Blocks run over the flattened matrix: in a row of this multiple one begins where the row does.
        let step = quant::BLOCK / gcd(cols, quant::BLOCK);
        let height = quant::BLOCK.div_ceil(cols).min(rows);
        for sample in 0..BLOCKS {
            let row = (sample * rows.saturating_sub(height) / BLOCKS) / step * step;
            let values = read(number, row..row + height)?;
            let column = sample * (values.len() / quant::BLOCK) / BLOCKS * quant::BLOCK;
            let block = &values[column..values.len().min(column + quant::BLOCK)];
            // Weights that are no numbers are refused elsewhere, where they matter.
            sum = add(sum, &quant::encode(block).map(|(codes, _)| codes).unwrap_or_default());
        }
    }
    Ok(covered.then(|| format!("nf4-codes-1:{sum:016x}")))
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}
