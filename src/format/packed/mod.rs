//! Weights in the few bits of other programs, as sources of `quantize`: dequantized by their definitions.
//!
//! | form | tensors of a module | a weight |
//! |---|---|---|
//! | MXFP4 | `mxfp4_blocks` `[out, in / 32, 16]`, `mxfp4_scales` `[out, in / 32]`, as [`Checkpoint`] names those of an expert | `w 2^(s - 127)` |
//! | NVFP4 (ModelOpt) | `weight` `[out, in / 2]`, `weight_scale` `[out, in / 16]` in E4M3, `weight_scale_2` for all | `w s s2` |
//! | FP8 (E4M3) | `weight` `[out, in]`, `weight_scale_inv` by blocks or for all, or `weight_scale` by rows or for all | `w s` |
//! | LLM.int8() | `weight` `[out, in]`, `SCB` `[out]` | `w SCB / 127` |
//! | mlx | `weight` `[out, in bits / 32]`, `scales`, `biases` `[out, in / group]` | `q s + b` |
//! | GPTQ | `qweight` `[in bits / 32, out]`, `qzeros`, `scales` `[in / group, out]`, `g_idx` `[in]` | `(q - z - 1) s` |
//! | AWQ | `qweight` `[in, out / 8]`, `qzeros`, `scales` `[in / group, out]` | `(q - z) s` |

mod decode;

use super::safetensors::{Dtype, Tensor};
use super::{Checkpoint, widen};
use crate::error::{Error, Result};
use bytes::Bytes;
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// A module's weight in few bits.
#[derive(Debug)]
pub(super) struct Packed {
    pub rows: usize,
    pub cols: usize,
    /// For people.
    pub name: String,
    form: Form,
    codes: Bytes,
    scales: Vec<f32>,
}

impl Packed {
    /// Where its codes lie in memory: what is read in that order is read fastest.
    pub fn address(&self) -> usize {
        self.codes.as_ptr().addr()
    }
}

/// How codes become numbers.
#[derive(Debug)]
enum Form {
    /// E2M1, an exponent for each 32 inputs (OCP 2023).
    Mxfp4 { exponents: Bytes },
    /// E2M1, a scale for each 16 inputs (ModelOpt).
    Nvfp4,
    /// E4M3, a scale for each block of so many rows and columns.
    Fp8 { block: [usize; 2] },
    /// Whole numbers, a scale for each row.
    Int8,
    /// Rows of codes, and what is added to each group.
    Affine { bits: usize, group: usize, biases: Vec<f32> },
    /// Columns of codes: the group of each input, and what is taken away.
    Gptq { bits: usize, groups: Vec<u32>, zeros: Bytes, add: u32 },
    /// Inputs by rows, outputs in eights.
    Awq { group: usize, zeros: Bytes },
}

/// The packed weights of a checkpoint.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// With the names that they have in other checkpoints.
    pub weights: Vec<(String, Packed)>,
    /// All tensors that belong to them.
    pub used: BTreeSet<String>,
}

/// Finds the packed weights of `checkpoint`, whose `config.json` was `config`.
///
/// # Errors
/// A module's tensors contradict each other, or are packed in another way.
pub(super) fn find(checkpoint: &Checkpoint, config: &Map<String, Value>) -> Result<Found> {
    let mut found = Found::default();
    let module = |name: &str| -> Option<String> {
        let ending = [".mxfp4_blocks", ".qweight", ".SCB", ".weight_scale_inv", ".weight_scale", ".scales"];
        ending.iter().find_map(|ending| name.strip_suffix(ending)).map(str::to_owned)
    };
    let modules: BTreeSet<String> = checkpoint.names().filter_map(module).collect();
    for module in modules {
        let parts = Parts { checkpoint, config, module: &module };
        let packed = match () {
            () if parts.has("mxfp4_blocks") => parts.mxfp4()?,
            () if parts.has("qweight") => parts.by_columns()?,
            () if parts.has("SCB") => parts.int8()?,
            () if parts.has("weight_scale_2") => parts.nvfp4()?,
            () if parts.has("weight_scale_inv") || parts.has("weight_scale") => parts.fp8()?,
            () => parts.affine()?,
        };
        const PARTS: [&str; 17] = [
            "mxfp4_blocks",
            "mxfp4_scales",
            "weight",
            "qweight",
            "SCB",
            "weight_format",
            "weight_scale_inv",
            "weight_scale",
            "weight_scale_2",
            // Of the keys and values that a server keeps in 8 bits.
            "k_scale",
            "v_scale",
            "activation_scale",
            "input_scale",
            "scales",
            "biases",
            "qzeros",
            "g_idx",
        ];
        found.used.extend(PARTS.iter().map(|part| format!("{module}.{part}")));
        found.weights.push((format!("{module}.weight"), packed));
    }
    Ok(found)
}

/// The tensors of one module.
struct Parts<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a Map<String, Value>,
    module: &'a str,
}

