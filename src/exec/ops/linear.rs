//! `y = g(f(x) Wᵀ + terms(f(x)) + b)` for each of a group of layers that read the same `x`. Adapters bring `f`, `g` and
//! the terms ([`crate::adapter::forms`]); without them it is `y = x Wᵀ + b`.

use super::{Gradients, Interpreter};
use crate::adapter::Context;
use crate::adapter::forms::{Change, LowRankFactors, OnLayer};
use crate::error::Result;
use crate::exec::pass::Part;
use pocketlora_kernels::{ALL_ROWS, Arithmetic, Backend, Call, LowRank, Product};
use pocketlora_models::{Linear, Param, Value};
use std::sync::Arc;

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, layers: &[Linear], x: Value, y: Value) -> Result<()> {
    let parts = &it.pass.parts;
    let reads = |layer: &Linear| parts.iter().any(|part| !part.adapters.on(layer.weight).inputs.is_empty());
    // Layers whose input no adapter changes share one product.
    let (changed, plain): (Vec<usize>, Vec<usize>) = (0..layers.len()).partition(|&i| reads(&layers[i]));
    let group: Vec<(usize, Linear)> = plain.into_iter().map(|i| (i, layers[i])).collect();
    if !group.is_empty() {
        let input = it.take(x);
        let made = products(it, &group, &input, y);
        it.set(x, input);
        made?;
    }
    for i in changed {
        let layer = layers[i];
        // x' = f(x)
        let input = it.take(x);
        let width = it.slots[x.0 as usize].width;
        let read = change_parts(it, &input, width, |part| &part.adapters.on(layer.weight).inputs);
        it.set(x, input);
        let read = read?.expect("an adapter changes it");
        products(it, &[(i, layer)], &read, y)?;
        it.put(read);
    }
    Ok(())
}

/// Outputs number `i` of a group of layers that read the same `x`.
fn products<B: Backend>(
    it: &mut Interpreter<'_, B>,
    layers: &[(usize, Linear)],
    x: &B::Buffer,
    y: Value,
) -> Result<()> {
    let (pass, backend, first) = (it.pass, it.backend(), it.rows.start);
    let mut ys = Vec::with_capacity(layers.len());
    for (i, _) in layers {
        ys.push(it.buffer(it.len(output(y, *i)))?);
    }
    // Low-rank terms go along with the product, unless their input is another because some of it is dropped.
    let fused = |weight: Param| {
        let mut all = Vec::with_capacity(pass.parts.len());
        if pass.layer_dropout(weight, first).is_some() {
            return None;
        }
        for Part { adapters, rows } in pass.parts.iter().filter(|part| !part.rows.is_empty()) {
            let rows = if pass.parts.len() == 1 { ALL_ROWS } else { rows.clone() };
            for term in &adapters.on(weight).terms {
                let LowRankFactors { a, b, factor } = term.low_rank(adapters.held())?;
                all.push(LowRank { a, b, scale: factor, rows: rows.clone() });
            }
        }
        Some(all)
    };
    // y = x Wᵀ + s (x Aᵀ) Bᵀ
    let mut products = Vec::with_capacity(layers.len());
    let mut apart = Vec::with_capacity(layers.len());
    for ((_, layer), y) in layers.iter().zip(&mut ys) {
        let low_rank = fused(layer.weight);
        apart.push(low_rank.is_none());
        let w = pass.factor(layer.weight, pass.arithmetic);
        products.push(Product { w, low_rank: low_rank.unwrap_or_default(), y });
    }
    backend.run(Call::MatmulGroup { arithmetic: pass.arithmetic, x, products: &mut products })?;
    for (((i, layer), mut data), apart) in layers.iter().zip(ys).zip(apart) {
        if apart {
            for part in &pass.parts {
                add_terms(it, part, layer.weight, x, &mut data)?;
            }
        }
        if let Some(bias) = layer.bias {
            // y += b
            backend.run(Call::AddBias { bias: pass.vector(bias), y: &mut data })?;
        }
        // y = g(y)
        let width = it.slots[output(y, *i).0 as usize].width;
        if let Some(changed) = change_parts(it, &data, width, |part| &part.adapters.on(layer.weight).outputs)? {
            it.put(std::mem::replace(&mut data, changed));
        }
        it.set(output(y, *i), data);
    }
    Ok(())
}

