//! `y[t, :] = table[ids[t], :]` and what adapters add to it. Its backward does nothing, for the embedding is frozen, and so
//! are adapters on it.

use super::Interpreter;
use crate::adapter::Context;
use crate::error::{Error, ErrorCode, Result};
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::{Param, Value};

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, table: Param, y: Value) -> Result<()> {
    let (pass, backend) = (it.pass, it.backend());
    let mut out = it.buffer(it.len(y))?;
    // An adapter may bring tokens of its own, but no second table.
    if table != pass.base.model.outline().embedding {
        backend.run(Call::Embed { table: pass.base.matrix(table), ids: &pass.batch.ids, y: &mut out })?;
        it.set(y, out);
        return Ok(());
    }
    let replaced = pass.adapters().replaced();
    backend.run(Call::Embed { table: replaced.table(pass.base, table), ids: &pass.batch.ids, y: &mut out })?;
    replaced.look_up(backend, it.pool, &pass.batch.ids, &mut out)?;
    for part in pass.parts.iter().filter(|part| !part.rows.is_empty()) {
        let lookups = &part.adapters.on(table).lookups;
        if lookups.is_empty() {
            continue;
        }
        let ids = &pass.batch.ids[part.rows.clone()];
        let rows: Vec<u32> = part.rows.clone().map(|row| row as u32).collect();
        let (held, arithmetic) = (part.adapters.held(), pass.arithmetic);
        let mut cx = Context { backend, pool: &mut *it.pool, held, arithmetic, dropout: None };
        lookups.iter().try_for_each(|lookup| lookup.apply(&mut cx, ids, &rows, &mut out))?;
    }
    it.set(y, out);
    Ok(())
}

/// The same for the tokens' positions in their texts.
pub(super) fn run_positions<B: Backend>(it: &mut Interpreter<'_, B>, table: Param, y: Value) -> Result<()> {
    let pass = it.pass;
    let mut out = it.buffer(it.len(y))?;
    let (table, ids) = (pass.base.matrix(table), &pass.positions);
    let (rows, _) = it.backend().shape(table);
    if let Some(beyond) = ids.iter().find(|&&position| position as usize >= rows) {
        let message =
            format!("expected a text of at most `{rows}` tokens, got position `{beyond}`; the model knows no more");
        return Err(Error::new(ErrorCode::Config, "text", message));
    }
    it.backend().run(Call::Embed { table, ids, y: &mut out })?;
    it.set(y, out);
    Ok(())
}