impl<'a> Parts<'a> {
    fn has(&self, part: &str) -> bool {
        self.checkpoint.contains(&format!("{}.{part}", self.module))
    }

    fn bad(&self, part: &str, expected: impl std::fmt::Display) -> Error {
        let name = format!("{}.{part}", self.module);
        let got = self.checkpoint.tensor(&name).map_or_else(|_| "none".to_owned(), Tensor::describe);
        self.checkpoint.bad(&name, &expected.to_string(), got)
    }

    /// The tensor `part` of type `dtype`, with its shape in two dimensions: a vector is one row, a number one of one.
    fn part(&self, part: &str, dtype: Dtype) -> Result<(&'a Tensor, [usize; 2])> {
        let tensor = self.checkpoint.tensor(&format!("{}.{part}", self.module));
        let tensor = tensor.ok().filter(|tensor| tensor.dtype == dtype);
        let tensor = tensor.ok_or_else(|| self.bad(part, format!("a tensor of `{dtype:?}`")))?;
        Ok((tensor, self.plane(part, tensor)?))
    }

    fn plane(&self, part: &str, tensor: &Tensor) -> Result<[usize; 2]> {
        match tensor.shape[..] {
            [] => Ok([1, 1]),
            [n] if n > 0 => Ok([1, n]),
            [rows, cols] if rows > 0 && cols > 0 => Ok([rows, cols]),
            _ => Err(self.bad(part, "a matrix with values")),
        }
    }

    /// The floats of `part` with their shape.
    fn floats(&self, part: &str) -> Result<(Vec<f32>, [usize; 2])> {
        let tensor = self.checkpoint.tensor(&format!("{}.{part}", self.module));
        let found = tensor.ok().and_then(|tensor| Some((tensor, tensor.float_type()?)));
        let (tensor, float) = found.ok_or_else(|| self.bad(part, "a tensor of F32, F16 or BF16"))?;
        let mut values = vec![0.0; tensor.shape.iter().product()];
        widen(float, &tensor.bytes, &mut values);
        if values.iter().any(|v| !v.is_finite()) {
            return Err(self.bad(part, "finite numbers"));
        }
        Ok((values, self.plane(part, tensor)?))
    }

    /// A number that the config says of this module's packing, or of all.
    fn said(&self, key: &str) -> Option<usize> {
        let object = |key: &str| self.config.get(key).and_then(Value::as_object);
        let all = object("quantization").or(object("quantization_config"))?;
        let own = all.get(self.module).and_then(Value::as_object);
        own.and_then(|own| own.get(key)).or(all.get(key))?.as_u64().map(|n| n as usize)
    }

    fn packed(&self, name: &str, [rows, cols]: [usize; 2], form: Form, codes: &Tensor, scales: Vec<f32>) -> Packed {
        Packed { rows, cols, name: name.to_owned(), form, codes: codes.bytes.clone(), scales }
    }

    fn mxfp4(&self) -> Result<Packed> {
        let bytes = |part: &str| {
            let tensor = self.checkpoint.tensor(&format!("{}.{part}", self.module)).ok();
            tensor.filter(|tensor| tensor.dtype == Dtype::U8)
        };
        let codes = bytes("mxfp4_blocks").filter(|t| matches!(t.shape[..], [rows, blocks, 16] if rows * blocks > 0));
        let codes = codes.ok_or_else(|| self.bad("mxfp4_blocks", "`U8` of shape `[out, in / 32, 16]`"))?;
        let exponents = bytes("mxfp4_scales").filter(|t| t.shape == codes.shape[..2]);
        let exponents = exponents.ok_or_else(|| {
            self.bad("mxfp4_scales", format!("`U8` of shape `{:?}`, one for each block", &codes.shape[..2]))
        })?;
        let form = Form::Mxfp4 { exponents: exponents.bytes.clone() };
        Ok(self.packed("MXFP4", [codes.shape[0], 32 * codes.shape[1]], form, codes, Vec::new()))
    }

    fn nvfp4(&self) -> Result<Packed> {
        let (codes, [rows, half]) = self.part("weight", Dtype::U8)?;
        let (scales, of_scales) = self.part("weight_scale", Dtype::F8_E4M3)?;
        let ([whole], [1, 1]) = (&self.floats("weight_scale_2")?.0[..], self.floats("weight_scale_2")?.1) else {
            return Err(self.bad("weight_scale_2", "one number"));
        };
        if half % 8 != 0 || of_scales != [rows, half / 8] {
            return Err(self.bad("weight_scale", format!("one for each 16 of `[{rows}, {}]` weights", 2 * half)));
        }
        let scales: Vec<f32> = scales.bytes.iter().map(|scale| decode::e4m3(*scale) * whole).collect();
        if scales.iter().any(|scale| !scale.is_finite()) {
            return Err(self.bad("weight_scale", "finite numbers"));
        }
        Ok(self.packed("NVFP4", [rows, 2 * half], Form::Nvfp4, codes, scales))
    }

