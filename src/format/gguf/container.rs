//! The GGUF container: header, metadata, tensor directory, data. It knows no model.

use super::cursor::Cursor;
use super::dequant::GgmlType;
use super::value::Metadata;
use crate::error::{Error, Result};
use crate::format::foreign;
use bytes::Bytes;
use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

/// Largest number of dimensions that ggml knows.
const MAX_DIMS: u32 = 4;
/// Alignment of tensor data unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: usize = 32;

/// One entry of the tensor directory.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    /// GGUF name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Row-major shape: the file's dimensions, which start with the fastest, reversed.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: GgmlType,
    /// Which of the files it lies in.
    file: usize,
    /// Its bytes in the file, checked to lie inside it.
    data: Range<usize>,
}

impl GgufTensor {
    /// Values in a row: the last dimension.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Rows: all dimensions but the last.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// Where its bytes begin: number of the file, and place there.
    pub(super) fn offset(&self) -> (usize, usize) {
        (self.file, self.data.start)
    }

    /// The bytes that it takes.
    pub(super) fn bytes(&self) -> u64 {
        self.data.len() as u64
    }

    fn row_bytes(&self) -> usize {
        let (values, bytes) = self.dtype.block();
        self.columns() / values * bytes
    }
}

/// A mapped GGUF file, version 2 or 3, little-endian, or several that are one model.
#[derive(Clone, Debug)]
pub struct Container {
    files: Vec<Bytes>,
    /// The key-value pairs.
    pub metadata: Metadata,
    /// The tensors, in the order of the directory.
    pub tensors: Vec<GgufTensor>,
}

impl Container {
    /// Reads the header of `bytes`; `path` is for messages.
    ///
    /// # Errors
    /// Not a GGUF file, a version or element type that is not supported, or a header that contradicts itself or
    /// the file's size.
    pub fn parse(bytes: Bytes, path: &Path) -> Result<Self> {
        foreign::check(path, &bytes, "a GGUF file")?;
        if foreign::looks_like_safetensors(&bytes) {
            let next = "give it the ending `.safetensors`, with its config.json beside it";
            return Err(Error::unsupported(path, "safetensors under the ending `.gguf`", next));
        }
        let mut cursor = Cursor::new(path, &bytes);
        check_version(&mut cursor, path)?;
        let tensor_count = cursor.u64(&"tensor count")?;
        let pair_count = cursor.u64(&"metadata count")?;
        let metadata = Metadata::read(&mut cursor, pair_count, path)?;
        let alignment = alignment(&metadata)?;
        let mut tensors = Vec::new();
        let mut names = HashSet::new();
        for i in 0..tensor_count {
            let tensor = read_tensor(&mut cursor, path, format_args!("tensor {i} of {tensor_count}"))?;
            if !names.insert(tensor.name.clone()) {
                return Err(tensor_error(path, &tensor.name, "one entry", "a second one"));
            }
            tensors.push(tensor);
        }
        place(&mut tensors, cursor.pos(), alignment, bytes.len(), path)?;
        Ok(Self { files: vec![bytes], metadata, tensors })
    }

    /// Takes the tensors of `part`, a further file of the model at `path`.
    ///
    /// # Errors
    /// A tensor is there already.
    pub(super) fn join(&mut self, part: Self, path: &Path) -> Result<()> {
        let names: HashSet<&str> = self.tensors.iter().map(|t| t.name.as_str()).collect();
        if let Some(again) = part.tensors.iter().find(|t| names.contains(t.name.as_str())) {
            return Err(tensor_error(path, &again.name, "one entry in all files", "a second one"));
        }
        let file = self.files.len();
        self.files.extend(part.files);
        self.tensors.extend(part.tensors.into_iter().map(|tensor| GgufTensor { file, ..tensor }));
        Ok(())
    }

    /// Dequantizes `rows` of `tensor` into `out` [rows, columns].
    ///
    /// # Panics
    /// `rows` or the length of `out` does not fit the tensor's shape, or the tensor is another file's.
    pub fn read_rows(&self, tensor: &GgufTensor, rows: Range<usize>, out: &mut [f32]) {
        assert!(
            rows.start <= rows.end && rows.end <= tensor.rows() && out.len() == rows.len() * tensor.columns(),
            "rows {rows:?} of `{}` {:?} into {} values",
            tensor.name,
            tensor.shape,
            out.len()
        );
        let stride = tensor.row_bytes();
        let data = &self.files[tensor.file][tensor.data.clone()];
        tensor.dtype.dequantize(&data[rows.start * stride..rows.end * stride], out);
    }
}

