//! First values that a fresh adapter takes from its base.

use super::Method;
use super::attach::Adapters;
use super::prompt::EMBEDDINGS;
use super::tensor::{HostTensor, Tensors};
use crate::base::{Base, Pool};
use crate::error::{Error, Result};
use crate::exec::train::{Batch, Pass};
use crate::rng::{Rng, mix};
use pocketlora_kernels::{Arithmetic, Backend, Call};
use pocketlora_models::Value;

/// Stream of random numbers for sampled tokens.
const SAMPLED: u64 = 6;

/// Puts into the fresh `tensors` of `method` what is the base's. Of a prompt, the embeddings of the text `ids`, cut or
/// repeated to their number, or of tokens that `seed` chooses; of a cartridge, the keys and values of that text, or of the
/// one that `learned` begins with.
///
/// # Errors
/// An id beyond the vocabulary, a text that is too short, device lost.
pub(crate) fn begin<'i, B: Backend>(
    base: &Base<B>,
    method: &Method,
    tensors: &mut Tensors,
    ids: Option<&[u32]>,
    learned: impl Iterator<Item = &'i [u32]>,
    seed: u64,
) -> Result<()> {
    match method {
        Method::PromptTuning(own) => embeddings(base, own.prompt.tokens, tensors, ids, seed),
        Method::Cartridge(own) => {
            let count = own.prefix.tokens;
            let text: Vec<u32> = match ids {
                Some(ids) => ids.iter().copied().take(count).collect(),
                None => learned.flatten().copied().take(count).collect(),
            };
            if text.len() < count {
                let expected = format!("at most {}, as many tokens as its text has", text.len());
                return Err(Error::config("num-virtual-tokens", expected, count));
            }
            let data = keys_and_values(base, &text)?;
            let shape = vec![count, data.len() / count];
            tensors.insert(EMBEDDINGS.to_owned(), HostTensor { shape, data });
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Embeddings of `count` tokens.
fn embeddings<B: Backend>(
    base: &Base<B>,
    count: usize,
    tensors: &mut Tensors,
    ids: Option<&[u32]>,
    seed: u64,
) -> Result<()> {
    let table = base.model.outline().embedding;
    let (backend, matrix) = (&base.backend, base.matrix(table));
    let (vocabulary, width) = backend.shape(matrix);
    let mut rng = Rng::new(mix(seed, SAMPLED));
    let chosen: Vec<u32> = match ids {
        Some([]) => return Err(Error::config("prompt-init-text", "a text of at least one token", "none")),
        Some(ids) => ids.iter().copied().cycle().take(count).collect(),
        None => (0..count).map(|_| rng.below(vocabulary) as u32).collect(),
    };
    if let Some(id) = chosen.iter().find(|id| **id as usize >= vocabulary) {
        return Err(Error::config("prompt-init-text", format!("tokens below the vocabulary's {vocabulary}"), id));
    }
    let mut rows = backend.buffer(count * width)?;
    backend.run(Call::Embed { table: matrix, ids: &chosen, y: &mut rows })?;
    let mut data = vec![0.0; count * width];
    backend.read(&rows, &mut data)?;
    // What a model scales where it looks tokens up is scaled in them already.
    let factor = super::prompt::factor(base.model.as_ref()).unwrap_or(1.0);
    data.iter_mut().for_each(|v| *v *= factor);
    tensors.insert(EMBEDDINGS.to_owned(), HostTensor { shape: vec![count, width], data });
    Ok(())
}

/// Keys and values of the text `ids` in all layers `[tokens, 2 layers, width]`: of each layer a key, as attention has it,
/// then a value. One layer is run at a time.
fn keys_and_values<B: Backend>(base: &Base<B>, ids: &[u32]) -> Result<Vec<f32>> {
    let (backend, layers) = (&base.backend, base.model.config().layers);
    let (adapters, mut pool) = (Adapters::none(base), Pool::default());
    let batch = Batch { ids: ids.to_vec(), segments: vec![ids.len()] };
    let pass = Pass::new(base, &adapters, &batch, None, Arithmetic::Exact, &mut pool)?;
    let mut tape = pass.tape(None, false, &mut pool);
    let x = base.model.embed(&mut tape);
    let mut x = tape.into_value(x)?;
    let mut data = Vec::new();
    for layer in 0..layers {
        // A tape gives one value, so that the layer is recorded for each of the two, and once more for what it gives.
        for part in 0..2 {
            let mut copy = pool.take(backend, backend.len(&x))?;
            backend.run(Call::Copy { x: &x, y: &mut copy })?;
            let mut tape = pass.tape(Some(copy), false, &mut pool);
            base.model.layer(&mut tape, layer, Value(0));
            let value = tape.keys_and_values()[part];
            let buffer = tape.into_value(value)?;
            let mut rows = vec![0.0; backend.len(&buffer)];
            backend.read(&buffer, &mut rows)?;
            pool.put(backend, buffer);
            let width = rows.len() / ids.len();
            data.resize(ids.len() * 2 * layers * width, 0.0);
            for (token, row) in rows.chunks_exact(width).enumerate() {
                let at = (2 * (token * layers + layer) + part) * width;
                data[at..at + width].copy_from_slice(row);
            }
        }
        let mut tape = pass.tape(Some(x), false, &mut pool);
        let y = base.model.layer(&mut tape, layer, Value(0));
        x = tape.into_value(y)?;
    }
    pool.put(backend, x);
    pass.finish(&mut pool);
    Ok(data)
}
