//! An adapter's tensors, as names and shapes and as values on the host.

use crate::error::{Error, ErrorCode, Result};
use half::f16;
use std::collections::BTreeMap;

/// Name and shape of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// As PEFT has it without `base_model.model.`, such as `model.layers.0.self_attn.q_proj.lora_A.weight`.
    pub name: String,
    /// Row-major.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// How many values it has.
    #[must_use]
    pub fn values(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A small tensor on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// Row-major.
    pub shape: Vec<usize>,
    /// The values.
    pub data: Vec<f32>,
}

/// An adapter's tensors by name, see [`TensorSpec::name`].
pub type Tensors = BTreeMap<String, HostTensor>;

/// In what type an adapter's file holds its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// Half the bytes, for matrices whose values are small.
    F16,
    /// For few values, or such as lie near 1, where f16 has but three digits.
    F32,
}

impl Stored {
    /// `values` in this type, little-endian; `name` is for the error.
    ///
    /// # Errors
    /// A value is not finite in it.
    pub(super) fn bytes(self, values: &[f32], name: &str) -> Result<Vec<u8>> {
        let refused = |at: Option<usize>, kind: &str| match at {
            None => Ok(()),
            Some(at) => {
                let message =
                    format!("value {at} is `{}`, which {kind} cannot hold; lower the learning rate", values[at]);
                Err(Error::new(ErrorCode::Diverged, format!("tensor `{name}`"), message))
            }
        };
        match self {
            Self::F16 => {
                let halves: Vec<f16> = values.iter().map(|&v| f16::from_f32(v)).collect();
                refused(halves.iter().position(|v| !v.is_finite()), "f16")?;
                Ok(halves.iter().flat_map(|v| v.to_le_bytes()).collect())
            }
            Self::F32 => {
                refused(values.iter().position(|v| !v.is_finite()), "an adapter")?;
                Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect())
            }
        }
    }
}

impl HostTensor {
    /// The values as an adapter's file holds them in `stored`; `name` is for the error.
    ///
    /// # Errors
    /// A value is not finite there.
    pub fn rounded(mut self, stored: Stored, name: &str) -> Result<Self> {
        stored.bytes(&self.data, name)?;
        if stored == Stored::F16 {
            self.data.iter_mut().for_each(|v| *v = f16::from_f32(*v).to_f32());
        }
        Ok(self)
    }
}

/// `[n, m]` of `[m, n]`, `rows` being `m`.
pub(super) fn transposed(values: &[f32], rows: usize) -> Vec<f32> {
    let cols = values.len() / rows.max(1);
    (0..values.len()).map(|i| values[i % rows * cols + i / rows]).collect()
}