fn tensor_error(path: &Path, name: &str, expected: impl std::fmt::Display, got: impl std::fmt::Display) -> Error {
    Error::format(path, format_args!("tensor `{name}`"), expected, got)
}

fn check_version(cursor: &mut Cursor<'_>, path: &Path) -> Result<()> {
    let magic = cursor.take(4, 1, &"magic")?;
    if magic != b"GGUF" {
        return Err(cursor.fail(&"magic", "`GGUF`", format_args!("`{}`", magic.escape_ascii())));
    }
    let version = cursor.u32(&"version")?;
    let next = "convert the model again with a current llama.cpp, or fetch a newer file";
    match version {
        2 | 3 => Ok(()),
        1 => Err(Error::unsupported(path, "GGUF version 1", next)),
        // A small number in the other byte order has its low half empty.
        v if v != 0 && v & 0xffff == 0 => Err(Error::unsupported(path, "a big-endian GGUF file", next)),
        v => Err(Error::unsupported(path, format_args!("GGUF version {v}"), "versions 2 and 3 can be read")),
    }
}

fn alignment(metadata: &Metadata) -> Result<usize> {
    let key = "general.alignment";
    match metadata.uint(key)? {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(n) if n.is_power_of_two() => Ok(n),
        Some(n) => Err(metadata.fail(key, "a power of two", n)),
    }
}

/// Reads one entry. Its data range is still relative to the data section.
fn read_tensor(cursor: &mut Cursor<'_>, path: &Path, place: std::fmt::Arguments<'_>) -> Result<GgufTensor> {
    let name = cursor.string(&place)?;
    let item = format!("tensor `{name}`");
    let dims = cursor.u32(&item)?;
    if dims == 0 || dims > MAX_DIMS {
        return Err(cursor.fail(&item, format_args!("1 to {MAX_DIMS} dimensions"), dims));
    }
    let mut shape = Vec::new();
    for _ in 0..dims {
        let dim = cursor.u64(&item)?;
        match usize::try_from(dim) {
            Ok(n) if n > 0 => shape.insert(0, n),
            _ => return Err(cursor.fail(&item, "dimensions that are positive and fit in memory", dim)),
        }
    }
    let dtype = GgmlType::from_id(cursor.u32(&item)?).map_err(|name| {
        Error::unsupported(
            path,
            format_args!("element type {name} of {item}"),
            "fetch a file of this model in Q4_K_M, Q5_K_M, Q6_K, Q8_0, Q4_0 or F16",
        )
    })?;
    let offset = cursor.u64(&item)?;
    let (values, bytes) = dtype.block();
    if shape[shape.len() - 1] % values != 0 {
        let expected = format_args!("rows of whole {dtype} blocks of {values} values").to_string();
        return Err(cursor.fail(&item, expected, shape[shape.len() - 1]));
    }
    let size =
        shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim)).and_then(|n| (n / values).checked_mul(bytes));
    let range = size.and_then(|size| {
        let start = usize::try_from(offset).ok()?;
        Some(start..start.checked_add(size)?)
    });
    let Some(data) = range else {
        return Err(cursor.fail(
            &item,
            "a size that fits in memory",
            format_args!("shape {shape:?} at offset {offset}"),
        ));
    };
    Ok(GgufTensor { name: name.to_owned(), shape, dtype, file: 0, data })
}

/// Turns offsets into the data section into offsets into the file and checks that all lie in it, apart from each other.
fn place(tensors: &mut [GgufTensor], header: usize, alignment: usize, len: usize, path: &Path) -> Result<()> {
    let start = header.checked_next_multiple_of(alignment).unwrap_or(usize::MAX);
    for t in tensors.iter_mut() {
        if t.data.start % alignment != 0 {
            return Err(tensor_error(path, &t.name, format_args!("an offset aligned to {alignment}"), t.data.start));
        }
        let end = start.checked_add(t.data.end).filter(|&end| end <= len);
        let Some(end) = end else {
            let got = format_args!("offsets {:?} after {start}", t.data).to_string();
            return Err(tensor_error(path, &t.name, format_args!("data within {len} bytes"), got));
        };
        t.data = start + t.data.start..end;
    }
    let mut order: Vec<&GgufTensor> = tensors.iter().collect();
    order.sort_by_key(|t| t.data.start);
    for pair in order.windows(2) {
        if pair[1].data.start < pair[0].data.end {
            let expected = format_args!("data after that of `{}`, which ends at {}", pair[0].name, pair[0].data.end);
            return Err(tensor_error(path, &pair[1].name, expected, pair[1].data.start));
        }
    }
    Ok(())
}