/// Adds what the terms of `part` on the layer of `weight` make of its rows of `x` to those of `y`.
fn add_terms<B: Backend>(
    it: &mut Interpreter<'_, B>,
    part: &Part<'_, B>,
    weight: Param,
    x: &B::Buffer,
    y: &mut B::Buffer,
) -> Result<()> {
    let (pass, backend) = (it.pass, it.backend());
    let terms = &part.adapters.on(weight).terms;
    let mut cx = context(it, part, Some(weight));
    if pass.parts.len() == 1 {
        return terms.iter().try_for_each(|term| term.apply(&mut cx, x, y));
    }
    if terms.is_empty() || part.rows.is_empty() {
        return Ok(());
    }
    let (out, input) = backend.shape(pass.factor(weight, pass.arithmetic));
    let rows: Vec<u32> = part.rows.clone().map(|row| row as u32).collect();
    let mut own = cx.pool.take(backend, rows.len() * input)?;
    let mut added = cx.pool.take(backend, rows.len() * out)?;
    backend.run(Call::GatherRows { x, rows: &rows, y: &mut own })?;
    backend.run(Call::Zero { x: &mut added })?;
    for term in terms {
        term.apply(&mut cx, &own, &mut added)?;
    }
    backend.run(Call::ScatterAddRows { x: &added, rows: &rows, y })?;
    [own, added].into_iter().for_each(|buffer| cx.pool.put(backend, buffer));
    Ok(())
}

/// `x` `[T, width]` with the rows of each part changed as `changes` says, or `None` where no row is.
fn change_parts<'p, B: Backend>(
    it: &mut Interpreter<'p, B>,
    x: &B::Buffer,
    width: usize,
    changes: impl Fn(&'p Part<'p, B>) -> &'p [Arc<dyn Change<B>>],
) -> Result<Option<B::Buffer>> {
    let (pass, backend) = (it.pass, it.backend());
    if let [part] = &pass.parts[..] {
        let mut cx = context(it, part, None);
        return chain(&mut cx, changes(part), x);
    }
    if pass.parts.iter().all(|part| changes(part).is_empty()) {
        return Ok(None);
    }
    let mut all = it.buffer(backend.len(x))?;
    backend.run(Call::Zero { x: &mut all })?;
    for part in pass.parts.iter().filter(|part| !part.rows.is_empty()) {
        let rows: Vec<u32> = part.rows.clone().map(|row| row as u32).collect();
        let mut own = it.buffer(rows.len() * width)?;
        backend.run(Call::GatherRows { x, rows: &rows, y: &mut own })?;
        let changed = chain(&mut context(it, part, None), changes(part), &own)?;
        backend.run(Call::ScatterAddRows { x: changed.as_ref().unwrap_or(&own), rows: &rows, y: &mut all })?;
        changed.into_iter().chain([own]).for_each(|buffer| it.put(buffer));
    }
    Ok(Some(all))
}

/// `x` through one change after the other; `None` where there is none.
fn chain<B: Backend>(
    cx: &mut Context<'_, B>,
    changes: &[Arc<dyn Change<B>>],
    x: &B::Buffer,
) -> Result<Option<B::Buffer>> {
    let mut last = None;
    for change in changes {
        let mut y = cx.pool.take(cx.backend, cx.backend.len(x))?;
        change.apply(cx, last.as_ref().unwrap_or(x), &mut y)?;
        if let Some(before) = last.replace(y) {
            cx.pool.put(cx.backend, before);
        }
    }
    Ok(last)
}