    fn fp8(&self) -> Result<Packed> {
        let (codes, shape) = self.part("weight", Dtype::F8_E4M3)?;
        let part = if self.has("weight_scale_inv") { "weight_scale_inv" } else { "weight_scale" };
        let (scales, of_scales) = self.floats(part)?;
        let object = |key: &str| self.config.get(key).and_then(Value::as_object);
        let said = object("quantization_config").and_then(|q| q.get("weight_block_size")).and_then(Value::as_array);
        let said = said.and_then(|list| match &list[..] {
            [rows, cols] => Some([rows.as_u64()? as usize, cols.as_u64()? as usize]),
            _ => None,
        });
        // One for all, one for each row, or one for each block.
        let block = match of_scales {
            [1, 1] => shape,
            [rows, 1] | [1, rows] if rows == shape[0] => [1, shape[1]],
            _ => said.unwrap_or([128, 128]),
        };
        let blocks = |i: usize| shape[i].div_ceil(block[i].max(1));
        if scales.len() != blocks(0) * blocks(1) {
            let expected = format!("{} by {} scales for `{shape:?}` in blocks of `{block:?}`", blocks(0), blocks(1));
            return Err(self.bad(part, expected));
        }
        Ok(self.packed("FP8", shape, Form::Fp8 { block }, codes, scales))
    }

    fn int8(&self) -> Result<Packed> {
        let (codes, shape) = self.part("weight", Dtype::I8)?;
        let (scales, _) = self.floats("SCB")?;
        if scales.len() != shape[0] {
            return Err(self.bad("SCB", format!("{} scales, one for each row", shape[0])));
        }
        let format = self.checkpoint.tensor(&format!("{}.weight_format", self.module));
        if format.is_ok_and(|format| format.bytes.iter().any(|b| *b != 0)) {
            return Err(
                self.bad("weight_format", "0, rows as they are; save the model again with a newer bitsandbytes")
            );
        }
        Ok(self.packed("INT8", shape, Form::Int8, codes, scales))
    }

    fn affine(&self) -> Result<Packed> {
        let (codes, [rows, words]) = self.part("weight", Dtype::U32)?;
        let ((scales, of_scales), (biases, of_biases)) = (self.floats("scales")?, self.floats("biases")?);
        let group = self.said("group_size").unwrap_or(64);
        let cols = of_scales[1] * group;
        let bits = words * 32 / cols.max(1);
        if of_scales[0] != rows || of_biases != of_scales || bits * cols != words * 32 || !matches!(bits, 2 | 4 | 8) {
            let expected = format!("codes of 2, 4 or 8 bits in groups of {group} for scales `{of_scales:?}`");
            return Err(self.bad("weight", expected));
        }
        let form = Form::Affine { bits, group, biases };
        Ok(self.packed(&format!("MLX{bits}"), [rows, cols], form, codes, scales))
    }

    /// GPTQ and AWQ keep inputs by rows; what is packed tells them apart.
    fn by_columns(&self) -> Result<Packed> {
        let (codes, of_codes) = self.part("qweight", Dtype::I32)?;
        let (zeros, of_zeros) = self.part("qzeros", Dtype::I32)?;
        let (scales, [groups, out]) = self.floats("scales")?;
        let bits = of_zeros[1] * 32 / out;
        let zeros_fit = of_zeros == [groups, out * bits / 32] && bits * out == of_zeros[1] * 32;
        if of_codes[1] == out && zeros_fit && matches!(bits, 2 | 4 | 8) {
            let input = of_codes[0] * 32 / bits;
            let group = input / groups;
            let of_input = if self.has("g_idx") {
                let (tensor, _) = self.part("g_idx", Dtype::I32)?;
                let (words, _) = tensor.bytes.as_chunks::<4>();
                words.iter().map(|word| u32::from_le_bytes(*word)).collect()
            } else {
                (0..input).map(|i| (i / group.max(1)) as u32).collect::<Vec<u32>>()
            };
            if of_input.len() != input || of_input.iter().any(|g| *g as usize >= groups) {
                return Err(self.bad("g_idx", format!("a group below {groups} for each of {input} inputs")));
            }
            let object = self.config.get("quantization_config").and_then(Value::as_object);
            let second = object.and_then(|q| q.get("checkpoint_format")).is_some_and(|format| format == "gptq_v2");
            let form = Form::Gptq { bits, groups: of_input, zeros: zeros.bytes.clone(), add: u32::from(!second) };
            return Ok(self.packed("GPTQ", [out, input], form, codes, scales));
        }
        if of_codes[1] * 8 == out && bits == 4 && zeros_fit && of_codes[0] % groups == 0 {
            let form = Form::Awq { group: of_codes[0] / groups, zeros: zeros.bytes.clone() };
            return Ok(self.packed("AWQ", [out, of_codes[0]], form, codes, scales));
        }
        let expected =
            format!("codes of 2, 4 or 8 bits of GPTQ, or of 4 bits of AWQ, for scales `{:?}`", [groups, out]);
        Err(self.bad("qweight", expected))
    }
}
