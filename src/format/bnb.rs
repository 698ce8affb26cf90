//! bitsandbytes' 4-bit weights in safetensors: the companion tensors of one weight, checked against each other.
//!
//! A weight `P.weight` is packed nibbles plus `P.weight.absmax`, `.quant_map`, `.quant_state.bitsandbytes__nf4` (or
//! `__fp4`) and, with double quantization, `.nested_absmax` and `.nested_quant_map`. Read from bitsandbytes 0.50,
//! `functional.QuantState.{as_dict, from_dict}`.

use super::safetensors::{Dtype, Tensor};
use crate::error::{Error, Result};
use pocketlora_kernels::quant::{BLOCK, NESTED_BLOCK};
use pocketlora_kernels::{Absmax, FloatType, MatrixData, MatrixSource, Nf4Source};
use serde::Deserialize;
use std::path::Path;
use std::sync::Arc;

/// Endings of the companion tensors; whatever carries one is not a weight of its own.
pub(super) const COMPANIONS: [&str; 6] = [
    ".absmax",
    ".quant_map",
    ".nested_absmax",
    ".nested_quant_map",
    ".quant_state.bitsandbytes__nf4",
    ".quant_state.bitsandbytes__fp4",
];

/// Whether `name` is a companion of a 4-bit weight.
pub(super) fn is_companion(name: &str) -> bool {
    COMPANIONS.iter().any(|ending| name.ends_with(ending))
}

/// The weight that the tensor `name` belongs to: itself, or the one whose companion it is.
pub(crate) fn weight_of(name: &str) -> &str {
    COMPANIONS.iter().find_map(|ending| name.strip_suffix(ending)).unwrap_or(name)
}

/// The JSON in `.quant_state.bitsandbytes__*`.
#[derive(Debug, Deserialize)]
struct QuantState {
    quant_type: String,
    blocksize: usize,
    dtype: String,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

/// The most bytes that [`quant_state`] makes.
pub(super) const QUANT_STATE_MAX: usize = 256;

/// The quant_state of a double-quantized NF4 weight `[rows, cols]`, as Python's `json.dumps` spells it.
pub(super) fn quant_state(rows: usize, cols: usize, dtype: FloatType, offset: f32) -> String {
    let (dtype, offset) = (torch_name(dtype), python_repr(f64::from(offset)));
    format!(
        "{{\"quant_type\": \"nf4\", \"blocksize\": {BLOCK}, \"dtype\": \"{dtype}\", \"shape\": [{rows}, {cols}], \
         \"nested_blocksize\": {NESTED_BLOCK}, \"nested_dtype\": \"float32\", \"nested_offset\": {offset}}}"
    )
}

/// Python's `repr` of a float: decimal from 1e-4 to 1e16, else an exponent of at least two digits.
fn python_repr(x: f64) -> String {
    // Rust and Python both find the fewest digits that read back as `x`, but differ when two such numbers are equally
    // near: Python takes the even one, as Rust does only when told how many digits to write.
    let shortest = format!("{x:e}");
    let (mantissa, exponent) = shortest.split_once('e').unwrap_or((&shortest, "0"));
    let decimals = mantissa.bytes().filter(u8::is_ascii_digit).count() - 1;
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let decimals = (decimals as i32 - exponent).max(1) as usize;
        return format!("{x:.decimals$}");
    }
    let even = format!("{x:.decimals$e}");
    let mantissa = even.split_once('e').map_or(even.as_str(), |(mantissa, _)| mantissa);
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

/// torch's name of a float type, as `quant_state` and `config.json` spell it.
pub(super) fn torch_name(dtype: FloatType) -> &'static str {
    match dtype {
        FloatType::F32 => "float32",
        FloatType::F16 => "float16",
        FloatType::BF16 => "bfloat16",
    }
}

/// The float type that torch calls `name`.
pub(super) fn from_torch_name(name: &str) -> Option<FloatType> {
    [FloatType::F32, FloatType::F16, FloatType::BF16].into_iter().find(|&t| torch_name(t) == name)
}

