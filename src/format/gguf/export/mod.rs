//! A model as a GGUF file of llama.cpp: names, row order, metadata and tokenizer as its converter has them.
//!
//! Weights stream through in pieces on all threads, as in `quantize`.

mod config;
mod quants;
mod tokens;

use super::dequant::GgmlType;
use super::rope;
use super::writer::{GgufEntry, GgufWriter, Pairs};
use crate::error::{Error, Result};
use crate::format::quantize::Ticker;
use crate::format::{Progress, Source, write_file};
use rayon::prelude::*;
use std::io::BufWriter;
use std::ops::{ControlFlow, Range};
use std::path::Path;

/// Values of a piece, about.
const PIECE: usize = 1 << 18;

/// Element type of a GGUF file's matrices. Norms and biases are in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GgufTarget {
    /// IEEE half precision, also where rows are no whole blocks of the others.
    F16,
    /// 8 bits in blocks of 32, 8.5 bits a weight.
    Q8_0,
    /// 4 bits in blocks of 32, 4.5 bits a weight; embedding and head in [`GgufTarget::Q8_0`].
    Q4_0,
}

impl GgufTarget {
    /// The type of a matrix with rows of `cols` values.
    fn of(self, cols: usize, vocabulary: bool) -> GgmlType {
        let dtype = match self {
            Self::F16 => GgmlType::F16,
            Self::Q4_0 if !vocabulary => GgmlType::Q4_0,
            Self::Q8_0 | Self::Q4_0 => GgmlType::Q8_0,
        };
        if cols.is_multiple_of(dtype.block().0) { dtype } else { GgmlType::F16 }
    }

    /// llama.cpp's number for such a file.
    fn file_type(self) -> u32 {
        match self {
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q8_0 => 7,
        }
    }
}

/// A tensor of the file: what it is made of.
struct Made {
    entry: GgufEntry,
    index: usize,
    /// Size of the heads whose rows change their order.
    head: Option<usize>,
    /// Gemma's norms have 1 added.
    plus_one: bool,
}

/// Writes the model `source`, which lies at `place`, as the GGUF file `out` with matrices of type `to`. `progress` is called
/// every few million values and stops the work by returning `Break`.
///
/// # Errors
/// llama.cpp has no such model or tokenizer, a weight is not finite in the type, the disk refuses, or the caller stops.
/// What was at `out` stays then.
pub fn export_model(
    source: &dyn Source,
    place: &Path,
    out: &Path,
    to: GgufTarget,
    progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
) -> Result<()> {
    crate::base::check_source(source, place)?;
    let model = crate::base::architecture_of(source.config(), place)?;
    let mut pairs = Pairs::default();
    let hyper = config::write(model.as_ref(), source.config(), place, &mut pairs)?;
    pairs.u32("general.file_type", to.file_type());
    pairs.u32("general.quantization_version", 2);
    tokens::write(&source.sidecars()?, place, model.config().vocab_size, &mut pairs)?;

    let mut made = Vec::new();
    for (index, meta) in source.tensors().iter().enumerate() {
        let Some(name) = hyper.family.tensor_of(&meta.name) else {
            let what = format!("to write the tensor `{}`, which llama.cpp has not, as GGUF", meta.name);
            return Err(Error::unsupported(place, what, "use llama.cpp's own converter"));
        };
        let dtype = match meta.shape[..] {
            [_, cols] => to.of(cols, matches!(name.as_str(), super::config::EMBEDDING | super::config::HEAD)),
            _ => GgmlType::F32,
        };
        let rotary = [".q_proj.", ".k_proj."].iter().any(|module| meta.name.contains(module));
        let head = (rotary && hyper.family.interleaved).then_some(model.config().head_dim);
        let plus_one = hyper.family.plus_one && name.ends_with("norm.weight");
        made.push(Made { entry: GgufEntry { name, shape: meta.shape.clone(), dtype }, index, head, plus_one });
    }
    let mut entries: Vec<GgufEntry> = made.iter().map(|made| made.entry.clone()).collect();
    if let Some(divisors) = &hyper.divisors {
        entries.push(GgufEntry { name: rope::FREQS.to_owned(), shape: vec![divisors.len()], dtype: GgmlType::F32 });
    }
    let total = made.iter().map(|made| made.entry.shape.iter().product::<usize>() as u64).sum();
    let mut ticker = Ticker { progress, done: 0, total };
    ticker.advance("", 0)?;
    write_file(out, |file| {
        let failed = |e| Error::io("write", out, e);
        let mut writer = GgufWriter::begin(BufWriter::new(file), &pairs, &entries).map_err(failed)?;
        for made in &made {
            made.write(source, &mut ticker, &mut |bytes| writer.write(bytes).map_err(failed))?;
        }
        if let Some(divisors) = &hyper.divisors {
            let bytes: Vec<u8> = divisors.iter().flat_map(|v| v.to_le_bytes()).collect();
            writer.write(&bytes).map_err(failed)?;
        }
        writer.finish().map_err(failed)
    })
}

impl Made {
    /// Hands the tensor's bytes to `put`, piece by piece.
    fn write(
        &self,
        source: &dyn Source,
        ticker: &mut Ticker<'_>,
        put: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let (rows, cols) = match self.entry.shape[..] {
            [rows, cols] => (rows, cols),
            _ => (1, self.entry.shape.iter().product()),
        };
        let step = (PIECE / cols.max(1)).max(1);
        let starts: Vec<usize> = (0..rows).step_by(step).collect();
        for group in starts.chunks(rayon::current_num_threads() * 4) {
            let one = |&start: &usize| self.piece(source, start..(start + step).min(rows), cols);
            let pieces: Vec<Result<Vec<u8>>> = group.par_iter().map(one).collect();
            for piece in pieces {
                put(&piece?)?;
            }
            let values = group.iter().map(|start| (step.min(rows - start) * cols) as u64).sum();
            ticker.advance(&self.entry.name, values)?;
        }
        Ok(())
    }

    /// The bytes of some rows.
    fn piece(&self, source: &dyn Source, rows: Range<usize>, cols: usize) -> Result<Vec<u8>> {
        let mut values = vec![0.0; rows.len() * cols];
        match self.head {
            Some(head) if self.entry.shape.len() == 2 => {
                for (row, out) in rows.clone().zip(values.chunks_exact_mut(cols)) {
                    let own = half_split_row(row, head);
                    source.read_rows(self.index, own..own + 1, out)?;
                }
            }
            Some(head) => {
                let mut own = vec![0.0; cols];
                source.read_rows(self.index, rows.clone(), &mut own)?;
                values.iter_mut().enumerate().for_each(|(row, v)| *v = own[half_split_row(row, head)]);
            }
            None => source.read_rows(self.index, rows.clone(), &mut values)?,
        }
        if self.plus_one {
            values.iter_mut().for_each(|v| *v += 1.0);
        }
        quants::encode(self.entry.dtype, &values).map_err(|at| {
            let place = format!("tensor `{}`", source.tensors()[self.index].name);
            let expected = format!("a value that is finite in {}", self.entry.dtype);
            let message =
                format!("expected {expected}, got `{}`; take another type, or another copy of the model", values[at]);
            Error::new(crate::error::ErrorCode::Format, place, message)
        })
    }
}

/// The row of a Hugging Face projection that is row number `row` in the file: the other way round than
/// [`super::interleaved_row`].
fn half_split_row(row: usize, head: usize) -> usize {
    let (start, r) = (row / head * head, row % head);
    start + r % 2 * (head / 2) + r / 2
}
