//! A state space: `S = e^(-e^rate d) S + b (d x)ᵀ`, `y = Sᵀ c + skip x` with `d = softplus(dt + bias)` for each token.

use super::{Interpreter, each_state};
use crate::error::Result;
use crate::exec::sequence::State;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::{StateId, StateSpace, Value};

pub(super) fn run<B: Backend>(
    it: &mut Interpreter<'_, B>,
    space: &StateSpace,
    state: StateId,
    [x, b, c, dt]: [Value; 4],
    y: Value,
) -> Result<()> {
    let (pass, backend, spec) = (it.pass, it.backend(), &spec(space));
    let [rate, bias, skip] = [space.rate, space.bias, space.skip].map(|p| pass.vector(p));
    let mut out = it.buffer(it.len(y))?;
    if it.states.is_empty() {
        let [x, b, c, dt] = [x, b, c, dt].map(|t| it.data(t));
        let segments = &pass.batch.segments;
        // y = Sᵀ c + skip x
        backend.run(Call::StateSpace { spec, segments, rate, bias, skip, x, b, c, dt, y: &mut out })?;
    } else {
        each_state(it, state, |it, state, rows| {
            let State::Matrix(state) = state else { unreachable!("a state space names a state of matrices") };
            let [x, b, c, dt] = [x, b, c, dt].map(|t| it.data(t));
            let y = &mut out;
            Ok(backend.run(Call::StateSpaceFrom { spec, rate, bias, skip, x, b, c, dt, state, y, rows })?)
        })?;
    }
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    space: &StateSpace,
    inputs: [Value; 4],
    dy: B::Buffer,
) -> Result<()> {
    let pass = it.pass;
    let [rate, bias, skip] = [space.rate, space.bias, space.skip].map(|p| pass.vector(p));
    let [mut dx, mut db, mut dc, mut ddt] = it.like(inputs)?;
    let [x, b, c, dt] = inputs.map(|t| it.data(t));
    // y = Sᵀ c + skip x
    it.backend().run(Call::StateSpaceVjp {
        spec: &spec(space),
        segments: &pass.batch.segments,
        rate,
        bias,
        skip,
        x,
        b,
        c,
        dt,
        dy: &dy,
        dx: &mut dx,
        db: &mut db,
        dc: &mut dc,
        ddt: &mut ddt,
    })?;
    it.put(dy);
    for (t, grad) in inputs.into_iter().zip([dx, db, dc, ddt]) {
        it.add_grad(t, grad)?;
    }
    Ok(())
}

/// The kernels' form of a model's state space.
fn spec(space: &StateSpace) -> pocketlora_kernels::StateSpace {
    let StateSpace { heads, head_dim, groups, state_dim, limits, .. } = *space;
    pocketlora_kernels::StateSpace { heads, head_dim, groups, state_dim, limits }
}