/// What reads the tensors of one weight: where it lies, for messages, and a lookup of whole names.
pub(super) struct FourBit<'a> {
    pub path: &'a Path,
    pub name: &'a str,
    pub find: &'a dyn Fn(&str) -> Option<&'a Tensor>,
}

impl<'a> FourBit<'a> {
    fn companion(&self, ending: &str) -> Option<&'a Tensor> {
        (self.find)(&format!("{}{ending}", self.name))
    }

    fn required(&self, ending: &str) -> Result<&'a Tensor> {
        self.companion(ending).ok_or_else(|| self.bad(ending, "a tensor", "none"))
    }

    fn bad(&self, ending: &str, expected: impl std::fmt::Display, got: impl std::fmt::Display) -> Error {
        Error::format(self.path, format_args!("tensor `{}{ending}`", self.name), expected, got)
    }

    /// Whether any bitsandbytes companion lies beside the weight.
    pub fn is_quantized(&self) -> bool {
        COMPANIONS.iter().any(|ending| self.companion(ending).is_some())
    }

    /// The weight `packed` with its companions, all checked against each other.
    ///
    /// # Errors
    /// A companion is missing, malformed or contradicts another.
    pub fn read(&self, packed: &Tensor) -> Result<MatrixSource> {
        let (state_key, state) = self.state()?;
        let [rows, cols] = state.shape[..] else {
            return Err(self.bad(state_key, "a `shape` of 2 numbers", format!("`{:?}`", state.shape)));
        };
        let elements = rows.checked_mul(cols).filter(|&n| n > 0);
        let Some(elements) = elements else {
            return Err(self.bad(state_key, "a `shape` of positive numbers", format!("`{:?}`", state.shape)));
        };
        let Some(dtype) = from_torch_name(&state.dtype) else {
            let expected = "`dtype` to be `float32`, `float16` or `bfloat16`";
            return Err(self.bad(state_key, expected, format!("`{}`", state.dtype)));
        };
        self.check_block(state_key, "blocksize", state.blocksize)?;

        // The bytes may be labelled with another storage type (`bnb_4bit_quant_storage`): same bytes, fewer rows.
        let storage = matches!(packed.dtype, Dtype::U8 | Dtype::I8 | Dtype::BF16 | Dtype::F16 | Dtype::F32);
        if !storage || packed.bytes.len() != elements.div_ceil(2) {
            let expected = format!("`{}` bytes of packed nibbles for shape `[{rows}, {cols}]`", elements.div_ceil(2));
            return Err(self.bad("", expected, format!("{} of `{}` bytes", packed.describe(), packed.bytes.len())));
        }
        let code = self.floats::<16>(".quant_map")?;
        let blocks = elements.div_ceil(state.blocksize);
        let absmax = self.absmax(state_key, &state, blocks)?;
        let data = Nf4Source { packed: packed.bytes.clone(), block: state.blocksize, code, absmax, dtype };
        Ok(MatrixSource { rows, cols, data: MatrixData::Nf4(data) })
    }

    fn state(&self) -> Result<(&'static str, QuantState)> {
        let (nf4, fp4) = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4");
        let (key, kind, tensor) = match (self.companion(nf4), self.companion(fp4)) {
            (Some(tensor), None) => (nf4, "nf4", tensor),
            (None, Some(tensor)) => (fp4, "fp4", tensor),
            (Some(_), Some(_)) => return Err(self.bad(fp4, "one quant_state", "one for nf4 and one for fp4")),
            (None, None) => return Err(self.bad(nf4, "a tensor", "none")),
        };
        if tensor.dtype != Dtype::U8 {
            return Err(self.bad(key, "UTF-8 JSON as `U8`", tensor.describe()));
        }
        let state: QuantState = serde_json::from_slice(&tensor.bytes)
            .map_err(|e| self.bad(key, "bitsandbytes' JSON", e.to_string()).caused_by(e))?;
        if state.quant_type != kind {
            return Err(self.bad(key, format!("`quant_type` to be `{kind}`"), format!("`{}`", state.quant_type)));
        }
        Ok((key, state))
    }

    fn absmax(&self, state_key: &str, state: &QuantState, blocks: usize) -> Result<Absmax> {
        let absmax = self.required(".absmax")?;
        let (nested_block, offset) = match (state.nested_blocksize, state.nested_offset) {
            (Some(block), Some(offset)) => (block, offset),
            (None, None) => {
                for ending in [".nested_absmax", ".nested_quant_map"] {
                    if self.companion(ending).is_some() {
                        return Err(self.bad(ending, "none, as quant_state has no nested keys", "a tensor"));
                    }
                }
                if absmax.dtype != Dtype::F32 || absmax.shape != [blocks] {
                    return Err(self.bad(".absmax", format!("`F32[{blocks}]`"), absmax.describe()));
                }
                return Ok(Absmax::Plain(absmax.bytes.clone()));
            }
            _ => return Err(self.bad(state_key, "both `nested_blocksize` and `nested_offset`, or neither", "one")),
        };
        self.check_block(state_key, "nested_blocksize", nested_block)?;
        if let Some(dtype) = state.nested_dtype.as_deref().filter(|&dtype| dtype != "float32") {
            return Err(self.bad(state_key, "`nested_dtype` to be `float32`", format!("`{dtype}`")));
        }
        let offset = offset as f32; // torch keeps it in f32; JSON holds the same number as f64
        if !offset.is_finite() {
            return Err(self.bad(state_key, "a finite `nested_offset`", format!("`{offset}`")));
        }
        if absmax.dtype != Dtype::U8 || absmax.shape != [blocks] {
            return Err(self.bad(".absmax", format!("`U8[{blocks}]`"), absmax.describe()));
        }
        let map = Arc::new(self.floats::<256>(".nested_quant_map")?);
        let nested = self.float_vec(".nested_absmax", blocks.div_ceil(nested_block))?;
        Ok(Absmax::Double { codes: absmax.bytes.clone(), map, nested: nested.into(), nested_block, offset })
    }

    /// Block sizes for which bitsandbytes has kernels.
    fn check_block(&self, state_key: &str, what: &str, block: usize) -> Result<()> {
        if block.is_power_of_two() && (32..=4096).contains(&block) {
            return Ok(());
        }
        let expected = format!("`{what}` to be a power of two from 32 to 4096");
        Err(self.bad(state_key, expected, format!("`{block}`")))
    }

    fn floats<const N: usize>(&self, ending: &str) -> Result<[f32; N]> {
        let values = self.float_vec(ending, N)?;
        Ok(std::array::from_fn(|i| values[i]))
    }

    /// A companion of `len` finite f32 values.
    fn float_vec(&self, ending: &str, len: usize) -> Result<Vec<f32>> {
        let tensor = self.required(ending)?;
        if tensor.dtype != Dtype::F32 || tensor.shape != [len] {
            return Err(self.bad(ending, format!("`F32[{len}]`"), tensor.describe()));
        }
        let values: Vec<f32> = tensor.bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
        match values.iter().position(|v| !v.is_finite()) {
            Some(i) => Err(self.bad(ending, "finite values", format!("`{}` at index `{i}`", values[i]))),
            None => Ok(values),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quant_state_is_spelled_as_python_does() {
        let offsets = [
            (0.0, "0.0"),
            (1.0, "1.0"),
            (0.308_120_73, "0.3081207275390625"),
            (0.209_857_94, "0.20985794067382812"), // 0.20985794067382813 is as near
            (40_000.0, "40000.0"),
            (1e-4, "9.999999747378752e-05"),
            (2.166_001_2e-30, "2.1660012496952197e-30"),
            (1e16, "1.0000000272564224e+16"),
        ];
        for (offset, repr) in offsets {
            assert_eq!(python_repr(f64::from(offset as f32)), repr);
        }
        let longest = quant_state(usize::MAX, usize::MAX, FloatType::BF16, -f32::MIN_POSITIVE * 1.234_567_9);
        assert!(longest.len() <= QUANT_STATE_MAX, "{longest}");
    }
}
