//! `y = R x` with a rotation `R` for each position.

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::{RopeTable, Value};

pub(super) fn run<B: Backend>(
    it: &mut Interpreter<'_, B>,
    table: RopeTable,
    heads: usize,
    x: Value,
    y: Value,
) -> Result<()> {
    let mut out = it.buffer(it.len(y))?;
    // y = R x
    turn(it, table, (heads, head_dim(it, heads, x)), it.data(x), false, &mut out)?;
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    table: RopeTable,
    heads: usize,
    x: Value,
    dy: B::Buffer,
) -> Result<()> {
    let mut dx = it.buffer(it.backend().len(&dy))?;
    // y = R x, so dx = R⁻¹ dy
    turn(it, table, (heads, head_dim(it, heads, x)), &dy, true, &mut dx)?;
    it.put(dy);
    it.add_grad(x, dx)
}

fn head_dim<B: Backend>(it: &Interpreter<'_, B>, heads: usize, x: Value) -> usize {
    it.slots[x.0 as usize].width / heads
}

fn turn<B: Backend>(
    it: &Interpreter<'_, B>,
    table: RopeTable,
    (heads, head_dim): (usize, usize),
    x: &B::Buffer,
    inverse: bool,
    y: &mut B::Buffer,
) -> Result<()> {
    let (cos, sin) = &it.pass.angles[table.0 as usize];
    let pairs = it.pass.base.model.ropes()[table.0 as usize].pairs;
    Ok(it.backend().run(Call::Rope { heads, head_dim, cos, sin, x, inverse, pairs, y })?)
}
