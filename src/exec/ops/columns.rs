//! `y` is the elements `part` of each of `blocks` blocks of a row of `x`.

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call, Columns};
use pocketlora_models::Value;
use std::ops::Range;

pub(super) fn run<B: Backend>(
    it: &mut Interpreter<'_, B>,
    x: Value,
    width: usize,
    part: &Range<usize>,
    y: Value,
) -> Result<()> {
    let mut out = it.buffer(it.len(y))?;
    // y = x[.., part]
    let (x_at, y_at) = places(width, part);
    it.backend().run(Call::CopyColumns {
        width: part.len(),
        x: it.data(x),
        x_at,
        y: &mut out,
        y_at,
        accumulate: false,
    })?;
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    x: Value,
    width: usize,
    part: &Range<usize>,
    dy: B::Buffer,
) -> Result<()> {
    let backend = it.backend();
    let (mut dx, started) = it.take_grad(x)?;
    if !started {
        // Other parts may have no gradient at all.
        backend.run(Call::Zero { x: &mut dx })?;
    }
    // y = x[.., part], so dx[.., part] += dy
    let (x_at, y_at) = places(width, part);
    backend.run(Call::CopyColumns {
        width: part.len(),
        x: &dy,
        x_at: y_at,
        y: &mut dx,
        y_at: x_at,
        accumulate: true,
    })?;
    it.set_grad(x, dx);
    it.put(dy);
    Ok(())
}

/// Where the part is in a block of `x`, and in what is made of it.
fn places(width: usize, part: &Range<usize>) -> (Columns, Columns) {
    (Columns { of: width, first: part.start }, Columns { of: part.len(), first: 0 })
}
