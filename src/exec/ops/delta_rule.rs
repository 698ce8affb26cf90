//! The gated delta rule: `S = e^g S`, `S = S + k (beta (v - Sᵀ k))ᵀ`, `y = Sᵀ q` for each token.

use super::{Interpreter, each_state};
use crate::error::Result;
use crate::exec::sequence::State;
use pocketlora_kernels::{Backend, Call, DeltaRule};
use pocketlora_models::{DeltaRuleShape, StateId, Value};

pub(super) fn run<B: Backend>(
    it: &mut Interpreter<'_, B>,
    shape: &DeltaRuleShape,
    state: StateId,
    [q, k, v, g, beta]: [Value; 5],
    y: Value,
) -> Result<()> {
    let (pass, backend, spec) = (it.pass, it.backend(), &spec(shape));
    let mut out = it.buffer(it.len(y))?;
    if it.states.is_empty() {
        let [q, k, v, g, beta] = [q, k, v, g, beta].map(|t| it.data(t));
        let segments = &pass.batch.segments;
        // y = Sᵀ q
        backend.run(Call::DeltaRule { spec, segments, q, k, v, g, beta, y: &mut out })?;
    } else {
        each_state(it, state, |it, state, rows| {
            let State::Matrix(state) = state else { unreachable!("the delta rule names a state of matrices") };
            let [q, k, v, g, beta] = [q, k, v, g, beta].map(|t| it.data(t));
            Ok(backend.run(Call::DeltaRuleFrom { spec, q, k, v, g, beta, state, y: &mut out, rows })?)
        })?;
    }
    it.set(y, out);
    Ok(())
}

pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    shape: &DeltaRuleShape,
    inputs: [Value; 5],
    dy: B::Buffer,
) -> Result<()> {
    let pass = it.pass;
    let [mut dq, mut dk, mut dv, mut dg, mut dbeta] = it.like(inputs)?;
    let [q, k, v, g, beta] = inputs.map(|t| it.data(t));
    // y = Sᵀ q
    it.backend().run(Call::DeltaRuleVjp {
        spec: &spec(shape),
        segments: &pass.batch.segments,
        q,
        k,
        v,
        g,
        beta,
        dy: &dy,
        dq: &mut dq,
        dk: &mut dk,
        dv: &mut dv,
        dg: &mut dg,
        dbeta: &mut dbeta,
    })?;
    it.put(dy);
    for (t, grad) in inputs.into_iter().zip([dq, dk, dv, dg, dbeta]) {
        it.add_grad(t, grad)?;
    }
    Ok(())
}

/// The kernels' form of a model's shape.
fn spec(shape: &DeltaRuleShape) -> DeltaRule {
    let DeltaRuleShape { key_heads, value_heads, key_dim, value_dim } = *shape;
    DeltaRule { key_heads, value_heads, key_dim, value_dim }
}
