//! `y = f(x)` for each element.

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::{Map, Value};

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, map: Map, x: Value, y: Value) -> Result<()> {
    let mut out = it.buffer(it.len(y))?;
    // y = f(x)
    it.backend().run(Call::Map { kind: kind(map), x: it.data(x), y: &mut out })?;
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(it: &mut Interpreter<'_, B>, map: Map, x: Value, dy: B::Buffer) -> Result<()> {
    let [mut dx] = it.like([x])?;
    // y = f(x), so dx = f'(x) dy
    it.backend().run(Call::MapVjp { kind: kind(map), x: it.data(x), dy: &dy, dx: &mut dx })?;
    it.put(dy);
    it.add_grad(x, dx)
}

/// The kernels' name of a function.
fn kind(map: Map) -> pocketlora_kernels::Map {
    match map {
        Map::Sigmoid => pocketlora_kernels::Map::Sigmoid,
        Map::Silu => pocketlora_kernels::Map::Silu,
        Map::GeluTanh => pocketlora_kernels::Map::GeluTanh,
        Map::Softcap(cap) => pocketlora_kernels::Map::Softcap(cap),
        Map::SquaredRelu => pocketlora_kernels::Map::SquaredRelu,
        Map::ClampedSwish { alpha, limit } => pocketlora_kernels::Map::ClampedSwish { alpha, limit },
        Map::Clamp { limit, plus } => pocketlora_kernels::Map::Clamp { limit, plus },
    }
}
