//! Whether a model gives an answer word for word, without letting it answer: it does if each word is the likeliest after
//! those before it, which one pass over the answer tells.

use super::{logits_of_from, nll, stopped};
use crate::engine::Engine;
use crate::error::Result;
use crate::train::{Change, Dataset, Learned, Recall};
use std::path::Path;

/// How well `engine`, with what is attached to it, knows the learned tokens of `data`. `progress` hears of tokens done.
///
/// # Errors
/// A sample is too long for the context, an id outside the vocabulary, stopped, out of memory.
pub fn recall(engine: &Engine, data: &Dataset, progress: &mut dyn FnMut(usize) -> bool) -> Result<Recall> {
    let (mut out, mut sum) = (Recall::default(), 0.0);
    for sample in &data.samples {
        let Some(first) = sample.trained.iter().find(|&i| i > 0) else { continue };
        let mut all = true;
        logits_of_from(engine, &sample.ids, first - 1, &mut |_| true, &mut |row, logits| {
            if sample.trained.contains(row + 1)
                && let Some(&next) = sample.ids.get(row + 1)
            {
                let mine = logits[next as usize];
                all &= logits.iter().all(|other| *other <= mine);
                sum += nll(logits, next as usize);
                out.tokens += 1;
            }
            Ok(())
        })?;
        out.asked += 1;
        out.right += usize::from(all);
        if !progress(sample.ids.len()) {
            return Err(stopped());
        }
    }
    out.loss = sum / out.tokens.max(1) as f64;
    Ok(out)
}

/// What a run taught, on `taught` and `watched`: asks the model with the adapter in the folder `init`, if the run began from
/// one, and then with the one in `adapter`. Nothing else may be attached.
///
/// # Errors
/// As [`recall`]; an adapter cannot be attached.
pub fn learned(
    engine: &Engine,
    taught: &Dataset,
    watched: Option<&Dataset>,
    init: Option<&Path>,
    adapter: &Path,
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<Learned> {
    let mut ask = |with: Option<&Path>| {
        let attached = with.map(|dir| engine.attach(dir, 1.0)).transpose()?;
        let first = recall(engine, taught, progress);
        let found =
            first.and_then(|taught| Ok((taught, watched.map(|data| recall(engine, data, progress)).transpose()?)));
        attached.map_or(Ok(()), |id| engine.detach(id))?;
        found
    };
    let (before, after) = (ask(init)?, ask(Some(adapter))?);
    // Of a text every token is learned, but the first.
    let answers = taught.samples.iter().any(|s| s.trained_tokens() + 1 < s.ids.len());
    let watched = before.1.zip(after.1).map(|(before, after)| Change { before, after });
    Ok(Learned { answers, taught: Change { before: before.0, after: after.0 }, watched })
}
