//! A LoRA in few bits, in a file of its own: what training made of each matrix, in signs ([`super::signs`]).
//!
//! B begins as zeros, so it is what training made of it. A begins as random numbers, which follow from the run's seed; where
//! they are known, the file has the signs of the difference alone. Where they are not, as in an adapter of another program,
//! A itself is written in [`STAGES`] rounds, each of what the rounds before it have left.
//!
//! The file: [`MAGIC`]; the length of a text and the text, facts in JSON; the number of layers; the layers; eight bytes of a
//! checksum of all before. A layer: how many bytes its name shares with the name before, the length of the rest, the rest;
//! rank, inputs, outputs; its factor as f32; 0 or 1 and the number of the layer in its run, which says how A began; A, B. A
//! matrix: the number of rounds; each round's size as f32, its `k`, how many values, the length of its codes, the codes.
//! Whole numbers are LEB128, floats little-endian.

use super::signs::Signs;
use super::{Layer, Plain, lora_of};
use crate::adapter::attach::layers_of;
use crate::adapter::method::AdapterMethod;
use crate::adapter::{AdapterFile, HostTensor, Lora, TensorSpec, Tensors};
use crate::checksum::add;
use crate::error::{Error, ErrorCode, Result};
use crate::format::write_bytes;
use crate::mmap;
use pocketlora_models::Model;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

const MAGIC: [u8; 8] = *b"PLSIGNS1";
/// Rounds for an A of unknown beginning.
const STAGES: usize = 3;
/// The least share of values that is kept. It bounds how much larger than the file its adapter can be.
const LEAST_DENSITY: f64 = 0.001;
const MOST_VALUES_OF_A_BYTE: u64 = 4096;

/// What is written of an adapter beside its matrices.
#[derive(Serialize, Deserialize)]
struct Facts {
    base: Option<String>,
    base_mark: Option<String>,
    /// Seed of the run that trained it.
    seed: u64,
}

/// What compression did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Compressed {
    /// Values of the adapter.
    pub values: usize,
    /// Bytes of the file.
    pub bytes: usize,
    /// Layers whose A is written as the difference from how it began.
    pub differences: usize,
    /// Norm of what is lost of all terms `s B A`, over the norm of the terms.
    pub error: f64,
}

/// Writes the LoRA `file`, which is for `model` and was trained with `seed`, as the compressed file `out`: in each matrix the
/// share `density` of the values that training changed most.
///
/// # Errors
/// As of [`super::export_gguf`]; `density` is not from 0.001 to 1.
pub fn export_compressed(
    file: &AdapterFile,
    model: &dyn Model,
    seed: u64,
    density: f64,
    out: &Path,
) -> Result<Compressed> {
    if !(LEAST_DENSITY..=1.0).contains(&density) {
        return Err(Error::config("density", format!("a share from {LEAST_DENSITY} to 1"), density));
    }
    let plain = Plain::of(file, model, "a compressed file")?;
    crate::adapter::ranks::check_single(&plain.file, "compress", false)?;
    // A run numbers its layers in the model's order.
    let mut order = layers_of(model, &plain.file)?;
    order.sort_by_key(|(param, _)| param.0);
    let numbers: HashMap<&str, usize> = order.into_iter().map(|(_, module)| module).zip(0..).collect();
    let facts = Facts { base: plain.file.base.clone(), base_mark: plain.file.base_mark.clone(), seed };
    let mut bytes = MAGIC.to_vec();
    put_text(&mut bytes, &serde_json::to_string(&facts).expect("plain data serializes"));
    let layers = plain.layers();
    put(&mut bytes, layers.len());
    let (mut before, mut done) = (String::new(), Compressed { values: 0, bytes: 0, differences: 0, error: 0.0 });
    let (mut lost, mut whole) = (0.0, 0.0);
    for layer in &layers {
        let number = numbers.get(layer.module).copied();
        let (a, b) = (Matrix::of_a(layer, number, seed, density), Matrix::of(&layer.b.data, density, 1));
        let shared = before.bytes().zip(layer.module.bytes()).take_while(|(a, b)| a == b).count();
        put(&mut bytes, shared);
        // Names of modules are ASCII, or else a shared part might end within a letter, which is as well.
        put(&mut bytes, layer.module.len() - shared);
        bytes.extend_from_slice(&layer.module.as_bytes()[shared..]);
        [layer.rank, layer.a.shape[1], layer.b.shape[0]].into_iter().for_each(|n| put(&mut bytes, n));
        bytes.extend(layer.factor.to_le_bytes());
        match a.begins {
            Some(number) => {
                put(&mut bytes, 1);
                put(&mut bytes, number);
            }
            None => put(&mut bytes, 0),
        }
        [&a, &b].into_iter().for_each(|matrix| matrix.put(&mut bytes));
        let [of_term, of_lost] = norms(layer, &a.values, &b.values);
        whole += of_term;
        lost += of_lost;
        done.values += layer.a.data.len() + layer.b.data.len();
        done.differences += usize::from(a.begins.is_some());
        layer.module.clone_into(&mut before);
    }
    let sum = add(0, &bytes);
    bytes.extend(sum.to_le_bytes());
    write_bytes(out, &bytes)?;
    done.bytes = bytes.len();
    done.error = if whole > 0.0 { (lost / whole).sqrt() } else { 0.0 };
    Ok(done)
}

