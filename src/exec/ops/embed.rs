//! `y[t, :] = table[ids[t], :]`. Its backward does nothing, for embeddings are frozen.

use super::Interpreter;
use crate::error::{Error, ErrorCode, Result};
use pocketlora_kernels::{Backend, Call};
use pocketlora_models::{Param, Value};

pub(super) fn run<B: Backend>(it: &mut Interpreter<'_, B>, table: Param, y: Value) -> Result<()> {
    let (pass, ids) = (it.pass, &it.pass.batch.ids);
    // An adapter may bring tokens of its own, but no second table.
    if table != pass.base.model.outline().embedding {
        return look_up(it, pass.base.matrix(table), ids, "token", y);
    }
    look_up(it, pass.adapters().replaced().table(pass.base, table), ids, "token", y)
}

/// The same for the tokens' positions in their texts.
pub(super) fn run_positions<B: Backend>(it: &mut Interpreter<'_, B>, table: Param, y: Value) -> Result<()> {
    let pass = it.pass;
    look_up(it, pass.base.matrix(table), &pass.positions, "position", y)
}

/// Rows of `table`, which may be fewer than what is looked up in another one; `what` is for people.
fn look_up<B: Backend>(
    it: &mut Interpreter<'_, B>,
    table: &B::Matrix,
    ids: &[u32],
    what: &str,
    y: Value,
) -> Result<()> {
    let (rows, _) = it.backend().shape(table);
    if let Some(beyond) = ids.iter().find(|&&id| id as usize >= rows) {
        let message = format!("expected a {what} below `{rows}`, got `{beyond}`; the model knows no more of them");
        return Err(Error::new(ErrorCode::Config, "text", message));
    }
    let mut out = it.buffer(it.len(y))?;
    it.backend().run(Call::Embed { table, ids, y: &mut out })?;
    it.set(y, out);
    Ok(())
}
