//! `y = activation(gate) * up`.

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::{self as kernels, Backend, Call};
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
    it.backend().run(Call::Gate {
        activation: kernel(activation),
        gate: it.data(gate),
        up: it.data(up),
        y: &mut out,
    })?;
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
    let activation = kernel(activation);
    let in_place = gate != up && dying.contains(&gate) && dying.contains(&up);
    // y = activation(gate) * up
    let [dgate, dup] = if in_place {
        let [mut dgate, mut dup] = [it.take(gate), it.take(up)];
        backend.run(Call::GateVjpInPlace { activation, dy: &dy, gate: &mut dgate, up: &mut dup })?;
        [dgate, dup]
    } else {
        let [mut dgate, mut dup] = it.like([gate, up])?;
        let (gate, up) = (it.data(gate), it.data(up));
        backend.run(Call::GateVjp { activation, gate, up, dy: &dy, dgate: &mut dgate, dup: &mut dup })?;
        [dgate, dup]
    };
    it.put(dy);
    it.add_grad(gate, dgate)?;
    it.add_grad(up, dup)
}

/// The kernels' name of a model's activation.
fn kernel(activation: Activation) -> kernels::Activation {
    match activation {
        Activation::Silu => kernels::Activation::Silu,
        Activation::GeluTanh => kernels::Activation::GeluTanh,
    }
}
