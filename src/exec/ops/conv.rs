//! `y[t] = bias + sum_j w[j] x[t - taps + 1 + j]` for each channel, see [`Conv`].

use super::{Interpreter, each_state};
use crate::error::Result;
use crate::exec::sequence::State;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::{Conv, StateId, Value};

pub(super) fn run<B: Backend>(
    it: &mut Interpreter<'_, B>,
    conv: &Conv,
    state: StateId,
    x: Value,
    y: Value,
) -> Result<()> {
    let (pass, backend) = (it.pass, it.backend());
    let (w, bias) = (pass.vector(conv.weight), conv.bias.map(|bias| pass.vector(bias)));
    let mut out = it.buffer(it.len(y))?;
    if it.states.is_empty() {
        // y[t] = bias + sum_j w[j] x[t - taps + 1 + j]
        let segments = &pass.batch.segments;
        backend.run(Call::Conv { w, bias, segments, x: it.data(x), y: &mut out })?;
    } else {
        each_state(it, state, |it, state, rows| {
            let State::Conv(state) = state else { unreachable!("a convolution names a state of its inputs") };
            Ok(backend.run(Call::ConvFrom { w, bias, state, x: it.data(x), y: &mut out, rows })?)
        })?;
    }
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(it: &mut Interpreter<'_, B>, conv: &Conv, x: Value, dy: B::Buffer) -> Result<()> {
    let pass = it.pass;
    let [mut dx] = it.like([x])?;
    // y[t] = bias + sum_j w[j] x[t - taps + 1 + j], so dx[t] = sum_j w[j] dy[t + taps - 1 - j]
    let segments = &pass.batch.segments;
    it.backend().run(Call::ConvVjpX { w: pass.vector(conv.weight), segments, dy: &dy, dx: &mut dx })?;
    it.put(dy);
    it.add_grad(x, dx)
}
