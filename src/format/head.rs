//! A copy of a model's head in 8 bits, kept in a cache folder and mapped: half the bytes to read for every token, and
//! no dirty memory. It can be deleted at any time and is made again.
//!
//! The file is a safetensors file with `weight` (I8 `[V, C]`, of every 64 elements the even ones first) and `scale`
//! (F32 `[V]`). Its name holds what tells one version of a model's file from another: path, size, time of change, and
//! the checkpoint's fingerprint.

use super::hf::Checkpoint;
use super::safetensors::TensorFile;
use super::writer::{Entry, Writer};
use super::{widen, write_file};
use crate::error::{Error, Result};
use crate::rng::mix;
use pocketlora_kernels::quant::{BLOCK, encode_int8};
use pocketlora_kernels::{MatrixData, MatrixSource};
use safetensors::Dtype;
use serde_json::json;
use std::io::BufWriter;
use std::path::Path;
use std::time::UNIX_EPOCH;

/// Elements from which a copy is worth a file: a smaller head is read in no time.
const WORTH: usize = 1 << 20;

const WEIGHT: &str = "weight";
const SCALE: &str = "scale";

/// The copy of the 16- or 32-bit matrix `name` of `checkpoint` in the folder `cache`, and the bytes that its map takes;
/// made now if it is not there or damaged. `None` if the matrix is in 4 bits already, its rows are no multiple of 64
/// elements, it is small, or the folder cannot be written to: the copy is for speed alone.
///
/// # Errors
/// The matrix itself cannot be read.
pub fn int8_head(checkpoint: &Checkpoint, name: &str, cache: &Path) -> Result<Option<(MatrixSource, u64)>> {
    let MatrixSource { rows, cols, data } = checkpoint.matrix(name)?;
    let MatrixData::Dense(float, bytes) = data else { return Ok(None) };
    if !cols.is_multiple_of(BLOCK) || rows.saturating_mul(cols) < WORTH {
        return Ok(None);
    }
    let Ok(meta) = checkpoint.path_of(name).metadata() else { return Ok(None) };
    let changed = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_nanos());
    let path = checkpoint.path_of(name).canonicalize().unwrap_or_default();
    let words = path.as_os_str().as_encoded_bytes().iter().chain(name.as_bytes()).map(|&b| u64::from(b));
    let key = words.chain([meta.len(), changed as u64, checkpoint.fingerprint()]).fold(0, mix);
    let path = cache.join(format!("head-int8-{key:016x}.safetensors"));
    if let Some(found) = open(&path, rows, cols) {
        return Ok(Some(found));
    }
    let write = |file: &mut std::fs::File| -> Result<()> {
        let failed = |e| Error::io("write", &path, e);
        let entry = |name: &str, dtype, shape| Entry { name: name.to_owned(), dtype, shape };
        let entries = vec![entry(WEIGHT, Dtype::I8, vec![rows, cols]), entry(SCALE, Dtype::F32, vec![rows])];
        let mut writer = Writer::new(BufWriter::new(file), json!({ "source": name }), entries, Vec::new());
        let (mut row, mut codes) = (vec![0.0; cols], vec![0; cols]);
        let mut scales = Vec::with_capacity(rows);
        for (i, bytes) in bytes.chunks_exact(cols * float.size()).enumerate() {
            widen(float, bytes, &mut row);
            scales.push(encode_int8(&row, &mut codes));
            let codes: Vec<u8> = codes.iter().map(|code| code.cast_unsigned()).collect();
            writer.write(WEIGHT, (i * cols) as u64, &codes).map_err(failed)?;
        }
        let scales: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        writer.write(SCALE, 0, &scales).map_err(failed)?;
        writer.finish().map_err(failed)?;
        Ok(())
    };
    let new = !cache.exists();
    if std::fs::create_dir_all(cache).is_ok() && write_file(&path, write).is_ok() {
        return Ok(open(&path, rows, cols));
    }
    if new {
        // Empty, for the file did not come to be; if that fails, too, an empty folder harms nobody.
        let _ = std::fs::remove_dir(cache);
    }
    Ok(None)
}

/// The copy at `path`, if it is whole.
fn open(path: &Path, rows: usize, cols: usize) -> Option<(MatrixSource, u64)> {
    let file = TensorFile::open(path).ok()?;
    file.bring_in();
    let (weight, scale) = (file.find(WEIGHT)?, file.find(SCALE)?);
    let fits = (weight.dtype, &weight.shape[..]) == (Dtype::I8, &[rows, cols])
        && (scale.dtype, &scale.shape[..]) == (Dtype::F32, &[rows]);
    let data = MatrixData::Int8 { codes: weight.bytes.clone(), scales: scale.bytes.clone() };
    fits.then(|| (MatrixSource { rows, cols, data }, file.mapped_bytes() as u64))
}
