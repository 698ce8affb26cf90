//! What the optimizer keeps of each tensor in training, and its step.
//!
//! An adapter's tensors in training are its f32 masters; there is no 16-bit working copy. Products in bf16 round them as
//! they would round such a copy. A method that stores f16, as LoRA does, rounds when the adapter is saved. A loaded LoRA is
//! therefore the trained one to within half a unit of f16.

use super::config::{Optimizer, TrainConfig};
use crate::adapter::Group;
use crate::error::Result;
use pocketlora_kernels::quant::{dynamic_map, unsigned_dynamic_map};
use pocketlora_kernels::{AdamW, Backend, Call, Lion, MOMENT_BLOCK, Sgd};
use safetensors::Dtype;

/// Moments of one tensor; zeros before the first step.
pub(super) enum Moments<B: Backend> {
    /// SGD without momentum.
    None,
    /// SGD with momentum, Lion.
    One(B::Buffer),
    /// AdamW: first and second moment.
    Two(B::Buffer, B::Buffer),
    /// The same in 8 bits.
    Coded(B::Codes, B::Codes),
}

/// A part of the moments as a checkpoint holds it: a prefix for the tensor's name, type and length.
pub(super) type Part = (&'static str, Dtype, usize);

impl<B: Backend> Moments<B> {
    /// For a tensor of `len` values.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(backend: &B, config: &TrainConfig, len: usize) -> Result<Self> {
        Ok(match config.optimizer {
            Optimizer::Sgd if config.momentum == 0.0 => Self::None,
            Optimizer::Sgd | Optimizer::Lion => Self::One(backend.buffer(len)?),
            Optimizer::AdamW => Self::Two(backend.buffer(len)?, backend.buffer(len)?),
            Optimizer::AdamW8bit => Self::Coded(backend.codes(len, true)?, backend.codes(len, false)?),
        })
    }

    /// Moves `master`, a tensor of `group`, along `grad` in step `number` (1-based) with learning rate `lr`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn step(
        &mut self,
        backend: &B,
        config: &TrainConfig,
        group: Group,
        lr: f32,
        number: u64,
        grad: &B::Buffer,
        master: &mut B::Buffer,
    ) -> Result<()> {
        let lr = lr * group.rate;
        let weight_decay = if group.decays { config.weight_decay } else { 0.0 };
        let (beta1, beta2) = (config.beta1, config.beta2());
        let adamw = AdamW { lr, beta1, beta2, eps: config.eps, weight_decay, step: number as u32 };
        let sgd = Sgd { lr, momentum: config.momentum, weight_decay };
        match self {
            Self::None => backend.run(Call::Sgd { step: &sgd, grad, param: master, m: None }),
            Self::One(m) if config.optimizer == Optimizer::Lion => {
                backend.run(Call::Lion { step: &Lion { lr, beta1, beta2, weight_decay }, grad, param: master, m })
            }
            Self::One(m) => backend.run(Call::Sgd { step: &sgd, grad, param: master, m: Some(m) }),
            Self::Two(m, v) => backend.run(Call::AdamW { step: &adamw, grad, param: master, m, v }),
            Self::Coded(m, v) => backend.run(Call::AdamW8 { step: &adamw, grad, param: master, m, v }),
        }?;
        Ok(())
    }

    /// Makes the share `share` of the values zero, those of which the first moment is smallest: both moments of a value together,
    /// for the first without the second would make a step of any size.
    ///
    /// # Errors
    /// Device lost.
    pub fn prune(&mut self, backend: &B, share: f32) -> Result<()> {
        match self {
            Self::None => Ok(()),
            Self::One(m) => {
                let small = smallest(&values(backend, m)?, share);
                clear(backend, m, &small)
            }
            Self::Two(m, v) => {
                let small = smallest(&values(backend, m)?, share);
                clear(backend, m, &small)?;
                clear(backend, v, &small)
            }
            Self::Coded(m, v) => {
                let parts = read_codes(backend, m)?;
                let (codes, absmax, map) = (&parts[0], floats(&parts[1]), dynamic_map());
                let value = |(i, code): (usize, &u8)| map[usize::from(*code)] * absmax[i / MOMENT_BLOCK];
                let small = smallest(&codes.iter().enumerate().map(value).collect::<Vec<_>>(), share);
                clear_codes(backend, m, &dynamic_map(), &small)?;
                clear_codes(backend, v, &unsigned_dynamic_map(), &small)
            }
        }
    }

    /// The parts of moments for `len` values.
    pub fn layout(&self, len: usize) -> Vec<Part> {
        let blocks = len.div_ceil(MOMENT_BLOCK);
        match self {
            Self::None => vec![],
            Self::One(_) => vec![("m", Dtype::F32, len)],
            Self::Two(..) => vec![("m", Dtype::F32, len), ("v", Dtype::F32, len)],
            Self::Coded(..) => vec![
                ("m.codes", Dtype::U8, len),
                ("m.absmax", Dtype::F32, blocks),
                ("v.codes", Dtype::U8, len),
                ("v.absmax", Dtype::F32, blocks),
            ],
        }
    }

    /// Tells `each` the bytes of the parts, in the order of [`Moments::layout`], one after the other: a part may be large.
    ///
    /// # Errors
    /// Device lost; what `each` returns.
    pub fn read(&self, backend: &B, each: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        match self {
            Self::None => Ok(()),
            Self::One(m) => each(&read_buffer(backend, m)?),
            Self::Two(m, v) => [m, v].into_iter().try_for_each(|part| each(&read_buffer(backend, part)?)),
            Self::Coded(m, v) => {
                let codes = |part| read_codes(backend, part)?.iter().try_for_each(|bytes| each(bytes));
                [m, v].into_iter().try_for_each(codes)
            }
        }
    }

    /// Takes the bytes of the parts back.
    pub fn write(&mut self, backend: &B, parts: &[&[u8]]) {
        match (self, parts) {
            (Self::None, []) => {}
            (Self::One(m), [bytes]) => backend.write(m, &floats(bytes)),
            (Self::Two(m, v), [first, second]) => {
                backend.write(m, &floats(first));
                backend.write(v, &floats(second));
            }
            (Self::Coded(m, v), [first, first_absmax, second, second_absmax]) => {
                backend.write_codes(m, first, &floats(first_absmax));
                backend.write_codes(v, second, &floats(second_absmax));
            }
            _ => unreachable!("the parts are those of `layout`"),
        }
    }
}

