//! `y = activation(gate) * up`.

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::Backend;
use pocketlora_models::{Activation, Value};

pub(super) fn run<B: Backend>(
    it: &mut Interpreter<'_, B>,
    activation: Activation,
    gate: Value,
    up: Value,
    y: Value,
) -> Result<()> {
    let mut out = it.buffer(it.len(y))?;
    // y = activation(gate) * up
    match activation {
        Activation::Silu => it.backend().swiglu(it.data(gate), it.data(up), &mut out),
        Activation::GeluTanh => it.backend().geglu(it.data(gate), it.data(up), &mut out),
    }
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    activation: Activation,
    gate: Value,
    up: Value,
    dy: B::Buffer,
    dying: &[Value],
) -> Result<()> {
    let backend = it.backend();
    let in_place = activation == Activation::Silu && gate != up && dying.contains(&gate) && dying.contains(&up);
    // y = activation(gate) * up
    let [dgate, dup] = if in_place {
        let [mut dgate, mut dup] = [it.take(gate), it.take(up)];
        backend.swiglu_vjp_in_place(&dy, &mut dgate, &mut dup);
        [dgate, dup]
    } else {
        let [mut dgate, mut dup] = it.like([gate, up])?;
        match activation {
            Activation::Silu => backend.swiglu_vjp(it.data(gate), it.data(up), &dy, &mut dgate, &mut dup),
            Activation::GeluTanh => backend.geglu_vjp(it.data(gate), it.data(up), &dy, &mut dgate, &mut dup),
        }
        [dgate, dup]
    };
    it.put(dy);
    it.add_grad(gate, dgate);
    it.add_grad(up, dup);
    Ok(())
}
