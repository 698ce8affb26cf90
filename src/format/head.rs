//! A copy of a model's head in 8 bits, kept in a cache folder and mapped: half the bytes to read for every token, and
//! no dirty memory. It can be deleted at any time and is made again.
//!
//! The file is a safetensors file with `weight` (I8 `[V, C]`, of every 64 elements the even ones first) and `scale`
//! (F32 `[V]`). Its name holds what tells one version of a model's file from another: size, time of change, the
//! checkpoint's fingerprint and a sample of the matrix; but no path, so that two copies of one model share it. Its
//! metadata say from which file it was made.

use super::hf::Checkpoint;
use super::safetensors::TensorFile;
use super::writer::{Entry, Writer};
use super::{widen, write_file};
use crate::error::{Error, Result};
use crate::rng::mix;
use pocketlora_kernels::quant::{BLOCK, encode_int8};
use pocketlora_kernels::{MatrixData, MatrixSource};
use safetensors::Dtype;
use serde_json::{Value, json};
use std::io::BufWriter;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Elements from which a copy is worth a file: a smaller head is read in no time.
const WORTH: usize = 1 << 20;

/// Version of the copies: raise it when they are encoded in another way.
const VERSION: u64 = 1;

/// Places in the matrix that its name depends on, and bytes at each.
const SAMPLES: usize = 256;
const SAMPLE: usize = 64;

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
    let Some(origin) = HeadOrigin::of(checkpoint.path_of(name)) else { return Ok(None) };
    // Weights are brought in when a model is opened, so that looking here and there costs nothing.
    let sampled = bytes.chunks(bytes.len().div_ceil(SAMPLES)).flat_map(|part| &part[..part.len().min(SAMPLE)]);
    let words = name.as_bytes().iter().chain(sampled).map(|&b| u64::from(b));
    let changed = origin.changed as u64;
    let key = words.chain([VERSION, origin.bytes, changed, checkpoint.fingerprint()]).fold(0, mix);
    let path = cache.join(format!("head-int8-{key:016x}.safetensors"));
    if let Some(found) = open(&path, rows, cols) {
        // For who looks for what is not used any more; where it cannot be noted, the copy is of use all the same.
        if let Ok(file) = std::fs::File::options().append(true).open(&path) {
            file.set_modified(SystemTime::now()).ok();
        }
        return Ok(Some(found));
    }
    let write = |file: &mut std::fs::File| -> Result<()> {
        let failed = |e| Error::io("write", &path, e);
        let entry = |name: &str, dtype, shape| Entry { name: name.to_owned(), dtype, shape };
        let entries = vec![entry(WEIGHT, Dtype::I8, vec![rows, cols]), entry(SCALE, Dtype::F32, vec![rows])];
        let mut writer = Writer::new(BufWriter::new(file), origin.metadata(name), entries, Vec::new());
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

/// The file of weights that a copy was made from.
#[derive(Clone, Debug)]
pub(crate) struct HeadOrigin {
    /// Where it lies, links followed.
    pub path: String,
    bytes: u64,
    /// When it was changed, in nanoseconds since 1970.
    changed: u128,
}

impl HeadOrigin {
    fn of(path: &Path) -> Option<Self> {
        let meta = path.metadata().ok()?;
        let changed = meta.modified().ok().and_then(|t| t.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_nanos());
        let path = path.canonicalize().ok()?.to_string_lossy().into_owned();
        Some(Self { path, bytes: meta.len(), changed })
    }

    /// Whether the file at `path` is the one, or the same under another name.
    #[cfg(feature = "hub")]
    pub fn is_of(&self, path: &Path) -> bool {
        Self::of(path).is_some_and(|now| (now.bytes, now.changed) == (self.bytes, self.changed))
    }

    fn metadata(&self, tensor: &str) -> Value {
        json!({ "source": tensor, "file": self.path, "bytes": self.bytes.to_string(), "changed": self.changed.to_string() })
    }
}

/// What the copy at `path` was made from, if it says so.
#[cfg(feature = "hub")]
pub(crate) fn head_origin(path: &Path) -> Option<HeadOrigin> {
    let file = TensorFile::open(path).ok()?;
    let text = |key| file.metadata().get(key);
    let (bytes, changed) = (text("bytes")?.parse().ok()?, text("changed")?.parse().ok()?);
    Some(HeadOrigin { path: text("file")?.clone(), bytes, changed })
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