/// A matrix as it is written.
struct Matrix {
    /// Number of the layer in its run, if it is written as a difference.
    begins: Option<usize>,
    stages: Vec<Signs>,
    /// As it will be read.
    values: Vec<f32>,
}

impl Matrix {
    fn of(values: &[f32], density: f64, stages: usize) -> Self {
        let mut read = vec![0.0; values.len()];
        let mut written = Vec::with_capacity(stages);
        for _ in 0..stages {
            let left: Vec<f32> = values.iter().zip(&read).map(|(value, read)| value - read).collect();
            let signs = Signs::of(&left, density);
            signs.add_to(&mut read).expect("what was written is read");
            written.push(signs);
        }
        Self { begins: None, stages: written, values: read }
    }

    /// The A of `layer`: as a difference from how it began, if that is nearer to zero than A is.
    fn of_a(layer: &Layer<'_>, number: Option<usize>, seed: u64, density: f64) -> Self {
        let (own, norm) = (&layer.a.data, |values: &[f32]| values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>());
        if let Some(number) = number {
            let first = beginning(number, layer.a.shape[0], layer.a.shape[1], seed);
            let change: Vec<f32> = own.iter().zip(&first).map(|(own, first)| own - first).collect();
            if norm(&change) < norm(own) {
                let mut matrix = Self::of(&change, density, 1);
                matrix.values.iter_mut().zip(&first).for_each(|(change, first)| *change += first);
                return Self { begins: Some(number), ..matrix };
            }
        }
        Self::of(own, density, STAGES)
    }

    fn put(&self, bytes: &mut Vec<u8>) {
        put(bytes, self.stages.len());
        for Signs { size, low_bits, kept, codes } in &self.stages {
            bytes.extend(size.to_le_bytes());
            bytes.push(*low_bits);
            [*kept, codes.len()].into_iter().for_each(|n| put(bytes, n));
            bytes.extend_from_slice(codes);
        }
    }
}

/// A `[rank, inputs]` of the layer `number` of a fresh LoRA.
fn beginning(number: usize, rank: usize, inputs: usize, seed: u64) -> Vec<f32> {
    let spec = TensorSpec { name: Lora::PARTS[0].to_owned(), shape: vec![rank, inputs] };
    Lora::of_modules(&[]).start(&spec, 0, number, seed)
}

