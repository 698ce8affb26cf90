//! Writing a safetensors file whose tensors arrive piece by piece, in any order.

use safetensors::Dtype;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::io::{self, Seek, SeekFrom, Write};

/// A tensor to come: what the header says about it.
pub(crate) struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Entry {
    fn size(&self) -> u64 {
        self.shape.iter().map(|&d| d as u64).product::<u64>() * self.dtype.bitsize() as u64 / 8
    }
}

/// The file under way. The header is written last, into room kept for it, because tensors of unknown length (the
/// quant_state JSON of each weight) may be appended; spaces fill what it does not need, as the format allows.
pub(crate) struct Writer<W> {
    sink: W,
    metadata: Value,
    /// In the order of their bytes; offsets count from the first byte after the header.
    entries: Vec<(Entry, u64)>,
    index: HashMap<String, usize>,
    /// Bytes of the header with its padding, a multiple of 8.
    header_len: u64,
    data_len: u64,
}

impl<W: Write + Seek> Writer<W> {
    /// Plans a file of `entries` and of U8 vectors appended later, given as name and greatest length.
    pub fn new(sink: W, metadata: Value, mut entries: Vec<Entry>, appended: Vec<(String, usize)>) -> Self {
        // The order of the safetensors library: wide dtypes first, so that every tensor is aligned to its elements.
        entries.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
        let mut writer =
            Self { sink, metadata, entries: Vec::new(), index: HashMap::new(), header_len: 0, data_len: 0 };
        for entry in entries {
            writer.place(entry);
        }
        let (fixed, data_len) = (writer.entries.len(), writer.data_len);
        for (name, len) in appended {
            writer.place(Entry { name, dtype: Dtype::U8, shape: vec![len] });
        }
        writer.header_len = (writer.header().len() as u64).next_multiple_of(8);
        for (entry, _) in writer.entries.drain(fixed..) {
            writer.index.remove(&entry.name);
        }
        writer.data_len = data_len;
        writer
    }

    fn place(&mut self, entry: Entry) {
        let start = self.data_len;
        self.data_len += entry.size();
        self.index.insert(entry.name.clone(), self.entries.len());
        self.entries.push((entry, start));
    }

    fn header(&self) -> Vec<u8> {
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), self.metadata.clone());
        for (entry, start) in &self.entries {
            let info = json!({
                "dtype": entry.dtype,
                "shape": entry.shape,
                "data_offsets": [start, start + entry.size()],
            });
            header.insert(entry.name.clone(), info);
        }
        Value::Object(header).to_string().into_bytes()
    }

    /// Writes `bytes` from byte `at` of the planned tensor `name` on.
    pub fn write(&mut self, name: &str, at: u64, bytes: &[u8]) -> io::Result<()> {
        let (entry, start) = &self.entries[self.index[name]];
        assert!(at + bytes.len() as u64 <= entry.size(), "`{name}` is shorter than what is written to it");
        self.sink.seek(SeekFrom::Start(8 + self.header_len + start + at))?;
        self.sink.write_all(bytes)
    }

    /// Appends the U8 vector `name`.
    pub fn append(&mut self, name: String, bytes: &[u8]) -> io::Result<()> {
        self.place(Entry { name: name.clone(), dtype: Dtype::U8, shape: vec![bytes.len()] });
        self.write(&name, 0, bytes)
    }

    /// Writes the header. Returns the bytes of the whole file.
    pub fn finish(mut self) -> io::Result<u64> {
        let mut header = self.header();
        assert!(header.len() as u64 <= self.header_len, "an appended tensor is longer than planned");
        header.resize(self.header_len as usize, b' ');
        self.sink.seek(SeekFrom::Start(0))?;
        self.sink.write_all(&self.header_len.to_le_bytes())?;
        self.sink.write_all(&header)?;
        self.sink.flush()?;
        Ok(8 + self.header_len + self.data_len)
    }
}