/// Which of `values` are among the share `share` of the smallest, ties included.
fn smallest(values: &[f32], share: f32) -> Vec<bool> {
    let count = (f64::from(share) * values.len() as f64).round() as usize;
    let mut sizes: Vec<f32> = values.iter().map(|v| v.abs()).collect();
    sizes.sort_unstable_by(f32::total_cmp);
    let bound = count.checked_sub(1).and_then(|last| sizes.get(last).copied());
    values.iter().map(|value| bound.is_some_and(|bound| value.abs() <= bound)).collect()
}

fn values<B: Backend>(backend: &B, buffer: &B::Buffer) -> Result<Vec<f32>> {
    let mut values = vec![0.0; backend.len(buffer)];
    backend.read(buffer, &mut values)?;
    Ok(values)
}

/// Makes the values zero for which `small` holds.
fn clear<B: Backend>(backend: &B, buffer: &mut B::Buffer, small: &[bool]) -> Result<()> {
    let mut values = values(backend, buffer)?;
    values.iter_mut().zip(small).filter(|(_, small)| **small).for_each(|(v, _)| *v = 0.0);
    backend.write(buffer, &values);
    Ok(())
}

/// The same of codes that stand for the values of `map`.
fn clear_codes<B: Backend>(backend: &B, codes: &mut B::Codes, map: &[f32; 256], small: &[bool]) -> Result<()> {
    let mut parts = read_codes(backend, codes)?;
    let absmax = floats(&parts[1]);
    let bytes = &mut parts[0];
    let zero = map.iter().position(|v| *v == 0.0).expect("the map has zero") as u8;
    bytes.iter_mut().zip(small).filter(|(_, small)| **small).for_each(|(code, _)| *code = zero);
    backend.write_codes(codes, bytes, &absmax);
    Ok(())
}

/// Little-endian f32 of a buffer.
fn read_buffer<B: Backend>(backend: &B, buffer: &B::Buffer) -> Result<Vec<u8>> {
    Ok(bytes_of(&values(backend, buffer)?))
}

/// Little-endian f32.
pub(super) fn bytes_of(values: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(size_of_val(values));
    values.iter().for_each(|v| bytes.extend(v.to_le_bytes()));
    bytes
}

fn read_codes<B: Backend>(backend: &B, codes: &B::Codes) -> Result<Vec<Vec<u8>>> {
    let len = backend.codes_len(codes);
    let (mut bytes, mut absmax) = (vec![0; len], vec![0.0; len.div_ceil(MOMENT_BLOCK)]);
    backend.read_codes(codes, &mut bytes, &mut absmax)?;
    Ok(vec![bytes, bytes_of(&absmax)])
}

/// Values of little-endian f32.
pub(super) fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[cfg(test)]
mod tests {
    use super::smallest;

    #[test]
    fn the_smallest_moments_are_the_ones_to_go() {
        let sizes = [-3.0, 0.0, -1.0, 2.0];
        assert_eq!(smallest(&sizes, 0.5), [false, true, true, false]);
        assert_eq!(smallest(&sizes, 0.0), [false; 4]);
        assert_eq!(smallest(&sizes, 1.0), [true; 4]);
    }
}
