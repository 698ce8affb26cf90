//! What becomes of each weight, decided before the first byte is written.

use super::bnb::{QUANT_STATE_MAX, torch_name};
use super::pieces::for_each_piece;
use super::quantize::Ticker;
use super::recipe::{Recipe, Target};
use super::safetensors::Tensor;
use super::writer::Entry;
use super::{Source, TensorMeta};
use crate::error::{Error, ErrorCode, Result};
use pocketlora_kernels::FloatType;
use pocketlora_kernels::quant::{BLOCK, NESTED_BLOCK};
use pocketlora_models::{Layout, Role};
use safetensors::Dtype;
use serde_json::Value;
use std::collections::{HashMap, HashSet};

/// Beyond this a weight does not go to binary16, whose largest value is 65504: double quantization may enlarge a
/// block's scale by half a step of its map, 0.35 %.
const F16_LIMIT: f32 = 65_000.0;

/// How a weight will be stored.
#[derive(Clone, Debug)]
pub(super) enum Store {
    Nf4,
    Float(FloatType),
    /// In NF4 as the source has it: its tensors by the endings of their names.
    Kept(Vec<(&'static str, Tensor)>),
}

/// One weight of the source.
#[derive(Debug)]
pub(super) struct Weight {
    pub name: String,
    /// Its number in the source.
    pub index: usize,
    pub shape: Vec<usize>,
    /// Leading dimension; a vector is one row.
    pub rows: usize,
    pub cols: usize,
    pub store: Store,
    /// The source has columns in place of rows.
    pub transposed: bool,
}

impl Weight {
    fn new(index: usize, meta: &TensorMeta, store: Store) -> Result<Self> {
        let (rows, cols) = match meta.shape[..] {
            [] => (1, Some(1)),
            [n] => (1, Some(n)),
            [rows, ref rest @ ..] => (rows, rest.iter().try_fold(1, |n: usize, &d| n.checked_mul(d))),
        };
        match cols.filter(|&cols| cols.checked_mul(rows).is_some_and(|n| n > 0)) {
            Some(cols) => {
                let (name, shape) = (meta.name.clone(), meta.shape.clone());
                Ok(Self { name, index, shape, rows, cols, store, transposed: false })
            }
            None => Err(bad(&meta.name, format!("expected at least one element, got shape `{:?}`", meta.shape))),
        }
    }

    /// The same matrix with rows and columns exchanged.
    fn transposed(self) -> Self {
        let shape = self.shape.iter().rev().copied().collect();
        Self { shape, rows: self.cols, cols: self.rows, transposed: true, ..self }
    }

    /// Whether it will be in NF4.
    pub fn is_four_bit(&self) -> bool {
        !matches!(self.store, Store::Float(_))
    }

    pub fn elements(&self) -> u64 {
        self.rows as u64 * self.cols as u64
    }

    /// Full name of the companion tensor with `ending`.
    pub fn companion(&self, ending: &str) -> String {
        format!("{}{ending}", self.name)
    }

    /// The error for the value at element `at` of the flattened weight.
    pub fn bad_value(&self, at: u64, value: f32, expected: &str) -> Error {
        let next = match value.is_finite() {
            true => "",
            false => "; the file is broken there: fetch it again, or use another copy of the model",
        };
        bad(&self.name, format!("expected {expected}, got `{value}` at element `{at}`{next}"))
    }
}

fn bad(name: &str, message: String) -> Error {
    Error::new(ErrorCode::Format, format!("tensor `{name}`"), message)
}

/// The fate of all weights, in the source's order.
#[derive(Debug)]
pub(super) struct Plan {
    pub weights: Vec<Weight>,
    /// Paths of the linear layers that stay in 16 bits where others become 4-bit.
    pub skipped: Vec<String>,
    /// Type of dense weights, and the one to which 4-bit weights are dequantized.
    pub float: FloatType,
}

impl Plan {
    /// Decides on every weight. Reads those of a source without 16-bit types, to see whether binary16 holds them.
    ///
    /// # Errors
    /// Weights are empty or named twice, one is not finite, a pattern of the recipe names no layer, or the caller stops.
    pub fn new(source: &dyn Source, recipe: &Recipe, ticker: &mut Ticker<'_>) -> Result<Self> {
        let Recipe { to, .. } = *recipe;
        let (mut weights, mut skipped) = (Vec::new(), Vec::new());
        let linears = Linears::of(source);
        let modules: Vec<&str> = source.tensors().iter().filter(|meta| linears.has(meta)).map(module).collect();
        recipe.check(&modules)?;
        for (index, meta) in source.tensors().iter().enumerate() {
            let linear = to == Target::Nf4 && linears.has(meta);
            let skip = linear && recipe.skips(module(meta));
            if skip {
                skipped.push(module(meta).to_owned());
            }
            let store = match linear && !skip {
                true => match source.nf4(index) {
                    parts if parts.is_empty() => Store::Nf4,
                    parts => Store::Kept(parts),
                },
                // The float type is filled in below, when it is known.
                false => Store::Float(FloatType::F32),
            };
            let weight = Weight::new(index, meta, store)?;
            // In four bits all have rows.
            let turned = linears.is_transposed(&meta.name) && (linear && !skip) != source.by_rows(index);
            weights.push(if turned { weight.transposed() } else { weight });
        }
        skipped.sort();
        ticker.total = weights.iter().map(Weight::elements).sum();
        ticker.advance("", 0)?;
        let float = match to {
            Target::F16 => FloatType::F16,
            Target::BF16 => FloatType::BF16,
            Target::F32 => FloatType::F32,
            Target::Nf4 => sixteen_bit_type(source, &weights, ticker)?,
        };
        for weight in weights.iter_mut().filter(|w| !w.is_four_bit()) {
            weight.store = Store::Float(float);
        }
        let plan = Self { weights, skipped, float };
        let mut names = HashSet::new();
        let appended = plan.quant_states().into_iter().map(|(name, _)| name);
        match plan.entries().into_iter().map(|entry| entry.name).chain(appended).find(|n| !names.insert(n.clone())) {
            Some(name) => Err(bad(&name, "expected one tensor of that name, got two".to_owned())),
            None => Ok(plan),
        }
    }

    /// The tensors of the file, but for those of [`quant_states`](Self::quant_states).
    pub fn entries(&self) -> Vec<Entry> {
        let mut entries = Vec::new();
        for weight in &self.weights {
            let mut add = |ending: &str, dtype, shape| {
                entries.push(Entry { name: weight.companion(ending), dtype, shape });
            };
            match &weight.store {
                &Store::Float(float) => add("", dtype(float), weight.shape.clone()),
                Store::Kept(tensors) => {
                    tensors.iter().for_each(|(ending, tensor)| add(ending, tensor.dtype, tensor.shape.clone()));
                }
                Store::Nf4 => {
                    let elements = weight.rows * weight.cols;
                    let blocks = elements.div_ceil(BLOCK);
                    add("", Dtype::U8, vec![elements.div_ceil(2), 1]);
                    add(".absmax", Dtype::U8, vec![blocks]);
                    add(".nested_absmax", Dtype::F32, vec![blocks.div_ceil(NESTED_BLOCK)]);
                    add(".nested_quant_map", Dtype::F32, vec![256]);
                    add(".quant_map", Dtype::F32, vec![16]);
                }
            }
        }
        entries
    }

    /// Names and greatest lengths of the quant_state tensors.
    pub fn quant_states(&self) -> Vec<(String, usize)> {
        let four_bit = self.weights.iter().filter(|w| matches!(w.store, Store::Nf4));
        four_bit.map(|w| (w.companion(".quant_state.bitsandbytes__nf4"), QUANT_STATE_MAX)).collect()
    }
}

/// Path of the module that holds a weight.
fn module(meta: &TensorMeta) -> &str {
    meta.name.strip_suffix(".weight").unwrap_or(&meta.name)
}

/// Refuses to make 4-bit what is 4-bit already: nothing would be gained, and another rounding lost.
///
/// # Errors
/// A linear layer of `source` is.
pub(super) fn refuse_four_bit(source: &dyn Source, recipe: &Recipe) -> Result<()> {
    let linears = Linears::of(source);
    let mut four_bit = source.tensors().iter().filter(|m| matches!(m.dtype.as_str(), "NF4" | "FP4") && linears.has(m));
    match four_bit.next().filter(|_| recipe.to == Target::Nf4) {
        None => Ok(()),
        Some(meta) => {
            let message = "is 4-bit already; use the model as it is, or quantize its 16-bit checkpoint";
            Err(Error::new(ErrorCode::Unsupported, format!("tensor `{}`", meta.name), message))
        }
    }
}

fn dtype(float: FloatType) -> Dtype {
    match float {
        FloatType::F32 => Dtype::F32,
        FloatType::F16 => Dtype::F16,
        FloatType::BF16 => Dtype::BF16,
    }
}

/// The weights that bitsandbytes quantizes: those of linear layers inside decoder layers.
enum Linears {
    /// Names, of a model that we run, and whether the source has columns in place of rows.
    Named(HashMap<String, bool>),
    /// What their names look like in most others.
    Projections,
}

impl Linears {
    fn of(source: &dyn Source) -> Self {
        let Ok(model) = pocketlora_models::build(source.config()) else { return Self::Projections };
        let linears = model
            .params()
            .iter()
            .filter(|spec| matches!(spec.role, Role::Linear | Role::Fixed))
            .filter(|spec| !matches!(spec.layout, Layout::Stacked(_)));
        Self::Named(linears.map(|spec| (spec.name.clone(), spec.layout == Layout::Transposed)).collect())
    }

    fn is_transposed(&self, name: &str) -> bool {
        matches!(self, Self::Named(names) if names.get(name) == Some(&true))
    }

    fn has(&self, meta: &TensorMeta) -> bool {
        let named = match self {
            Self::Named(names) => names.contains_key(&meta.name),
            Self::Projections => meta.name.contains("model.layers.") && meta.name.ends_with("_proj.weight"),
        };
        named && meta.shape.len() == 2
    }
}

/// About the bytes of an NF4 copy of `source`, without reading a weight.
#[cfg(feature = "hub")]
pub(crate) fn nf4_bytes(source: &dyn Source) -> u64 {
    let linears = Linears::of(source);
    let bits = |meta: &TensorMeta| {
        let elements: f64 = meta.shape.iter().map(|&n| n as f64).product();
        elements * if linears.has(meta) { 4.127 } else { 16.0 }
    };
    (source.tensors().iter().map(bits).sum::<f64>() / 8.0) as u64
}

/// The 16-bit type that loses least: the source's own, be it that of its weights or the one that its config names; else
/// binary16, which has the finer steps, if it holds all weights.
fn sixteen_bit_type(source: &dyn Source, weights: &[Weight], ticker: &mut Ticker<'_>) -> Result<FloatType> {
    let dtype = |weight: &Weight| source.tensors()[weight.index].dtype.as_str();
    let named = |key: &str| source.config().get(key).and_then(Value::as_str) == Some(torch_name(FloatType::BF16));
    if weights.iter().any(|w| dtype(w) == "BF16") || named("dtype") || named("torch_dtype") {
        return Ok(FloatType::BF16);
    }
    let kept = |w: &&Weight| matches!(w.store, Store::Kept(_));
    let unknown: Vec<&Weight> = weights.iter().filter(|w| dtype(w) != "F16" && !kept(w)).collect();
    ticker.total += unknown.iter().map(|w| w.elements()).sum::<u64>();
    let mut largest = 0.0f32;
    for weight in unknown {
        // NaN and infinity are left to the writing pass, which names them.
        let magnitude = |_, values: &[f32]| Ok(values.iter().fold(0.0f32, |max, x| max.max(x.abs())));
        for_each_piece(source, weight, magnitude, ticker, |max| {
            largest = largest.max(max);
            Ok(())
        })?;
    }
    Ok(if largest > F16_LIMIT { FloatType::BF16 } else { FloatType::F16 })
}