/// The gradient `dy` of what `changes` make of `x` becomes that of `x`; adds to the gradients of their tensors. Only where
/// one of those is in training is `x` asked for: the inputs of later changes are computed again from it.
fn back_through<B: Backend>(
    cx: &mut Context<'_, B>,
    changes: &[Arc<dyn Change<B>>],
    x: Option<&B::Buffer>,
    dy: &mut B::Buffer,
    grads: &mut Gradients<B>,
) -> Result<()> {
    for (i, change) in changes.iter().enumerate().rev() {
        let learns = change.learns(grads);
        let before = if learns { chain(cx, &changes[..i], x.expect("what learns is given its input"))? } else { None };
        let input = before.as_ref().or(x).filter(|_| learns);
        let mut dx = cx.pool.take(cx.backend, cx.backend.len(dy))?;
        change.backward(cx, input, dy, &mut dx, grads)?;
        cx.pool.put(cx.backend, std::mem::replace(dy, dx));
        before.into_iter().for_each(|buffer| cx.pool.put(cx.backend, buffer));
    }
    Ok(())
}

/// What forms of `part` compute with, on the layer of `weight` where they ask for it.
fn context<'a, B: Backend>(it: &'a mut Interpreter<'_, B>, part: &Part<'a, B>, layer: Option<Param>) -> Context<'a, B> {
    let (pass, backend) = (it.pass, it.backend());
    let dropout = pass.dropout.and_then(|_| pass.layer_dropout(layer?, it.rows.start));
    let weight = layer.map(|layer| pass.factor(layer, Arithmetic::Exact));
    // Rows of one part of several are handed to it by themselves.
    let first = if pass.parts.len() == 1 { it.rows.start } else { part.rows.start };
    let (held, arithmetic, active) = (part.adapters.held(), pass.arithmetic, pass.active.get(first..).unwrap_or(&[]));
    Context { backend, pool: &mut *it.pool, held, arithmetic, dropout, weight, active }
}

/// Backward of the layers of a group, the last one first. A pass that learns has one part.
pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    layers: &[Linear],
    x: Value,
    y: Value,
    dying: &[Value],
    grads: &mut Gradients<B>,
) -> Result<()> {
    let pass = it.pass;
    let [part] = &pass.parts[..] else { unreachable!("a pass that learns has one part") };
    let mut given = Vec::with_capacity(layers.len());
    // Where a layer's own input learns, `x` is needed to the end.
    let mut x_learns = false;
    for (i, layer) in layers.iter().enumerate().rev() {
        let Some(mut dy) = it.slots[output(y, i).0 as usize].grad.take() else { continue };
        let on = part.adapters.on(layer.weight);
        x_learns |= on.inputs.iter().any(|change| change.learns(grads));
        if !on.outputs.is_empty() {
            // y = g(u) with u = x' Wᵀ + terms + b
            let learns = on.outputs.iter().any(|change| change.learns(grads));
            let u = if learns { Some(unchanged(it, part, *layer, x)?) } else { None };
            back_through(&mut context(it, part, Some(layer.weight)), &on.outputs, u.as_ref(), &mut dy, grads)?;
            u.into_iter().for_each(|buffer| it.put(buffer));
        }
        if let Some(db) = part.adapters.learned_vector(layer.bias).and_then(|id| grads.of(id)) {
            // y += b
            it.backend().run(Call::SumColumns { a: &dy, b: None, y: db })?;
        }
        let mut carried = Vec::with_capacity(on.terms.len());
        if !on.terms.is_empty() {
            let input = it.take(x);
            let mut cx = context(it, part, Some(layer.weight));
            let read = chain(&mut cx, &on.inputs, &input)?;
            for term in &on.terms {
                carried.push(term.backward(&mut cx, read.as_ref().unwrap_or(&input), &dy, grads)?);
            }
            read.into_iter().for_each(|buffer| it.put(buffer));
            it.set(x, input);
        }
        given.push((layer, dy, carried));
    }
    // Its gradient may take its place.
    let dies = dying.contains(&x);
    if dies && !x_learns {
        it.free(x);
    }
    for (layer, dy, carried) in given {
        back_product(it, part, *layer, x, dy, carried, grads)?;
    }
    if dies && x_learns {
        it.free(x);
    }
    Ok(())
}

