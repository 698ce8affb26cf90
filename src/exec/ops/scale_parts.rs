//! `y[t, c] = factor x[t, c]` with a factor for each part of a row.

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::Value;

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, parts: &[(usize, f32)], x: Value, y: Value) -> Result<()> {
    let (factors, mut out) = (factors(it, parts)?, it.buffer(it.len(y))?);
    // y[t, c] = factor x[t, c]
    it.backend().run(Call::ScaleColumns { factors: &factors, x: it.data(x), y: &mut out })?;
    it.put(factors);
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    parts: &[(usize, f32)],
    x: Value,
    dy: B::Buffer,
) -> Result<()> {
    let (factors, [mut dx]) = (factors(it, parts)?, it.like([x])?);
    // y[t, c] = factor x[t, c], so dx[t, c] = factor dy[t, c]
    it.backend().run(Call::ScaleColumns { factors: &factors, x: &dy, y: &mut dx })?;
    it.put(factors);
    it.put(dy);
    it.add_grad(x, dx)
}

/// The factor of each column.
fn factors<B: Backend>(it: &mut Interpreter<'_, B>, parts: &[(usize, f32)]) -> Result<B::Buffer> {
    let all: Vec<f32> = parts.iter().flat_map(|(width, factor)| std::iter::repeat_n(*factor, *width)).collect();
    let mut factors = it.buffer(all.len())?;
    it.backend().write(&mut factors, &all);
    Ok(factors)
}
