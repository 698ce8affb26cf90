//! `y[t, :] = table[ids[t], :]` and what adapters add to it. Its backward does nothing, for embeddings are frozen, and so are
//! adapters on them.

use super::Interpreter;
use crate::adapter::Context;
use crate::error::{Error, ErrorCode, Result};
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
    let mut out = look_up(it, replaced.table(pass.base, table), ids, "token", y)?;
    replaced.look_up(backend, it.pool, ids, &mut out)?;
    for part in pass.parts.iter().filter(|part| !part.rows.is_empty()) {
        let lookups = &part.adapters.on(table).lookups;
        if lookups.is_empty() {
            continue;
        }
        let ids = &ids[part.rows.clone()];
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
