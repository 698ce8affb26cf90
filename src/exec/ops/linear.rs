//! `y = x Wᵀ + adapters(x) + b` for each of a group of layers that read the same `x`.

use super::{Gradients, Interpreter};
use crate::adapter::Context;
use crate::error::Result;
use crate::exec::pass::Part;
use pocketlora_kernels::{Backend, Product};
use pocketlora_models::{Linear, Param, Value};

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, layers: &[Linear], x: Value, y: Value) -> Result<()> {
    let (pass, backend, first) = (it.pass, it.backend(), it.rows.start);
    let mut ys = Vec::with_capacity(layers.len());
    for i in 0..layers.len() {
        ys.push(it.buffer(it.len(output(y, i)))?);
    }
    // Low-rank terms go along with the product, unless their input is another because some of it is dropped.
    let fused = |weight: Param| {
        let [Part { adapters, .. }] = &pass.parts[..] else { return None };
        let on = adapters.on(weight);
        let low_rank = on.iter().all(|adapter| adapter.low_rank().is_some());
        (low_rank && pass.layer_dropout(weight, first).is_none()).then_some(on)
    };
    // y = x Wᵀ + s (x Aᵀ) Bᵀ
    let product = |(layer, y): (&Linear, _)| {
        let terms = fused(layer.weight).unwrap_or_default();
        let low_rank = terms.iter().filter_map(|adapter| adapter.low_rank()).collect();
        Product { w: pass.factor(layer.weight, pass.arithmetic), low_rank, y }
    };
    let mut products: Vec<_> = layers.iter().zip(&mut ys).map(product).collect();
    backend.matmul_group(pass.arithmetic, it.data(x), &mut products)?;
    drop(products);
    for (i, (layer, mut data)) in layers.iter().zip(ys).enumerate() {
        if fused(layer.weight).is_none() {
            for part in &pass.parts {
                adapt(it, part, layer.weight, x, &mut data)?;
            }
        }
        if let Some(bias) = layer.bias {
            // y += b
            backend.add_bias(pass.vector(bias), &mut data);
        }
        it.set(output(y, i), data);
    }
    Ok(())
}

/// Adds what the adapters of `part` on the layer of `weight` make of its rows of `x` to those of `y`.
fn adapt<B: Backend>(
    it: &mut Interpreter<'_, B>,
    part: &Part<'_, B>,
    weight: Param,
    x: Value,
    y: &mut B::Buffer,
) -> Result<()> {
    let (pass, backend) = (it.pass, it.backend());
    let adapters = part.adapters.on(weight);
    let dropout = pass.layer_dropout(weight, it.rows.start);
    let slot = &it.slots[x.0 as usize];
    let input = slot.data.as_ref().expect("an operation runs after those whose values it reads");
    let mut cx = Context { backend, pool: &mut *it.pool, arithmetic: pass.arithmetic, dropout };
    if pass.parts.len() == 1 {
        return adapters.iter().try_for_each(|adapter| adapter.apply(&mut cx, input, y));
    }
    if adapters.is_empty() {
        return Ok(());
    }
    let (out, _) = backend.shape(pass.factor(weight, pass.arithmetic));
    let rows: Vec<u32> = part.rows.clone().map(|row| row as u32).collect();
    let mut own = cx.pool.take(backend, rows.len() * slot.width)?;
    let mut added = cx.pool.take(backend, rows.len() * out)?;
    backend.gather_rows(input, &rows, &mut own);
    backend.zero(&mut added);
    for adapter in adapters {
        adapter.apply(&mut cx, &own, &mut added)?;
    }
    backend.scatter_add_rows(&added, &rows, y);
    [own, added].into_iter().for_each(|buffer| cx.pool.put(backend, buffer));
    Ok(())
}

/// Only a layer's first adapter is in training; others attached beside it pass gradients on.
pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    layers: &[Linear],
    x: Value,
    y: Value,
    dying: &[Value],
    grads: &mut Gradients<B>,
) -> Result<()> {
    let (pass, backend, first) = (it.pass, it.backend(), it.rows.start);
    let adapters = pass.adapters();
    let mut given = Vec::with_capacity(layers.len());
    for (i, layer) in layers.iter().enumerate().rev() {
        let Some(dy) = it.slots[output(y, i).0 as usize].grad.take() else { continue };
        let dropout = pass.layer_dropout(layer.weight, first);
        let mut carried = Vec::new();
        for adapter in adapters.on(layer.weight).iter().map(Box::as_ref) {
            let Some(range) = grads.ranges[layer.weight.0 as usize].clone() else { continue };
            let input = it.slots[x.0 as usize].data.as_ref().expect("kept for backward");
            let mut cx = Context { backend, pool: &mut *it.pool, arithmetic: pass.arithmetic, dropout };
            carried.push((adapter, adapter.backward(&mut cx, input, &dy, &mut grads.tensors[range])?));
        }
        given.push((layer, dropout, dy, carried));
    }
    // Its gradient may take its place.
    if dying.contains(&x) {
        it.free(x);
    }
    for (layer, dropout, dy, carried) in given {
        let mut dx = None;
        if it.needs(x) {
            let (mut buffer, started) = it.take_grad(x)?;
            // y = x Wᵀ + s (x Aᵀ) Bᵀ, so dx = dy W + dh A. What was dropped in part is not taken along.
            let mut terms = vec![(pass.factor(layer.weight, Default::default()), &dy)];
            if dropout.is_none() {
                terms.extend(carried.iter().filter_map(|(adapter, dh)| Some((adapter.low_rank()?.a, dh))));
            }
            backend.matmul_vjp_x_sum(pass.arithmetic, &terms, &mut buffer, started);
            dx = Some(buffer);
        }
        for (adapter, dh) in carried {
            if let Some(dx) = &mut dx
                && (dropout.is_some() || adapter.low_rank().is_none())
            {
                let mut cx = Context { backend, pool: &mut *it.pool, arithmetic: pass.arithmetic, dropout };
                adapter.backward_x(&mut cx, &dh, dx)?;
            }
            it.put(dh);
        }
        it.slots[x.0 as usize].grad = dx;
        it.put(dy);
    }
    Ok(())
}

/// What layer number `i` of a group writes, whose first output is `y`.
fn output(y: Value, i: usize) -> Value {
    Value(y.0 + i as u32)
}