/// `x' Wᵀ + terms + b` of a layer once more, before adapters change it.
fn unchanged<B: Backend>(
    it: &mut Interpreter<'_, B>,
    part: &Part<'_, B>,
    layer: Linear,
    x: Value,
) -> Result<B::Buffer> {
    let (pass, backend) = (it.pass, it.backend());
    let on = part.adapters.on(layer.weight);
    let weight = pass.factor(layer.weight, pass.arithmetic);
    let mut u = it.buffer(backend.shape(weight).0 * it.rows.len())?;
    let input = it.take(x);
    let mut cx = context(it, part, Some(layer.weight));
    let read = chain(&mut cx, &on.inputs, &input)?;
    let x_read = read.as_ref().unwrap_or(&input);
    backend.run(Call::Matmul { arithmetic: pass.arithmetic, w: weight, x: x_read, y: &mut u, accumulate: false })?;
    for term in &on.terms {
        term.apply(&mut cx, x_read, &mut u)?;
    }
    read.into_iter().for_each(|buffer| it.put(buffer));
    it.set(x, input);
    if let Some(bias) = layer.bias {
        backend.run(Call::AddBias { bias: pass.vector(bias), y: &mut u })?;
    }
    Ok(u)
}

/// What a layer passes on to `x`, given the gradient `dy` of its product and what its terms carry.
fn back_product<B: Backend>(
    it: &mut Interpreter<'_, B>,
    part: &Part<'_, B>,
    layer: Linear,
    x: Value,
    dy: B::Buffer,
    carried: Vec<B::Buffer>,
    grads: &mut Gradients<B>,
) -> Result<()> {
    let (pass, backend) = (it.pass, it.backend());
    let on: &OnLayer<B> = part.adapters.on(layer.weight);
    let learns = on.inputs.iter().any(|change| change.learns(grads));
    let dropout = pass.layer_dropout(layer.weight, it.rows.start);
    if it.needs(x) || learns {
        // A changed input has a gradient of its own.
        let (mut dx, started) = if on.inputs.is_empty() { it.take_grad(x)? } else { (it.buffer(it.len(x))?, false) };
        // y = x Wᵀ + s (x Aᵀ) Bᵀ, so dx = dy W + dh A. What was dropped in part is not taken along.
        let held = part.adapters.held();
        let mut terms = vec![(pass.factor(layer.weight, Default::default()), &dy)];
        if dropout.is_none() {
            let low_rank = on.terms.iter().zip(&carried);
            terms.extend(low_rank.filter_map(|(term, dh)| Some((term.low_rank(held)?.a, dh))));
        }
        backend.run(Call::MatmulVjpX {
            arithmetic: pass.arithmetic,
            terms: &terms,
            dx: &mut dx,
            accumulate: started,
        })?;
        for (term, dh) in on.terms.iter().zip(&carried) {
            if dropout.is_some() || term.low_rank(held).is_none() {
                term.backward_x(&mut context(it, part, Some(layer.weight)), dh, &mut dx)?;
            }
        }
        if on.inputs.is_empty() {
            it.set_grad(x, dx);
        } else {
            // x' = f(x)
            let input = learns.then(|| it.take(x));
            back_through(&mut context(it, part, Some(layer.weight)), &on.inputs, input.as_ref(), &mut dx, grads)?;
            if let Some(input) = input {
                it.set(x, input);
            }
            it.add_grad(x, dx)?;
        }
    }
    carried.into_iter().chain([dy]).for_each(|buffer| it.put(buffer));
    Ok(())
}

/// What layer number `i` of a group writes, whose first output is `y`.
fn output(y: Value, i: usize) -> Value {
    Value(y.0 + i as u32)
}
