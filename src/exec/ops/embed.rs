//! `y[t, :] = table[ids[t], :]`. Its backward does nothing, for the embedding is frozen.

use super::Interpreter;
use crate::error::{Error, ErrorCode, Result};
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::{Param, Value};

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, table: Param, y: Value) -> Result<()> {
    let pass = it.pass;
    let mut out = it.buffer(it.len(y))?;
    // An adapter may bring tokens of its own, but no second table.
    let own = table == pass.base.model.outline().embedding;
    let table = if own { pass.adapters().replaced().table(pass.base, table) } else { pass.base.matrix(table) };
    it.backend().run(Call::Embed { table, ids: &pass.batch.ids, y: &mut out })?;
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