/// The squared norms of the term of `layer` and of what is lost of it where `a` and `b` stand in.
fn norms(layer: &Layer<'_>, a: &[f32], b: &[f32]) -> [f64; 2] {
    let (rank, inputs) = (layer.rank, layer.a.shape[1]);
    // <B A, D C> is the sum of the products of BᵀD and A Cᵀ, which are small.
    let dot = |a: &[f32], b: &[f32], c: &[f32], d: &[f32]| -> f64 {
        let mut sum = 0.0;
        for i in 0..rank {
            for j in 0..rank {
                let rows = a[i * inputs..][..inputs].iter().zip(&c[j * inputs..][..inputs]);
                let columns = b.iter().skip(i).step_by(rank).zip(d.iter().skip(j).step_by(rank));
                let product = |(x, y): (&f32, &f32)| f64::from(*x) * f64::from(*y);
                sum += rows.map(product).sum::<f64>() * columns.map(product).sum::<f64>();
            }
        }
        sum * f64::from(layer.factor).powi(2)
    };
    let (own_a, own_b) = (&layer.a.data, &layer.b.data);
    let whole = dot(own_a, own_b, own_a, own_b);
    [whole, (whole - 2.0 * dot(own_a, own_b, a, b) + dot(a, b, a, b)).max(0.0)]
}

/// Whether the file at `path` is a compressed adapter.
pub(in crate::adapter) fn is_compressed(path: &Path) -> bool {
    let mut begin = [0; MAGIC.len()];
    path.is_file() && File::open(path).and_then(|mut file| file.read_exact(&mut begin)).is_ok() && begin == MAGIC
}

/// Reads the compressed adapter at `path`.
///
/// # Errors
/// The file is broken.
pub(in crate::adapter) fn open(path: &Path) -> Result<AdapterFile> {
    let bytes = mmap::map(path)?;
    let broken = || {
        let message = "expected a whole compressed adapter, got a damaged one; fetch the file again, or export it anew";
        Error::new(ErrorCode::Format, format!("`{}`", path.display()), message)
    };
    let (body, sum) = bytes.split_at_checked(bytes.len().saturating_sub(8)).ok_or_else(broken)?;
    if !body.starts_with(&MAGIC) || sum != add(0, body).to_le_bytes() {
        return Err(broken());
    }
    let most = bytes.len() as u64 * MOST_VALUES_OF_A_BYTE;
    let mut read = Reader { bytes: &body[MAGIC.len()..], values_left: most };
    read.adapter(path).ok_or_else(broken)?
}

struct Reader<'a> {
    bytes: &'a [u8],
    /// How many values the matrices to come may have.
    values_left: u64,
}

impl<'a> Reader<'a> {
    /// The adapter of the file at `path`. None where the bytes are no such thing.
    fn adapter(&mut self, path: &Path) -> Option<Result<AdapterFile>> {
        let len = self.number()?;
        let facts: Facts = serde_json::from_slice(self.take(len)?).ok()?;
        let (mut modules, mut tensors, mut name) = (Vec::new(), Tensors::new(), Vec::new());
        for _ in 0..self.number()? {
            let shared = self.number().filter(|shared| *shared <= name.len())?;
            name.truncate(shared);
            let rest = self.number()?;
            name.extend_from_slice(self.take(rest)?);
            let module = std::str::from_utf8(&name).ok()?.to_owned();
            let [rank, inputs, outputs] = [self.number()?, self.number()?, self.number()?];
            let factor = f32::from_le_bytes(self.take(4)?.try_into().ok()?);
            if rank == 0 || !factor.is_finite() {
                return None;
            }
            let begins = if self.number()? > 0 { Some(self.number()?) } else { None };
            self.claim(rank, inputs)?;
            let first = match begins {
                Some(number) => beginning(number, rank, inputs, facts.seed),
                None => vec![0.0; rank * inputs],
            };
            let a = self.matrix([rank, inputs], first)?;
            self.claim(outputs, rank)?;
            let b = self.matrix([outputs, rank], vec![0.0; outputs * rank])?;
            let new = tensors.insert(format!("{module}.{}", Lora::PARTS[0]), a).is_none();
            tensors.insert(format!("{module}.{}", Lora::PARTS[1]), b);
            modules.push((module, rank, f64::from(factor) * rank as f64));
            new.then_some(())?;
        }
        self.bytes.is_empty().then_some(())?;
        let adapter = lora_of(path, &modules, tensors);
        Some(adapter.map(|mut adapter| {
            (adapter.base, adapter.base_mark) = (facts.base, facts.base_mark);
            adapter
        }))
    }

