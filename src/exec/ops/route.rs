//! `weights, chosen = top(scores(logits))`: which experts a token goes to, and how much each counts.

use super::Interpreter;
use crate::error::Result;
use pocketlora_kernels::{self as kernels, Backend, Call, Map};
use pocketlora_models::{Param, Routing, Scores, Value};

pub(super) fn run<B: Backend>(
    it: &mut Interpreter<'_, B>,
    router: Param,
    routing: &Routing,
    logits: Value,
    y: Value,
) -> Result<()> {
    let Routing { top: top_k, normalize, scores, .. } = *routing;
    let (pass, backend) = (it.pass, it.backend());
    let numbers = chosen(y);
    let (mut weights, mut chosen) = (it.buffer(it.len(y))?, it.buffer(it.len(numbers))?);
    let training = it.states.is_empty();
    match pass.choices.of(router, &it.rows, top_k).filter(|_| training) {
        Some(before) => backend.write(&mut chosen, &before),
        None => {
            choose(it, routing, logits, &mut chosen)?;
            if training {
                let mut found = vec![0.0; backend.len(&chosen)];
                backend.read(&chosen, &mut found)?;
                pass.choices.keep(router, &it.rows, top_k, &found);
            }
        }
    }
    // weights = scores(logits)[chosen]
    let (scores, logits) = (kernel(scores), it.data(logits));
    backend.run(Call::Route { top_k, scores, normalize, logits, chosen: &chosen, weights: &mut weights })?;
    if let Some(of_experts) = routing.factors {
        let factors = factors_of(it, of_experts, &as_numbers(backend, &chosen)?)?;
        let mut scaled = it.buffer(it.len(y))?;
        // weights = factors[chosen] * weights
        it.backend().run(Call::Multiply { a: &factors, b: &weights, y: &mut scaled })?;
        [factors, std::mem::replace(&mut weights, scaled)].into_iter().for_each(|buffer| it.put(buffer));
    }
    it.set(y, weights);
    it.set(numbers, chosen);
    Ok(())
}

/// The experts with the largest scores, to which a bias may be added for that.
fn choose<B: Backend>(
    it: &mut Interpreter<'_, B>,
    routing: &Routing,
    logits: Value,
    chosen: &mut B::Buffer,
) -> Result<()> {
    let backend = it.backend();
    let Scores::Sigmoid { bias: Some(bias) } = routing.scores else {
        // Scores are in the order of the logits.
        return Ok(backend.run(Call::TopK { k: routing.top, x: it.data(logits), chosen })?);
    };
    let mut scores = it.buffer(it.len(logits))?;
    backend.run(Call::Map { kind: Map::Sigmoid, x: it.data(logits), y: &mut scores })?;
    backend.run(Call::AddBias { bias: it.pass.vector(bias), y: &mut scores })?;
    backend.run(Call::TopK { k: routing.top, x: &scores, chosen })?;
    it.put(scores);
    Ok(())
}

/// The factors `of_experts` of those that were chosen.
fn factors_of<B: Backend>(it: &mut Interpreter<'_, B>, of_experts: Param, chosen: &[u32]) -> Result<B::Buffer> {
    let mut factors = it.buffer(chosen.len())?;
    it.backend().run(Call::GatherRows { x: it.pass.vector(of_experts), rows: chosen, y: &mut factors })?;
    Ok(factors)
}

/// Numbers of experts, which a device holds as floats.
fn as_numbers<B: Backend>(backend: &B, chosen: &B::Buffer) -> Result<Vec<u32>> {
    let mut numbers = vec![0.0; backend.len(chosen)];
    backend.read(chosen, &mut numbers)?;
    Ok(numbers.into_iter().map(|number| number as u32).collect())
}

/// The kernels' name of a kind of scores.
fn kernel(scores: Scores) -> kernels::Scores {
    match scores {
        Scores::Softmax => kernels::Scores::Softmax,
        Scores::Sigmoid { .. } => kernels::Scores::Sigmoid,
    }
}

pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    routing: &Routing,
    logits: Value,
    y: Value,
    mut dweights: B::Buffer,
) -> Result<()> {
    let [mut dlogits] = it.like([logits])?;
    if let Some(of_experts) = routing.factors {
        let factors = factors_of(it, of_experts, &as_numbers(it.backend(), it.data(chosen(y)))?)?;
        let [mut scaled] = it.like([y])?;
        // weights = factors[chosen] * weights, so dweights = factors[chosen] * dweights
        it.backend().run(Call::Multiply { a: &factors, b: &dweights, y: &mut scaled })?;
        [factors, std::mem::replace(&mut dweights, scaled)].into_iter().for_each(|buffer| it.put(buffer));
    }
    // weights, chosen = top(scores(logits)); the choice stays as it was
    it.backend().run(Call::RouteVjp {
        top_k: routing.top,
        scores: kernel(routing.scores),
        normalize: routing.normalize,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Adapters;
    use crate::base::{Base, Pool};
    use crate::exec::train::{Batch, Pass};
    use crate::format::Checkpoint;
    use pocketlora_kernels::{Arithmetic, Cpu, Memory};
    use pocketlora_models::Op;
    use std::path::Path;

    #[test]
    fn a_layer_that_is_run_again_takes_the_experts_it_took_first() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/oracles/tiny-llama");
        let base = Base::load(Cpu::new(1), &Checkpoint::open(&dir).unwrap()).unwrap();
        let (adapters, batch) = (Adapters::none(&base), Batch { ids: vec![1, 2, 3], segments: vec![3] });
        let mut pool = Pool::default();
        let pass = Pass::new(&base, &adapters, &batch, None, Arithmetic::Exact, &mut pool).unwrap();
        let width = base.model.config().hidden_size;
        let mut choose = |router, best: usize| {
            let mut logits = base.backend.buffer(3 * width).unwrap();
            logits.chunks_mut(width).for_each(|row| (row[best], row[best + 1]) = (2.0, 1.0));
            let mut it = Interpreter::new(&pass, Some(logits), false, &mut pool);
            let routing = Routing { top: 2, scores: Scores::Softmax, normalize: true, factors: None };
            let op = Op::Route { router: Param(router), routing, logits: Value(0) };
            let y = it.declare(&op);
            it.run(&op, y).unwrap();
            (it.data(chosen(y)).to_vec(), it.data(y).to_vec())
        };
        let (first, weights) = choose(0, 5);
        assert_eq!(first, [5.0, 6.0].repeat(3));
        // The inputs are others now: so are the weights, but not the experts.
        let (again, others) = choose(0, 9);
        assert_eq!(again, first);
        assert_ne!(others, weights);
        assert_eq!(choose(1, 9).0, [9.0, 10.0].repeat(3), "another router");
    }
}
