//! `weights, chosen = top(softmax(logits))`: which experts a token goes to, and how much each counts.

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::{Param, Value};

pub(super) fn run<B: Backend>(
    it: &mut Interpreter<'_, B>,
    router: Param,
    top_k: usize,
    normalize: bool,
    logits: Value,
    y: Value,
) -> Result<()> {
    let (pass, backend) = (it.pass, it.backend());
    let numbers = chosen(y);
    let (mut weights, mut chosen) = (it.buffer(it.len(y))?, it.buffer(it.len(numbers))?);
    let training = it.states.is_empty();
    match pass.choices.of(router, &it.rows, top_k).filter(|_| training) {
        Some(before) => backend.write(&mut chosen, &before),
        None => {
            backend.run(Call::TopK { k: top_k, x: it.data(logits), chosen: &mut chosen })?;
            if training {
                let mut found = vec![0.0; backend.len(&chosen)];
                backend.read(&chosen, &mut found)?;
                pass.choices.keep(router, &it.rows, top_k, &found);
            }
        }
    }
    // weights = softmax(logits)[chosen]
    let logits = it.data(logits);
    backend.run(Call::Route { top_k, normalize, logits, chosen: &chosen, weights: &mut weights })?;
    it.set(y, weights);
    it.set(numbers, chosen);
    Ok(())
}

pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    top_k: usize,
    normalize: bool,
    logits: Value,
    y: Value,
    dweights: B::Buffer,
) -> Result<()> {
    let [mut dlogits] = it.like([logits])?;
    // weights, chosen = top(softmax(logits)); the choice stays as it was
    it.backend().run(Call::RouteVjp {
        top_k,
        normalize,
        logits: it.data(logits),
        chosen: it.data(chosen(y)),
        dweights: &dweights,
        dlogits: &mut dlogits,
    })?;
    it.put(dweights);
    it.add_grad(logits, dlogits)
}

/// The second output: numbers of experts.
pub(super) fn chosen(weights: Value) -> Value {
    Value(weights.0 + 1)
}
