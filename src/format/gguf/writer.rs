//! Writing a GGUF file, version 3: metadata and the list of tensors first, then the tensors one after another.

use super::dequant::GgmlType;
use std::io::{self, Write};

/// Where tensors begin: at multiples of this.
const ALIGNMENT: u64 = 32;
/// Numbers of the types of values.
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Metadata in the order in which it is written.
#[derive(Default)]
pub(crate) struct Pairs {
    bytes: Vec<u8>,
    count: u64,
}

fn string(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

impl Pairs {
    fn pair(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.bytes.extend(string(key));
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend(value);
        self.count += 1;
    }

    pub fn text(&mut self, key: &str, value: &str) {
        self.pair(key, STRING, &string(value));
    }

    pub fn u32(&mut self, key: &str, value: u32) {
        self.pair(key, U32, &value.to_le_bytes());
    }

    pub fn f32(&mut self, key: &str, value: f32) {
        self.pair(key, F32, &value.to_le_bytes());
    }

    pub fn bool(&mut self, key: &str, value: bool) {
        self.pair(key, BOOL, &[value.into()]);
    }

    pub fn texts<S: AsRef<str>>(&mut self, key: &str, values: &[S]) {
        self.array(key, STRING, values.iter().map(|text| string(text.as_ref())));
    }

    pub fn f32s(&mut self, key: &str, values: &[f32]) {
        self.array(key, F32, values.iter().map(|value| value.to_le_bytes().to_vec()));
    }

    pub fn i32s(&mut self, key: &str, values: &[i32]) {
        self.array(key, I32, values.iter().map(|value| value.to_le_bytes().to_vec()));
    }

    fn array(&mut self, key: &str, kind: u32, values: impl ExactSizeIterator<Item = Vec<u8>>) {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        values.for_each(|value| bytes.extend(value));
        self.pair(key, ARRAY, &bytes);
    }
}

/// A tensor to come.
#[derive(Clone, Debug)]
pub(crate) struct GgufEntry {
    pub name: String,
    /// Row-major.
    pub shape: Vec<usize>,
    pub dtype: GgmlType,
}

impl GgufEntry {
    fn size(&self) -> u64 {
        let (values, bytes) = self.dtype.block();
        (self.shape.iter().product::<usize>() / values * bytes) as u64
    }
}

/// A file under way: its header is written, and the bytes of its tensors follow in the order of the header.
pub(crate) struct GgufWriter<W> {
    sink: W,
    /// Bytes of each tensor, the next one first.
    sizes: std::vec::IntoIter<u64>,
    /// Bytes that the tensor under way still needs.
    left: u64,
    /// Bytes of zeros behind it.
    padding: u64,
}

impl<W: Write> GgufWriter<W> {
    /// Writes the header of a file of `entries`.
    pub fn begin(mut sink: W, pairs: &Pairs, entries: &[GgufEntry]) -> io::Result<Self> {
        let mut header = b"GGUF".to_vec();
        header.extend(3u32.to_le_bytes());
        header.extend((entries.len() as u64).to_le_bytes());
        header.extend(pairs.count.to_le_bytes());
        header.extend(&pairs.bytes);
        let mut offset = 0u64;
        for entry in entries {
            header.extend(string(&entry.name));
            header.extend((entry.shape.len() as u32).to_le_bytes());
            // The format counts dimensions from the fastest.
            entry.shape.iter().rev().for_each(|&n| header.extend((n as u64).to_le_bytes()));
            header.extend(entry.dtype.id().to_le_bytes());
            header.extend(offset.to_le_bytes());
            offset += entry.size().next_multiple_of(ALIGNMENT);
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
        sink.write_all(&header)?;
        let sizes = entries.iter().map(GgufEntry::size).collect::<Vec<_>>().into_iter();
        Ok(Self { sink, sizes, left: 0, padding: 0 })
    }

    /// Writes the next bytes of tensors; a piece does not go beyond its tensor.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.left == 0 {
            self.left = self.sizes.next().expect("no more tensors than in the header");
            self.padding = self.left.next_multiple_of(ALIGNMENT) - self.left;
        }
        assert!(bytes.len() as u64 <= self.left, "a tensor is longer than the header says");
        self.sink.write_all(bytes)?;
        self.left -= bytes.len() as u64;
        if self.left == 0 {
            self.sink.write_all(&vec![0; self.padding as usize])?;
        }
        Ok(())
    }

    /// Hands the last bytes to the system.
    pub fn finish(mut self) -> io::Result<()> {
        assert!(self.left == 0 && self.sizes.len() == 0, "tensors of the header are missing");
        self.sink.flush()
    }
}