    /// Counts a matrix in before there is room for it.
    fn claim(&mut self, rows: usize, columns: usize) -> Option<()> {
        let values = rows.checked_mul(columns).filter(|values| *values > 0)?;
        self.values_left = self.values_left.checked_sub(values as u64)?;
        Some(())
    }

    fn matrix(&mut self, shape: [usize; 2], mut data: Vec<f32>) -> Option<HostTensor> {
        for _ in 0..self.number().filter(|stages| *stages <= STAGES)? {
            let size = f32::from_le_bytes(self.take(4)?.try_into().ok()?);
            let low_bits = self.take(1)?[0];
            let [kept, len] = [self.number()?, self.number()?];
            Signs { size, low_bits, kept, codes: self.take(len)?.to_vec() }.add_to(&mut data)?;
        }
        data.iter().all(|value| value.is_finite()).then(|| HostTensor { shape: shape.to_vec(), data })
    }

    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(len)?;
        self.bytes = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<usize> {
        let mut number = 0u64;
        for shift in (0..63).step_by(7) {
            let byte = self.take(1)?[0];
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return usize::try_from(number).ok();
            }
        }
        None
    }
}

fn put(bytes: &mut Vec<u8>, mut number: usize) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    put(bytes, text.len());
    bytes.extend_from_slice(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes that anybody could write, with a checksum that fits: an error or an adapter, never a panic.
    #[test]
    fn other_bytes_never_panic() {
        let values = |n: usize| HostTensor { shape: vec![2, n / 2], data: (0..n).map(|i| i as f32 - 3.5).collect() };
        let (a, mut b) = (values(16), values(12));
        b.shape = vec![6, 2];
        let mut bytes = Vec::new();
        put_text(&mut bytes, r#"{"base":null,"base_mark":null,"seed":300}"#);
        put(&mut bytes, 2);
        for (begins, name) in [(None, &b"a.q"[..]), (Some(7), b"k")] {
            [if begins.is_some() { 2 } else { 0 }, name.len()].into_iter().for_each(|n| put(&mut bytes, n));
            bytes.extend_from_slice(name);
            [2, 8, 6].into_iter().for_each(|n| put(&mut bytes, n));
            bytes.extend(2.5f32.to_le_bytes());
            match begins {
                Some(number) => [1, number].into_iter().for_each(|n| put(&mut bytes, n)),
                None => put(&mut bytes, 0),
            }
            [Matrix::of(&a.data, 0.5, 2), Matrix::of(&b.data, 0.7, 1)].iter().for_each(|m| m.put(&mut bytes));
        }
        let path = Path::new("a.signs");
        let read = |bytes: &[u8]| Reader { bytes, values_left: 100 }.adapter(path);
        let whole = read(&bytes).unwrap().unwrap();
        assert_eq!(whole.modules().collect::<Vec<_>>(), ["a.k", "a.q"]);
        assert!(Reader { bytes: &bytes, values_left: 55 }.adapter(path).is_none(), "two layers of 28 values");
        for len in 0..bytes.len() {
            assert!(read(&bytes[..len]).is_none_or(|read| read.is_err()), "{len} bytes");
        }
        for at in 0..bytes.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff, bytes[at] ^ 1] {
                let old = std::mem::replace(&mut bytes[at], value);
                let _ = read(&bytes);
                bytes[at] = old;
            }
        }
    }
}
