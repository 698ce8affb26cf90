//! Logits on disk, for comparison with other runtimes.

use super::{Score, logits_of, nll};
use crate::engine::Engine;
use crate::error::{Error, ErrorCode, Result};
use serde_json::{Map, Value, json};
use std::io::Write;
use std::path::Path;

/// Runs each of `lists` as one text and writes its logits to the safetensors file `out` as tensor `logits.N`
/// `[tokens, vocab]` in f32. Logits are written as they are computed; the file appears when all are there.
///
/// # Errors
/// As [`logits_of`]; no list or an empty one; a loss that is not a number; the file cannot be written.
pub fn save_logits(
    engine: &Engine,
    lists: &[Vec<u32>],
    out: &Path,
    progress: &mut dyn FnMut(usize) -> bool,
) -> Result<Score> {
    if lists.is_empty() {
        return Err(Error::new(ErrorCode::Data, "lists", "expected at least one array of token ids, got none"));
    }
    if let Some(at) = lists.iter().position(Vec::is_empty) {
        return Err(Error::new(ErrorCode::Data, format!("array {at}"), "expected at least one token id, got none"));
    }
    let vocab = engine.vocabulary();
    let header = header(lists, vocab);
    let mut score = Score::default();
    crate::format::write_file(out, |file| {
        let failed = |e| Error::io("write", out, e);
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(failed)?;
        file.write_all(header.as_bytes()).map_err(failed)?;
        for (i, ids) in lists.iter().enumerate() {
            let in_array = |e: Error| if e.code() == ErrorCode::Data { e.at(format!("array {i}")) } else { e };
            logits_of(engine, ids, progress, &mut |row, logits| {
                let bytes: Vec<u8> = logits.iter().flat_map(|l| l.to_le_bytes()).collect();
                file.write_all(&bytes).map_err(failed)?;
                if let Some(&next) = ids.get(row + 1) {
                    score.tokens += 1;
                    score.nll_sum += nll(logits, next as usize);
                }
                Ok(())
            })
            .map_err(in_array)?;
        }
        score = score.checked()?;
        Ok(())
    })?;
    Ok(score)
}

/// The safetensors header, padded so that the data starts at a multiple of eight bytes.
fn header(lists: &[Vec<u32>], vocab: usize) -> String {
    let (mut tensors, mut offset) = (Map::new(), 0);
    for (i, ids) in lists.iter().enumerate() {
        let end = offset + ids.len() * vocab * 4;
        let entry = json!({"dtype": "F32", "shape": [ids.len(), vocab], "data_offsets": [offset, end]});
        tensors.insert(format!("logits.{i}"), entry);
        offset = end;
    }
    let mut text = Value::Object(tensors).to_string();
    while !text.len().is_multiple_of(8) {
        text.push(' ');
    }
    text
}
