//! `y[t, :] = table[ids[t], :]` and what adapters add to it. Its backward is theirs alone, for the table is frozen.

use super::{Gradients, Interpreter};
use crate::adapter::Context;
use crate::error::{Error, ErrorCode, Result};
use crate::exec::pass::virtual_number;
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::{Param, Value};

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, table: Param, y: Value) -> Result<()> {
    let (pass, backend, ids) = (it.pass, it.backend(), &it.pass.batch.ids);
    // An adapter may bring tokens of its own, but no second table.
    if table != pass.base.model.outline().embedding {
        let out = look_up(it, pass.base.matrix(table), ids, "token", y)?;
        it.set(y, out);
        return Ok(());
    }
    let replaced = pass.adapters().replaced();
    // A virtual token has no row here, but one of an adapter's, which takes the place of any.
    let known: Vec<u32> = ids.iter().map(|id| if virtual_number(*id).is_some() { 0 } else { *id }).collect();
    let mut out = look_up(it, replaced.table(pass.base, table), &known, "token", y)?;
    replaced.look_up(backend, it.pool, ids, &mut out)?;
    for part in pass.parts.iter().filter(|part| !part.rows.is_empty()) {
        let lookups = &part.adapters.on(table).lookups;
        if lookups.is_empty() {
            continue;
        }
        let ids = &ids[part.rows.clone()];
        let rows: Vec<u32> = part.rows.clone().map(|row| row as u32).collect();
        let (held, arithmetic) = (part.adapters.held(), pass.arithmetic);
        let mut cx =
            Context { backend, pool: &mut *it.pool, held, arithmetic, dropout: None, weight: None, active: &[] };
        lookups.iter().try_for_each(|lookup| lookup.apply(&mut cx, ids, &rows, &mut out))?;
    }
    it.set(y, out);
    Ok(())
}

/// Adds to the gradients of what adapters add, given the gradient `dy` of all rows.
pub(super) fn back<B: Backend>(
    it: &mut Interpreter<'_, B>,
    table: Param,
    mut dy: B::Buffer,
    grads: &mut Gradients<B>,
) -> Result<()> {
    let (pass, backend) = (it.pass, it.backend());
    if table == pass.base.model.outline().embedding {
        let [part] = &pass.parts[..] else { unreachable!("a pass that learns has one part") };
        let rows: Vec<u32> = part.rows.clone().map(|row| row as u32).collect();
        let (held, arithmetic) = (part.adapters.held(), pass.arithmetic);
        let mut cx =
            Context { backend, pool: &mut *it.pool, held, arithmetic, dropout: None, weight: None, active: &[] };
        // y = E[ids], then one term after the other
        for lookup in part.adapters.on(table).lookups.iter().rev() {
            lookup.backward(&mut cx, &pass.batch.ids, &rows, &mut dy, grads)?;
        }
    }
    it.put(dy);
    Ok(())
}

/// The same for the tokens' positions in their texts.
pub(super) fn run_positions<B: Backend>(it: &mut Interpreter<'_, B>, table: Param, y: Value) -> Result<()> {
    let pass = it.pass;
    let out = look_up(it, pass.base.matrix(table), &pass.positions, "position", y)?;
    it.set(y, out);
    Ok(())
}

/// Rows of `table`, which may be fewer than what is looked up in another one; `what` is for people.
fn look_up<B: Backend>(
    it: &mut Interpreter<'_, B>,
    table: &B::Matrix,
    ids: &[u32],
    what: &str,
    y: Value,
) -> Result<B::Buffer> {
    let (rows, _) = it.backend().shape(table);
    if let Some(beyond) = ids.iter().find(|&&id| id as usize >= rows) {
        let message = format!("expected a {what} below `{rows}`, got `{beyond}`; the model knows no more of them");
        return Err(Error::new(ErrorCode::Config, "text", message));
    }
    let mut out = it.buffer(it.len(y))?;
    it.backend().run(Call::Embed { table, ids, y: &mut out })?;
    Ok(out)
}
